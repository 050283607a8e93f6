//! A writer of small GGUF files (version 3), for tests and tools: everything is held in memory.

use std::collections::BTreeMap;
use std::path::Path;

use peft_tensor::WeightFormat;

use super::types::ggml_id;
use super::{MetaArray, MetaValue};
use crate::{Error, Result, atomic_write};

/// Collects metadata and tensors, then gives the file's bytes.
#[derive(Debug, Default, Clone)]
pub struct GgufBuilder {
    metadata: BTreeMap<String, MetaValue>,
    tensors: Vec<(String, Vec<usize>, WeightFormat, Vec<u8>)>,
}

impl GgufBuilder {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a metadata key; a second value replaces the first.
    #[must_use]
    pub fn meta(mut self, key: &str, value: MetaValue) -> Self {
        self.metadata.insert(key.to_owned(), value);
        self
    }

    /// Adds a tensor: row-major shape (outermost first), its stored bytes in `format`.
    #[must_use]
    pub fn tensor(
        mut self,
        name: &str,
        shape: &[usize],
        format: WeightFormat,
        bytes: Vec<u8>,
    ) -> Self {
        self.tensors
            .push((name.to_owned(), shape.to_vec(), format, bytes));
        self
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// When a weight format has no ggml number. Sizes are not checked: the reader does that.
    pub fn build(&self) -> Result<Vec<u8>> {
        let alignment = match self
            .metadata
            .get("general.alignment")
            .and_then(MetaValue::as_u64)
        {
            Some(a) if a.is_power_of_two() && a <= 1 << 21 => a as usize,
            _ => 32,
        };
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for (name, shape, format, bytes) in &self.tensors {
            let id = ggml_id(*format).ok_or_else(|| {
                Error::Usage(format!(
                    "tensor `{name}`: GGUF has no format {}",
                    format.name()
                ))
            })?;
            put_string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            for &d in shape.iter().rev() {
                out.extend((d as u64).to_le_bytes());
            }
            out.extend(id.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += bytes.len().next_multiple_of(alignment) as u64;
        }
        for (_, _, _, bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(alignment), 0);
            out.extend(bytes);
        }
        Ok(out)
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// As [`build`](Self::build), or when the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        atomic_write(path, &self.build()?)
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Type number and bytes of a value.
fn put_value(out: &mut Vec<u8>, value: &MetaValue) {
    macro_rules! put {
        ($id:literal, $v:expr) => {{
            out.extend(u32::to_le_bytes($id));
            out.extend($v.to_le_bytes());
        }};
    }
    match value {
        MetaValue::U8(v) => put!(0, v),
        MetaValue::I8(v) => put!(1, v),
        MetaValue::U16(v) => put!(2, v),
        MetaValue::I16(v) => put!(3, v),
        MetaValue::U32(v) => put!(4, v),
        MetaValue::I32(v) => put!(5, v),
        MetaValue::F32(v) => put!(6, v),
        MetaValue::Bool(v) => put!(7, u8::from(*v)),
        MetaValue::U64(v) => put!(10, v),
        MetaValue::I64(v) => put!(11, v),
        MetaValue::F64(v) => put!(12, v),
        MetaValue::String(v) => {
            out.extend(8u32.to_le_bytes());
            put_string(out, v);
        }
        MetaValue::Array(v) => {
            out.extend(9u32.to_le_bytes());
            put_array(out, v);
        }
    }
}

/// Element type number, count and elements.
fn put_array(out: &mut Vec<u8>, array: &MetaArray) {
    macro_rules! put {
        ($id:literal, $items:expr) => {{
            out.extend(u32::to_le_bytes($id));
            out.extend(($items.len() as u64).to_le_bytes());
            $items.iter().for_each(|v| out.extend(v.to_le_bytes()));
        }};
    }
    match array {
        MetaArray::U8(v) => put!(0, v),
        MetaArray::I8(v) => put!(1, v),
        MetaArray::U16(v) => put!(2, v),
        MetaArray::I16(v) => put!(3, v),
        MetaArray::U32(v) => put!(4, v),
        MetaArray::I32(v) => put!(5, v),
        MetaArray::F32(v) => put!(6, v),
        MetaArray::U64(v) => put!(10, v),
        MetaArray::I64(v) => put!(11, v),
        MetaArray::F64(v) => put!(12, v),
        MetaArray::Bool(v) => {
            out.extend(7u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            out.extend(v.iter().map(|&b| u8::from(b)));
        }
        MetaArray::String(v) => {
            out.extend(8u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|s| put_string(out, s));
        }
        MetaArray::Array(v) => {
            out.extend(9u32.to_le_bytes());
            out.extend((v.len() as u64).to_le_bytes());
            v.iter().for_each(|a| put_array(out, a));
        }
    }
}
