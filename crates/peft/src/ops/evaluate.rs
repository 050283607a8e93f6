//! Measuring a model with adapters on a file of rows.

use std::path::Path;

use peft_core::{Device, Result};
use peft_models::{LoadOptions, Model, Quantize, Task};
use peft_train::config::{DataFormat, DataSection};
use peft_train::{
    Dataset, EvalOptions, EvalReport, LabelNames, Observer, RawData, VoteReport, encode_for,
    task_for,
};

use super::compose::{Compose, read_all};
use super::open::{OpenedAdapter, config_json, open_composed, task_of_adapters};

/// What to measure on.
#[derive(Clone, Debug)]
pub struct EvaluateOptions {
    /// Where to run.
    pub device: Device,
    /// Longest row in tokens.
    pub max_length: usize,
    /// Only the first rows.
    pub limit: Option<usize>,
    /// The task of rows that do not say theirs, for methods that learn several.
    pub task: Option<u32>,
    /// How several adapters combine; with [`Compose::Parallel`], call it once for each.
    pub compose: Compose,
    /// Format to bring the linear layers of the blocks into; None = as they are stored.
    pub quantize: Option<Quantize>,
    /// Batches and choices.
    pub eval: EvalOptions,
}

/// Loss, perplexity and accuracy of a model with adapters on it. Classes are named as the adapter's `labels.json` or
/// the model's `config.json` says, or else as the data does.
///
/// # Errors
/// If model, adapters or data cannot be read or do not fit each other; a bad row is named by its line.
pub fn evaluate(
    model: &str,
    adapters: &[String],
    data: &Path,
    options: &EvaluateOptions,
    observer: &mut dyn Observer,
) -> Result<EvalReport> {
    let (model, dataset, _) = prepared(model, adapters, data, options, observer)?;
    peft_train::evaluate(&model, &dataset, &options.eval, observer)
}

/// Lets adapters of one task vote on every row; all of them see it in one batch.
///
/// # Errors
/// As [`evaluate`], or if the adapters cannot share a batch.
pub fn vote(
    model: &str,
    adapters: &[String],
    data: &Path,
    options: &EvaluateOptions,
    observer: &mut dyn Observer,
) -> Result<VoteReport> {
    let (model, dataset, opened) = prepared(model, adapters, data, options, observer)?;
    let names: Vec<&str> = opened.iter().map(|o| o.name.as_str()).collect();
    peft_train::vote(&model, &dataset, &names, &options.eval, observer)
}

/// The model with its adapters, and the rows encoded for it.
fn prepared(
    model: &str,
    adapters: &[String],
    data: &Path,
    options: &EvaluateOptions,
    observer: &mut dyn Observer,
) -> Result<(Model, Dataset, Vec<OpenedAdapter>)> {
    let mut raw = RawData::read(data, DataFormat::Auto)?;
    if let Some(limit) = options.limit {
        raw.rows.truncate(limit);
    }
    if let Some(task) = options.task {
        raw.set_task(task);
    }
    let files = read_all(adapters, options.compose)?;
    let config = config_json(&peft_io::resolve_model(model)?);
    let mut known = None;
    for (_, file) in files.iter().rev() {
        known = known.or(LabelNames::read(&file.folder)?);
    }
    let classifier = |c: &&peft_core::serde_json::Value| {
        c["architectures"][0]
            .as_str()
            .is_some_and(|name| name.ends_with("ForSequenceClassification"))
    };
    let known = known.or_else(|| {
        config
            .as_ref()
            .filter(classifier)
            .and_then(LabelNames::from_config)
    });
    let trained_for = task_of_adapters(files.iter().map(|(_, f)| f), config.as_ref())?;
    let num_labels = match trained_for {
        Some(Task::SequenceClassification { num_labels }) => Some(num_labels),
        _ => known.as_ref().map(LabelNames::len),
    };
    let (task, labels) = task_for(&raw, known, num_labels)?;
    let load = LoadOptions {
        task: Some(task),
        device: options.device.clone(),
        quantize: options.quantize,
        ..LoadOptions::default()
    };
    let (model, opened) = open_composed(model, adapters, options.compose, &load)?;
    let section = DataSection {
        max_length: options.max_length,
        ..DataSection::default()
    };
    let dataset = encode_for(&model, &raw, labels.as_ref(), &section)?;
    dataset.notes.iter().for_each(|note| observer.message(note));
    Ok((model, dataset, opened))
}
