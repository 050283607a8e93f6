//! Text generation: one token after another with cached keys and values, sampled from a counter-based stream, so that
//! a seed means the same text everywhere.

use peft_core::{Error, Pass, Result, RngKey};
use peft_tensor::no_grad;

use crate::attend::KvCache;
use crate::loss::argmax;
use crate::model::{Batch, Model, Task};
use crate::tokenizer::TextStream;

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f32,
    /// Draw from this many likeliest tokens; 0 = all.
    pub top_k: usize,
    /// Draw from the likeliest tokens that together have this probability; 1 = all (arXiv 1904.09751).
    pub top_p: f32,
    /// Divides positive and multiplies negative logits of tokens that have occurred; 1 = off (arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Texts that end generation; they are not part of the result.
    pub stop: Vec<String>,
    /// Tokens that end generation, besides the model's own; they are not part of the result.
    pub stop_tokens: Vec<u32>,
    /// Decides the draws.
    pub seed: u64,
    /// The task, for methods that learn several.
    pub task: Option<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            seed: 0,
            task: None,
        }
    }
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A stop token or text came.
    Stop,
    /// `max_new_tokens` was reached.
    Length,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The text, stop texts left out.
    pub text: String,
    /// The tokens, the stop token left out.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

impl GenerateOptions {
    fn check(&self) -> Result<()> {
        let fail = |field: &str, detail: String| Err(Error::config(field, detail));
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return fail(
                "temperature",
                format!("{} is not 0 or a positive number", self.temperature),
            );
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fail("top_p", format!("{} is not in (0, 1]", self.top_p));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return fail(
                "repetition_penalty",
                format!("{} is not a positive number", self.repetition_penalty),
            );
        }
        Ok(())
    }
}

impl Model {
    /// Goes on from `prompt` and calls `on_text` with each piece of text as it is certain. Special tokens written out
    /// in the prompt count as such; `special` adds those the tokenizer puts around a text (not wanted after a chat
    /// template, which writes them itself).
    ///
    /// # Errors
    /// If the model has no tokenizer or is no language model, an option is out of its range, or the text outgrows the
    /// model's positions.
    pub fn generate(
        &self,
        prompt: &str,
        special: bool,
        options: &GenerateOptions,
        on_text: &mut dyn FnMut(&str),
    ) -> Result<Generated> {
        let tokenizer = self.tokenizer()?;
        let mut ids = tokenizer.encode_with(prompt, special)?;
        if ids.is_empty() {
            // Something has to be asked for a first token.
            let start = tokenizer.bos().or(tokenizer.eos().first().copied());
            ids.extend(start.or(self.config().bos_token));
        }
        let mut stream = TextStream::new(&tokenizer);
        let mut text = String::new();
        let mut given = 0;
        let mut stopped = false;
        let (tokens, finish) = self.generate_ids(&ids, options, &mut |id| {
            text.push_str(&stream.push(id)?);
            stopped = cut_at_stop(&mut text, given, &options.stop);
            let certain = if stopped {
                text.len()
            } else {
                text.len() - held_back(&text, &options.stop)
            };
            if certain > given {
                on_text(&text[given..certain]);
                given = certain;
            }
            Ok(!stopped)
        })?;
        if !stopped {
            text.push_str(&stream.finish()?);
            cut_at_stop(&mut text, given, &options.stop);
            if text.len() > given {
                on_text(&text[given..]);
            }
        }
        Ok(Generated {
            text,
            tokens,
            finish,
            prompt_tokens: ids.len(),
        })
    }

    /// Goes on from token ids; `on_token` gets each token and says whether to go on. Stop tokens are the options', the
    /// configuration's and the tokenizer's ends of text; the stop token is neither given nor returned.
    ///
    /// # Errors
    /// As [`Model::generate`].
    pub fn generate_ids(
        &self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(u32) -> Result<bool>,
    ) -> Result<(Vec<u32>, Finish)> {
        options.check()?;
        if self.task() != Task::CausalLm {
            return Err(Error::config(
                "task",
                "only a causal language model generates text",
            ));
        }
        let mut stops = options.stop_tokens.clone();
        stops.extend(&self.config().eos_tokens);
        if let Ok(tokenizer) = self.tokenizer() {
            stops.extend(tokenizer.eos());
        }
        let key = RngKey::new(options.seed).fork("generate");
        let mut cache = KvCache::default();
        let mut seen = prompt.to_vec();
        let mut tokens = Vec::new();
        let mut next = prompt.to_vec();
        no_grad(|| {
            while tokens.len() < options.max_new_tokens {
                let logits = self.next_logits(&next, options.task, &mut cache)?;
                let id = choose(logits, &seen, options, key, tokens.len() as u64);
                if stops.contains(&id) {
                    return Ok((std::mem::take(&mut tokens), Finish::Stop));
                }
                tokens.push(id);
                seen.push(id);
                if !on_token(id)? {
                    return Ok((std::mem::take(&mut tokens), Finish::Stop));
                }
                next = vec![id];
            }
            Ok((std::mem::take(&mut tokens), Finish::Length))
        })
    }

    /// Logits after the last of `ids`, which follow on what the cache has seen.
    fn next_logits(&self, ids: &[u32], task: Option<u32>, cache: &mut KvCache) -> Result<Vec<f32>> {
        let batch = Batch {
            task_ids: task.map(|task| vec![task]),
            ..Batch::single(ids.to_vec())
        };
        let pass = self.pass(&batch, &Pass::eval())?;
        let hidden = self
            .architecture
            .hidden(&self.network, &batch, Some(cache), &pass)?;
        let (_, len, width) = hidden.dims3()?;
        let last = hidden.narrow(1, len - 1, 1)?.reshape(&[1, width])?;
        Ok(self
            .architecture
            .head(&self.network, &last, &pass)?
            .to_vec()?)
    }
}

