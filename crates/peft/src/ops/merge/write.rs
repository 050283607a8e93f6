//! Putting tensors into the writer: merged modules whole, everything else in pieces that stay in a cache.

use peft_core::{BaseWeight, Error, ModuleKind, Result, Tensor};
use peft_io::{DType, StoredFormat, StreamWriter, check_finite};
use peft_tensor::{FrozenWeight, WeightFormat, encode_onto};

use super::plan::{Output, Source};
use crate::ops::Subject;

/// Values that are converted at a time.
const PIECE: usize = 1 << 16;

/// Memory of one thread for the pieces it converts.
#[derive(Default)]
pub(super) struct Pieces {
    values: Vec<f32>,
    bytes: Vec<u8>,
}

/// Merges one module and writes its parameters; `group` are the tensors that come from it.
pub(super) fn merged(
    writer: &StreamWriter,
    subject: &Subject,
    group: &[&Output],
    pieces: &mut Pieces,
) -> Result<()> {
    let Some(Source::Merged(id)) = group.first().map(|o| &o.source) else {
        return Ok(());
    };
    let network = subject.network();
    let info = network.tree().info(*id);
    let base = network.base();
    let weight = info.weight.as_ref().and_then(|name| base.weight(name));
    let bias = info
        .bias
        .as_ref()
        .and_then(|name| base.weight(name))
        .map(vector)
        .transpose()?;
    let result = network.merged(*id, weight, bias.as_ref())?;
    if info.bias.is_none() && result.bias.is_some() {
        let detail =
            "an adapter brings a bias, which the base model has no place for: it cannot be merged";
        return Err(Error::module(&info.path, detail));
    }
    for output in group {
        let name = &output.entry.name;
        let (changed, unchanged) = if output.bias {
            (&result.bias, bias.clone())
        } else {
            (&result.weight, None)
        };
        match (changed, unchanged, weight) {
            (Some(values), ..) => {
                let values = if output.bias {
                    values.clone()
                } else {
                    stored_layout(values, weight, info.kind)?
                };
                float(writer, output, &values.values()?, pieces)?;
            }
            (None, Some(values), _) => float(writer, output, &values.values()?, pieces)?,
            (None, None, Some(weight)) => base_weight(writer, output, weight, info.kind, pieces)?,
            (None, None, None) => {
                return Err(Error::module(&info.path, format!("`{name}` has no values")));
            }
        }
    }
    if let Some(frozen) = weight.and_then(BaseWeight::as_frozen) {
        frozen.bytes().release();
    }
    Ok(())
}

/// Writes a tensor that no adapter changes.
pub(super) fn copied(
    writer: &StreamWriter,
    subject: &Subject,
    output: &Output,
    pieces: &mut Pieces,
) -> Result<()> {
    match &output.source {
        Source::Merged(_) => Ok(()),
        Source::Stored(name) => stored(writer, subject, output, name, pieces),
        Source::Base(name, id) => {
            let network = subject.network();
            let weight = network.base().weight(name).ok_or_else(|| {
                Error::file(&subject.path, format!("there is no tensor `{name}`"))
            })?;
            base_weight(
                writer,
                output,
                weight,
                network.tree().info(*id).kind,
                pieces,
            )
        }
    }
}

/// A tensor of the checkpoint: its bytes where the element type stays, converted in pieces where not.
fn stored(
    writer: &StreamWriter,
    subject: &Subject,
    output: &Output,
    name: &str,
    pieces: &mut Pieces,
) -> Result<()> {
    let checkpoint = &subject.checkpoint;
    let Some(meta) = checkpoint.meta(name) else {
        return Err(Error::file(
            &subject.path,
            format!("there is no tensor `{name}`"),
        ));
    };
    if let StoredFormat::Weight(_) = meta.format {
        return frozen(writer, output, &checkpoint.weight(name)?, pieces);
    }
    let bytes = checkpoint.bytes(name)?;
    writer.write(&output.entry.name, &bytes)?;
    bytes.release();
    Ok(())
}

