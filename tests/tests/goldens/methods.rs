//! What methods beside the foundation's promise of Hugging Face's: fresh adapters, and training with their own rules.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use peft::core::{Device, Error, Tensor, Tensors};
use peft::io::read_tensors;
use peft::models::{LoadOptions, Model, Tokenizer};
use peft::train::config::DataFormat;
use peft::train::{ADAPTER_NAME, RawData, TrainConfig, Trainer, encode_for, train};
use peft_tests::compare::{Check, close};
use peft_tests::golden::{every, expected, json, root, tensors};
use peft_tests::subject::told;
use serde_json::{Value, json as value};

use crate::{Quiet, same_run};

fn load(facts: &Value) -> Result<Model, String> {
    let name = facts["model"].as_str().ok_or("no model is named")?;
    told(
        "load",
        Model::load(&root().join("models").join(name), &LoadOptions::default()),
    )
}

/// A fresh adapter has HF's keys and shapes, and HF's values where no seed of the run decides them.
#[test]
fn initial_values() {
    every("initial", |_, folder| {
        let facts = json(&folder.join("case.json"))?;
        let mut model = load(&facts)?;
        let mut config = facts["config"].clone();
        for (field, path) in config.as_object_mut().into_iter().flatten() {
            if field.ends_with("_path")
                && let Some(relative) = path.as_str()
            {
                let file = root().join(relative);
                if file.is_dir() {
                    let tokenizer = told("tokenizer", Tokenizer::from_folder(&file))?;
                    told("tokenizer", model.set_tokenizer(tokenizer))?;
                }
                *path = file.display().to_string().into();
            }
        }
        let network = told("network", model.network_mut())?;
        network.set_tensors(Arc::new(|path: &str| read_file(Path::new(path))));
        told("attach", network.attach("a", &config, 5))?;
        let (_, out) = told("export", model.network().export("a"))?;
        let shapes: BTreeMap<String, Vec<usize>> =
            told("shapes", serde_json::from_value(facts["shapes"].clone()))?;
        let ours: BTreeMap<String, Vec<usize>> = out
            .iter()
            .map(|(key, t)| (key.clone(), t.shape().to_vec()))
            .collect();
        if ours != shapes {
            return Err(format!("keys and shapes are {ours:?}, HF has {shapes:?}"));
        }
        let same = tensors(&folder.join("same.safetensors"))?;
        same.keys()
            .try_for_each(|key| close(key, &out[key], &expected(&same, key)?, 1e-6))
    });
}

/// The tensors of one file.
fn read_file(path: &Path) -> peft::Result<(Value, Tensors)> {
    let all = read_tensors(path).map_err(|e| Error::other(e.to_string()))?;
    let made = all
        .into_iter()
        .map(|(key, (shape, values))| Ok((key, Tensor::from_vec(values, &shape, &Device::cpu())?)));
    Ok((Value::Null, made.collect::<peft::Result<_>>()?))
}

fn config_of(
    facts: &Value,
    adapter: &Path,
    folder: &Path,
    out: &Path,
) -> Result<TrainConfig, String> {
    let path = |p: &Path| p.display().to_string();
    let model = facts["model"].as_str().ok_or("train.json names no model")?;
    let mut fields = facts["adapter_fields"].clone();
    if facts["fresh"] != value!(true) {
        fields["init_from"] = path(adapter).into();
    }
    let config = value!({
        "model": {"path": path(&root().join("models").join(model))},
        "adapter": fields,
        "data": {"train": path(&folder.join("data.jsonl")), "shuffle": false},
        "train": {
            "steps": facts["steps"], "batch_size": facts["batch_size"],
            "gradient_accumulation": facts["gradient_accumulation"],
            "learning_rate": facts["learning_rate"], "weight_decay": facts["weight_decay"],
            "betas": facts["betas"], "eps": facts["eps"], "schedule": facts["schedule"],
            "warmup_steps": facts["warmup_steps"], "max_grad_norm": facts["max_grad_norm"],
        },
        "output": {"dir": path(out)},
    });
    told("config", TrainConfig::from_value(&config))
}

/// A few steps with a method's own optimiser, schedule, encoder or mask, HF's or worked out apart: the same losses, rates,
/// norms and result.
#[test]
fn method_runs() {
    every("runs", |_, folder| {
        let facts = json(&folder.join("train.json"))?;
        let out = told("a folder", tempfile::tempdir())?;
        let run = out.path().join("run");
        let config = config_of(&facts, &folder.join("adapter_init"), folder, &run)?;
        if folder.join("encoder_init.safetensors").is_file() {
            with_encoder(&facts, &config, folder)?;
        } else {
            told("train", train(&config, false, &mut Quiet))?;
        }
        same_run(&run, folder)?;
        same_choices(&run, folder)
    });
}

/// A prompt that an encoder makes: HF's file has the prompt alone, so that the encoder's weights are given apart.
fn with_encoder(facts: &Value, config: &TrainConfig, folder: &Path) -> Check {
    let mut model = load(facts)?;
    let mut fields = json(&folder.join("adapter_init").join(peft::io::ADAPTER_CONFIG))?;
    fields["inference_mode"] = false.into();
    let network = told("network", model.network_mut())?;
    told("attach", network.attach(ADAPTER_NAME, &fields, 0))?;
    let weights = tensors(&folder.join("encoder_init.safetensors"))?;
    for name in weights.keys() {
        let params = network.parameters();
        let param = params
            .iter()
            .find(|p| p.key().ends_with(&format!(".{name}")))
            .ok_or_else(|| format!("no parameter for HF's {name}"))?;
        told(name, param.set(expected(&weights, name)?))?;
    }
    if network.parameters().len() != weights.len() {
        let keys: Vec<_> = network
            .parameters()
            .iter()
            .map(|p| p.key().to_owned())
            .collect();
        return Err(format!(
            "parameters are {keys:?}, HF has {:?}",
            weights.keys()
        ));
    }
    let raw = told(
        "data",
        RawData::read(&folder.join("data.jsonl"), DataFormat::Auto),
    )?;
    let rows = told("data", encode_for(&model, &raw, None, &config.data))?;
    let mut trainer = Trainer::new(config, model, rows, None, None);
    told("train", trainer.run(false, &mut Quiet))?;
    Ok(())
}

/// What a run decides and writes into its configuration.
fn same_choices(run: &Path, folder: &Path) -> Check {
    let theirs = folder.join("adapter_final").join(peft::io::ADAPTER_CONFIG);
    if !theirs.is_file() {
        return Ok(());
    }
    let (ours, theirs) = (json(&run.join(peft::io::ADAPTER_CONFIG))?, json(&theirs)?);
    for field in ["rank_pattern", "shared_modules"] {
        let (got, want) = (&ours[field], &theirs[field]);
        if !want.is_null() && got != want {
            return Err(format!("{field} is {got}, should be {want}"));
        }
    }
    Ok(())
}
