//! What models promise beyond single numbers: caching, recomputing, losses, names of checkpoints, errors.

mod rows;

use std::path::{Path, PathBuf};

use peft_core::serde_json::{Value, json};
use peft_core::{Pass, RngKey};
use peft_models::{Batch, GenerateOptions, IGNORE, Labels, LoadOptions, Model, ModelConfig, Task};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens/models")
        .join(name)
}

fn load(name: &str) -> Model {
    Model::load(&golden(name), &LoadOptions::default()).unwrap()
}

fn classify(name: &str, num_labels: usize, seed: u64) -> Model {
    let task = Some(Task::SequenceClassification { num_labels });
    Model::load(
        &golden(name),
        &LoadOptions {
            task,
            seed,
            ..LoadOptions::default()
        },
    )
    .unwrap()
}

/// A small configuration with every kind of layer that differs between architectures.
fn tiny(model_type: &str) -> ModelConfig {
    let mut json = json!({
        "model_type": model_type, "vocab_size": 53, "hidden_size": 16, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "max_position_embeddings": 64, "initializer_range": 0.2, "sliding_window": 3,
    });
    if model_type == "gpt2" {
        json = json!({"model_type": "gpt2", "vocab_size": 53, "n_embd": 16, "n_layer": 2, "n_head": 4,
            "n_positions": 64, "initializer_range": 0.2});
    }
    if model_type == "bert" {
        json = json!({"model_type": "bert", "vocab_size": 53, "hidden_size": 16, "intermediate_size": 20,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64});
    }
    ModelConfig::from_json(&json).unwrap()
}

fn fresh(model_type: &str, seed: u64) -> Model {
    Model::from_config(
        &tiny(model_type),
        &LoadOptions {
            seed,
            ..LoadOptions::default()
        },
    )
    .unwrap()
}

fn ids(seed: u64, n: usize, vocab: u64) -> Vec<u32> {
    (0..n as u64)
        .map(|i| RngKey::new(seed).below(i, vocab) as u32)
        .collect()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

const CAUSAL: [&str; 8] = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2",
];

#[test]
fn cached_generation_is_the_plain_forward_pass() {
    for (seed, name) in CAUSAL.iter().enumerate() {
        let model = fresh(name, seed as u64);
        let prompt = ids(seed as u64, 5, 53);
        let options = GenerateOptions {
            max_new_tokens: 12,
            ..GenerateOptions::default()
        };
        let (tokens, _) = model
            .generate_ids(&prompt, &options, &mut |_| Ok(true))
            .unwrap();
        let mut all = prompt;
        for &token in &tokens {
            let logits = model
                .logits(&Batch::single(all.clone()), &Pass::eval())
                .unwrap();
            let last = logits
                .narrow(1, all.len() - 1, 1)
                .unwrap()
                .to_vec()
                .unwrap();
            let best = last.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert!(
                last[token as usize] >= best - 1e-4,
                "{name}: {token} after {all:?}"
            );
            all.push(token);
        }
        assert_eq!(tokens.len(), 12, "{name}");
    }
}

#[test]
fn sampling_is_a_function_of_the_seed() {
    let model = fresh("llama", 1);
    let draw = |seed: u64| {
        let options = GenerateOptions {
            max_new_tokens: 20,
            temperature: 1.0,
            seed,
            ..GenerateOptions::default()
        };
        model
            .generate_ids(&[1, 2, 3], &options, &mut |_| Ok(true))
            .unwrap()
            .0
    };
    assert_eq!(draw(5), draw(5));
    assert_ne!(draw(5), draw(6));
    let options = GenerateOptions {
        max_new_tokens: 20,
        ..GenerateOptions::default()
    };
    let mut given = 0;
    let stopped = model.generate_ids(&[1], &options, &mut |_| {
        given += 1;
        Ok(given < 3)
    });
    assert_eq!(stopped.unwrap().0.len(), 3);
    let hot = GenerateOptions {
        temperature: f32::NAN,
        ..options
    };
    assert!(
        model
            .generate_ids(&[1], &hot, &mut |_| Ok(true))
            .unwrap_err()
            .to_string()
            .contains("temperature")
    );
}

