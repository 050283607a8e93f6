//! Weights that bitsandbytes quantised, as `transformers` saves them: several tensors that are one weight.
//!
//! 4 bit: `<weight>` holds two codes a byte, `<weight>.absmax` the scales, `<weight>.quant_map` the table, and
//! `<weight>.quant_state.bitsandbytes__nf4` (or `__fp4`) the bytes of a JSON object with shape and block size. Doubly
//! quantised, `absmax` are 8-bit codes of `nested_quant_map` with scales `nested_absmax`, and the JSON holds their
//! offset. 8 bit: `<module>.weight` of signed bytes with `<module>.SCB`, a scale for each row, and
//! `<module>.weight_format`. Source: bitsandbytes 0.50.2, `QuantState.as_dict` and `Linear8bitLt._save_to_state_dict`.

use peft_tensor::bnb::{Nested, pack, pack_int8, table};
use peft_tensor::{FrozenWeight, WeightFormat};
use safetensors::Dtype;
use serde_json::Value;

use super::{Checkpoint, StoredFormat, TensorMeta};
use crate::{Error, Result};

/// Longest JSON of a state that is read; real ones have under 300 bytes.
const MAX_STATE: u64 = 1 << 16;

/// What a quantised weight is made of.
#[derive(Clone, Debug)]
pub(super) struct Quantised {
    /// The codes, under the weight's name.
    pub(super) codes: TensorMeta,
    scales: Scales,
}

#[derive(Clone, Debug)]
enum Scales {
    /// One for each row.
    Rows(TensorMeta),
    /// One for each block of values.
    Blocks(Box<Blocks>),
}

#[derive(Clone, Debug)]
struct Blocks {
    format: WeightFormat,
    blocksize: usize,
    absmax: TensorMeta,
    map: TensorMeta,
    nested: Option<Second>,
}

#[derive(Clone, Debug)]
struct Second {
    absmax: TensorMeta,
    map: TensorMeta,
    blocksize: usize,
    offset: f32,
}

/// Puts the tensors of quantised weights together: each becomes one entry with its own shape and format.
pub(super) fn gather(checkpoint: &mut Checkpoint) -> Result<()> {
    const STATE: &str = ".quant_state.bitsandbytes__";
    let names: Vec<String> = checkpoint.metas.keys().cloned().collect();
    for name in &names {
        if let Some((weight, kind)) = name.split_once(STATE) {
            four_bit(checkpoint, weight, name, kind)?;
        } else if let Some(module) = name.strip_suffix(".SCB") {
            eight_bit(checkpoint, module, name)?;
        }
    }
    let metas = &checkpoint.metas;
    checkpoint.order.retain(|name| metas.contains_key(name));
    Ok(())
}

