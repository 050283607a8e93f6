//! Against Hugging Face: models of `transformers`, adapters of `peft`, training curves of `torch`, from files alone.

use std::collections::BTreeSet;
use std::path::Path;

use peft::core::{Device, Pass, RngKey, Tensor};
use peft::io::read_json;
use peft::models::{Batch, Labels, LoadOptions, Model, Task};
use peft::train::{Observer, TrainConfig, train};
use peft_tests::compare::{close as close_all, same_bits, size, slopes};
use peft_tests::golden::{self, Case, batch, close, every, expected, json, logits, root, tensors};
use peft_tests::subject::told;
use serde_json::{Value, json as value};

/// What f32 leaves between two programs that sum in different orders, at logits of this size.
const LOGITS: f64 = 1e-4;

fn load(name: &str) -> Result<Model, String> {
    told(
        "load",
        Model::load(&root().join("models").join(name), &LoadOptions::default()),
    )
}

#[test]
fn base_models() {
    every("models", |name, folder| {
        let model = load(name)?;
        let inputs = json(&folder.join("inputs.json"))?;
        let wanted = tensors(&folder.join("expected.safetensors"))?;
        let output = if model.task() == Task::Features {
            "last_hidden_state"
        } else {
            "logits"
        };
        for (input, facts) in inputs.as_object().into_iter().flatten() {
            let batch = batch(facts)?;
            let want = expected(&wanted, &format!("{input}.{output}"))?;
            close(input, &batch, &logits(&model, &batch)?, &want, LOGITS)?;
        }
        Ok(())
    });
}

#[test]
fn adapted_outputs() {
    every("cases", |_, folder| {
        let case = Case::read(folder)?;
        let (mut model, adapter) = case.open()?;
        case.close(
            "adapted",
            &logits(&model, &case.batch)?,
            &case.expected("adapted")?,
            LOGITS,
        )?;
        let network = told("network", model.network_mut())?;
        told("set_active", network.set_active(&[]))?;
        case.close(
            "switched off",
            &logits(&model, &case.batch)?,
            &case.expected("base")?,
            LOGITS,
        )?;
        let network = told("network", model.network_mut())?;
        told("set_active", network.set_active(&[&adapter.name]))?;
        case.close(
            "switched on",
            &logits(&model, &case.batch)?,
            &case.expected("adapted")?,
            LOGITS,
        )
    });
}

/// Merged, the model computes what it did with the adapter beside it, and what Hugging Face's merge computes where that
/// one is right.
#[test]
fn merged_outputs() {
    every("cases", |_, folder| {
        let case = Case::read(folder)?;
        let (mut model, _) = case.open()?;
        let adapted = logits(&model, &case.batch)?;
        let merged = told("network", model.network_mut())?.merge();
        if case.facts["merge"] != value!(true) && merged.is_err() {
            return Ok(());
        }
        told("merge", merged)?;
        let out = logits(&model, &case.batch)?;
        // The same sums in another order.
        case.close(
            "merged against adapted",
            &out,
            &adapted,
            1e-5 * (1.0 + size(&adapted)?),
        )?;
        // Where it is not kept, it is the adapted output to `merge_gap`.
        if case.has("merged") {
            case.close(
                "merged against HF's",
                &out,
                &case.expected("merged")?,
                LOGITS,
            )?;
        }
        told("network", model.network_mut())?.unmerge();
        same_bits("unmerged", &logits(&model, &case.batch)?, &adapted)
    });
}

const WRAPPED: &[&str] = &[".modules_to_save.", ".original_module."];

/// Loaded and exported again, an adapter is the file it came from: keys, bits and configuration fields.
#[test]
fn exports() {
    every("cases", |_, folder| {
        let case = Case::read(folder)?;
        let (model, adapter) = case.open()?;
        let (config, out) = told("export", model.network().export(&adapter.name))?;
        let theirs = json(&case.adapter.join(peft::io::ADAPTER_CONFIG))?;
        let mut wanted = tensors(&case.adapter.join(peft::io::ADAPTER_WEIGHTS))?;
        // With `bias: "all"`, HF writes the biases of a module it saves whole two times over: as the wrapper's own and,
        // untrained, as the original's.
        if theirs["bias"] == "all" {
            wanted
                .retain(|key, _| out.contains_key(key) || !WRAPPED.iter().any(|w| key.contains(w)));
        }
        // Of a head whose start comes out of its weight HF writes what is left; here the start is subtracted beside the base.
        if theirs["init_lora_weights"] == "olora" {
            wanted.retain(|key, _| out.contains_key(key) || !key.ends_with(".base_layer.weight"));
        }
        let (got, want): (BTreeSet<_>, BTreeSet<_>) =
            (out.keys().collect(), wanted.keys().collect());
        if got != want {
            let missing: Vec<_> = want.difference(&got).collect();
            let extra: Vec<_> = got.difference(&want).collect();
            return Err(format!(
                "keys missing {missing:?}, keys HF does not write {extra:?}"
            ));
        }
        for key in wanted.keys() {
            same_bits(key, &out[key], &expected(&wanted, key)?)?;
        }
        let differences = config_differences(&config, &theirs);
        if differences.is_empty() {
            Ok(())
        } else {
            Err(differences.join("; "))
        }
    });
}

