//! The training loss, and what a model predicts at labelled places, without ever holding a whole batch's logits.

use std::ops::Range;

use peft_core::{Error, Pass, Result};
use peft_tensor::{Eager, IGNORE, Tensor, no_grad};

use crate::arch::into_tensor_error;
use crate::model::{Batch, Model, Task};

/// Bytes of logits that are in memory at once: about what a block's backward pass takes of 1000 tokens anyway. With fewer
/// the head's weight would be decoded too often.
const LOGITS: usize = 24 << 20;

/// Rows of `width` logits that are in memory at once where there are so many labels: about equally many each time.
pub fn logit_rows(width: usize, labels: usize) -> usize {
    let most = (LOGITS / size_of::<f32>() / width.max(1) / 16 * 16).clamp(64, 1024);
    labels.div_ceil(labels.div_ceil(most).max(1)).max(1)
}

/// What a batch should have been answered with.
#[derive(Clone, Debug, PartialEq)]
pub enum Labels {
    /// A token id for each of `[batch * seq]`, [`IGNORE`] where there is none; the model is asked for it one position
    /// earlier.
    Tokens(Vec<i64>),
    /// A class for each text: each row, or each of the texts that share rows.
    Classes(Vec<u32>),
}

/// A batch's loss.
#[derive(Clone, Debug)]
pub struct LossOutput {
    /// Mean over what is labelled, shape `[]`; zero where nothing is.
    pub loss: Tensor,
    /// Numbers whose sum is that over what is labelled. They are where the model is: whoever does not ask for their values
    /// does not wait for the device.
    pub parts: Vec<Tensor>,
    /// How many labels there are.
    pub count: usize,
    /// How many of them the model would have answered; not counted (0) in a training pass.
    pub correct: usize,
}

impl LossOutput {
    /// Sum over what is labelled.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn sum(&self) -> Result<f64> {
        let each = self.parts.iter().map(|part| Ok(f64::from(part.item()?)));
        each.sum()
    }
}

/// The model's answer at one labelled place.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Row of the batch; for a class, the text's place among the batch's texts.
    pub row: usize,
    /// Position of the labelled token in the row; 0 for a class.
    pub position: usize,
    /// The label.
    pub label: u32,
    /// The likeliest answer.
    pub predicted: u32,
    /// Natural logarithm of the label's probability.
    pub log_prob: f32,
}

/// The rows of hidden states a label is read from, with what belongs there.
struct Labelled {
    /// `[n, hidden]`
    rows: Tensor,
    targets: Vec<i64>,
    /// (row, position) of each.
    places: Vec<(usize, usize)>,
    /// What each counts, equal ones together; all 1 where it is empty.
    weights: Vec<f32>,
}

impl Labelled {
    fn weight(&self, at: usize) -> f32 {
        self.weights.get(at).copied().unwrap_or(1.0)
    }

    /// Labels that go through the head together: not too many, and all of one weight.
    fn chunks(&self, width: usize) -> Vec<Range<usize>> {
        let rows = logit_rows(width, self.targets.len());
        let mut chunks: Vec<Range<usize>> = Vec::new();
        for at in 0..self.targets.len() {
            match chunks.last_mut() {
                Some(chunk)
                    if chunk.len() < rows && self.weight(chunk.start) == self.weight(at) =>
                {
                    chunk.end = at + 1;
                }
                _ => chunks.push(at..at + 1),
            }
        }
        chunks
    }
}

