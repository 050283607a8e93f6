//! Whole runs of methods with virtual tokens: checkpoints keep what a file does not, tasks find their prompts, one prompt
//! is the start of another, and a context's own labels are learned.

use std::path::{Path, PathBuf};

use peft::core::{Device, Pass};
use peft::io::{NamedTensors, read_adapter};
use peft::models::{Batch, Labels, LoadOptions, Model, ModelConfig};
use peft::train::{Observer, TrainConfig, train};
use serde_json::{Value, json};

fn llama() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 23, "hidden_size": 12,
        "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false,
        "initializer_range": 0.4
    })
}

/// A folder with a model's configuration and rows for it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().expect("a folder"));
        std::fs::create_dir(place.path("model")).expect("a folder");
        place.write("model/config.json", &llama().to_string());
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).expect("written");
    }

    /// Rows of token ids; with `classes`, of that many classes.
    fn rows(&self, name: &str, seed: usize, classes: Option<usize>) -> PathBuf {
        let row = |i: usize| {
            let ids: Vec<usize> = (0..3 + (i + seed) % 4)
                .map(|j| (i * i + 5 * j + seed) % 23)
                .collect();
            let row = match classes {
                Some(n) => json!({"input_ids": ids, "label": i % n}),
                None => json!({"input_ids": ids}),
            };
            format!("{row}\n")
        };
        self.write(name, &(0..8).map(row).collect::<String>());
        self.path(name)
    }

    fn config(&self, adapter: Value, data: Value, out: &str) -> TrainConfig {
        let config = json!({
            "model": {"path": self.path("model"), "init": "random"},
            "adapter": adapter,
            "data": {"train": data},
            "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.05, "seed": 3, "save_every": 3},
            "output": {"dir": self.path(out)}
        });
        TrainConfig::from_value(&config).expect("a configuration")
    }

    fn adapter(&self, out: &str) -> NamedTensors {
        read_adapter(&self.path(out)).expect("an adapter").tensors
    }
}

/// Remembers the losses and what it is told.
#[derive(Default)]
struct Watcher {
    losses: Vec<f64>,
    told: Vec<String>,
}

impl Observer for Watcher {
    fn step(&mut self, report: &peft::train::StepReport) {
        self.losses.push(report.loss);
    }

    fn message(&mut self, text: &str) {
        self.told.push(text.to_owned());
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
    }
}

/// The network that makes a prompt, or how far a context was moved, is in no adapter's file, but in the checkpoints.
#[test]
fn a_resumed_run_has_what_no_file_holds() {
    let place = Place::new();
    let data = json!(place.rows("rows.jsonl", 1, None));
    for (name, adapter) in [
        (
            "prefix",
            json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "prefix_projection": true}),
        ),
        (
            "encoded",
            json!({"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_dropout": 0.3,
                "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 5}),
        ),
        (
            "context",
            json!({"peft_type": "CPT", "cpt_token_ids": [4, 5, 6], "cpt_tokens_type_mask": [1, 2, 4]}),
        ),
    ] {
        let whole = format!("{name}-whole");
        let config = place.config(adapter.clone(), data.clone(), &whole);
        train(&config, false, &mut ()).expect("trains");
        let kept = "checkpoints/step-3";
        let cut = format!("{name}-cut");
        copy_folder(&place.path(&whole).join(kept), &place.path(&cut).join(kept));
        let config = place.config(adapter, data.clone(), &cut);
        let mut watcher = Watcher::default();
        train(&config, true, &mut watcher).expect("goes on");
        assert_eq!(watcher.losses.len(), 3, "{name}");
        assert_eq!(place.adapter(&cut), place.adapter(&whole), "{name}");
    }
}

/// Two files are two tasks; a third starts from the prompt of one of them and is better there than from nothing.
#[test]
fn a_prompt_of_several_tasks_is_the_start_of_another() {
    let place = Place::new();
    let (first, second) = (
        place.rows("first.jsonl", 1, None),
        place.rows("second.jsonl", 9, None),
    );
    let fields = |tasks: usize, start: &str| {
        json!({"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 3, "num_tasks": tasks, "num_ranks": 2,
            "prompt_tuning_init": start, "prompt_tuning_init_task": 1,
            "prompt_tuning_init_state_dict_path": place.path("sources")})
    };
    let mut config = place.config(fields(2, "RANDOM"), json!([first, second]), "sources");
    config.train.steps = Some(60);
    train(&config, false, &mut ()).expect("trains on two tasks");
    let sources = place.adapter("sources");
    assert_eq!(sources["prefix_task_cols"].0, [2, 3, 2]);

    let first_loss = |start: &str, out: &str| {
        let mut watcher = Watcher::default();
        let config = place.config(fields(1, start), json!(second), out);
        train(&config, false, &mut watcher).expect("trains on one");
        watcher.losses[0]
    };
    let (known, anew) = (
        first_loss("EXACT_SOURCE_TASK", "exact"),
        first_loss("RANDOM", "anew"),
    );
    assert!(known < anew - 0.05, "{known} against {anew}");

    // Rows that do not say their task, and a task that is not there.
    for (data, named) in [
        (json!(second), "task"),
        (json!([first, second, first]), "0 to 1"),
    ] {
        let config = place.config(fields(2, "RANDOM"), data, "none");
        let error = train(&config, false, &mut ())
            .expect_err("refused")
            .to_string();
        assert!(error.contains(named), "{error}");
    }
}

