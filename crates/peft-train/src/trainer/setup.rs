//! From a configuration to a run: data, task, model, adapter, in the order that finds a user's mistakes soonest.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use peft_core::{Error, Network, Pass, Result, Tensors};
use peft_io::resolve_model;
use peft_models::{Batch, Labels, LoadOptions, Model, ModelConfig, Task, Tokenizer};
use peft_tensor::{Device, IGNORE, RngKey, Tensor, no_grad};
use serde_json::{Value, json};

use super::{ADAPTER_NAME, Trainer, output};
use crate::config::{DataSection, ModelInit, TaskKind, TrainConfig};
use crate::data::{Dataset, EncodeOptions, Encoder, Example, LabelNames, RawData, RowKind};
use crate::{Observer, io};

/// Everything that `train` does before the first step.
pub(super) fn trainer<'a>(
    config: &'a TrainConfig,
    resume: bool,
    observer: &mut dyn Observer,
) -> Result<Trainer<'a>> {
    config.check()?;
    output::check_free(&config.output.dir, config.output.overwrite || resume)?;
    let raw = RawData::read_all(&config.data.train, config.data.format)?;
    let raw_eval = config
        .data
        .eval
        .as_ref()
        .map(|files| RawData::read_all(files, config.data.format))
        .transpose()?;
    let path = resolve_model(&config.model.path).map_err(io)?;
    let (task, labels) = task_and_labels(config, &raw, &path)?;
    let chosen = Device::choose(&config.device, config.precision()?, config.keep()?)?;
    if let Some(note) = &chosen.note {
        observer.message(note);
    }
    let mut model = load(config, &path, task, chosen.device)?;
    if let Some(note) = attach(config, &mut model)? {
        observer.message(&note);
    }
    let data = &config.data;
    let train = encode_for(&model, &raw, labels.as_ref(), data)?;
    let eval = raw_eval
        .map(|raw| encode_for(&model, &raw, labels.as_ref(), data))
        .transpose()?;
    check_tasks(
        &model,
        train
            .examples
            .iter()
            .chain(eval.iter().flat_map(|e| &e.examples)),
    )?;
    for note in train.notes.iter().chain(eval.iter().flat_map(|e| &e.notes)) {
        observer.message(note);
    }
    let (train, eval) = match data.eval_split {
        Some(share) => {
            let (train, eval) =
                train.split(share, RngKey::new(config.train.seed).fork("eval_split"))?;
            (train, Some(eval))
        }
        None => (train, eval),
    };
    let train = match data.packing {
        true => packed(config, &model, train, observer)?,
        false => train,
    };
    Ok(Trainer::new(config, model, train, eval, labels))
}

/// What rows are for: classes if they have some, otherwise tokens; and the number of classes.
///
/// `known` are names that are already fixed, an adapter's or a model's; they are used where they cover the data.
///
/// # Errors
/// Rows of both kinds, or classes that cannot be counted.
pub fn task_for(
    raw: &RawData,
    known: Option<LabelNames>,
    num_labels: Option<usize>,
) -> Result<(Task, Option<LabelNames>)> {
    if !raw.has_classes()? {
        return Ok((Task::CausalLm, None));
    }
    let known =
        known.filter(|names| names.cover(raw) && num_labels.is_none_or(|n| n == names.len()));
    let labels = match known {
        Some(names) => names,
        None => LabelNames::infer(raw, num_labels)?,
    };
    Ok((
        Task::SequenceClassification {
            num_labels: labels.len(),
        },
        Some(labels),
    ))
}

fn task_and_labels(
    config: &TrainConfig,
    raw: &RawData,
    path: &Path,
) -> Result<(Task, Option<LabelNames>)> {
    let has_classes = raw.has_classes()?;
    match config.model.task {
        Some(TaskKind::CausalLm) if has_classes => {
            let detail = format!(
                "\"causal_lm\", but the rows of {} have a `label`; leave it out or use \"sequence_classification\"",
                raw.files
            );
            return Err(Error::config("model.task", detail));
        }
        Some(TaskKind::SequenceClassification) if !has_classes => {
            let detail = format!(
                "\"sequence_classification\", but the rows of {} have no `label`",
                raw.files
            );
            return Err(Error::config("model.task", detail));
        }
        _ => {}
    }
    let adapter = match config.init_from()? {
        Some(folder) => LabelNames::read(&peft_io::resolve_adapter(folder).map_err(io)?)?,
        None => None,
    };
    let known = match adapter {
        Some(names) => Some(names),
        None => model_labels(path)?,
    };
    task_for(raw, known, config.model.num_labels)
}

