//! Which tensors a merged checkpoint has, in which form, and where each comes from.

use std::collections::{HashMap, HashSet};

use peft_core::{Error, ModuleId, ModuleKind, Result};
use peft_io::{DType, PlanEntry, StoredFormat};
use peft_models::Task;
use peft_tensor::WeightFormat;

use super::MergeDType;
use crate::ops::Subject;

/// Where a tensor comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A module that adapters change: its weight and bias come from one merge.
    Merged(ModuleId),
    /// A stored tensor of this name, as it is.
    Stored(String),
    /// A base parameter of this name that is stored in another form, or not at all (a fresh head).
    Base(String, ModuleId),
}

/// One tensor of the result.
#[derive(Clone, Debug)]
pub(super) struct Output {
    /// Name, shape and element type.
    pub(super) entry: PlanEntry,
    pub(super) source: Source,
    /// Whether it is its module's bias.
    pub(super) bias: bool,
}

/// The tensors of the result: those of the module tree in its order, then what the checkpoint has besides.
pub(super) fn outputs(subject: &Subject, untied: bool, dtype: MergeDType) -> Result<Vec<Output>> {
    let network = subject.network();
    let tree = network.tree();
    let features = subject.model().is_some_and(|m| m.task() == Task::Features);
    let mut outputs: Vec<Output> = Vec::new();
    let mut taken: HashSet<String> = HashSet::new();
    let mut index: HashMap<String, usize> = HashMap::new();
    for (id, info) in tree.iter() {
        let changed = network.changes(id);
        let own = [(&info.weight, false), (&info.bias, true)];
        for (parameter, bias) in own
            .into_iter()
            .filter_map(|(name, bias)| Some((name.as_ref()?, bias)))
        {
            let stored = subject
                .stored_name(parameter)
                .or_else(|| tied_name(subject, parameter));
            let name = match index.get(parameter) {
                // Without a head the stored names are kept: which class they are for is not the merge's to decide.
                None if features => stored.clone().unwrap_or_else(|| parameter.clone()),
                None => parameter.clone(),
                // The other side of a tied pair, which gets its own tensor only if the two part ways.
                Some(_) if untied => {
                    format!("{}.{}", info.path, if bias { "bias" } else { "weight" })
                }
                Some(&first) => {
                    if changed
                        && matches!(outputs[first].source, Source::Stored(_) | Source::Base(..))
                    {
                        outputs[first].source = Source::Merged(id);
                    }
                    continue;
                }
            };
            let shape = if bias {
                vec![info.out_features]
            } else {
                stored_shape(subject, stored.as_deref(), id)
            };
            let element = element_of(subject, stored.as_deref(), parameter, dtype);
            let source = match (&stored, changed) {
                (_, true) => Source::Merged(id),
                (Some(stored), false) if turned(subject, stored, id) => {
                    taken.insert(stored.clone());
                    Source::Base(parameter.clone(), id)
                }
                (Some(stored), false) => Source::Stored(stored.clone()),
                (None, false) => Source::Base(parameter.clone(), id),
            };
            taken.extend(stored);
            index.insert(parameter.clone(), outputs.len());
            outputs.push(Output {
                entry: PlanEntry {
                    name,
                    shape,
                    dtype: element,
                },
                source,
                bias,
            });
        }
    }
    if subject.checkpoint.gguf().is_none() || subject.model().is_none() {
        outputs.extend(besides(subject, &taken, &outputs, dtype)?);
    }
    Ok(outputs)
}

