//! Measuring a model on held-out rows.

use std::collections::BTreeSet;
use std::time::Instant;

use peft_core::{Error, Pass, Result};
use peft_models::Model;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::Observer;
use crate::data::{Collated, Dataset, Example, Goal, collate};

/// Most completions that are tried for each row because they are few.
const FEW_CHOICES: usize = 8;
/// Most that are tried because the user wants so.
const MOST_CHOICES: usize = 256;

/// How to evaluate.
#[derive(Clone, Copy, Debug)]
pub struct EvalOptions {
    /// Rows of one forward pass.
    pub batch_size: usize,
    /// Whether to choose among the completions the data has; None = where these are at most eight.
    pub choices: Option<bool>,
}

impl Default for EvalOptions {
    fn default() -> Self {
        Self {
            batch_size: 8,
            choices: None,
        }
    }
}

/// What an evaluation found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Rows.
    pub rows: usize,
    /// Labels: tokens, or rows with a class.
    pub count: usize,
    /// Mean cross-entropy over the labels.
    pub loss: f64,
    /// Its exponential, for language models.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// Share of labels that are the model's likeliest answer.
    pub accuracy: f64,
    /// Share of rows with a completion all of whose tokens are the likeliest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_accuracy: Option<f64>,
    /// Share of rows whose completion is likelier, as a whole, than any other completion of the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice_accuracy: Option<f64>,
    /// How long it took.
    pub seconds: f64,
}

impl EvalReport {
    /// Its line in `metrics.jsonl`; without times, so that two runs write the same bytes.
    pub fn to_json(&self, step: u64) -> Value {
        let mut line = serde_json::Map::new();
        line.insert("step".to_owned(), json!(step));
        let fields = [
            ("eval_loss", Some(self.loss)),
            ("eval_perplexity", self.perplexity),
            ("eval_accuracy", Some(self.accuracy)),
            ("eval_completion_accuracy", self.completion_accuracy),
            ("eval_choice_accuracy", self.choice_accuracy),
        ];
        line.extend(
            fields
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), json!(value?)))),
        );
        Value::Object(line)
    }
}

/// Sums over the labels of one row.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowScore {
    pub(crate) log_prob: f64,
    count: usize,
    correct: usize,
    /// The answer at the last label: the class of a classifier.
    pub(crate) predicted: u32,
}