impl Model {
    /// The mean cross-entropy over all labelled tokens (after the shift) or rows, as Hugging Face computes it: with
    /// virtual tokens in front, the last of them is asked for the first token if that one is labelled. Tokens that an
    /// adapter wants said inside its prompt count too, each with its weight ([`peft_core::Adapter::prompt_labels`]).
    ///
    /// # Errors
    /// If batch or labels do not fit the model or each other.
    pub fn loss(&self, batch: &Batch, labels: &Labels, pass: &Pass) -> Result<LossOutput> {
        let pass = &self.pass(batch, pass)?;
        let Some(labelled) = self.labelled(batch, labels, true, pass)? else {
            let loss = Tensor::zeros(&[], self.device())?;
            return Ok(LossOutput {
                loss,
                parts: Vec::new(),
                count: 0,
                correct: 0,
            });
        };
        let count = labelled.targets.len();
        let counted = !pass.train;
        let (mut total, mut parts, mut correct) = (None::<Tensor>, Vec::new(), 0);
        let mut pieces = Eager::default();
        for chunk in labelled.chunks(self.answers()) {
            let weight = labelled.weight(chunk.start);
            let rows = labelled.rows.narrow(0, chunk.start, chunk.len())?;
            let pass = &for_rows(pass, labelled.places[chunk.clone()].iter());
            let targets = &labelled.targets[chunk];
            let part = pieces.piece(&[&rows], weight, |x| {
                let logits = self
                    .architecture
                    .head(&self.network, &x[0], pass)
                    .map_err(into_tensor_error)?;
                if counted {
                    let values = logits.to_vec()?;
                    let answers = values.chunks(logits.last_dim().max(1)).map(argmax);
                    correct += answers
                        .zip(targets)
                        .filter(|&(a, &t)| i64::from(a) == t)
                        .count();
                }
                logits.into_cross_entropy(targets)
            })?;
            let part = if weight == 1.0 {
                part
            } else {
                part.scale(weight)?
            };
            parts.push(part.detach());
            total = Some(match total {
                Some(total) => total.add(&part)?,
                None => part,
            });
        }
        let loss = match total {
            Some(total) => pieces.finish(&total).scale(1.0 / count as f32)?,
            None => Tensor::zeros(&[], self.device())?,
        };
        Ok(LossOutput {
            loss,
            parts,
            count,
            correct,
        })
    }