/// The next token: penalties, temperature, top-k and top-p in the order Hugging Face applies them.
fn choose(
    mut logits: Vec<f32>,
    seen: &[u32],
    options: &GenerateOptions,
    key: RngKey,
    step: u64,
) -> u32 {
    if options.repetition_penalty != 1.0 {
        let mut seen = seen.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(v) = logits.get_mut(id as usize) {
                *v = if *v < 0.0 {
                    *v * options.repetition_penalty
                } else {
                    *v / options.repetition_penalty
                };
            }
        }
    }
    if options.temperature == 0.0 {
        return argmax(&logits);
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| {
        logits[*b as usize]
            .total_cmp(&logits[*a as usize])
            .then(a.cmp(b))
    };
    if options.top_k > 0 && options.top_k < order.len() {
        order.select_nth_unstable_by(options.top_k - 1, by_logit);
        order.truncate(options.top_k);
    }
    order.sort_unstable_by(by_logit);
    let Some(&best) = order.first() else { return 0 };
    let top = logits[best as usize];
    let weight = |id: u32| f64::from((logits[id as usize] - top) / options.temperature).exp();
    let mut weights: Vec<f64> = order.iter().map(|&id| weight(id)).collect();
    let total: f64 = weights.iter().sum();
    if options.top_p < 1.0 {
        let mut sum = 0.0;
        let within = |w: &&f64| {
            let wanted = sum < f64::from(options.top_p) * total;
            sum += **w;
            wanted
        };
        let kept = weights.iter().take_while(within).count().max(1);
        weights.truncate(kept);
    }
    let total: f64 = weights.iter().sum();
    let mut left = f64::from(key.uniform_at(step)) * total;
    for (&id, w) in order.iter().zip(&weights) {
        left -= w;
        if left < 0.0 {
            return id;
        }
    }
    order[weights.len() - 1]
}

/// Cuts the text where the first stop text begins; those wholly before `given` were not there before.
fn cut_at_stop(text: &mut String, given: usize, stops: &[String]) -> bool {
    let found = stops
        .iter()
        .filter(|s| !s.is_empty())
        .filter_map(|s| text[given..].find(s.as_str()))
        .min();
    match found {
        Some(at) => {
            text.truncate(given + at);
            true
        }
        None => false,
    }
}

/// Bytes at the end that may be the beginning of a stop text.
fn held_back(text: &str, stops: &[String]) -> usize {
    let longest = |stop: &String| {
        (1..stop.len())
            .rev()
            .filter(|&n| stop.is_char_boundary(n))
            .find(|&n| text.ends_with(&stop[..n]))
            .unwrap_or(0)
    };
    stops.iter().map(longest).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> GenerateOptions {
        GenerateOptions {
            temperature: 1.0,
            ..GenerateOptions::default()
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = vec![0.0, 2f32.ln(), f32::NEG_INFINITY, 5f32.ln()];
        let key = RngKey::new(3);
        let mut counts = [0; 4];
        for step in 0..8000 {
            counts[choose(logits.clone(), &[], &options(), key, step) as usize] += 1;
        }
        // 1000, 2000, 0 and 5000 expected; four standard deviations are at most 180.
        for (count, want) in counts.iter().zip([1000_i32, 2000, 0, 5000]) {
            assert!((count - want).abs() < 180, "{counts:?}");
        }
        assert_eq!(counts[2], 0);
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = vec![1.0, 3.0, 2.0, 0.0];
        let drawn = |options: &GenerateOptions| {
            let mut seen: Vec<u32> = (0..2000)
                .map(|s| choose(logits.clone(), &[], options, RngKey::new(1), s))
                .collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        assert_eq!(
            drawn(&GenerateOptions {
                top_k: 2,
                ..options()
            }),
            [1, 2]
        );
        // softmax: 0.087, 0.644, 0.237, 0.032
        assert_eq!(
            drawn(&GenerateOptions {
                top_p: 0.6,
                ..options()
            }),
            [1]
        );
        assert_eq!(
            drawn(&GenerateOptions {
                top_p: 0.7,
                ..options()
            }),
            [1, 2]
        );
        assert_eq!(
            drawn(&GenerateOptions {
                top_p: 0.9,
                ..options()
            }),
            [0, 1, 2]
        );
        assert_eq!(drawn(&options()), [0, 1, 2, 3]);
    }

    #[test]
    fn repetition_is_penalised_on_both_sides_of_zero() {
        let greedy = GenerateOptions {
            repetition_penalty: 2.0,
            ..GenerateOptions::default()
        };
        let pick = |logits: &[f32], seen: &[u32]| {
            choose(logits.to_vec(), seen, &greedy, RngKey::new(0), 0)
        };
        assert_eq!(pick(&[1.5, 1.0], &[0]), 1);
        assert_eq!(pick(&[-1.0, -1.5], &[0]), 1);
        assert_eq!(pick(&[3.0, 1.0], &[0, 0, 0]), 0);
    }

    #[test]
    fn stop_texts_are_cut_and_their_beginnings_held_back() {
        let stops = ["\n\n".to_owned(), "END".to_owned()];
        let mut text = "one EN".to_owned();
        assert!(!cut_at_stop(&mut text, 0, &stops));
        assert_eq!(held_back(&text, &stops), 2);
        text.push_str("D two");
        assert!(cut_at_stop(&mut text, 4, &stops));
        assert_eq!(text, "one ");
        assert_eq!(held_back("x\n", &stops), 1);
        assert_eq!(held_back("x", &stops), 0);
    }
}
