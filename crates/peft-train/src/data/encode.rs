//! From rows to token ids and labels.
//!
//! - Plain text: what the tokenizer puts in front, the text, and (`add_eos`) the end-of-text token; too long a text is
//!   cut at its end and then has no end-of-text token.
//! - Prompt and completion are tokenised apart and joined, so that the border between them is a border of tokens; the
//!   end-of-text token follows the completion. Too long a row loses the beginning of its *prompt* (what the tokenizer
//!   puts in front stays); only a completion that is too long by itself is cut too, at its end.
//! - A conversation goes through the model's chat template; a long one is cut at its end.
//! - Text with a class: the tokenizer's own frame (`[CLS] .. [SEP]`) stays whole, the text is cut at its end.
//! - `input_ids` are taken as they are and cut at their end.

use peft_core::Result;
use serde_json::Value;

use super::dataset::{Example, Goal};
use super::{LabelNames, RawRow, RowKind};
use crate::config::TaskKind;

/// The tokenizer as the data needs it.
pub trait Encoder: Sync {
    /// Token ids of a text; with `special`, also those the tokenizer puts around it.
    ///
    /// # Errors
    /// When the tokenizer fails.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>>;

    /// The end-of-text token.
    fn eos(&self) -> Option<u32>;

    /// The token that fills rows up.
    fn pad(&self) -> Option<u32>;

    /// A conversation through the chat template, and which tokens the assistant said.
    ///
    /// # Errors
    /// When there is no template or it refuses the conversation.
    fn chat(&self, messages: &[Value]) -> Result<Vec<(u32, bool)>>;
}

/// How rows become tokens.
#[derive(Clone, Copy, Debug)]
pub struct EncodeOptions {
    /// Longest row in tokens.
    pub max_length: usize,
    /// Whether the end-of-text token follows texts and completions.
    pub add_eos: bool,
    /// What the model is for.
    pub task: TaskKind,
    /// Token ids are below this.
    pub vocab_size: usize,
}

/// What happened to a row on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Cut {
    #[default]
    None,
    End,
    Prompt,
    Completion,
}

/// What does not change from row to row.
pub(super) struct RowEncoder<'a> {
    tokenizer: Option<&'a dyn Encoder>,
    options: &'a EncodeOptions,
    labels: Option<&'a LabelNames>,
    /// What the tokenizer puts around a text.
    front: Vec<u32>,
    back: Vec<u32>,
    /// What follows a text that is learned.
    end: Vec<u32>,
}

type Encoded = std::result::Result<(Example, Cut), String>;

impl<'a> RowEncoder<'a> {
    pub(super) fn new(
        tokenizer: Option<&'a dyn Encoder>,
        options: &'a EncodeOptions,
        labels: Option<&'a LabelNames>,
    ) -> Result<Self> {
        let (front, back) = match tokenizer {
            Some(tokenizer) => frame(
                &tokenizer.encode("a", true)?,
                &tokenizer.encode("a", false)?,
            ),
            None => (Vec::new(), Vec::new()),
        };
        let eos = tokenizer.and_then(Encoder::eos);
        let end = match (options.add_eos, back.is_empty()) {
            (false, _) => Vec::new(),
            (true, true) => eos.into_iter().collect(),
            (true, false) => back.clone(),
        };
        Ok(Self {
            tokenizer,
            options,
            labels,
            front,
            back,
            end,
        })
    }

    /// One row; the error is what is wrong with it.
    pub(super) fn row(&self, row: &RawRow) -> Encoded {
        let classify = self.options.task == TaskKind::SequenceClassification;
        let (example, cut) = match &row.kind {
            RowKind::Labelled { text, label } if classify => {
                self.classified(text, self.class(label)?)?
            }
            RowKind::Tokens {
                ids,
                labels: None,
                mask,
                class: Some(label),
            } if classify => {
                let goal = Goal::Class(self.class(label)?);
                self.given(ids, mask.as_deref(), goal)
            }
            RowKind::Labelled { .. } | RowKind::Tokens { class: Some(_), .. } => {
                return Err("has a class, but the model predicts tokens; set model.task = \"sequence_classification\"".to_owned());
            }
            _ if classify => {
                return Err("has no `label`, which a model for classification needs".to_owned());
            }
            RowKind::Text(text) => self.text(text)?,
            RowKind::Completion { prompt, completion } => self.completion(prompt, completion)?,
            RowKind::Messages(messages) => self.conversation(messages)?,
            RowKind::Tokens {
                ids, labels, mask, ..
            } => {
                let seen = |i: usize| mask.as_ref().is_none_or(|m| m[i]);
                let own = || {
                    ids.iter().enumerate().map(|(i, &id)| {
                        if seen(i) {
                            i64::from(id)
                        } else {
                            peft_tensor::IGNORE
                        }
                    })
                };
                let labels = labels.clone().unwrap_or_else(|| own().collect());
                self.given(
                    ids,
                    mask.as_deref(),
                    Goal::Tokens {
                        labels,
                        prompt: None,
                    },
                )
            }
        };
        self.check_ids(&example)?;
        Ok((
            Example {
                line: row.line,
                file: row.file,
                task: row.task,
                ..example
            },
            cut,
        ))
    }

