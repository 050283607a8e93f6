//! Writing a model with its linear layers quantised, in the layout that bitsandbytes' users load.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use peft_core::serde_json::{Value, json};
use peft_core::{BaseWeight, Error, ModuleId, ModuleKind, Result};
use peft_io::{DType, PlanEntry, ShardPlan, StreamWriter};
use peft_models::{LoadOptions, Quantize};
use peft_tensor::bnb::{double_quantized, table, unpack, unpack_int8};
use peft_tensor::{FrozenWeight, WeightFormat};

use super::plan::{self, Output};
use super::{MergeDType, add, config, refuse, side, write};
use crate::ops::Subject;

/// Bytes of a state: its JSON and blanks, so that its place is known before its numbers are.
const STATE: usize = 320;

/// How to quantise.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeOptions {
    /// NF4, once or twice, or INT8.
    pub quantize: Quantize,
    /// Bytes of the largest file.
    pub max_shard_size: u64,
    /// Whether a checkpoint in the target folder may be replaced.
    pub overwrite: bool,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct QuantizeReport {
    /// The new checkpoint.
    pub folder: PathBuf,
    /// Weights that were quantised.
    pub quantised: usize,
    /// Bytes of the model's tensors before.
    pub before: u64,
    /// And after.
    pub bytes: u64,
    /// All files, tensors first.
    pub files: Vec<String>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Writes a model to `output` with the linear layers of its blocks quantised, as `transformers` saves a model that
/// bitsandbytes quantised: `quantization_config` in its `config.json`, everything else as it was. `progress` is told
/// (tensors written, tensors in all).
///
/// # Errors
/// If the model cannot be read, its architecture is not known, it is quantised already, the format is not one of
/// bitsandbytes', or the result cannot be written; nothing is left in `output` then.
pub fn quantize(
    model: &str,
    output: &Path,
    options: &QuantizeOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<QuantizeReport> {
    let format = options.quantize.format;
    if !matches!(format, WeightFormat::NF4 | WeightFormat::INT8) {
        let detail = format!(
            "{} has no form in bitsandbytes' checkpoints; nf4, nf4_single and int8 have",
            format.name()
        );
        return Err(Error::config("format", detail));
    }
    let subject = Subject::open(model, &[], &LoadOptions::default())?;
    refuse(&subject, output)?;
    if subject.model().is_none() {
        let detail = "its architecture is not known, so which layers to quantise is not either";
        return Err(Error::file(&subject.path, detail));
    }
    if subject.is_quantised() {
        return Err(Error::file(
            &subject.path,
            "its weights are quantised already",
        ));
    }
    let outputs = plan::outputs(&subject, false, MergeDType::Keep)?;
    let covered = covered(&subject);
    let mut entries = Vec::new();
    for output in &outputs {
        match covered.get(&output.entry.name) {
            Some(id) => {
                let info = subject.network().tree().info(*id);
                let shape = [info.out_features, info.in_features];
                entries.extend(parts_of(&output.entry.name, shape, options.quantize));
            }
            None => entries.push(output.entry.clone()),
        }
    }
    let shards = ShardPlan::new(entries, options.max_shard_size)?;
    let writer = StreamWriter::create(output, &shards, &Default::default(), options.overwrite)?;
    let mut pieces = write::Pieces::default();
    for (done, output) in outputs.iter().enumerate() {
        progress(done, outputs.len());
        match covered.get(&output.entry.name) {
            Some(id) => quantised(&writer, &subject, output, *id, options.quantize)?,
            None => write::copied(&writer, &subject, output, &mut pieces)?,
        }
    }
    progress(outputs.len(), outputs.len());

    let mut files = shards.file_names();
    if files.len() > 1 {
        files.push("model.safetensors.index.json".to_owned());
    }
    let mut notes = Vec::new();
    let mut json = config::merged(&subject, &shards, false, None)?;
    json["quantization_config"] = settings(&subject, options.quantize, &json);
    add(&writer, &mut files, "config.json", &json)?;
    files.extend(side::add(&writer, &subject, &mut notes)?);
    writer.finish()?;
    Ok(QuantizeReport {
        folder: output.to_owned(),
        quantised: covered.len(),
        before: subject.checkpoint.metas().values().map(|m| m.nbytes).sum(),
        bytes: shards.total_size(),
        files,
        notes,
    })
}

/// The modules whose weights are quantised, by the names their tensors get.
fn covered(subject: &Subject) -> HashMap<String, ModuleId> {
    let modules = subject.network().tree().iter();
    let linear = modules.filter(|(_, m)| Quantize::covers(m));
    let features =
        subject.model().map(peft_models::Model::task) == Some(peft_models::Task::Features);
    linear
        .filter_map(|(id, m)| {
            let name = m.weight.clone()?;
            let stored = if features {
                subject.stored_name(&name)
            } else {
                None
            };
            Some((stored.unwrap_or(name), id))
        })
        .collect()
}

/// The tensors that a quantised weight `[out, in]` becomes.
fn parts_of(name: &str, shape: [usize; 2], quantize: Quantize) -> Vec<PlanEntry> {
    let part = |name: String, dtype: DType, shape: &[usize]| PlanEntry {
        name,
        shape: shape.to_vec(),
        dtype,
    };
    let n = shape[0] * shape[1];
    if quantize.format == WeightFormat::INT8 {
        let (scales, order) = eight_bit_names(name);
        return vec![
            part(name.to_owned(), DType::I8, &shape),
            part(scales, DType::F32, &shape[..1]),
            part(order, DType::U8, &[]),
        ];
    }
    let blocks = n.div_ceil(peft_tensor::bnb::BLOCK);
    let scales = if quantize.double {
        DType::U8
    } else {
        DType::F32
    };
    let mut parts = vec![
        part(name.to_owned(), DType::U8, &[n.div_ceil(2), 1]),
        part(format!("{name}.absmax"), scales, &[blocks]),
        part(format!("{name}.quant_map"), DType::F32, &[16]),
        part(state_name(name), DType::U8, &[STATE]),
    ];
    if quantize.double {
        let second = blocks.div_ceil(256);
        parts.push(part(format!("{name}.nested_absmax"), DType::F32, &[second]));
        parts.push(part(format!("{name}.nested_quant_map"), DType::F32, &[256]));
    }
    parts
}

fn state_name(name: &str) -> String {
    format!("{name}.quant_state.bitsandbytes__nf4")
}

fn eight_bit_names(name: &str) -> (String, String) {
    let module = name.trim_end_matches(".weight");
    (format!("{module}.SCB"), format!("{module}.weight_format"))
}

/// Quantises one weight and writes its parts.
fn quantised(
    writer: &StreamWriter,
    subject: &Subject,
    output: &Output,
    id: ModuleId,
    quantize: Quantize,
) -> Result<()> {
    let name = &output.entry.name;
    let base = subject.network().base();
    let info = subject.network().tree().info(id);
    let weight = info.weight.as_ref().and_then(|n| base.weight(n));
    let Some((weight, stored)) = weight.and_then(|w: &BaseWeight| Some((w, w.as_frozen()?))) else {
        return Err(Error::module(
            &info.path,
            "has no stored weight to quantise",
        ));
    };
    let once = Quantize {
        double: false,
        ..quantize
    };
    let made = once
        .apply(stored, weight.is_transposed())
        .map_err(|e| e.context(format!("tensor `{name}`")))?;
    let floats =
        |values: &[f32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
    if quantize.format == WeightFormat::INT8 {
        let (codes, scales) = unpack_int8(&made)?;
        let (scb, order) = eight_bit_names(name);
        writer.write(name, &codes)?;
        writer.write(&scb, &floats(&scales))?;
        return Ok(writer.write(&order, &[0])?);
    }
    let (codes, scales) = unpack(&made)?;
    let mut state = json!({
        "quant_type": "nf4", "blocksize": peft_tensor::bnb::BLOCK, "dtype": dtype_of(stored),
        "shape": [made.rows(), made.cols()],
    });
    writer.write(name, &codes)?;
    if let Some(table) = table(quantize.format) {
        writer.write(&format!("{name}.quant_map"), &floats(table))?;
    }
    if quantize.double {
        let (_, nested) = double_quantized(&made)?;
        writer.write(&format!("{name}.absmax"), &nested.codes)?;
        writer.write(&format!("{name}.nested_absmax"), &floats(&nested.scales))?;
        writer.write(&format!("{name}.nested_quant_map"), &floats(&nested.map))?;
        state["nested_blocksize"] = json!(nested.blocksize);
        state["nested_dtype"] = json!("float32");
        state["nested_offset"] = json!(f64::from(nested.offset));
    } else {
        writer.write(&format!("{name}.absmax"), &floats(&scales))?;
    }
    let state = format!("{:<STATE$}", state.to_string());
    Ok(writer.write(&state_name(name), state.as_bytes())?)
}

/// How torch calls the type of a float format.
fn dtype_of(weight: &FrozenWeight) -> &'static str {
    match weight.format() {
        WeightFormat::F16 => "float16",
        WeightFormat::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// `quantization_config`, with every linear layer that stays as it is named.
fn settings(subject: &Subject, quantize: Quantize, config: &Value) -> Value {
    let four = quantize.format == WeightFormat::NF4;
    let dtype = ["dtype", "torch_dtype"]
        .iter()
        .find_map(|k| config[k].as_str());
    let tree = subject.network().tree();
    let linear = |kind| matches!(kind, ModuleKind::Linear | ModuleKind::Conv1d);
    let skipped: Vec<&str> = tree
        .iter()
        .filter(|(_, m)| linear(m.kind) && !Quantize::covers(m))
        .map(|(_, m)| m.path.as_str())
        .collect();
    json!({
        "quant_method": "bitsandbytes",
        "_load_in_4bit": four, "_load_in_8bit": !four, "load_in_4bit": four, "load_in_8bit": !four,
        "bnb_4bit_compute_dtype": dtype.unwrap_or("float32"), "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": quantize.double,
        "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skipped, "llm_int8_threshold": 6.0,
    })
}
