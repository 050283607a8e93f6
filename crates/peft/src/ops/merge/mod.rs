//! Merging adapters into a checkpoint, tensor by tensor: the base stays mapped, and what is in memory is, for each
//! thread, the module being merged or one piece of a tensor being copied.

mod config;
mod plan;
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

/// Element type of a merged checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MergeDType {
    /// Each tensor's own; f32 where a GGUF has it quantised.
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
#[derive(Clone, Copy, Debug)]
pub struct MergeOptions {
    /// Element type of the result.
    pub dtype: MergeDType,
    /// Bytes of the largest file.
    pub max_shard_size: u64,
    /// Whether a checkpoint in the target folder may be replaced.
    pub overwrite: bool,
}

impl Default for MergeOptions {
    /// Own types, 5 GB, nothing replaced.
    fn default() -> Self {
        Self {
            dtype: MergeDType::Keep,
            max_shard_size: 5_000_000_000,
            overwrite: false,
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
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Merges adapters, in the order given, into a model and writes the result to `output` as a Hugging Face folder.
/// `progress` is told (tensors written, tensors in all).
///
/// # Errors
/// If model or adapters cannot be read or do not fit, an adapter is no change of weights, a parameter is not finite,
/// or the result cannot be written; nothing is left in `output` then.
pub fn merge(
    model: &str,
    adapters: &[String],
    output: &Path,
    options: &MergeOptions,
    progress: impl FnMut(usize, usize) + Send,
) -> Result<MergeReport> {
    let (subject, opened) = Subject::with_adapters(model, adapters, false)?;
    refuse(&subject, output)?;
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
    let mut notes = Vec::new();
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
    writer.finish()?;
    Ok(MergeReport {
        folder: output.to_owned(),
        tensors: outputs.len(),
        changed: network.changed_modules().len(),
        bytes: shards.total_size(),
        files,
        untied,
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
    let worker = |_: rayon::BroadcastContext<'_>| -> Result<()> {
        while let Some(group) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let written = match group {
                [output] if !matches!(output.source, Source::Merged(_)) => {
                    write::copied(writer, subject, output)
                }
                group => write::merged(writer, subject, group),
            };
            // The first error ends the others' work too.
            written.inspect_err(|_| next.store(work.len(), Ordering::Relaxed))?;
            step(group.len());
        }
        Ok(())
    };
    rayon::broadcast(worker).into_iter().collect()
}

fn add(writer: &StreamWriter, files: &mut Vec<String>, name: &str, value: &Value) -> Result<()> {
    writer.add_file(name, format!("{value:#}\n").as_bytes())?;
    files.push(name.to_owned());
    Ok(())
}

/// What makes a merge pointless or harmful from the start.
fn refuse(subject: &Subject, output: &Path) -> Result<()> {
    let folder = if subject.path.is_dir() {
        Some(subject.path.as_path())
    } else {
        subject.path.parent()
    };
    let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
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
    if subject
        .config
        .get("quantization_config")
        .is_some_and(|q| !q.is_null())
    {
        let detail = "its weights are quantised (`quantization_config` in config.json); merge into the original";
        return Err(Error::file(&subject.path, detail));
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
