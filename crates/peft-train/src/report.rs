//! What a run tells while it goes on, and at its end.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::EvalReport;

/// Fields of a line of `metrics.jsonl` that depend on the clock; all others are the same bytes on every run of one
/// configuration, resumed or not.
pub const TIMING_FIELDS: [&str; 2] = ["tokens_per_second", "elapsed_s"];

/// One optimiser step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// Its number, from 1.
    pub step: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean over all labelled tokens (or rows) of the step, before the step.
    pub loss: f64,
    /// What the methods added to the loss, if they did.
    pub penalty: Option<f64>,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub grad_norm: f64,
    /// Tokens the model looked at, padding not counted.
    pub tokens: usize,
    /// What it took, without evaluations and checkpoints; of steps that are shown together, an equal share.
    pub seconds: f64,
    /// Tokens per second of this step.
    pub tokens_per_second: f64,
    /// Seconds since the run began, those before a resume included.
    pub elapsed_s: f64,
}

impl StepReport {
    /// Its line in `metrics.jsonl`.
    pub fn to_json(&self) -> Value {
        let mut line = json!({
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
        });
        if let (Some(penalty), Some(map)) = (self.penalty, line.as_object_mut()) {
            map.insert("penalty".to_owned(), json!(penalty));
        }
        if let Some(map) = line.as_object_mut() {
            map.insert(
                "tokens_per_second".to_owned(),
                json!(self.tokens_per_second),
            );
            map.insert("elapsed_s".to_owned(), json!(self.elapsed_s));
        }
        line
    }
}

/// Who watches a run. Every method does nothing by default; `()` watches in silence.
pub trait Observer {
    /// Once before the first step: steps done before a resume, steps in all, values that are trained.
    fn start(&mut self, _done: u64, _total: u64, _trainable: usize) {}

    /// After each step.
    fn step(&mut self, _report: &StepReport) {}

    /// While evaluating: rows done and rows in all.
    fn eval_progress(&mut self, _done: usize, _total: usize) {}

    /// After each evaluation, with the steps done before it.
    fn eval(&mut self, _step: u64, _report: &EvalReport) {}

    /// After a checkpoint, or the final result, is complete on disk.
    fn saved(&mut self, _path: &Path) {}

    /// Something the user should know.
    fn message(&mut self, _text: &str) {}
}

impl Observer for () {}

/// How a run went.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Summary {
    /// Where the results are.
    pub output: PathBuf,
    /// Steps done, those before a resume included.
    pub steps: u64,
    /// Values that were trained.
    pub trainable: usize,
    /// Whether the model tells classes apart rather than predict text.
    pub classifier: bool,
    /// Loss of the first step.
    pub first_loss: Option<f64>,
    /// Loss of the last step; None if a resumed run had none left to do.
    pub last_loss: Option<f64>,
    /// The evaluation before the first step, if there was one.
    pub eval_before: Option<EvalReport>,
    /// The last evaluation, if there is data for one.
    pub eval_after: Option<EvalReport>,
    /// Seconds, those before a resume included.
    pub elapsed_s: f64,
}