/// Fields that differ: all but the version that wrote them, with lists that HF keeps as sets compared as sets.
fn config_differences(ours: &Value, theirs: &Value) -> Vec<String> {
    const SETS: &[&str] = &[
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "feedforward_modules",
    ];
    let plain = |field: &str, config: &Value| {
        let mut found = config[field].clone();
        if let Value::Array(list) = &mut found
            && SETS.contains(&field)
        {
            list.sort_by_key(ToString::to_string);
        }
        found
    };
    let keys = |config: &Value| {
        config
            .as_object()
            .map(|m| m.keys().cloned().collect::<BTreeSet<_>>())
            .unwrap_or_default()
    };
    let all: BTreeSet<String> = keys(ours).union(&keys(theirs)).cloned().collect();
    all.into_iter()
        .filter(|field| !matches!(field.as_str(), "peft_version" | "auto_mapping"))
        .filter_map(|field| {
            let there = |config: &Value| {
                config.get(&field).map_or_else(
                    || "absent".to_owned(),
                    |_| plain(&field, config).to_string(),
                )
            };
            let (a, b) = (there(ours), there(theirs));
            (a != b).then(|| format!("{field} is {a}, HF writes {b}"))
        })
        .collect()
}

/// Modules that an adapter sits on, from its keys.
fn adapted_modules(model: &Model, name: &str) -> Result<BTreeSet<String>, String> {
    let (_, out) = told("export", model.network().export(name))?;
    let tree = model.network().tree();
    let modules = out.keys().filter_map(|key| {
        let path = key.strip_prefix("base_model.model.")?;
        tree.iter()
            .map(|(_, m)| &m.path)
            .filter(|p| {
                path.strip_prefix(p.as_str())
                    .is_some_and(|rest| rest.starts_with('.'))
            })
            .max_by_key(|p| p.len())
    });
    Ok(modules.cloned().collect())
}