/// The classes of a model that was saved as a classifier.
fn model_labels(path: &Path) -> Result<Option<LabelNames>> {
    let file = path.join("config.json");
    if !file.is_file() {
        return Ok(None);
    }
    let json = peft_io::read_json(&file).map_err(io)?;
    let classifier = json["architectures"][0]
        .as_str()
        .is_some_and(|name| name.ends_with("ForSequenceClassification"));
    if !classifier {
        return Ok(None);
    }
    // transformers writes no names for its default of two classes.
    let two = || LabelNames::new((0..2).map(|i| format!("LABEL_{i}")).collect());
    let stated = json.get("id2label").is_some() || json.get("num_labels").is_some();
    Ok(LabelNames::from_config(&json).or_else(|| (!stated).then(two)))
}

fn load(config: &TrainConfig, path: &Path, task: Task, device: Device) -> Result<Model> {
    let options = LoadOptions {
        task: Some(task),
        seed: config.train.seed,
        quantize: config.quantize()?,
        device,
        compact: true,
    };
    match config.model.init {
        ModelInit::Pretrained => Model::load(path, &options),
        ModelInit::Random => {
            let json = peft_io::read_json(&path.join("config.json")).map_err(io)?;
            let mut model = Model::from_config(&ModelConfig::from_json(&json)?, &options)?;
            if path.join("tokenizer.json").is_file() {
                model.set_tokenizer(Tokenizer::from_folder(path)?)?;
            }
            Ok(model)
        }
    }
}

/// Attaches what is to be trained; what a user should know of it comes back.
fn attach(config: &TrainConfig, model: &mut Model) -> Result<Option<String>> {
    let task = model.task();
    let network = model.network_mut()?;
    let Some(fields) = &config.adapter else {
        return network.train_base().map(|()| None);
    };
    let mut fields = fields.clone();
    fields.shift_remove("init_from");
    let mut defaults = vec![("base_model_name_or_path", json!(config.model.path))];
    match task {
        Task::CausalLm => defaults.push(("task_type", json!("CAUSAL_LM"))),
        Task::SequenceClassification { .. } => defaults.push(("task_type", json!("SEQ_CLS"))),
        Task::Features => {}
    }
    if fields.contains_key("peft_type") {
        check_fields(&fields)?;
    }
    let Some(folder) = config.init_from()? else {
        fill(&mut fields, defaults);
        return network
            .attach(ADAPTER_NAME, &Value::Object(fields), config.train.seed)
            .map(|()| None)
            .map_err(|e| e.context("[adapter]"));
    };
    let folder: PathBuf = peft_io::resolve_adapter(folder).map_err(io)?;
    let files = peft_io::read_adapter(&folder).map_err(io)?;
    let Value::Object(mut saved) = files.config else {
        return Err(Error::file(
            folder,
            "has no object in its adapter_config.json",
        ));
    };
    // What the run's file says counts, so that dropout may differ; what makes other parameters fails when they load.
    saved.extend(fields);
    // One that was trained without a head of its own goes on without.
    let heads = &network.tree().facts().task_heads;
    let brings_head = |head: &String| {
        let end = format!(".{head}.weight");
        files.tensors.keys().any(|key| key.ends_with(&end))
    };
    if !heads.iter().any(brings_head) {
        defaults.retain(|(field, value)| *field != "task_type" || value != "SEQ_CLS");
    }
    fill(&mut saved, defaults);
    let device = network.device().clone();
    let mut tensors = Tensors::new();
    for (key, (shape, values)) in files.tensors {
        tensors.insert(key, Tensor::from_vec(values, &shape, &device)?);
    }
    let fresh = renew_heads(network, &mut tensors)?;
    network
        .load(ADAPTER_NAME, &Value::Object(saved), tensors, true)
        .map_err(|e| e.context(format!("adapter.init_from = {}", folder.display())))?;
    let note = |heads: String| {
        format!(
            "`{heads}` starts anew: in {} it is for another number of classes",
            folder.display()
        )
    };
    Ok((!fresh.is_empty()).then(|| note(fresh.join("`, `"))))
}

/// Lets prompts refuse rows of tasks they do not have before anything is written.
fn check_tasks<'a>(model: &Model, rows: impl Iterator<Item = &'a Example>) -> Result<()> {
    let tasks: BTreeSet<Option<u32>> = rows.map(|row| row.task).collect();
    let ids: Option<Vec<u32>> = tasks.into_iter().collect();
    let count = ids.as_ref().map_or(1, Vec::len);
    let pass = Pass {
        task_ids: ids.map(Arc::new),
        ..Pass::eval()
    };
    no_grad(|| model.network().prompt(count, &pass)).map(drop)
}