fn four_bit(checkpoint: &mut Checkpoint, weight: &str, state: &str, kind: &str) -> Result<()> {
    let path = checkpoint.path_of(checkpoint.require(state)?).to_owned();
    let fail = |detail: String| Error::tensor(&path, state, detail);
    let format = match kind {
        "nf4" => WeightFormat::NF4,
        "fp4" => WeightFormat::FP4,
        other => {
            return Err(fail(format!(
                "a 4-bit type {other:?} is not read; nf4 and fp4 are"
            )));
        }
    };
    if checkpoint.require(state)?.nbytes > MAX_STATE {
        return Err(fail(format!("is longer than {MAX_STATE} bytes")));
    }
    let json: Value = serde_json::from_slice(&checkpoint.bytes(state)?)
        .map_err(|e| fail(format!("is not the JSON of a quantised weight: {e}")))?;
    let number = |key: &str| {
        let n = json[key].as_u64().and_then(|n| usize::try_from(n).ok());
        n.filter(|n| *n > 0)
            .ok_or_else(|| fail(format!("`{key}` is not a number above 0")))
    };
    if json["quant_type"] != kind {
        return Err(fail(format!(
            "`quant_type` is {}, the name says {kind}",
            json["quant_type"]
        )));
    }
    const FLOATS: [&str; 3] = ["float32", "float16", "bfloat16"];
    if !json["dtype"].as_str().is_some_and(|d| FLOATS.contains(&d)) {
        return Err(fail(format!(
            "`dtype` is {}, not one of {}",
            json["dtype"],
            FLOATS.join(", ")
        )));
    }
    let shape = shape(&json).ok_or_else(|| fail("`shape` is not a list of sizes".to_owned()))?;
    let blocksize = number("blocksize")?;

    let mut take = |suffix: &str| {
        let name = format!("{weight}.{suffix}");
        checkpoint
            .metas
            .remove(&name)
            .ok_or_else(|| fail(format!("there is no `{name}` with it")))
    };
    let (absmax, map) = (take("absmax")?, take("quant_map")?);
    let nested = if json["nested_offset"].is_null() {
        None
    } else {
        let offset = json["nested_offset"].as_f64().map(|v| v as f32);
        Some(Second {
            absmax: take("nested_absmax")?,
            map: take("nested_quant_map")?,
            blocksize: number("nested_blocksize")?,
            offset: offset
                .filter(|v| v.is_finite())
                .ok_or_else(|| fail("`nested_offset` is not a number".to_owned()))?,
        })
    };
    let codes = checkpoint
        .metas
        .get(weight)
        .cloned()
        .ok_or_else(|| fail(format!("there is no `{weight}` with it")))?;
    checkpoint.metas.remove(state);
    let mut nbytes = codes.nbytes + absmax.nbytes + map.nbytes;
    nbytes += nested
        .as_ref()
        .map_or(0, |n| n.absmax.nbytes + n.map.nbytes);
    let meta = TensorMeta {
        shape,
        format: StoredFormat::Weight(format),
        nbytes,
        ..codes.clone()
    };
    let scales = Scales::Blocks(Box::new(Blocks {
        format,
        blocksize,
        absmax,
        map,
        nested,
    }));
    insert(checkpoint, meta, Quantised { codes, scales });
    Ok(())
}

fn eight_bit(checkpoint: &mut Checkpoint, module: &str, name: &str) -> Result<()> {
    let scales = checkpoint.require(name)?.clone();
    let path = checkpoint.path_of(&scales).to_owned();
    let weight = format!("{module}.weight");
    let Some(codes) = checkpoint.metas.get(&weight).cloned() else {
        return Ok(());
    };
    let fail = |detail: String| Err(Error::tensor(&path, name, detail));
    if codes.format != StoredFormat::Plain(Dtype::I8) {
        return fail(format!(
            "are scales of 8-bit rows, but `{weight}` is stored as {}",
            codes.format
        ));
    }
    let order = format!("{module}.weight_format");
    if checkpoint.meta(&order).is_some() {
        // 0 is "row"; the others are layouts of graphics cards that bitsandbytes gave up.
        let (_, values) = checkpoint.f32(&order)?;
        if values != [0.0] {
            return fail(format!("`{order}` is {values:?}; 0, row by row, is read"));
        }
        checkpoint.metas.remove(&order);
    }
    checkpoint.metas.remove(name);
    let meta = TensorMeta {
        format: StoredFormat::Weight(WeightFormat::INT8),
        nbytes: codes.nbytes + scales.nbytes,
        ..codes.clone()
    };
    let scales = Scales::Rows(scales);
    insert(checkpoint, meta, Quantised { codes, scales });
    Ok(())
}

fn insert(checkpoint: &mut Checkpoint, meta: TensorMeta, parts: Quantised) {
    checkpoint.quantised.insert(meta.name.clone(), parts);
    checkpoint.metas.insert(meta.name.clone(), meta);
}