    fn tokenizer(&self) -> std::result::Result<&'a dyn Encoder, String> {
        self.tokenizer.ok_or_else(|| {
            "is text, but the model comes without a tokenizer; give `input_ids`".to_owned()
        })
    }

    fn plain(&self, text: &str) -> std::result::Result<Vec<u32>, String> {
        self.tokenizer()?
            .encode(text, false)
            .map_err(|e| e.to_string())
    }

    fn class(&self, label: &super::RawLabel) -> std::result::Result<u32, String> {
        let names = self
            .labels
            .ok_or("has a `label`, but no classes are known")?;
        names.index(label).map(|i| i as u32).ok_or_else(|| {
            format!(
                "`label` {label} is not one of the classes 0..{} ({})",
                names.len(),
                names.names().join(", ")
            )
        })
    }

    fn text(&self, text: &str) -> Encoded {
        let mut ids = self.front.clone();
        ids.extend(self.plain(text)?);
        ids.extend(&self.end);
        Ok(self.learned_whole(ids))
    }

    fn learned_whole(&self, mut ids: Vec<u32>) -> (Example, Cut) {
        let cut = shorten(&mut ids, self.options.max_length);
        let labels = ids.iter().map(|&id| i64::from(id)).collect();
        (
            Example::new(
                ids,
                Goal::Tokens {
                    labels,
                    prompt: None,
                },
            ),
            cut,
        )
    }

    fn completion(&self, prompt: &str, completion: &str) -> Encoded {
        let max = self.options.max_length;
        let prompt = self.plain(prompt)?;
        let mut tail = self.plain(completion)?;
        tail.extend(&self.end);
        if tail.is_empty() {
            return Err("`completion` has no tokens".to_owned());
        }
        let mut cut = Cut::None;
        if tail.len() >= max {
            // One token stays in front, to predict the first of the completion from.
            tail.truncate(max - 1);
            cut = Cut::Completion;
        }
        let mut ids = join_prompt(&self.front, &prompt, max - tail.len());
        if cut == Cut::None && ids.len() < self.front.len() + prompt.len() {
            cut = Cut::Prompt;
        }
        let border = ids.len();
        ids.extend(&tail);
        let labels = learned_from(&ids, border);
        Ok((
            Example::new(
                ids,
                Goal::Tokens {
                    labels,
                    prompt: Some(border),
                },
            ),
            cut,
        ))
    }

    fn conversation(&self, messages: &[Value]) -> Encoded {
        let tokens = self
            .tokenizer()?
            .chat(messages)
            .map_err(|e| e.to_string())?;
        let (mut ids, said): (Vec<u32>, Vec<bool>) = tokens.into_iter().unzip();
        if ids.is_empty() {
            return Err("the chat template makes nothing of this conversation".to_owned());
        }
        let cut = shorten(&mut ids, self.options.max_length);
        let labels = ids
            .iter()
            .zip(said)
            .map(|(&id, said)| {
                if said {
                    i64::from(id)
                } else {
                    peft_tensor::IGNORE
                }
            })
            .collect();
        Ok((
            Example::new(
                ids,
                Goal::Tokens {
                    labels,
                    prompt: None,
                },
            ),
            cut,
        ))
    }

    fn classified(&self, text: &str, class: u32) -> Encoded {
        let mut plain = self.plain(text)?;
        let frame = self.front.len() + self.back.len();
        let room = self.options.max_length.saturating_sub(frame).max(1);
        let cut = shorten(&mut plain, room);
        let mut ids = self.front.clone();
        ids.extend(plain);
        ids.extend(&self.back);
        if ids.is_empty() {
            return Err("`text` has no tokens".to_owned());
        }
        Ok((Example::new(ids, Goal::Class(class)), cut))
    }

    fn given(&self, ids: &[u32], mask: Option<&[bool]>, goal: Goal) -> (Example, Cut) {
        let mut ids = ids.to_vec();
        let cut = shorten(&mut ids, self.options.max_length);
        let mask = mask
            .map(|m| m[..ids.len()].to_vec())
            .filter(|m| m.contains(&false));
        let goal = match goal {
            Goal::Tokens { mut labels, prompt } => {
                labels.truncate(ids.len());
                Goal::Tokens { labels, prompt }
            }
            goal => goal,
        };
        (
            Example {
                mask,
                ..Example::new(ids, goal)
            },
            cut,
        )
    }

    fn check_ids(&self, example: &Example) -> std::result::Result<(), String> {
        let vocab = self.options.vocab_size;
        if let Some(bad) = example.ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(format!(
                "token id {bad} is not in the model's vocabulary of {vocab}"
            ));
        }
        match &example.goal {
            Goal::Tokens { labels, .. } => match labels.iter().find(|&&l| l >= vocab as i64) {
                Some(bad) => Err(format!(
                    "label {bad} is not in the model's vocabulary of {vocab}"
                )),
                None => Ok(()),
            },
            Goal::Class(_) => Ok(()),
        }
    }
}

/// A prompt in at most `room` tokens: what comes in front stays if there is room for more than that, the rest loses its
/// beginning.
pub(super) fn join_prompt(front: &[u32], prompt: &[u32], room: usize) -> Vec<u32> {
    let front = if front.len() < room || front.len() + prompt.len() <= room {
        front
    } else {
        &[]
    };
    let kept = prompt.len().min(room - front.len());
    [front, &prompt[prompt.len() - kept..]].concat()
}

/// Labels that are the ids from `border` on.
pub(crate) fn learned_from(ids: &[u32], border: usize) -> Vec<i64> {
    ids.iter()
        .enumerate()
        .map(|(i, &id)| {
            if i < border {
                peft_tensor::IGNORE
            } else {
                i64::from(id)
            }
        })
        .collect()
}

fn shorten(ids: &mut Vec<u32>, max: usize) -> Cut {
    let cut = if ids.len() > max { Cut::End } else { Cut::None };
    ids.truncate(max);
    cut
}

/// What stands before and after `plain` in `framed`.
fn frame(framed: &[u32], plain: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let at = framed.windows(plain.len().max(1)).position(|w| w == plain);
    match at {
        Some(at) => (framed[..at].to_vec(), framed[at + plain.len()..].to_vec()),
        None => (Vec::new(), Vec::new()),
    }
}