#[test]
fn gradients_do_not_depend_on_checkpointing() {
    for (seed, name) in ["llama", "gemma2", "phi3", "qwen3", "gpt2"]
        .iter()
        .enumerate()
    {
        let mut model = fresh(name, 7 + seed as u64);
        model.network_mut().unwrap().train_base().unwrap();
        let tokens = ids(3, 2 * 9, 53);
        let labels = tokens.iter().map(|&t| i64::from(t)).collect();
        let batch = Batch {
            ids: tokens,
            batch: 2,
            seq: 9,
            mask: None,
            task_ids: None,
            segments: None,
            shared: 0,
        };
        let labels = Labels::Tokens(labels);
        let run = |checkpoint: usize| {
            let pass = Pass {
                checkpoint,
                ..Pass::train(RngKey::new(0))
            };
            let out = model.loss(&batch, &labels, &pass).unwrap();
            let value = out.loss.item().unwrap();
            (value, out.loss.backward().unwrap())
        };
        let ((plain, a), (recomputed, b)) = (run(0), run(usize::MAX));
        assert_eq!(plain, recomputed, "{name}");
        let parameters = model.network().parameters();
        assert!(!parameters.is_empty());
        for p in parameters {
            let leaf = p.tensor();
            let (Some(a), Some(b)) = (a.get(&leaf), b.get(&leaf)) else {
                panic!("{name}: no gradient for {}", p.key())
            };
            let (a, b) = (a.to_vec().unwrap(), b.to_vec().unwrap());
            assert!(worst(&a, &b) < 1e-5, "{name} {}", p.key());
            // A key bias shifts a row's scores alike, which the softmax does not see; unused positions get nothing.
            let flat = p.key().contains("k_proj.bias") || p.key().contains("c_attn.bias");
            assert!(flat || a.iter().any(|&g| g != 0.0), "{name} {}", p.key());
        }
    }
}

#[test]
fn the_loss_is_the_mean_over_labelled_tokens_after_the_shift() {
    let model = load("qwen2");
    let (b, s) = (3, 7);
    let tokens = ids(11, b * s, 79);
    let mut labels: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    labels[2] = IGNORE;
    labels[s..2 * s].fill(IGNORE);
    let batch = Batch {
        ids: tokens,
        batch: b,
        seq: s,
        mask: None,
        task_ids: None,
        segments: None,
        shared: 0,
    };
    let logits = model
        .logits(&batch, &Pass::eval())
        .unwrap()
        .to_vec()
        .unwrap();
    let (mut sum, mut count, mut correct) = (0.0f64, 0, 0);
    for row in 0..b {
        for at in 1..s {
            let label = labels[row * s + at];
            if label == IGNORE {
                continue;
            }
            let place = (row * s + at - 1) * 79;
            let values: Vec<f64> = logits[place..place + 79]
                .iter()
                .map(|&v| f64::from(v))
                .collect();
            let total: f64 = values.iter().map(|v| v.exp()).sum();
            sum += total.ln() - values[label as usize];
            correct += usize::from(values.iter().all(|&v| v <= values[label as usize]));
            count += 1;
        }
    }
    let out = model
        .loss(&batch, &Labels::Tokens(labels.clone()), &Pass::eval())
        .unwrap();
    assert_eq!((out.count, out.correct), (count, correct));
    assert!(
        (out.sum().unwrap() - sum).abs() < 1e-3
            && (f64::from(out.loss.item().unwrap()) - sum / count as f64).abs() < 1e-4
    );
    let scored = model
        .score(&batch, &Labels::Tokens(labels), &Pass::eval())
        .unwrap();
    assert_eq!(scored.len(), count);
    let total: f64 = scored.iter().map(|s| f64::from(-s.log_prob)).sum();
    assert!((total - sum).abs() < 1e-3);
    assert!(scored.iter().all(|s| s.position > 0 && s.row != 1));
    let none = model
        .loss(&batch, &Labels::Tokens(vec![IGNORE; b * s]), &Pass::eval())
        .unwrap();
    assert_eq!((none.count, none.loss.item().unwrap()), (0, 0.0));
}

#[test]
fn a_long_batch_is_scored_in_pieces_that_add_up() {
    let model = fresh("llama", 2);
    let tokens = ids(1, 10 * 60, 53);
    let labels: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    let whole = Batch {
        ids: tokens.clone(),
        batch: 10,
        seq: 60,
        mask: None,
        task_ids: None,
        segments: None,
        shared: 0,
    };
    let all = model
        .loss(&whole, &Labels::Tokens(labels.clone()), &Pass::eval())
        .unwrap();
    assert_eq!(all.count, 590);
    let mut sum = 0.0;
    for (row, labels) in tokens.chunks(60).zip(labels.chunks(60)) {
        let part = model
            .loss(
                &Batch::single(row.to_vec()),
                &Labels::Tokens(labels.to_vec()),
                &Pass::eval(),
            )
            .unwrap();
        sum += part.sum().unwrap();
    }
    let all = all.sum().unwrap();
    assert!((all - sum).abs() < 1e-2, "{all} {sum}");
}

