//! The configuration of a training run: what stands in `train.toml`, with its defaults.
//!
//! The formats (TOML, YAML, JSON) are the caller's business: a configuration comes as a JSON value, overrides
//! go into it with [`apply_set`], and [`TrainConfig::from_value`] checks names, types and ranges, in this order.

mod check;
mod checkpointing;
mod files;
mod keys;
mod set;

pub use checkpointing::Checkpointing;
pub use files::Files;
pub use keys::validate_keys;
pub use set::apply_set;

use std::path::PathBuf;

use peft_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::schedule::Schedule;

/// A whole configuration. Field names are the keys of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainConfig {
    /// `cpu`, `wgpu` where the build has it, or `auto` for the best there is.
    pub device: String,
    /// `f32` or `bf16`: what base weights are kept in, and by default the activations that wait for the backward pass
    /// (`train.activations`). Gradients, moments and adapters are always f32.
    pub precision: String,
    /// The model.
    pub model: ModelSection,
    /// The fields of `adapter_config.json`, and `init_from`; without it every parameter is trained.
    pub adapter: Option<Map<String, Value>>,
    /// What to train on.
    pub data: DataSection,
    /// How to train.
    pub train: TrainSection,
    /// Where results go.
    pub output: OutputSection,
}

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelSection {
    /// Folder, `.gguf` file or hub id.
    pub path: String,
    /// What the model is for; found from the data where it is not given.
    pub task: Option<TaskKind>,
    /// Classes; counted in the data where it is not given.
    pub num_labels: Option<usize>,
    /// Whether weights are read or drawn anew.
    pub init: ModelInit,
    /// Format to hold the linear layers of the base's blocks in: nf4, nf4_single, int8, q8_0, q5_1, q5_0, q4_1 or q4_0.
    pub quantize: Option<String>,
}

/// `model.task`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// Next-token prediction.
    CausalLm,
    /// One class for a text.
    SequenceClassification,
}

/// `model.init`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelInit {
    /// The weights at `model.path`.
    #[default]
    Pretrained,
    /// Fresh weights by `train.seed`; only `config.json` and the tokenizer are read.
    Random,
}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DataSection {
    /// Rows to train on: a file, or a list of files, whose rows belong to the tasks 0, 1, .. where they say nothing else.
    pub train: Files,
    /// Rows to evaluate on, written the same way.
    pub eval: Option<Files>,
    /// Instead of `eval`: the share (below 1) or number (from 1) of training rows set aside, drawn by the seed.
    pub eval_split: Option<f64>,
    /// How the files are written.
    pub format: DataFormat,
    /// Longest row in tokens; longer ones are cut.
    pub max_length: usize,
    /// Whether every epoch has an order of its own.
    pub shuffle: bool,
    /// Whether rows of similar length share a batch; only with `shuffle`.
    pub bucket: bool,
    /// Whether several texts share a row of up to `max_length` tokens, with attention kept apart; for decoders.
    pub packing: bool,
    /// Whether the rows of a training batch that differ in length are joined into one without padding, wherever model and
    /// method can tell the texts apart; the losses are the same.
    pub padding_free: bool,
    /// Whether what all rows of a training batch begin with (a template's or system prompt's tokens, none of which is learned)
    /// is run once for all of them, wherever model and method treat tokens alike; the losses are the same.
    pub shared_prompts: bool,
    /// Whether the tokenizer's end-of-text token follows every text and completion.
    pub add_eos: bool,
    /// Whether evaluation also chooses among the completions the data has; by default where these are few.
    pub choices: Option<bool>,
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            train: Files::default(),
            eval: None,
            eval_split: None,
            format: DataFormat::Auto,
            max_length: 512,
            shuffle: true,
            bucket: true,
            packing: false,
            padding_free: true,
            shared_prompts: true,
            add_eos: true,
            choices: None,
        }
    }
}

/// `data.format`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// `csv` for a file of that ending, otherwise `jsonl`.
    #[default]
    Auto,
    /// One JSON object a line.
    Jsonl,
    /// Comma-separated values under a line of column names.
    Csv,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TrainSection {
    /// Passes over the data; a fraction is fine.
    pub epochs: f64,
    /// Optimiser steps; where given, it decides instead of `epochs`. Also written `max_steps`.
    pub steps: Option<u64>,
    /// Rows of one forward pass.
    pub batch_size: usize,
    /// Forward passes of one step.
    pub gradient_accumulation: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay, for every parameter that no rule sets apart (biases and norms too, as in PyTorch).
    pub weight_decay: f64,
    /// `adamw` or `adamw_8bit`
    pub optimizer: Optimizer,
    /// Decay of AdamW's two moments.
    pub betas: [f64; 2],
    /// AdamW's epsilon, outside of the root.
    pub eps: f64,
    /// Parameters with a learning rate of their own; a later rule wins.
    pub lr_multipliers: Vec<LrRule>,
    /// How the learning rate falls.
    pub schedule: Schedule,
    /// Share of the steps in which the rate rises from 0, rounded up.
    pub warmup_ratio: f64,
    /// The same as a number of steps; where given, it decides.
    pub warmup_steps: Option<u64>,
    /// Largest norm of all gradients together; 0 is no limit.
    pub max_grad_norm: f64,
    /// Most resident memory, such as "2GiB". Where the run is predicted to need more, the optimiser's moments go to a file
    /// in the output folder; a run that needs more even so is refused. It is a prediction that is held to, not a guard.
    pub memory_limit: Option<String>,
    /// Which blocks are computed again in the backward pass to save memory: `true` for all, `false`, a number of blocks, or
    /// `"auto"`: as many as `memory_limit` makes necessary.
    pub gradient_checkpointing: Checkpointing,
    /// What activations that wait for the backward pass are kept in: `f32`, `bf16` or `int8`; as `precision` by default.
    /// Only gradients see it.
    pub activations: Option<String>,
    /// The seed of everything random.
    pub seed: u64,
    /// Steps between evaluations; 0 is only at the end.
    pub eval_every: u64,
    /// Whether to evaluate before the first step too.
    pub eval_before: bool,
    /// Rows of one forward pass in evaluation; `batch_size` by default.
    pub eval_batch_size: Option<usize>,
    /// Steps between checkpoints; 0 is none.
    pub save_every: u64,
    /// Checkpoints kept, the newest.
    pub keep_checkpoints: usize,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            epochs: 3.0,
            steps: None,
            batch_size: 8,
            gradient_accumulation: 1,
            learning_rate: 1e-3,
            weight_decay: 0.01,
            optimizer: Optimizer::Adamw,
            betas: [0.9, 0.999],
            eps: 1e-8,
            lr_multipliers: Vec::new(),
            schedule: Schedule::Linear,
            warmup_ratio: 0.0,
            warmup_steps: None,
            max_grad_norm: 1.0,
            memory_limit: None,
            gradient_checkpointing: Checkpointing::None,
            activations: None,
            seed: 0,
            eval_every: 0,
            eval_before: false,
            eval_batch_size: None,
            save_every: 0,
            keep_checkpoints: 2,
        }
    }
}