/// Stored tensors that no module names: buffers, modules of kinds the tree does not show. A stored copy of a tied
/// output embedding is left out, as it would contradict the merged one.
fn besides(
    subject: &Subject,
    taken: &HashSet<String>,
    have: &[Output],
    dtype: MergeDType,
) -> Result<Vec<Output>> {
    let facts = subject.network().tree().facts();
    let tied_copy = facts
        .output_embedding
        .as_ref()
        .filter(|_| facts.tied)
        .map(|path| format!("{path}.weight"));
    let names: HashSet<&str> = have.iter().map(|o| o.entry.name.as_str()).collect();
    let mut more = Vec::new();
    for (name, meta) in subject.checkpoint.metas() {
        if taken.contains(name) || names.contains(name.as_str()) || tied_copy.as_ref() == Some(name)
        {
            continue;
        }
        let element = element(meta.format, dtype).ok_or_else(|| {
            Error::file(
                &subject.path,
                format!(
                    "tensor `{name}` is stored as {}, which cannot be written",
                    meta.format
                ),
            )
        })?;
        let entry = PlanEntry {
            name: name.clone(),
            shape: meta.shape.clone(),
            dtype: element,
        };
        more.push(Output {
            entry,
            source: Source::Stored(name.clone()),
            bias: false,
        });
    }
    Ok(more)
}

/// The name an input embedding is stored under when only the tied output embedding is there.
fn tied_name(subject: &Subject, parameter: &str) -> Option<String> {
    let facts = subject.network().tree().facts();
    let embedding = facts.input_embedding.as_ref().filter(|_| facts.tied)?;
    let output = facts.output_embedding.as_ref()?;
    if parameter == format!("{embedding}.weight") {
        subject.stored_name(&format!("{output}.weight"))
    } else {
        None
    }
}

/// Whether a weight is not stored in the layout of Hugging Face's class: bitsandbytes turns those of GPT-2.
fn turned(subject: &Subject, stored: &str, id: ModuleId) -> bool {
    subject.network().tree().info(id).kind == ModuleKind::Conv1d
        && subject.checkpoint.is_quantised(stored)
}

fn stored_shape(subject: &Subject, stored: Option<&str>, id: ModuleId) -> Vec<usize> {
    let stored = stored.filter(|name| !turned(subject, name, id));
    let meta = stored.and_then(|name| subject.checkpoint.meta(name));
    meta.map_or_else(
        || subject.network().tree().info(id).weight_shape(),
        |meta| meta.shape.clone(),
    )
}

/// The element type of a base parameter in the result.
fn element_of(
    subject: &Subject,
    stored: Option<&str>,
    parameter: &str,
    dtype: MergeDType,
) -> DType {
    let format = match stored.and_then(|name| subject.checkpoint.meta(name)) {
        // bitsandbytes leaves embeddings and norms in the type the model had.
        Some(meta) if subject.checkpoint.is_quantised(&meta.name) => plain(subject),
        Some(meta) => meta.format,
        // Fresh heads and what a GGUF holds: as the model's largest tensor, if that is a plain float.
        None => {
            let frozen = subject
                .network()
                .base()
                .weight(parameter)
                .and_then(|w| w.as_frozen().map(|f| f.format()));
            let fresh = subject.checkpoint.gguf().is_none();
            match (fresh, frozen) {
                (true, _) => plain(subject),
                (false, Some(format)) => StoredFormat::Weight(format),
                (false, None) => StoredFormat::Weight(WeightFormat::F32),
            }
        }
    };
    element(format, dtype).unwrap_or(DType::F32)
}

/// The format of the largest tensor of floats; f32 if there is none.
fn plain(subject: &Subject) -> StoredFormat {
    let metas = subject.checkpoint.metas().values();
    let floats =
        metas.filter(|m| matches!(m.format, StoredFormat::Weight(_)) && m.format.dtype().is_some());
    floats
        .max_by_key(|m| m.nbytes)
        .map_or(StoredFormat::Weight(WeightFormat::F32), |m| m.format)
}

/// The element type to write a stored format as; None where it cannot be written as what it is.
fn element(format: StoredFormat, dtype: MergeDType) -> Option<DType> {
    match (format, dtype.format()) {
        (StoredFormat::Weight(_), Some(wanted)) => StoredFormat::Weight(wanted).dtype(),
        // A quantised tensor has no form of its own in safetensors.
        (StoredFormat::Weight(_), None) => Some(format.dtype().unwrap_or(DType::F32)),
        (StoredFormat::Plain(dtype), _) => Some(dtype),
        (StoredFormat::Ggml(_), _) => None,
    }
}
