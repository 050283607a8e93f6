//! Merging adapters into a checkpoint, tensor by tensor: the base stays mapped, and what is in memory is, for each
//! thread, the module being merged or one piece of a tensor being copied.

mod config;
mod plan;
mod quantize;
mod rest;
mod side;
mod write;

use std::cmp::Reverse;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use peft_core::serde_json::Value;
use peft_core::{Error, Result};
use peft_io::{ShardPlan, StreamWriter};
use peft_tensor::WeightFormat;
use peft_train::LabelNames;

use super::Subject;
use plan::{Output, Source};
pub use quantize::{QuantizeOptions, QuantizeReport, quantize};

/// What a change is added to where the base is quantised.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Onto {
    /// The base as it is: where it is quantised, the values its codes stand for, which the adapter was trained on.
    #[default]
    AsIs,
    /// The same, and the base has to be quantised.
    Dequantized,
    /// The weights from before the quantisation, in this model: better ones, that the adapter has not seen.
    Original(String),
}

/// Element type of a merged checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MergeDType {
    /// Each tensor's own; where it is quantised, f32 in a GGUF and the type of the other tensors in a folder.
    #[default]
    Keep,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit floats.
    F16,
}

impl MergeDType {
    /// The names `--dtype` takes.
    pub const NAMES: [&str; 4] = ["keep", "f32", "bf16", "f16"];

    fn format(self) -> Option<WeightFormat> {
        match self {
            Self::Keep => None,
            Self::F32 => Some(WeightFormat::F32),
            Self::Bf16 => Some(WeightFormat::BF16),
            Self::F16 => Some(WeightFormat::F16),
        }
    }
}

impl FromStr for MergeDType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "keep" => Ok(Self::Keep),
            "f32" | "float32" => Ok(Self::F32),
            "bf16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "float16" => Ok(Self::F16),
            _ => Err(Error::config(
                "dtype",
                format!("{text:?} is not one of {}", Self::NAMES.join(", ")),
            )),
        }
    }
}

/// How to merge.
#[derive(Clone, Debug)]
pub struct MergeOptions {
    /// What the change is added to.
    pub onto: Onto,
    /// Element type of the result.
    pub dtype: MergeDType,
    /// Bytes of the largest file.
    pub max_shard_size: u64,
    /// Whether a checkpoint or an adapter in a target folder may be replaced.
    pub overwrite: bool,
    /// Where an adapter of a composition's members that cannot be merged goes; without, all have to be.
    pub rest: Option<PathBuf>,
}

impl Default for MergeOptions {
    /// The base as it is, own types, 5 GB, nothing replaced.
    fn default() -> Self {
        Self {
            onto: Onto::AsIs,
            dtype: MergeDType::Keep,
            max_shard_size: 5_000_000_000,
            overwrite: false,
            rest: None,
        }
    }
}