/// `train.optimizer`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// AdamW (arXiv 1711.05101), as `torch.optim.AdamW`.
    #[default]
    Adamw,
    /// The same with moments in blocks of 8 bits (arXiv 2110.02861), as `bitsandbytes.optim.AdamW8bit`.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
}

impl TrainSection {
    /// `memory_limit` in bytes.
    ///
    /// # Errors
    /// If it is not a size.
    pub fn memory_limit(&self) -> Result<Option<u64>> {
        let size = |text: &String| {
            peft_io::parse_size(text)
                .map_err(|e| Error::config("train.memory_limit", e.to_string()))
        };
        self.memory_limit.as_ref().map(size).transpose()
    }
}

impl Optimizer {
    /// Whether moments are kept in 8 bits.
    pub fn eight_bit(self) -> bool {
        self == Self::Adamw8bit
    }
}

/// One entry of `train.lr_multipliers`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LrRule {
    /// Regular expression searched for in the parameter's key.
    pub pattern: String,
    /// Factor on `train.learning_rate`.
    pub multiplier: Option<f64>,
    /// Instead of a factor: the highest rate itself.
    pub learning_rate: Option<f64>,
    /// Weight decay instead of `train.weight_decay`.
    pub weight_decay: Option<f64>,
}

/// `[output]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct OutputSection {
    /// Folder of the results.
    pub dir: PathBuf,
    /// Whether a run that is there already may be replaced.
    pub overwrite: bool,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            device: "cpu".to_owned(),
            precision: "f32".to_owned(),
            model: ModelSection::default(),
            adapter: None,
            data: DataSection::default(),
            train: TrainSection::default(),
            output: OutputSection::default(),
        }
    }
}

impl TrainConfig {
    /// A configuration out of a file's value, completely checked.
    ///
    /// # Errors
    /// An unknown key with the nearest names, a value of the wrong type or out of range, a missing one, or
    /// something this build does not do; each names the field.
    pub fn from_value(value: &Value) -> Result<Self> {
        let mut value = value.clone();
        keys::rename_aliases(&mut value)?;
        validate_keys(&value)?;
        let config: Self =
            serde_json::from_value(value.clone()).map_err(|e| keys::blame(&value, &e))?;
        config.check()?;
        Ok(config)
    }

    /// Steps of warm-up in a run of `total`.
    pub fn warmup(&self, total: u64) -> u64 {
        let ratio = (self.train.warmup_ratio * total as f64).ceil() as u64;
        self.train.warmup_steps.unwrap_or(ratio)
    }

    /// Where to start the adapter from, if not afresh.
    ///
    /// # Errors
    /// If `adapter.init_from` is not a string.
    pub fn init_from(&self) -> Result<Option<&str>> {
        match self.adapter.as_ref().and_then(|a| a.get("init_from")) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(path)) if !path.is_empty() => Ok(Some(path)),
            Some(other) => Err(Error::config(
                "adapter.init_from",
                format!("expected a folder, got {other}"),
            )),
        }
    }

    /// Dotted names of the fields that make `self` another run than `written`, the JSON of another configuration as
    /// read from a file. What only says where the run is computed, and where and how often results are written, does not
    /// count.
    pub fn differences(&self, written: &Value) -> Vec<String> {
        const FREE: &[&str] = &[
            "device",
            "output",
            "train.eval_every",
            "train.eval_before",
            "train.save_every",
            "train.keep_checkpoints",
            "train.memory_limit",
        ];
        // Through text, as `written` went: a number may lose its last bit there. Plain data always has that form.
        let text = serde_json::to_string(self).unwrap_or_default();
        let own: Value = serde_json::from_str(&text).unwrap_or_default();
        let mut found = Vec::new();
        keys::compare("", &own, written, &mut found);
        found.retain(|name| {
            !FREE
                .iter()
                .any(|free| name == free || name.starts_with(&format!("{free}.")))
        });
        found
    }
}

#[cfg(test)]
mod tests;