/// Measures a model on encoded rows, without gradients and without dropout.
///
/// # Errors
/// When the rows do not fit the model, the loss is not finite, or choices are asked for where there are none.
pub fn evaluate(
    model: &Model,
    data: &Dataset,
    options: &EvalOptions,
    observer: &mut dyn Observer,
) -> Result<EvalReport> {
    let begun = Instant::now();
    let choices = choices(data, options.choices)?;
    let rows = data.examples.len();
    let own: Vec<&Example> = data.examples.iter().collect();
    let total = rows * choices.len().max(1);
    let scores = score(model, data, &own, &[], options, &mut |done| {
        observer.eval_progress(done, total)
    })?;

    let count: usize = scores.iter().map(|s| s.count).sum();
    let correct: usize = scores.iter().map(|s| s.correct).sum();
    let loss = -scores.iter().map(|s| s.log_prob).sum::<f64>() / count.max(1) as f64;
    if !loss.is_finite() {
        let bad = own.iter().zip(&scores);
        let bad: Vec<&Example> = bad
            .filter(|(_, score)| !score.log_prob.is_finite())
            .map(|(example, _)| *example)
            .collect();
        return Err(Error::other(format!(
            "the evaluation's loss is {loss}, from {}",
            data.places(&bad)
        )));
    }
    let causal = own.iter().any(|e| matches!(e.goal, Goal::Tokens { .. }));
    let complete: Vec<&RowScore> = own
        .iter()
        .zip(&scores)
        .filter(|(e, s)| border(e).is_some() && s.count > 0)
        .map(|(_, s)| s)
        .collect();
    let whole = complete.iter().filter(|s| s.correct == s.count).count();
    let share = |part: usize, of: usize| part as f64 / of.max(1) as f64;
    let choice_accuracy = match choices.is_empty() {
        true => None,
        false => Some(share(
            choose(model, data, &scores, &choices, options, observer)?,
            rows,
        )),
    };
    Ok(EvalReport {
        rows,
        count,
        loss,
        perplexity: causal.then(|| loss.exp()),
        accuracy: share(correct, count),
        completion_accuracy: (!complete.is_empty()).then(|| share(whole, complete.len())),
        choice_accuracy,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

/// Scores rows in batches of similar length; `names` are the adapters that act on each, all active ones where it is
/// empty.
pub(crate) fn score(
    model: &Model,
    data: &Dataset,
    examples: &[&Example],
    names: &[&str],
    options: &EvalOptions,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<RowScore>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(examples[i].ids.len()));
    let mut scores = vec![RowScore::default(); examples.len()];
    let mut done = 0;
    for rows in order.chunks(options.batch_size.max(1)) {
        let batch: Vec<&Example> = rows.iter().map(|&i| examples[i]).collect();
        let Collated { batch, labels, .. } = collate(&batch, data.pad);
        let mut pass = Pass::eval();
        if !names.is_empty() {
            let own = rows.iter().map(|&i| names.get(i).map(|&n| n.to_owned()));
            pass.adapter_names = Some(own.collect::<Vec<_>>().into());
        }
        for scored in model.score(&batch, &labels, &pass)? {
            let Some(score) = rows.get(scored.row).and_then(|&i| scores.get_mut(i)) else {
                continue;
            };
            score.log_prob += f64::from(scored.log_prob);
            score.count += 1;
            score.correct += usize::from(scored.predicted == scored.label);
            score.predicted = scored.predicted;
        }
        done += rows.len();
        progress(done);
    }
    Ok(scores)
}

/// The distinct completions, if there is something to choose.
pub(crate) fn choices(data: &Dataset, wanted: Option<bool>) -> Result<Vec<Vec<u32>>> {
    if wanted == Some(false) {
        return Ok(Vec::new());
    }
    let field = "data.choices";
    let mut distinct = BTreeSet::new();
    for example in &data.examples {
        let Some(border) = border(example) else {
            return match wanted {
                Some(_) => Err(Error::config(
                    field,
                    "needs rows that all have a prompt and a completion",
                )),
                None => Ok(Vec::new()),
            };
        };
        distinct.insert(&example.ids[border..]);
        let most = if wanted.is_some() {
            MOST_CHOICES
        } else {
            FEW_CHOICES
        };
        if distinct.len() > most {
            return match wanted {
                Some(_) => Err(Error::config(
                    field,
                    format!("there are more than {most} different completions"),
                )),
                None => Ok(Vec::new()),
            };
        }
    }
    match distinct.len() {
        0 | 1 if wanted.is_some() => Err(Error::config(field, "all completions are the same")),
        0 | 1 => Ok(Vec::new()),
        // As many as rows: completions that are all different are few only because the rows are.
        n if wanted.is_none() && 2 * n > data.examples.len() => Ok(Vec::new()),
        _ => Ok(distinct.into_iter().map(<[u32]>::to_vec).collect()),
    }
}

/// In how many rows the own completion is the likeliest; `own` are their scores.
fn choose(
    model: &Model,
    data: &Dataset,
    own: &[RowScore],
    choices: &[Vec<u32>],
    options: &EvalOptions,
    observer: &mut dyn Observer,
) -> Result<usize> {
    let rows = data.examples.len();
    let mut best = vec![true; rows];
    let (mut done, total) = (rows, rows * choices.len());
    for choice in choices {
        let (places, others): (Vec<usize>, Vec<Example>) = data
            .examples
            .iter()
            .enumerate()
            .filter_map(|(i, e)| {
                with_completion(e, choice, data.max_length).map(|other| (i, other))
            })
            .unzip();
        let others: Vec<&Example> = others.iter().collect();
        let scores = score(model, data, &others, &[], options, &mut |n| {
            observer.eval_progress(done + n, total)
        })?;
        done += others.len();
        for (i, score) in places.into_iter().zip(scores) {
            best[i] &= own[i].log_prob > score.log_prob;
        }
    }
    observer.eval_progress(total, total);
    Ok(best.into_iter().filter(|&b| b).count())
}

/// The row with another completion; None for its own.
pub(crate) fn with_completion(
    example: &Example,
    completion: &[u32],
    max_length: usize,
) -> Option<Example> {
    let border = border(example)?;
    if example.ids[border..] == *completion {
        return None;
    }
    let start = (border + completion.len())
        .saturating_sub(max_length)
        .min(border.saturating_sub(1));
    let ids = [&example.ids[start..border], completion].concat();
    let labels = crate::data::learned_from(&ids, border - start);
    Some(Example {
        mask: None,
        goal: Goal::Tokens {
            labels,
            prompt: Some(border - start),
        },
        ids,
        ..example.clone()
    })
}

fn border(example: &Example) -> Option<usize> {
    match example.goal {
        Goal::Tokens { prompt, .. } => prompt,
        Goal::Class(_) => None,
    }
}
