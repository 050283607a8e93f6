//! Adapter files as people have them: with more in them than the method needs, or written by other versions.

use peft::core::Device;
use peft::io::{AdapterFiles, read_adapter};
use peft::models::{LoadOptions, Model};
use peft::ops::tensors_of;
use peft::train::{TrainConfig, train};
use peft_tests::compare::Check;
use peft_tests::golden::{Case, logits, root};
use peft_tests::subject::told;
use serde_json::json;

use crate::{LOGITS, Quiet};

/// A case's model with what an edit makes of its adapter.
fn edited(name: &str, edit: impl FnOnce(&mut AdapterFiles)) -> Result<(Case, Model), String> {
    let case = Case::read(&root().join("cases").join(name))?;
    let mut files = told("adapter", read_adapter(&case.adapter))?;
    edit(&mut files);
    let mut model = told("model", Model::load(&case.model, &LoadOptions::default()))?;
    let tensors = told("tensors", tensors_of(files.tensors, &Device::cpu()))?;
    told(
        "load",
        told("network", model.network_mut())?.load("a", &files.config, tensors, true),
    )?;
    Ok((case, model))
}

fn same(name: &str, edit: impl FnOnce(&mut AdapterFiles)) -> Check {
    let (case, model) = edited(name, edit)?;
    case.close(
        name,
        &logits(&model, &case.batch)?,
        &case.expected("adapted")?,
        LOGITS,
    )
}

fn refused(name: &str, reason: &str, edit: impl FnOnce(&mut AdapterFiles)) -> Check {
    match edited(name, edit) {
        Err(message) if message.contains(reason) => Ok(()),
        Err(message) => Err(format!("{name} is refused for {message:?}, not {reason:?}")),
        Ok(_) => Err(format!("{name} is taken")),
    }
}

/// Embeddings that come whole beside an adapter are not trained, leave a tied pair tied, and have to be the model's size.
#[test]
fn whole_embeddings() {
    for name in ["llama-embed", "llama-tied-saved-embed"] {
        let (_, model) = edited(name, |_| ()).expect(name);
        let network = model.network();
        for param in network.parameters().iter().filter(|p| p.is_trainable()) {
            assert!(param.key().contains("lora_"), "{} is trained", param.key());
        }
        assert!(!network.unties(), "{name}");
        let longer = |files: &mut AdapterFiles| {
            let whole = |key: &String| {
                key.ends_with("embed_tokens.weight")
                    || key.ends_with("embed_tokens.base_layer.weight")
            };
            let key = files
                .tensors
                .keys()
                .find(|key| whole(key))
                .expect("whole")
                .clone();
            let (shape, values) = files.tensors.get_mut(&key).expect("there");
            values.extend(vec![0.0; shape[1]]);
            shape[0] += 1;
        };
        refused(name, "another vocabulary", longer).expect(name);
    }
}

/// Rows of a tied pair may come under both of its names, if they are the same.
#[test]
fn rows_of_both_sides() {
    let twice = |by: f32| {
        move |files: &mut AdapterFiles| {
            let key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
            let (shape, mut values) = files.tensors[key].clone();
            values[0] += by;
            let other = key
                .replace("model.embed_tokens", "lm_head")
                .replace("base_model.model.model.", "base_model.model.");
            files.tensors.insert(other, (shape, values));
        }
    };
    same("llama-tied-tokens-list", twice(0.0)).expect("the same rows");
    refused(
        "llama-tied-tokens-list",
        "lm_head.token_adapter",
        twice(1.0),
    )
    .expect("other rows");
}

/// DoRA's magnitude as a module's weight: instead of the plain key, or beside it.
#[test]
fn magnitudes_with_weight_in_their_keys() {
    for name in ["llama-dora", "gpt2-dora-wpe"] {
        for beside in [false, true] {
            let rename = |files: &mut AdapterFiles| {
                for (key, value) in std::mem::take(&mut files.tensors) {
                    if key.ends_with("lora_magnitude_vector") {
                        files.tensors.insert(format!("{key}.weight"), value.clone());
                        if !beside {
                            continue;
                        }
                    }
                    files.tensors.insert(key, value);
                }
            };
            same(name, rename).expect(name);
        }
    }
}

/// Settings of a training that is over do not keep its adapter from being used.
#[test]
fn settings_of_the_past() {
    let set = |field: &'static str, value: serde_json::Value| {
        move |files: &mut AdapterFiles| files.config[field] = value
    };
    same("llama-qv", set("init_lora_weights", json!("eva"))).expect("EVA");
    same("llama-qv", set("init_lora_weights", json!(null))).expect("null");
    same("llama-qv", set("layers_pattern", json!(""))).expect("no pattern");
    // HF's default of `target_r` is above a rank of 5.
    same("llama-adalora", set("target_r", json!(8))).expect("a target above the rank");
    let mut model =
        Model::load(&root().join("models/llama"), &LoadOptions::default()).expect("loads");
    let fresh =
        json!({"peft_type": "ADALORA", "init_r": 5, "target_r": 8, "target_modules": ["q_proj"]});
    let error = model
        .network_mut()
        .expect("free")
        .attach("a", &fresh, 0)
        .expect_err("a mistake");
    assert!(error.to_string().contains("target_r"), "{error}");
}

/// HF's mean over the factors' distances from orthonormal ones counts those of modules that nothing is left of.
#[test]
fn the_penalty_of_a_pruned_adapter() {
    let case = Case::read(&root().join("cases/llama-adalora-pruned")).expect("a case");
    let files = read_adapter(&case.adapter).expect("an adapter");
    let (mut sum, mut factors) = (0.0, 0);
    for (key, (shape, values)) in &files.tensors {
        let (rows, cols) = match shape[..] {
            [_, _] if key.ends_with("lora_A") => (shape[0], shape[1]),
            [_, _] if key.ends_with("lora_B") => (shape[1], shape[0]),
            _ => continue,
        };
        factors += 1;
        let at = |row: usize, col: usize| {
            f64::from(if key.ends_with("lora_A") {
                values[row * cols + col]
            } else {
                values[col * rows + row]
            })
        };
        let product = |i: usize, j: usize| {
            (0..cols).map(|c| at(i, c) * at(j, c)).sum::<f64>() - f64::from(u8::from(i == j))
        };
        let squares = (0..rows * rows).map(|n| product(n / rows, n % rows).powi(2));
        sum += squares.sum::<f64>().sqrt();
    }
    let wanted = 0.5 * sum / f64::from(factors);
    let out = tempfile::tempdir().expect("a folder");
    let path = |p: &std::path::Path| p.display().to_string();
    std::fs::write(
        out.path().join("rows.jsonl"),
        "{\"input_ids\": [5, 9, 3, 7]}\n",
    )
    .expect("written");
    let config = json!({
        "model": {"path": path(&case.model)},
        "adapter": {"init_from": path(&case.adapter)},
        "data": {"train": path(&out.path().join("rows.jsonl"))},
        "train": {"steps": 1, "batch_size": 1},
        "output": {"dir": path(&out.path().join("run"))},
    });
    train(
        &TrainConfig::from_value(&config).expect("a config"),
        false,
        &mut Quiet,
    )
    .expect("runs");
    let log = std::fs::read_to_string(out.path().join("run/metrics.jsonl")).expect("a log");
    let step: serde_json::Value =
        serde_json::from_str(log.lines().next().expect("a line")).expect("JSON");
    let got = step["penalty"].as_f64().expect("a penalty");
    assert!((got - wanted).abs() < 1e-4 * wanted, "{got}, not {wanted}");
}