    /// What the model answers at every labelled place, and how likely it finds the label. No gradient.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn score(&self, batch: &Batch, labels: &Labels, pass: &Pass) -> Result<Vec<Scored>> {
        no_grad(|| {
            let pass = &self.pass(batch, pass)?;
            let Some(labelled) = self.labelled(batch, labels, false, pass)? else {
                return Ok(Vec::new());
            };
            let mut scored = Vec::with_capacity(labelled.targets.len());
            for chunk in labelled.chunks(self.answers()) {
                let rows = labelled.rows.narrow(0, chunk.start, chunk.len())?;
                let places = &labelled.places[chunk.clone()];
                let pass = &for_rows(pass, places.iter());
                let targets = &labelled.targets[chunk];
                let logits = self.architecture.head(&self.network, &rows, pass)?;
                let values = logits.to_vec()?;
                for ((row, &target), &(at, position)) in values
                    .chunks(logits.last_dim().max(1))
                    .zip(targets)
                    .zip(places)
                {
                    let label = row
                        .get(target as usize)
                        .copied()
                        .unwrap_or(f32::NEG_INFINITY);
                    let log_prob = label - log_sum_exp(row);
                    scored.push(Scored {
                        row: at,
                        position,
                        label: target as u32,
                        predicted: argmax(row),
                        log_prob,
                    });
                }
            }
            Ok(scored)
        })
    }

    /// The labelled places; with `prompts`, also those inside adapters' prompts.
    fn labelled(
        &self,
        batch: &Batch,
        labels: &Labels,
        prompts: bool,
        pass: &Pass,
    ) -> Result<Option<Labelled>> {
        match (self.task(), labels) {
            (Task::CausalLm, Labels::Tokens(tokens)) => {
                if tokens.len() != batch.ids.len() {
                    let detail = format!("{} labels for {} ids", tokens.len(), batch.ids.len());
                    return Err(Error::config("labels", detail));
                }
                if let Some(bad) = tokens.iter().find(|&&t| t != IGNORE && !self.is_token(t)) {
                    let detail = format!(
                        "{bad} is no token of the vocabulary of {}",
                        self.config().vocab_size
                    );
                    return Err(Error::config("labels", detail));
                }
                let added = self.network.prompt_len_in(pass);
                let width = added + batch.seq;
                let (mut ids, mut targets, mut places) = (Vec::new(), Vec::new(), Vec::new());
                for (row, tokens) in tokens.chunks(batch.seq).enumerate() {
                    for (position, &token) in tokens.iter().enumerate() {
                        let asked = (added + position).checked_sub(1);
                        if let (Some(asked), true) = (asked, token >= 0) {
                            ids.push((row * width + asked) as u32);
                            targets.push(token);
                            places.push((row, position));
                        }
                    }
                }
                let mut weights = Vec::new();
                if prompts && pass.adapter_names.is_none() {
                    let mut inside = self.network.prompt_labels();
                    inside.sort_by(|a, b| b.weight.total_cmp(&a.weight));
                    if !inside.is_empty() {
                        weights.resize(targets.len(), 1.0);
                    }
                    for label in inside {
                        let Some(asked) = label.position.checked_sub(1) else {
                            continue;
                        };
                        for row in 0..batch.batch {
                            ids.push((row * width + asked) as u32);
                            targets.push(i64::from(label.token));
                            places.push((row, label.position));
                            weights.push(label.weight);
                        }
                    }
                }
                if ids.is_empty() {
                    return Ok(None);
                }
                let rows = self
                    .architecture
                    .hidden_of(&self.network, batch, &ids, pass)?;
                Ok(Some(Labelled {
                    rows,
                    targets,
                    places,
                    weights,
                }))
            }
            (Task::SequenceClassification { num_labels }, Labels::Classes(classes)) => {
                let texts = batch.texts().len();
                if classes.len() != texts {
                    let detail = format!("{} labels for {texts} texts", classes.len());
                    return Err(Error::config("labels", detail));
                }
                if let Some(bad) = classes.iter().find(|&&c| c as usize >= num_labels) {
                    return Err(Error::config(
                        "labels",
                        format!("class {bad} of a model of {num_labels} labels"),
                    ));
                }
                let rows = self.architecture.texts(&self.network, batch, pass)?;
                let targets = classes.iter().map(|&c| i64::from(c)).collect();
                Ok(Some(Labelled {
                    rows,
                    targets,
                    places: (0..texts).map(|text| (text, 0)).collect(),
                    weights: Vec::new(),
                }))
            }
            (Task::Features, _) => Err(Error::config(
                "task",
                "a model loaded for its features has no loss",
            )),
            (Task::CausalLm, Labels::Classes(_)) => {
                Err(Error::config("labels", "a language model takes tokens"))
            }
            (_, Labels::Tokens(_)) => Err(Error::config(
                "labels",
                "a classifier takes one class a row",
            )),
        }
    }

    /// How many answers the head weighs.
    fn answers(&self) -> usize {
        match self.task() {
            Task::SequenceClassification { num_labels } => num_labels,
            Task::CausalLm | Task::Features => self.config().vocab_size,
        }
    }

    fn is_token(&self, label: i64) -> bool {
        usize::try_from(label).is_ok_and(|t| t < self.config().vocab_size)
    }
}

/// The pass for hidden states picked from the batch: each goes through its own row's adapter.
fn for_rows<'a>(pass: &Pass, places: impl Iterator<Item = &'a (usize, usize)>) -> Pass {
    let mut pass = pass.clone();
    if let Some(names) = &pass.adapter_names {
        let picked = places.filter_map(|&(row, _)| names.get(row).cloned());
        pass.adapter_names = Some(picked.collect::<Vec<_>>().into());
    }
    pass
}

/// Index of the largest value, the first of equals.
pub(crate) fn argmax(values: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &v) in values.iter().enumerate() {
        if v > best.1 {
            best = (i, v);
        }
    }
    best.0 as u32
}

fn log_sum_exp(values: &[f32]) -> f32 {
    let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = values.iter().map(|&v| f64::from(v - max).exp()).sum();
    max + sum.ln() as f32
}