/// A base parameter in the layout Hugging Face stores it in.
fn base_weight(
    writer: &StreamWriter,
    output: &Output,
    weight: &BaseWeight,
    kind: ModuleKind,
    pieces: &mut Pieces,
) -> Result<()> {
    let turned = kind == ModuleKind::Conv1d && !weight.is_transposed() && !output.bias;
    match (weight.as_frozen(), weight.as_dense()) {
        (Some(w), _) if !turned => frozen(writer, output, w, pieces),
        (Some(_), _) => float(writer, output, &weight.to_dense()?.t()?.values()?, pieces),
        (_, Some(t)) => float(writer, output, &t.values()?, pieces),
        (None, None) => Ok(()),
    }
}

/// A merged weight in the layout Hugging Face stores it in: `[in, out]` for GPT-2's linear layers, also where the base
/// came from a GGUF, which turns them.
fn stored_layout(values: &Tensor, base: Option<&BaseWeight>, kind: ModuleKind) -> Result<Tensor> {
    let turned = kind == ModuleKind::Conv1d && base.is_some_and(|w| !w.is_transposed());
    Ok(if turned { values.t()? } else { values.clone() })
}

/// A bias or a norm's weight as a vector.
fn vector(weight: &BaseWeight) -> Result<Tensor> {
    let values = weight.to_dense()?;
    let n = values.numel();
    Ok(values.reshape(&[n])?)
}

/// Writes a mapped matrix piece by piece, checking that it is finite and giving its pages back.
fn frozen(
    writer: &StreamWriter,
    output: &Output,
    weight: &FrozenWeight,
    pieces: &mut Pieces,
) -> Result<()> {
    let name = &output.entry.name;
    let same = StoredFormat::Weight(weight.format()).dtype() == Some(output.entry.dtype);
    let row_bytes = weight.nbytes() / weight.rows().max(1);
    let rows = (PIECE / weight.cols().max(1)).clamp(1, weight.rows().max(1));
    let values = &mut pieces.values;
    for start in (0..weight.rows()).step_by(rows) {
        let end = (start + rows).min(weight.rows());
        values.resize((end - start) * weight.cols(), 0.0);
        weight.decode_rows(start..end, values);
        finite(name, start * weight.cols(), values)?;
        let bytes = weight.bytes().slice(start * row_bytes..end * row_bytes);
        match &bytes {
            Some(bytes) if same => writer.write_part(name, bytes)?,
            _ => {
                pieces.bytes.clear();
                encode_onto(wanted(output), values, values.len(), &mut pieces.bytes)?;
                writer.write_part(name, &pieces.bytes)?;
            }
        }
        if let Some(bytes) = bytes {
            bytes.release();
        }
    }
    if weight.rows() == 0 || weight.cols() == 0 {
        writer.write(name, &[])?;
    }
    Ok(())
}

/// Writes values in memory piece by piece.
fn float(
    writer: &StreamWriter,
    output: &Output,
    values: &[f32],
    pieces: &mut Pieces,
) -> Result<()> {
    let name = &output.entry.name;
    let expected: usize = output.entry.shape.iter().product();
    if values.len() != expected {
        let detail = format!(
            "tensor `{name}` has {} values for shape {:?}",
            values.len(),
            output.entry.shape
        );
        return Err(Error::other(detail));
    }
    for (i, piece) in values.chunks(PIECE).enumerate() {
        // While the piece is in the cache anyhow.
        finite(name, i * PIECE, piece)?;
        pieces.bytes.clear();
        encode_onto(wanted(output), piece, piece.len(), &mut pieces.bytes)?;
        writer.write_part(name, &pieces.bytes)?;
    }
    Ok(())
}

/// Checks values of a tensor from `first` on.
fn finite(name: &str, first: usize, values: &[f32]) -> peft_io::Result<()> {
    check_finite(name, values).map_err(|e| match e {
        peft_io::Error::NonFinite { name, index, value } => peft_io::Error::NonFinite {
            name,
            index: first + index,
            value,
        },
        e => e,
    })
}

/// The element type of floats in the result.
fn wanted(output: &Output) -> WeightFormat {
    match output.entry.dtype {
        DType::F16 => WeightFormat::F16,
        DType::BF16 => WeightFormat::BF16,
        _ => WeightFormat::F32,
    }
}