#[test]
fn an_encoder_without_a_head_gets_one_by_seed() {
    let (a, again, b) = (
        classify("bert", 4, 1),
        classify("bert", 4, 1),
        classify("bert", 4, 2),
    );
    let batch = Batch::padded(&[ids(1, 6, 93), ids(2, 9, 93)], 0);
    let logits = |m: &Model| m.logits(&batch, &Pass::eval()).unwrap().to_vec().unwrap();
    assert_eq!(logits(&a).len(), 8);
    assert_eq!(logits(&a), logits(&again));
    assert_ne!(logits(&a), logits(&b));
    assert!(
        a.network()
            .tree()
            .get("bert.encoder.layer.1.attention.self.query")
            .is_some()
    );
    assert_eq!(a.network().tree().facts().task_heads, ["classifier"]);
    // The encoder under it is the stored one.
    let hidden = a.forward(&batch, &Pass::eval()).unwrap().to_vec().unwrap();
    assert_eq!(
        hidden,
        load("bert")
            .logits(&batch, &Pass::eval())
            .unwrap()
            .to_vec()
            .unwrap()
    );
    // And the other way round: the classifier's file as a bare encoder.
    let features = LoadOptions {
        task: Some(Task::Features),
        ..LoadOptions::default()
    };
    let bare = Model::load(&golden("bert-cls"), &features).unwrap();
    assert!(
        bare.network()
            .tree()
            .get("encoder.layer.0.output.dense")
            .is_some()
    );
    assert_eq!(
        bare.forward(&batch, &Pass::eval()).unwrap().shape(),
        [2, 9, 24]
    );
    let other = LoadOptions {
        task: Some(Task::SequenceClassification { num_labels: 5 }),
        ..LoadOptions::default()
    };
    let error = Model::load(&golden("bert-cls"), &other)
        .unwrap_err()
        .to_string();
    assert!(error.contains("classifier.weight"), "{error}");
}

#[test]
fn a_decoder_reads_the_label_from_the_last_token_that_is_no_padding() {
    for name in ["llama", "gpt2"] {
        let model = classify(name, 3, 5);
        let (short, long) = (ids(4, 4, 60), ids(5, 8, 60));
        let alone = model
            .logits(&Batch::single(short.clone()), &Pass::eval())
            .unwrap()
            .to_vec()
            .unwrap();
        let padded = Batch::padded(&[short.clone(), long.clone()], 0);
        assert!(padded.mask.is_some());
        let both = model
            .logits(&padded, &Pass::eval())
            .unwrap()
            .to_vec()
            .unwrap();
        assert!(worst(&both[..3], &alone) < 1e-5, "{name}");
        let labels = Labels::Classes(vec![2, 0]);
        let out = model.loss(&padded, &labels, &Pass::eval()).unwrap();
        assert_eq!(out.count, 2);
        assert!(
            model
                .loss(&padded, &Labels::Classes(vec![0, 3]), &Pass::eval())
                .is_err()
        );
        assert!(
            model
                .loss(&padded, &Labels::Tokens(vec![0; 16]), &Pass::eval())
                .is_err()
        );
    }
}

#[test]
fn junctions_attention_and_heads_are_in_the_tree() {
    let paths = |model: &Model| -> Vec<String> {
        model
            .network()
            .tree()
            .iter()
            .map(|(_, m)| m.path.clone())
            .collect()
    };
    let llama = paths(&load("llama"));
    for path in [
        "model.layers.2.attention_adapters",
        "model.layers.0.output_adapters",
        "model.layers.1.self_attn",
        "lm_head",
    ] {
        assert!(llama.iter().any(|p| p == path), "{path}");
    }
    let bert = paths(&load("bert-cls"));
    for path in [
        "bert.encoder.layer.0.attention.output",
        "bert.encoder.layer.1.output",
        "bert.pooler",
        "classifier",
    ] {
        assert!(bert.iter().any(|p| p == path), "{path}");
    }
    assert!(
        paths(&load("gpt2"))
            .iter()
            .any(|p| p == "transformer.h.0.attn.c_attn")
    );
    let facts = load("llama-tied").network().tree().facts().clone();
    assert!(facts.tied && facts.output_embedding.as_deref() == Some("lm_head"));
}

