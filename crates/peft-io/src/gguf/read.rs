//! The GGUF parser. Every count and length is checked against the bytes that are left before anything is
//! allocated for it, so memory stays within a small multiple of the metadata's own size.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::types::{GGML_TYPES, ggml_type};
use super::{Gguf, MetaArray, MetaValue};
use crate::{Error, Result, StoredFormat};

/// Longest key or tensor name, in bytes (the format's limit for keys).
const MAX_NAME: u64 = 65_535;
/// Dimensions of a tensor (`GGML_MAX_DIMS`).
const MAX_DIMS: u32 = 4;
/// Depth of arrays in arrays.
const MAX_DEPTH: usize = 4;
/// Largest alignment that makes sense: a huge page.
const MAX_ALIGNMENT: u64 = 1 << 21;
/// Fewest bytes a key with its value takes: length, type, one byte.
const MIN_PAIR: usize = 8 + 4 + 1;
/// Fewest bytes a tensor description takes: length, dimension count, type, offset.
const MIN_TENSOR: usize = 8 + 4 + 4 + 8;

/// One tensor of the file; `start..end` are bytes of the file, the shape is row-major (outermost first).
#[derive(Debug, Clone)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) format: StoredFormat,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// Reads metadata and tensor descriptions of a whole GGUF file; tensors come in file order.
///
/// # Errors
/// On anything that is not a complete, consistent, little-endian GGUF of version 2 or 3.
pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<(Gguf, Vec<GgufTensor>)> {
    let mut cursor = Cursor { path, file, at: 0 };
    if cursor.take(4, "the magic")? != b"GGUF" {
        return Err(Error::format(
            path,
            "not a GGUF file: the first four bytes are not `GGUF`",
        ));
    }
    let version = cursor.u32("the version")?;
    check_version(path, version)?;
    let tensor_count = cursor.count("the tensor count", MIN_TENSOR)?;
    let pair_count = cursor.count("the metadata count", MIN_PAIR)?;

    let mut metadata = BTreeMap::new();
    for _ in 0..pair_count {
        let key = cursor.name("a metadata key")?;
        let value = cursor.value(&key)?;
        if metadata.contains_key(&key) {
            return Err(Error::key(path, key, "is set twice"));
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(path, metadata.get("general.alignment"))?;

    let mut raw = Vec::new();
    let mut seen = HashSet::new();
    for _ in 0..tensor_count {
        let tensor = cursor.tensor(alignment)?;
        if !seen.insert(tensor.name.clone()) {
            return Err(Error::tensor(path, tensor.name, "is described twice"));
        }
        raw.push(tensor);
    }
    let tensors = place(path, raw, cursor.at, alignment, file.len())?;
    Ok((
        Gguf {
            version,
            metadata,
            alignment,
            path: path.to_owned(),
        },
        tensors,
    ))
}

fn check_version(path: &Path, version: u32) -> Result<()> {
    match version {
        2 | 3 => Ok(()),
        1 => Err(Error::unsupported(
            path,
            "GGUF version 1 is obsolete; convert the model again with a current llama.cpp",
        )),
        v if matches!(v.swap_bytes(), 1..=3) => Err(Error::unsupported(
            path,
            "a big-endian GGUF; only little-endian files are read",
        )),
        v => Err(Error::unsupported(
            path,
            format!("GGUF version {v}; versions 2 and 3 are read"),
        )),
    }
}

fn alignment(path: &Path, value: Option<&MetaValue>) -> Result<u64> {
    let Some(value) = value else { return Ok(32) };
    value
        .as_u64()
        .filter(|a| a.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(a))
        .ok_or_else(|| {
            Error::key(
                path,
                "general.alignment",
                format!(
                    "is no power of two between 8 and {MAX_ALIGNMENT} ({})",
                    value.type_name()
                ),
            )
        })
}

/// A tensor description before its place in the file is known to be sound.
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    format: StoredFormat,
    offset: u64,
    nbytes: usize,
}

/// Turns offsets from the data's start into places in the file, in file order; refuses overlaps.
fn place(
    path: &Path,
    mut raw: Vec<RawTensor>,
    described_until: usize,
    alignment: u64,
    file_len: usize,
) -> Result<Vec<GgufTensor>> {
    let data_start = (described_until as u64).next_multiple_of(alignment);
    raw.sort_by_key(|t| (t.offset, t.nbytes));
    let mut taken = data_start;
    let mut tensors = Vec::with_capacity(raw.len());
    for t in raw {
        let span = data_start
            .checked_add(t.offset)
            .and_then(|s| Some((s, s.checked_add(t.nbytes as u64)?)));
        let Some((start, end)) = span.filter(|&(_, end)| end <= file_len as u64) else {
            return Err(Error::tensor(
                path,
                t.name,
                format!(
                    "{} bytes at offset {} reach past the end of the file ({file_len} bytes; truncated?)",
                    t.nbytes, t.offset
                ),
            ));
        };
        if start < taken {
            return Err(Error::tensor(
                path,
                t.name,
                format!("offset {} overlaps another tensor", t.offset),
            ));
        }
        taken = end;
        tensors.push(GgufTensor {
            name: t.name,
            shape: t.shape,
            format: t.format,
            start: start as usize,
            end: end as usize,
        });
    }
    Ok(tensors)
}

struct Cursor<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let taken = self
            .at
            .checked_add(n)
            .and_then(|end| self.file.get(self.at..end));
        let Some(bytes) = taken else {
            return Err(Error::format(
                self.path,
                format!(
                    "truncated GGUF: {what} at byte {} needs {n} bytes, {} are left",
                    self.at,
                    self.left()
                ),
            ));
        };
        self.at += n;
        Ok(bytes)
    }

    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.take(N, what)?;
        let mut out = [0; N];
        out.copy_from_slice(bytes);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A count of items that take at least `min_bytes` each, so that it cannot exceed what is left.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize> {
        let n = self.u64(what)?;
        let fits = self.left() / min_bytes;
        usize::try_from(n)
            .ok()
            .filter(|&n| n <= fits)
            .ok_or_else(|| {
                Error::format(
                    self.path,
                    format!(
                        "bad GGUF: {what} is {n}, the {} bytes that follow hold at most {fits}",
                        self.left()
                    ),
                )
            })
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let n = self.count(&format!("the length of {what}"), 1)?;
        let bytes = self.take(n, what)?;
        let text = std::str::from_utf8(bytes)
            .map_err(|e| Error::format(self.path, format!("{what} is not UTF-8: {e}")))?;
        Ok(text.to_owned())
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let length = self
            .file
            .get(self.at..)
            .and_then(|rest| rest.first_chunk::<8>());
        if let Some(n) = length
            .map(|b| u64::from_le_bytes(*b))
            .filter(|&n| n > MAX_NAME)
        {
            return Err(Error::format(
                self.path,
                format!(
                    "bad GGUF: {what} at byte {} is {n} bytes long (limit {MAX_NAME})",
                    self.at
                ),
            ));
        }
        self.string(what)
    }

    fn bool(&mut self, what: &str) -> Result<bool> {
        match self.array::<1>(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [b] => Err(Error::format(
                self.path,
                format!("bad GGUF: {what} is a boolean of value {b}"),
            )),
        }
    }

    fn value(&mut self, key: &str) -> Result<MetaValue> {
        let what = format!("the value of `{key}`");
        let what = what.as_str();
        Ok(match self.u32(what)? {
            0 => MetaValue::U8(u8::from_le_bytes(self.array(what)?)),
            1 => MetaValue::I8(i8::from_le_bytes(self.array(what)?)),
            2 => MetaValue::U16(u16::from_le_bytes(self.array(what)?)),
            3 => MetaValue::I16(i16::from_le_bytes(self.array(what)?)),
            4 => MetaValue::U32(u32::from_le_bytes(self.array(what)?)),
            5 => MetaValue::I32(i32::from_le_bytes(self.array(what)?)),
            6 => MetaValue::F32(f32::from_le_bytes(self.array(what)?)),
            7 => MetaValue::Bool(self.bool(what)?),
            8 => MetaValue::String(self.string(what)?),
            9 => MetaValue::Array(self.values(key, what, 0)?),
            10 => MetaValue::U64(u64::from_le_bytes(self.array(what)?)),
            11 => MetaValue::I64(i64::from_le_bytes(self.array(what)?)),
            12 => MetaValue::F64(f64::from_le_bytes(self.array(what)?)),
            other => {
                return Err(Error::key(
                    self.path,
                    key,
                    format!("has unknown type number {other}"),
                ));
            }
        })
    }

    fn values(&mut self, key: &str, what: &str, depth: usize) -> Result<MetaArray> {
        if depth == MAX_DEPTH {
            return Err(Error::key(
                self.path,
                key,
                format!("nests arrays more than {MAX_DEPTH} deep"),
            ));
        }
        Ok(match self.u32(what)? {
            0 => MetaArray::U8(self.numbers(what, u8::from_le_bytes)?),
            1 => MetaArray::I8(self.numbers(what, i8::from_le_bytes)?),
            2 => MetaArray::U16(self.numbers(what, u16::from_le_bytes)?),
            3 => MetaArray::I16(self.numbers(what, i16::from_le_bytes)?),
            4 => MetaArray::U32(self.numbers(what, u32::from_le_bytes)?),
            5 => MetaArray::I32(self.numbers(what, i32::from_le_bytes)?),
            6 => MetaArray::F32(self.numbers(what, f32::from_le_bytes)?),
            7 => MetaArray::Bool(self.items(what, 1, |c| c.bool(what))?),
            8 => MetaArray::String(self.items(what, 8, |c| c.string(what))?),
            9 => MetaArray::Array(self.items(what, 12, |c| c.values(key, what, depth + 1))?),
            10 => MetaArray::U64(self.numbers(what, u64::from_le_bytes)?),
            11 => MetaArray::I64(self.numbers(what, i64::from_le_bytes)?),
            12 => MetaArray::F64(self.numbers(what, f64::from_le_bytes)?),
            other => {
                return Err(Error::key(
                    self.path,
                    key,
                    format!("is an array of unknown type number {other}"),
                ));
            }
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        what: &str,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let n = self.count(what, N)?;
        let (chunks, _) = self.take(n * N, what)?.as_chunks::<N>();
        Ok(chunks.iter().map(|&chunk| read(chunk)).collect())
    }

    fn items<T>(
        &mut self,
        what: &str,
        min_bytes: usize,
        mut read: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let n = self.count(what, min_bytes)?;
        (0..n).map(|_| read(self)).collect()
    }

    fn tensor(&mut self, alignment: u64) -> Result<RawTensor> {
        let name = self.name("a tensor name")?;
        let fail = |path: &Path, detail: String| Err(Error::tensor(path, name.as_str(), detail));
        let dims = self.u32("a tensor's dimension count")?;
        if dims > MAX_DIMS {
            return fail(
                self.path,
                format!("has {dims} dimensions, more than {MAX_DIMS}"),
            );
        }
        let mut shape = Vec::with_capacity(MAX_DIMS as usize);
        for _ in 0..dims {
            let d = self.u64("a tensor's dimension")?;
            let Ok(d) = usize::try_from(d) else {
                return fail(self.path, format!("dimension {d} is too large"));
            };
            shape.push(d);
        }
        let row = shape.first().copied().unwrap_or(1);
        shape.reverse();
        let id = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;

        let Some(ggml) = ggml_type(id) else {
            let known: Vec<_> = GGML_TYPES.iter().map(|t| format!("{}", t.format)).collect();
            return fail(
                self.path,
                format!(
                    "unknown ggml type number {id}; known are {}",
                    known.join(", ")
                ),
            );
        };
        if !row.is_multiple_of(ggml.block_len) {
            return fail(
                self.path,
                format!(
                    "rows of {row} values are no multiple of {}'s block of {}",
                    ggml.format, ggml.block_len
                ),
            );
        }
        let nbytes = shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .and_then(|n| (n / ggml.block_len).checked_mul(ggml.block_bytes));
        let Some(nbytes) = nbytes else {
            return fail(
                self.path,
                format!("shape {shape:?} of {} overflows", ggml.format),
            );
        };
        if !offset.is_multiple_of(alignment) {
            return fail(
                self.path,
                format!("offset {offset} is not aligned to {alignment} bytes"),
            );
        }
        Ok(RawTensor {
            name,
            shape,
            format: ggml.format,
            offset,
            nbytes,
        })
    }
}
