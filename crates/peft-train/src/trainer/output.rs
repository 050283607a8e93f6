//! What a run leaves: an adapter folder, or a whole model where the base itself was trained.

use std::collections::BTreeMap;
use std::path::Path;

use peft_core::{Error, Result};
use peft_io::{DType, NamedTensors, PlanEntry, SIDE_FILES, ShardPlan, StreamWriter};
use peft_models::{Model, Task};
use serde_json::{Value, json};

use super::{ADAPTER_NAME, holds_a_run, state::named};
use crate::config::TrainConfig;
use crate::data::{LABELS_FILE, LabelNames};
use crate::io;

/// Makes the output folder ready for a new run; one that holds a run is an error unless it may be replaced.
pub(super) fn clear(folder: &Path, checkpoints: &Path, replace: bool) -> Result<()> {
    check_free(folder, replace)?;
    peft_io::create_folder(folder).map_err(io)?;
    for name in peft_io::list_states(checkpoints).map_err(io)? {
        peft_io::remove_state(checkpoints, &name).map_err(io)?;
    }
    Ok(())
}

/// The check of [`clear`] alone, for before a model is loaded.
pub(super) fn check_free(folder: &Path, replace: bool) -> Result<()> {
    if folder.exists() && !folder.is_dir() {
        return Err(Error::config(
            "output.dir",
            format!("{} is a file", folder.display()),
        ));
    }
    if !replace && holds_a_run(folder) {
        let detail = format!(
            "{} holds a run; resume it, or set output.overwrite = true",
            folder.display()
        );
        return Err(Error::config("output.dir", detail));
    }
    Ok(())
}

/// Writes the result.
pub(super) fn write(
    config: &TrainConfig,
    model: &Model,
    labels: Option<&LabelNames>,
) -> Result<()> {
    let folder = &config.output.dir;
    let network = model.network();
    if network.adapters().contains(&ADAPTER_NAME) {
        if let Some(labels) = labels {
            labels.write(folder)?;
        }
        let (settings, tensors) = network.export(ADAPTER_NAME)?;
        let tensors: NamedTensors = tensors
            .iter()
            .map(|(key, tensor)| Ok((key.clone(), named(tensor)?)))
            .collect::<Result<_>>()?;
        let integers = network.integer_keys(ADAPTER_NAME)?;
        return peft_io::write_adapter_with(folder, &settings, &tensors, &integers).map_err(io);
    }
    write_model(config, model, labels)
}

/// A folder in Hugging Face's layout, tensor by tensor.
fn write_model(config: &TrainConfig, model: &Model, labels: Option<&LabelNames>) -> Result<()> {
    let params = model.network().parameters();
    let entries = params
        .iter()
        .map(|p| PlanEntry {
            name: p.key().to_owned(),
            shape: p.shape().to_vec(),
            dtype: DType::F32,
        })
        .collect();
    let plan = ShardPlan::new(entries, 5_000_000_000).map_err(io)?;
    // Whether the folder may be replaced was decided before the run began.
    let writer =
        StreamWriter::create(&config.output.dir, &plan, &BTreeMap::new(), true).map_err(io)?;
    for param in &params {
        let values = param.tensor().to_vec()?;
        peft_io::check_finite(param.key(), &values).map_err(io)?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer.write(param.key(), &bytes).map_err(io)?;
    }
    let settings = serde_json::to_vec_pretty(&model_config(model, labels))
        .map_err(|e| Error::other(format!("cannot write config.json: {e}")))?;
    writer.add_file("config.json", &settings).map_err(io)?;
    if let Some(labels) = labels {
        let text = format!("{:#}\n", labels.to_json());
        writer.add_file(LABELS_FILE, text.as_bytes()).map_err(io)?;
    }
    for (name, bytes) in side_files(config, model)? {
        writer.add_file(&name, &bytes).map_err(io)?;
    }
    writer.finish().map_err(io)
}

/// Tokenizer and generation files of the model's folder.
fn side_files(config: &TrainConfig, model: &Model) -> Result<Vec<(String, Vec<u8>)>> {
    let given = Path::new(&config.model.path);
    let folder = model.folder().or_else(|| given.is_dir().then_some(given));
    let Some(folder) = folder else {
        // A GGUF has its tokenizer inside; without one there is nothing to write.
        let Ok(tokenizer) = model.tokenizer() else {
            return Ok(Vec::new());
        };
        return Ok(tokenizer
            .files()?
            .into_iter()
            .map(|(name, bytes)| (name.to_owned(), bytes))
            .collect());
    };
    let there = SIDE_FILES.iter().filter(|name| folder.join(name).is_file());
    there
        .map(|name| {
            Ok((
                (*name).to_owned(),
                peft_io::read_bytes(&folder.join(name)).map_err(io)?,
            ))
        })
        .collect()
}

/// `config.json` of the trained model.
fn model_config(model: &Model, labels: Option<&LabelNames>) -> Value {
    let mut json = model.config().json().clone();
    let Some(map) = json.as_object_mut() else {
        return json;
    };
    map.insert("dtype".to_owned(), json!("float32"));
    map.shift_remove("torch_dtype");
    map.shift_remove("quantization_config");
    let class = match (model.config().model_type.as_str(), model.task()) {
        ("gpt2", Task::CausalLm) => "GPT2LMHeadModel".to_owned(),
        (kind, task) => {
            let head = match task {
                Task::CausalLm => "ForCausalLM",
                Task::SequenceClassification { .. } => "ForSequenceClassification",
                Task::Features => "Model",
            };
            format!("{}{head}", class_name(kind))
        }
    };
    map.insert("architectures".to_owned(), json!([class]));
    if let Task::SequenceClassification { num_labels } = model.task() {
        map.shift_remove("num_labels");
        let names = labels.map(LabelNames::to_json);
        let names = names.unwrap_or_else(|| {
            LabelNames::new((0..num_labels).map(|i| format!("LABEL_{i}")).collect()).to_json()
        });
        for key in ["id2label", "label2id"] {
            map.insert(key.to_owned(), names[key].clone());
        }
    }
    json
}

/// How transformers spells a `model_type` in class names.
fn class_name(model_type: &str) -> String {
    match model_type {
        "gpt2" => "GPT2".to_owned(),
        other => {
            let mut letters = other.chars();
            letters
                .next()
                .map(|first| first.to_uppercase().chain(letters).collect())
                .unwrap_or_default()
        }
    }
}