/// Deep prompts trained over two sets of rows go on with a third of another number of classes; the head starts anew.
#[test]
fn deep_prompts_go_on_with_another_task() {
    let place = Place::new();
    let both = json!([
        place.rows("first.jsonl", 1, Some(2)),
        place.rows("second.jsonl", 9, Some(2))
    ]);
    let fields = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3});
    train(&place.config(fields, both, "both"), false, &mut ()).expect("trains on both");
    let third = json!(place.rows("third.jsonl", 4, Some(3)));
    let from = json!({"init_from": place.path("both")});
    let mut config = place.config(from, third, "third");
    config.train.learning_rate = 1e-12;
    let mut watcher = Watcher::default();
    train(&config, false, &mut watcher).expect("goes on");
    assert!(
        watcher
            .told
            .iter()
            .any(|t| t.contains("`score` starts anew")),
        "{:?}",
        watcher.told
    );
    let (before, after) = (place.adapter("both"), place.adapter("third"));
    assert_eq!(before["base_model.score.weight"].0, [2, 12]);
    assert_eq!(after["base_model.score.weight"].0, [3, 12]);
    assert_eq!(before["prompt_embeddings"].0, after["prompt_embeddings"].0);
    let gap = before["prompt_embeddings"]
        .1
        .iter()
        .zip(&after["prompt_embeddings"].1)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    assert!(gap < 1e-6, "{gap}");
    let config = read_adapter(&place.path("both"))
        .expect("an adapter")
        .config;
    assert_eq!(config["task_type"], "SEQ_CLS");
}

/// The mean over the text's labels and the context's, each with its weight, out of the model's own logits.
#[test]
fn labels_of_a_context_are_learned() {
    let config = ModelConfig::from_json(&llama()).expect("a configuration");
    let mut model = Model::from_config(&config, &LoadOptions::default()).expect("a model");
    let adapter = json!({"peft_type": "CPT", "cpt_token_ids": [4, 5, 6, 7], "cpt_tokens_type_mask": [2, 4, 6, 8],
        "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5});
    model
        .network_mut()
        .expect("free")
        .attach("a", &adapter, 0)
        .expect("attaches");
    let batch = Batch {
        ids: vec![1, 2, 3, 9, 8, 3],
        batch: 2,
        seq: 3,
        ..Batch::default()
    };
    let tokens = [-100, 2, 3, 9, -100, 3];
    let out = model
        .loss(&batch, &Labels::Tokens(tokens.to_vec()), &Pass::eval())
        .expect("a loss");
    let logits = model.logits(&batch, &Pass::eval()).expect("logits");
    let logits = logits.to_device(&Device::cpu()).and_then(|l| l.to_vec());
    let logits = logits.expect("values");
    let minus_log_prob = |row: usize, asked: usize, token: usize| {
        let at = (row * 7 + asked) * 23;
        let all = &logits[at..at + 23];
        let sum: f64 = all.iter().map(|&v| f64::from(v).exp()).sum();
        sum.ln() - f64::from(all[token])
    };
    let mut sum = 0.0;
    for row in 0..2 {
        // Position 1 of the context holds 5 (the earlier example), position 3 holds 7.
        sum += 0.25 * minus_log_prob(row, 0, 5) + 0.5 * minus_log_prob(row, 2, 7);
    }
    for (row, position, token) in [(0, 1, 2), (0, 2, 3), (1, 0, 9), (1, 2, 3)] {
        sum += minus_log_prob(row, 4 + position - 1, token);
    }
    assert_eq!(out.count, 8);
    let all = out.sum().expect("values");
    assert!((all - sum).abs() < 1e-4, "{all} {sum}");
    let loss = f64::from(out.loss.item().expect("a value"));
    assert!((loss - sum / 8.0).abs() < 1e-5, "{loss} {}", sum / 8.0);
    // Evaluation asks for the text alone.
    let scored = model
        .score(&batch, &Labels::Tokens(tokens.to_vec()), &Pass::eval())
        .expect("scores");
    assert_eq!(scored.len(), 4);
}