/// `all-linear` and the defaults mean the modules that HF adapts.
#[test]
fn targets_of_real_models() {
    let facts = json(&root().join("matcher.json")).expect("matcher.json");
    let mut failed = Vec::new();
    for entry in facts["all_linear"].as_array().expect("a list") {
        let name = entry["model"].as_str().expect("a name");
        let wanted: BTreeSet<String> =
            serde_json::from_value(entry["expected"].clone()).expect("names");
        let check = || {
            let mut model = load(name)?;
            let config = value!({"peft_type": "LORA", "r": 1, "target_modules": "all-linear"});
            told(
                "attach",
                told("network", model.network_mut())?.attach("a", &config, 0),
            )?;
            let got = adapted_modules(&model, "a")?;
            if got == wanted {
                Ok(())
            } else {
                Err(format!("adapted are {got:?}"))
            }
        };
        failed.extend(check().err().map(|e| format!("all-linear on {name}: {e}")));
    }
    for (table, peft_type) in [
        ("default_targets", "LORA"),
        ("default_norm_targets", "LN_TUNING"),
    ] {
        for name in facts["all_linear"]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(|e| e["model"].as_str())
        {
            let check = || {
                let mut model = load(name)?;
                let wanted = &facts[table][&model.config().model_type];
                let attached = told("network", model.network_mut())?.attach(
                    "a",
                    &value!({"peft_type": peft_type}),
                    0,
                );
                // Where HF has no default, a method may have one.
                let Some(wanted) = wanted.as_array() else {
                    return Ok(());
                };
                told("attach", attached)?;
                let ends = |path: &str| {
                    wanted
                        .iter()
                        .filter_map(Value::as_str)
                        .any(|w| path == w || path.ends_with(&format!(".{w}")))
                };
                let wanted: BTreeSet<String> = model
                    .network()
                    .tree()
                    .iter()
                    .map(|(_, m)| m.path.clone())
                    .filter(|p| ends(p))
                    .collect();
                let got = adapted_modules(&model, "a")?;
                if got == wanted {
                    Ok(())
                } else {
                    Err(format!("adapted are {got:?}, not {wanted:?}"))
                }
            };
            failed.extend(check().err().map(|e| format!("{table} on {name}: {e}")));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

mod methods;
mod sloppy;

/// A run that reports nothing.
pub(crate) struct Quiet;

impl Observer for Quiet {}

/// Twenty steps of `torch.optim.AdamW` on the same adapter and data: the same losses, rates, norms and result.
#[test]
fn training_curves() {
    every("curves", |_, folder| {
        let facts = json(&folder.join("train.json"))?;
        let out = told("a folder", tempfile::tempdir())?;
        let path = |p: &Path| p.display().to_string();
        let model = facts["model"].as_str().ok_or("train.json names no model")?;
        let config = value!({
            "model": {"path": path(&root().join("models").join(model))},
            "adapter": {"init_from": path(&folder.join("adapter_init"))},
            "data": {"train": path(&folder.join("data.jsonl")), "shuffle": false},
            "train": {
                "steps": facts["steps"], "batch_size": facts["batch_size"],
                "gradient_accumulation": facts["gradient_accumulation"],
                "learning_rate": facts["learning_rate"], "weight_decay": facts["weight_decay"],
                "betas": facts["betas"], "eps": facts["eps"], "schedule": facts["schedule"],
                "warmup_steps": facts["warmup_steps"], "max_grad_norm": facts["max_grad_norm"],
            },
            "output": {"dir": path(&out.path().join("run"))},
        });
        let config = told("config", TrainConfig::from_value(&config))?;
        told("train", train(&config, false, &mut Quiet))?;
        same_run(&out.path().join("run"), folder)
    });
}

/// The run in `out` went as the golden one: every step's numbers, and the adapter at the end.
pub(crate) fn same_run(out: &Path, folder: &Path) -> Result<(), String> {
    let log = told(
        "metrics",
        std::fs::read_to_string(out.join("metrics.jsonl")),
    )?;
    let lines: Vec<Value> = told("metrics", log.lines().map(serde_json::from_str).collect())?;
    let steps: Vec<&Value> = lines.iter().filter(|l| l["loss"].is_number()).collect();
    let curve = told("curve", read_json(&folder.join("curve.json")))?;
    let curve = curve.as_array().ok_or("curve.json is no list")?;
    let facts = json(&folder.join("train.json"))?;
    let partial = facts["partial"] == value!(true);
    if steps.len() != curve.len() && !partial {
        return Err(format!(
            "{} steps were logged, {} wanted",
            steps.len(),
            curve.len()
        ));
    }
    for (got, want) in steps.iter().zip(curve) {
        for field in ["step", "loss", "penalty", "learning_rate", "grad_norm"] {
            if want.get(field).is_none() {
                continue;
            }
            let (Some(g), Some(w)) = (got[field].as_f64(), want[field].as_f64()) else {
                return Err(format!(
                    "{field} is {} in {got}, {} in {want}",
                    got[field], want[field]
                ));
            };
            if (g - w).abs() > 1e-3 * w.abs() {
                return Err(format!(
                    "step {}: {field} is {g}, torch has {w}",
                    want["step"]
                ));
            }
        }
    }
    if partial {
        return Ok(());
    }
    let (got, want) = (
        tensors(&out.join(peft::io::ADAPTER_WEIGHTS))?,
        tensors(&folder.join("adapter_final").join(peft::io::ADAPTER_WEIGHTS))?,
    );
    let (got_keys, want_keys): (Vec<_>, Vec<_>) = (got.keys().collect(), want.keys().collect());
    if got_keys != want_keys {
        return Err(format!(
            "the adapter's keys are {got_keys:?}, not {want_keys:?}"
        ));
    }
    // What a run draws is its own.
    let drawn: Vec<String> = serde_json::from_value(facts["drawn"].clone()).unwrap_or_default();
    want.keys()
        .filter(|key| !drawn.iter().any(|part| key.starts_with(part)))
        .try_for_each(|key| close_all(key, &expected(&got, key)?, &expected(&want, key)?, 1e-3))
}

/// A checkpoint's class decides the task.
#[test]
fn a_model_is_what_its_checkpoint_says() {
    let model = load("bert-cls").expect("loads");
    assert_eq!(model.task(), Task::SequenceClassification { num_labels: 3 });
    assert_eq!(load("bert").expect("loads").task(), Task::Features);
    assert_eq!(load("llama").expect("loads").task(), Task::CausalLm);
}

/// Padding does not leak: the unpadded rows of a padded batch give what they give alone.
#[test]
fn padding_changes_nothing() {
    every("models", |name, folder| {
        if name == "llama-rope-dynamic" {
            return Ok(()); // Its frequencies depend on the length of the batch, padding included.
        }
        let model = load(name)?;
        let inputs = json(&folder.join("inputs.json"))?;
        let padded = batch(inputs.get("right").ok_or("no padded input")?)?;
        let all = logits(&model, &padded)?;
        let mask = padded.mask.clone().ok_or("no mask")?;
        for row in 0..padded.batch {
            let cells = row * padded.seq..(row + 1) * padded.seq;
            let ids: Vec<u32> = cells
                .clone()
                .filter(|&i| mask[i])
                .map(|i| padded.ids[i])
                .collect();
            let alone = Batch::single(ids);
            let got = told(
                "logits",
                peft::tensor::no_grad(|| model.logits(&alone, &Pass::eval())),
            )?;
            let want = row_of(&all, row, alone.seq)?;
            golden::close(&format!("row {row} alone"), &alone, &got, &want, 2e-5)?;
        }
        Ok(())
    });
}

/// One row of a batch's output, cut to its tokens.
fn row_of(all: &Tensor, row: usize, seq: usize) -> Result<Tensor, String> {
    let one = told("row", all.narrow(0, row, 1))?;
    if one.rank() == 3 {
        told("row", one.narrow(1, 0, seq))
    } else {
        Ok(one)
    }
}

/// Labels for a batch of tokens: itself, or classes; None where the model has no loss.
fn labels(model: &Model, batch: &Batch) -> Option<Labels> {
    match model.task() {
        Task::CausalLm => Some(Labels::Tokens(
            batch.ids.iter().map(|&id| i64::from(id)).collect(),
        )),
        Task::SequenceClassification { num_labels } => Some(Labels::Classes(
            (0..batch.batch).map(|i| (i % num_labels) as u32).collect(),
        )),
        Task::Features => None,
    }
}

/// Recomputing layers in the backward pass gives the same loss and gradients.
#[test]
fn checkpointing_changes_nothing() {
    every("models", |name, folder| {
        let mut model = load(name)?;
        let config = value!({"peft_type": "LORA", "r": 2, "target_modules": "all-linear", "lora_dropout": 0.2, "init_lora_weights": false});
        told(
            "attach",
            told("network", model.network_mut())?.attach("a", &config, 1),
        )?;
        let inputs = json(&folder.join("inputs.json"))?;
        let batch = batch(inputs.get("right").ok_or("no padded input")?)?;
        let Some(labels) = labels(&model, &batch) else {
            return Ok(());
        };
        let run = |checkpoint: usize| {
            let pass = Pass {
                checkpoint,
                ..Pass::train(RngKey::new(3))
            };
            let loss = told("loss", model.loss(&batch, &labels, &pass))?.loss;
            Ok::<_, String>((loss.detach(), told("backward", loss.backward())?))
        };
        let ((plain, plain_grads), (again, again_grads)) = (run(0)?, run(usize::MAX)?);
        close_all("loss", &again, &plain, 1e-6)?;
        for param in model.network().parameters() {
            let value = param.tensor();
            let (Some(got), Some(want)) = (again_grads.get(&value), plain_grads.get(&value)) else {
                return Err(format!("{} got no gradient", param.key()));
            };
            close_all(param.key(), got, want, 1e-5)?;
        }
        Ok(())
    });
}

/// Full-parameter training: every parameter of every model gets a gradient, and it is the slope of the loss, in f64.
#[test]
fn gradients_of_real_models() {
    every("models", |name, folder| {
        let options = LoadOptions {
            device: Device::reference(),
            ..LoadOptions::default()
        };
        let mut model = told(
            "load",
            Model::load(&root().join("models").join(name), &options),
        )?;
        told(
            "train_base",
            told("network", model.network_mut())?.train_base(),
        )?;
        let inputs = json(&folder.join("inputs.json"))?;
        let batch = batch(inputs.get("right").ok_or("no padded input")?)?;
        let Some(labels) = labels(&model, &batch) else {
            return Ok(());
        };
        let loss = || told("loss", model.loss(&batch, &labels, &Pass::eval())).map(|l| l.loss);
        let grads = told("backward", loss()?.backward())?;
        for (at, param) in model.network().parameters().iter().enumerate() {
            let leaf = param.tensor();
            let Some(grad) = grads.get(&leaf) else {
                return Err(format!("{} got no gradient", param.key()));
            };
            slopes(param, grad, RngKey::new(at as u64), loss)?;
        }
        Ok(())
    });
}