/// The sizes of a weight; none is 0.
fn shape(json: &Value) -> Option<Vec<usize>> {
    let sizes = json["shape"].as_array()?;
    let size = |v: &Value| usize::try_from(v.as_u64()?).ok().filter(|n| *n > 0);
    let sizes: Option<Vec<usize>> = sizes.iter().map(size).collect();
    sizes.filter(|s| !s.is_empty())
}

/// The weight of `rows x cols`, put together from its parts.
pub(super) fn weight(
    checkpoint: &Checkpoint,
    name: &str,
    parts: &Quantised,
    rows: usize,
    cols: usize,
) -> Result<FrozenWeight> {
    let path = checkpoint.path_of(&parts.codes);
    let codes = checkpoint.slice(&parts.codes)?;
    let made = match &parts.scales {
        Scales::Rows(scales) => pack_int8(rows, cols, &codes, &floats(checkpoint, scales)?),
        Scales::Blocks(blocks) => {
            check_table(checkpoint, blocks.format, &blocks.map)?;
            let scales = match &blocks.nested {
                None => floats(checkpoint, &blocks.absmax)?,
                Some(nested) => second(checkpoint, &blocks.absmax, nested)?,
            };
            pack(blocks.format, rows, cols, &codes, &scales, blocks.blocksize)
        }
    };
    // They are in memory in another layout now.
    codes.release();
    made.map_err(|e| Error::tensor(path, name, e.to_string()))
}

/// Scales from their 8-bit codes.
fn second(checkpoint: &Checkpoint, absmax: &TensorMeta, nested: &Second) -> Result<Vec<f32>> {
    let fail = |meta: &TensorMeta, detail: String| {
        Err(Error::tensor(checkpoint.path_of(meta), &meta.name, detail))
    };
    if absmax.format != StoredFormat::Plain(Dtype::U8) {
        return fail(absmax, format!("is stored as {}, not U8", absmax.format));
    }
    let codes = checkpoint.slice(absmax)?.to_vec();
    let scales = floats(checkpoint, &nested.absmax)?;
    if scales.len() != codes.len().div_ceil(nested.blocksize) {
        let detail = format!(
            "has {} values for {} scales in blocks of {}",
            scales.len(),
            codes.len(),
            nested.blocksize
        );
        return fail(&nested.absmax, detail);
    }
    let map = floats(checkpoint, &nested.map)?;
    let Ok(map) = <[f32; 256]>::try_from(map) else {
        return fail(&nested.map, "does not have 256 values".to_owned());
    };
    if map.iter().any(|v| !v.is_finite()) {
        return fail(&nested.map, "holds what is not a number".to_owned());
    }
    let nested = Nested {
        codes,
        scales,
        offset: nested.offset,
        map,
        blocksize: nested.blocksize,
    };
    Ok(nested.decode())
}

/// Refuses a table that is not the one the codes will be read with.
fn check_table(checkpoint: &Checkpoint, format: WeightFormat, map: &TensorMeta) -> Result<()> {
    let values = floats(checkpoint, map)?;
    let same = table(format).is_some_and(|t| {
        t.len() == values.len() && t.iter().zip(&values).all(|(a, b)| (a - b).abs() <= 1e-6)
    });
    if same {
        return Ok(());
    }
    let detail = format!("is not the table of {}: {values:?}", format.name());
    Err(Error::tensor(checkpoint.path_of(map), &map.name, detail))
}

/// A short list of floats of any width.
fn floats(checkpoint: &Checkpoint, meta: &TensorMeta) -> Result<Vec<f32>> {
    let fail = |detail: String| Error::tensor(checkpoint.path_of(meta), &meta.name, detail);
    let StoredFormat::Weight(format) = meta.format else {
        return Err(fail(format!("is stored as {}, not as floats", meta.format)));
    };
    let n = meta.shape.iter().product();
    let values = FrozenWeight::new(1, n, format, checkpoint.slice(meta)?)
        .map_err(|e| fail(e.to_string()))?;
    Ok(values.to_f32())
}