#[test]
fn configurations_say_what_is_wrong() {
    let base = json!({"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2});
    let with = |field: &str, value: Value| {
        let mut json = base.clone();
        json[field] = value;
        ModelConfig::from_json(&json)
    };
    assert!(ModelConfig::from_json(&base).is_ok());
    for (field, value, says) in [
        ("model_type", json!("mamba"), "qwen2"),
        ("hidden_size", json!("wide"), "hidden_size"),
        ("hidden_size", json!(null), "missing"),
        ("hidden_size", json!(9), "does not divide"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        ("num_key_value_heads", json!(0), "num_key_value_heads"),
        ("num_key_value_heads", json!(3), "does not divide"),
        (
            "num_hidden_layers",
            json!(1_000_000_000_u64),
            "num_hidden_layers",
        ),
        ("vocab_size", json!(-1), "vocab_size"),
        ("head_dim", json!(3), "rotated"),
        ("hidden_act", json!("mish"), "silu"),
        ("rope_parameters", json!({"rope_type": "spiral"}), "llama3"),
        ("rope_parameters", json!({"rope_type": "linear"}), "factor"),
        (
            "rope_scaling",
            json!({"type": "llama3", "factor": 8.0}),
            "low_freq_factor",
        ),
        ("rope_theta", json!(0.0), "rope_theta"),
    ] {
        let error = with(field, value.clone())
            .err()
            .unwrap_or_else(|| panic!("{field} = {value}"))
            .to_string();
        assert!(error.contains(says), "{field} = {value}: {error}");
    }
    assert!(ModelConfig::from_json(&json!([1])).is_err());
}

#[test]
fn batches_say_what_is_wrong() {
    let model = fresh("gpt2", 0);
    let refused = |batch: Batch, says: &str| {
        let error = model.logits(&batch, &Pass::eval()).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    };
    refused(Batch::single(vec![]), "no tokens");
    refused(Batch::single(vec![53]), "beyond the vocabulary");
    refused(Batch::single(vec![1; 65]), "64 positions");
    refused(
        Batch {
            seq: 3,
            ..Batch::single(vec![1, 2])
        },
        "ids for",
    );
    refused(
        Batch {
            mask: Some(vec![true]),
            ..Batch::single(vec![1, 2])
        },
        "attention_mask",
    );
    refused(
        Batch {
            task_ids: Some(vec![0, 0]),
            segments: None,
            shared: 0,
            ..Batch::single(vec![1, 2])
        },
        "task_ids",
    );
}

#[test]
fn every_weight_that_does_not_fit_is_listed_at_once() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        golden("llama").join("model.safetensors"),
        folder.path().join("model.safetensors"),
    )
    .unwrap();
    let mut config = peft_io::read_json(&golden("llama").join("config.json")).unwrap();
    config["num_hidden_layers"] = json!(4);
    config["intermediate_size"] = json!(45);
    peft_io::write_json(&folder.path().join("config.json"), &config).unwrap();
    let error = Model::load(folder.path(), &LoadOptions::default())
        .unwrap_err()
        .to_string();
    for name in [
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ] {
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn embeddings_that_differ_are_not_tied_whatever_the_configuration_says() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(
        golden("llama").join("model.safetensors"),
        folder.path().join("model.safetensors"),
    )
    .unwrap();
    let mut config = peft_io::read_json(&golden("llama").join("config.json")).unwrap();
    config["tie_word_embeddings"] = json!(true);
    peft_io::write_json(&folder.path().join("config.json"), &config).unwrap();
    let model = Model::load(folder.path(), &LoadOptions::default()).unwrap();
    assert!(!model.config().tied && !model.network().tree().facts().tied);
    assert_eq!(model.config().json()["tie_word_embeddings"], false);
    let batch = Batch::single(vec![1, 2, 3]);
    let logits = |m: &Model| m.logits(&batch, &Pass::eval()).unwrap().to_vec().unwrap();
    assert_eq!(logits(&model), logits(&load("llama")));
}

#[test]
fn fresh_models_start_as_hugging_faces() {
    let a = fresh("gpt2", 3);
    let dense = |m: &Model, name: &str| {
        m.network()
            .base()
            .weight(name)
            .unwrap()
            .to_dense()
            .unwrap()
            .to_vec()
            .unwrap()
    };
    let std = |v: &[f32]| (v.iter().map(|x| f64::from(x * x)).sum::<f64>() / v.len() as f64).sqrt();
    assert!((std(&dense(&a, "transformer.h.0.attn.c_attn.weight")) - 0.2).abs() < 0.03);
    // 0.2 / sqrt(2 layers * 2)
    assert!((std(&dense(&a, "transformer.h.1.mlp.c_proj.weight")) - 0.1).abs() < 0.02);
    assert!(
        dense(&a, "transformer.ln_f.weight")
            .iter()
            .all(|&v| v == 1.0)
    );
    assert!(dense(&a, "transformer.ln_f.bias").iter().all(|&v| v == 0.0));
    assert!(
        dense(&fresh("gemma", 3), "model.norm.weight")
            .iter()
            .all(|&v| v == 0.0)
    );
    let (b, c) = (fresh("gpt2", 3), fresh("gpt2", 4));
    let name = "transformer.wte.weight";
    assert_eq!(dense(&a, name), dense(&b, name));
    assert_ne!(dense(&a, name), dense(&c, name));
    let bert = Model::from_config(&tiny("bert"), &LoadOptions::default()).unwrap();
    assert_eq!(bert.task(), Task::Features);
    let causal = LoadOptions {
        task: Some(Task::CausalLm),
        ..LoadOptions::default()
    };
    assert!(Model::from_config(&tiny("bert"), &causal).is_err());
}