/// What was written.
#[derive(Clone, Debug)]
pub struct MergeReport {
    /// The new checkpoint.
    pub folder: PathBuf,
    /// Tensors in it.
    pub tensors: usize,
    /// Modules whose parameters the adapters changed.
    pub changed: usize,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// All files, tensors first.
    pub files: Vec<String>,
    /// Whether a tied pair of embeddings was untied.
    pub untied: bool,
    /// The adapter of what could not be merged, for this checkpoint.
    pub rest: Option<PathBuf>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Merges adapters, in the order given, into a model and writes the result to `output` as a Hugging Face folder.
/// `progress` is told (tensors written, tensors in all).
///
/// # Errors
/// If model or adapters cannot be read or do not fit, an adapter or a member of one is no change of weights (members may
/// stay where `options.rest` says where), a parameter is not finite,
/// or the result cannot be written; nothing is left in `output` then.
pub fn merge(
    model: &str,
    adapters: &[String],
    output: &Path,
    options: &MergeOptions,
    progress: impl FnMut(usize, usize) + Send,
) -> Result<MergeReport> {
    let mut notes = Vec::new();
    let (mut subject, opened) = match &options.onto {
        Onto::Original(original) => {
            let (subject, opened) = Subject::with_adapters(original, adapters, false)?;
            check_original(&subject, model)?;
            (subject, opened)
        }
        Onto::AsIs | Onto::Dequantized => Subject::with_adapters(model, adapters, false)?,
    };
    refuse(&subject, output)?;
    if opened.iter().any(|adapter| same(&adapter.folder, output)) {
        let detail = "is the folder of an adapter; write the merged model elsewhere";
        return Err(Error::file(output, detail));
    }
    let folder = options.rest.as_deref();
    if folder.is_some_and(|folder| folder == output || same(folder, output)) {
        let detail = "has to be another folder than the merged model's";
        return Err(Error::config("rest", detail));
    }
    let rest = rest::set_aside(&mut subject, &opened, folder, options.overwrite)?;
    match (&options.onto, subject.is_quantised()) {
        (Onto::AsIs, true) => notes.push(
            "the base is quantised: the change is added to the values its codes stand for; \
             `--onto original --base MODEL` adds it to the weights from before"
                .to_owned(),
        ),
        (Onto::Dequantized, false) => {
            let detail =
                "\"dequantized\" is for a quantised base, and this one is not: leave it out";
            return Err(Error::config("onto", detail));
        }
        _ => {}
    }
    let network = subject.network();
    network.check_mergeable()?;
    check_places(&subject)?;
    let untied = network.unties();
    let outputs = plan::outputs(&subject, untied, options.dtype)?;
    let entries = outputs.iter().map(|o| o.entry.clone()).collect();
    let shards = ShardPlan::new(entries, options.max_shard_size)?;
    let writer = StreamWriter::create(output, &shards, &Default::default(), options.overwrite)?;
    write_all(&writer, &subject, &outputs, progress)?;

    let mut files = shards.file_names();
    if files.len() > 1 {
        files.push("model.safetensors.index.json".to_owned());
    }
    notes.extend(rest.iter().flat_map(|r| r.notes.clone()));
    if let (Some(folder), None) = (folder, &rest) {
        let folder = folder.display();
        notes.push(format!(
            "all of it is merged: there is no rest to write to {folder}"
        ));
    }
    if subject.config.is_object() {
        let mut labels = None;
        for adapter in opened.iter().rev() {
            labels = labels.or(LabelNames::read(&adapter.folder)?);
        }
        let config = config::merged(&subject, &shards, untied, labels)?;
        add(&writer, &mut files, "config.json", &config)?;
    } else {
        notes.push("the model has no config.json, so the result has none".to_owned());
    }
    files.extend(side::add(&writer, &subject, &mut notes)?);
    let rest = rest.map(|rest| rest.write(network, output)).transpose()?;
    writer.finish()?;
    Ok(MergeReport {
        folder: output.to_owned(),
        tensors: outputs.len(),
        changed: network.changed_modules().len(),
        bytes: shards.total_size(),
        files,
        untied,
        rest,
        notes,
    })
}

/// Writes every tensor, several at a time, the largest first, so that threads end together.
fn write_all(
    writer: &StreamWriter,
    subject: &Subject,
    outputs: &[Output],
    progress: impl FnMut(usize, usize) + Send,
) -> Result<()> {
    let (changed, copied): (Vec<&Output>, Vec<&Output>) = outputs
        .iter()
        .partition(|o| matches!(o.source, Source::Merged(_)));
    let values = |o: &&Output| o.entry.shape.iter().product::<usize>();
    let mut work: Vec<&[&Output]> = changed.chunk_by(|a, b| a.source == b.source).collect();
    work.extend(copied.chunks(1));
    work.sort_by_key(|group| Reverse(group.iter().map(values).sum::<usize>()));
    let next = AtomicUsize::new(0);
    let watch = Mutex::new((0, progress));
    let step = |n: usize| {
        let mut watch = watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.0 += n;
        let done = watch.0;
        (watch.1)(done, outputs.len());
    };
    step(0);
    let worker = |_: rayon::BroadcastContext<'_>| -> std::result::Result<(), (usize, Error)> {
        let mut pieces = write::Pieces::default();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(group) = work.get(at) else {
                return Ok(());
            };
            let written = match group {
                [output] if !matches!(output.source, Source::Merged(_)) => {
                    write::copied(writer, subject, output, &mut pieces)
                }
                group => write::merged(writer, subject, group, &mut pieces),
            };
            if let Err(error) = written {
                // The others begin nothing new.
                next.store(work.len(), Ordering::Relaxed);
                return Err((at, error));
            }
            step(group.len());
        }
    };
    let ends = rayon::broadcast(worker).into_iter();
    // What comes before a failure was begun before it, so the first in order is the same for any timing.
    let first = ends
        .filter_map(std::result::Result::err)
        .min_by_key(|(at, _)| *at);
    first.map_or(Ok(()), |(_, error)| Err(error))
}

fn add(writer: &StreamWriter, files: &mut Vec<String>, name: &str, value: &Value) -> Result<()> {
    writer.add_file(name, format!("{value:#}\n").as_bytes())?;
    files.push(name.to_owned());
    Ok(())
}

/// Whether two paths lead to one place.
fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// What makes a merge pointless or harmful from the start.
fn refuse(subject: &Subject, output: &Path) -> Result<()> {
    let folder = if subject.path.is_dir() {
        Some(subject.path.as_path())
    } else {
        subject.path.parent()
    };
    if folder.is_some_and(|folder| same(folder, output)) {
        return Err(Error::file(
            output,
            "is the folder of the base model; write the merged one elsewhere",
        ));
    }
    if output.is_file() {
        return Err(Error::file(output, "is a file; give a folder"));
    }
    if subject.checkpoint.gguf().is_some() && subject.model().is_none() {
        let detail =
            "its architecture is not known, so its tensors cannot be given Hugging Face's names";
        return Err(Error::file(&subject.path, detail));
    }
    Ok(())
}

/// The weights from before a quantisation have to be those of the same model.
fn check_original(original: &Subject, model: &str) -> Result<()> {
    let quantised = Subject::open(model, &[], &Default::default())?;
    let fail = |detail: String| Err(Error::file(&original.path, detail));
    if original.is_quantised() {
        return fail("its weights are quantised themselves: give the model from before".to_owned());
    }
    if !quantised.is_quantised() {
        return fail(format!(
            "is given as the original of {model}, which is not quantised: leave it out"
        ));
    }
    let (ours, theirs) = (original.network().tree(), quantised.network().tree());
    for (_, module) in theirs.iter() {
        let same = ours
            .get(&module.path)
            .is_some_and(|id| ours.info(id).weight_shape() == module.weight_shape());
        if module.weight.is_some() && !same {
            return fail(format!(
                "is not the original of {model}: `{}` is missing or of another size",
                module.path
            ));
        }
    }
    Ok(())
}

/// Every changed module has a parameter that the change can go into.
fn check_places(subject: &Subject) -> Result<()> {
    let network = subject.network();
    for id in network.changed_modules() {
        if network.tree().info(id).weight.is_none() {
            network.merged(id, None, None)?;
        }
    }
    Ok(())
}
