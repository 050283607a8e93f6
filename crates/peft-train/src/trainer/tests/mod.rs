//! Runs of tiny models: accumulation, resuming, hooks, outputs, and what stops a run.

mod evals;
mod joined;
mod needs;
mod probe;
mod runs;
mod stops;

use std::path::{Path, PathBuf};

use peft_io::NamedTensors;
use peft_models::{LoadOptions, Model, ModelConfig};
use serde_json::{Value, json};

use crate::config::{TrainConfig, apply_set};
use crate::{EvalReport, Observer, StepReport, Summary, TIMING_FIELDS, train};

fn llama() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 31, "hidden_size": 16,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false,
        "initializer_range": 0.3
    })
}

/// A folder with a model's `config.json` and data of rows of different lengths.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(rows: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("model")).unwrap();
        std::fs::write(folder.path().join("model/config.json"), llama().to_string()).unwrap();
        let place = Self { folder };
        let row = |i: usize| {
            let ids: Vec<usize> = (0..3 + (i * 5) % 7)
                .map(|j| (i * i + 3 * j + 1) % 31)
                .collect();
            let labels: Vec<i64> = ids
                .iter()
                .enumerate()
                .map(|(j, &id)| if j < i % 3 { -100 } else { id as i64 })
                .collect();
            json!({"input_ids": ids, "labels": labels}).to_string() + "\n"
        };
        place.write("train.jsonl", &(0..rows).map(row).collect::<String>());
        place.write("eval.jsonl", &(90..95).map(row).collect::<String>());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn config(&self, sets: &[&str]) -> TrainConfig {
        let mut value = json!({
            "model": {"path": self.path("model"), "init": "random"},
            "adapter": {"peft_type": "TRAIN_PROBE", "target_modules": ["q_proj", "down_proj"]},
            "data": {"train": self.path("train.jsonl")},
            "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.02, "seed": 5},
            "output": {"dir": self.path("out")}
        });
        for set in sets {
            apply_set(
                &mut value,
                &set.replace("DIR", &self.folder.path().display().to_string()),
            )
            .unwrap();
        }
        TrainConfig::from_value(&value).unwrap()
    }

    fn train(&self, sets: &[&str]) -> Summary {
        train(&self.config(sets), false, &mut ()).unwrap()
    }

    fn adapter(&self, out: &str) -> NamedTensors {
        peft_io::read_adapter(&self.path(out)).unwrap().tensors
    }

    /// The lines of the log without what the clock says.
    fn metrics(&self, out: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.path(out).join("metrics.jsonl")).unwrap();
        let line = |line: &str| {
            let mut value: Value = serde_json::from_str(line).unwrap();
            TIMING_FIELDS
                .iter()
                .for_each(|field| drop(value.as_object_mut().unwrap().shift_remove(*field)));
            value
        };
        text.lines().map(line).collect()
    }
}

/// Remembers what it is told.
#[derive(Default)]
struct Watcher {
    steps: Vec<StepReport>,
    evals: Vec<(u64, EvalReport)>,
    saved: Vec<PathBuf>,
    messages: Vec<String>,
    started: Option<(u64, u64, usize)>,
}

impl Observer for Watcher {
    fn start(&mut self, done: u64, total: u64, trainable: usize) {
        self.started = Some((done, total, trainable));
    }

    fn step(&mut self, report: &StepReport) {
        self.steps.push(report.clone());
    }

    fn eval(&mut self, step: u64, report: &EvalReport) {
        self.evals.push((step, report.clone()));
    }

    fn saved(&mut self, path: &Path) {
        self.saved.push(path.to_owned());
    }

    fn message(&mut self, text: &str) {
        self.messages.push(text.to_owned());
    }
}

fn fresh_model(seed: u64) -> Model {
    let config = ModelConfig::from_json(&llama()).unwrap();
    Model::from_config(
        &config,
        &LoadOptions {
            seed,
            ..LoadOptions::default()
        },
    )
    .unwrap()
}