/// The rows of `data.packing`. Model and adapter see two texts in one row first, so that they can refuse before anything
/// is written.
fn packed(
    config: &TrainConfig,
    model: &Model,
    train: Dataset,
    observer: &mut dyn Observer,
) -> Result<Dataset> {
    if model.task() != Task::CausalLm {
        let detail = "is for language models: a classifier reads one text a row";
        return Err(Error::config("data.packing", detail));
    }
    let task = train.examples.first().and_then(|e| e.task);
    try_sharing(model, task).map_err(|e| {
        let method = config.adapter.as_ref().and_then(|fields| {
            let entry = peft_core::entry_for(&Value::Object(fields.clone())).ok()?;
            Some(format!(" with {}", entry.title))
        });
        e.context(format!("data.packing{}", method.unwrap_or_default()))
    })?;
    let mut train = train.packed();
    if let Some(note) = train.notes.pop() {
        observer.message(&note);
    }
    Ok(train)
}

/// Shows model and adapters two texts in one row.
///
/// # Errors
/// If one of them cannot tell them apart.
pub(super) fn try_sharing(model: &Model, task: Option<u32>) -> Result<()> {
    let batch = Batch {
        ids: vec![0; 4],
        batch: 1,
        seq: 4,
        segments: Some(vec![0, 0, 1, 1]),
        task_ids: task.map(|t| vec![t]),
        ..Batch::default()
    };
    let labels = match model.task() {
        Task::SequenceClassification { .. } => Labels::Classes(vec![0, 0]),
        Task::CausalLm | Task::Features => Labels::Tokens(vec![IGNORE, 0, IGNORE, 0]),
    };
    let pass = Pass::train(RngKey::new(0));
    no_grad(|| model.loss(&batch, &labels, &pass)).map(drop)
}

/// Puts the model's own values for a classification head that was trained for another number of classes, and names it:
/// an adapter that learned one task is the start of another's.
fn renew_heads(network: &Network, tensors: &mut Tensors) -> Result<Vec<String>> {
    let mut fresh = Vec::new();
    let tree = network.tree();
    for head in &tree.facts().task_heads {
        let Some(id) = tree.get(head) else { continue };
        let info = tree.info(id);
        for (slot, name) in [("weight", &info.weight), ("bias", &info.bias)] {
            let Some(name) = name else { continue };
            let own = network.param(name)?;
            let end = format!(".{head}.{slot}");
            let of_head = tensors.iter_mut().filter(|(key, _)| key.ends_with(&end));
            for (_, value) in of_head.filter(|(_, value)| value.shape() != own.shape()) {
                *value = own.clone();
                if !fresh.contains(head) {
                    fresh.push(head.clone());
                }
            }
        }
    }
    Ok(fresh)
}

/// A field that no part of the method reads is a typing mistake here, though files may have them.
fn check_fields(fields: &serde_json::Map<String, Value>) -> Result<()> {
    let known = peft_core::known_fields(&Value::Object(fields.clone()))?;
    let Some(unknown) = fields.keys().find(|key| !known.contains(key)) else {
        return Ok(());
    };
    let near = peft_core::nearest(unknown, known.iter().map(String::as_str));
    let hint = if near.is_empty() {
        format!("known: {}", known.join(", "))
    } else {
        format!("nearest: {}", near.join(", "))
    };
    Err(Error::config(
        format!("adapter.{unknown}"),
        format!("is no field of this method; {hint}"),
    ))
}

fn fill(fields: &mut serde_json::Map<String, Value>, defaults: Vec<(&str, Value)>) {
    for (key, value) in defaults {
        if fields.get(key).is_none_or(Value::is_null) {
            fields.insert(key.to_owned(), value);
        }
    }
}

/// Encodes rows for a model: by its tokenizer and task, cut to `data.max_length` or, where positions are learnt, to those
/// the model has.
///
/// # Errors
/// As [`Dataset::encode`].
pub fn encode_for(
    model: &Model,
    raw: &RawData,
    labels: Option<&LabelNames>,
    data: &DataSection,
) -> Result<Dataset> {
    let shape = model.config();
    let network = model.network();
    let mut max_length = data.max_length;
    if shape.rope.is_none() {
        let taken = network.prompt_len() + network.prefix_len();
        max_length = max_length
            .min(shape.max_positions.saturating_sub(taken))
            .max(2);
    }
    let task = match model.task() {
        Task::SequenceClassification { .. } => TaskKind::SequenceClassification,
        Task::CausalLm | Task::Features => TaskKind::CausalLm,
    };
    let options = EncodeOptions {
        max_length,
        add_eos: data.add_eos,
        task,
        vocab_size: shape.vocab_size,
    };
    let tokenised = raw
        .rows
        .iter()
        .all(|row| matches!(row.kind, RowKind::Tokens { .. }));
    let loaded = match model.tokenizer() {
        Ok(tokenizer) => Some(tokenizer),
        Err(_) if tokenised => None,
        Err(e) => return Err(e.context("the data is text, which needs a tokenizer")),
    };
    let tokenizer = loaded.as_deref().map(|t| t as &dyn Encoder);
    Dataset::encode(raw, tokenizer, labels, &options)
}
