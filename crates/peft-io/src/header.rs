//! The safetensors header, read and written: 8 bytes of little-endian length, then JSON
//! `{"__metadata__": {..}, name: {"dtype", "shape", "data_offsets": [start, end]}, ..}`, then the data.
//!
//! The `safetensors` crate types the entries. Its own reader keeps the last of two equal names and does
//! not say which tensor is at fault, so the walk over the map is done here. Format and limits:
//! <https://github.com/huggingface/safetensors#format>.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use safetensors::{Dtype, tensor::TensorInfo};
use serde::Deserializer as _;
use serde::de::{Error as _, MapAccess, Visitor};

use crate::{Error, Result};

/// Longest header that is read, in bytes; the limit of the reference implementation.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// One tensor of a header; offsets in bytes from the start of the data.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

/// A checked header: entries in the order of their data, without gaps or overlaps, within the file.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) entries: Vec<Entry>,
    pub(crate) metadata: BTreeMap<String, String>,
    /// Where the data starts in the file.
    pub(crate) data_start: usize,
}

/// Bytes of a tensor, or `None` on overflow or when the elements do not fill whole bytes.
pub(crate) fn tensor_bytes(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = shape
        .iter()
        .try_fold(1usize, |n, &d| n.checked_mul(d))?
        .checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Reads and checks the header of a whole safetensors file.
///
/// # Errors
/// When the header is longer than the file or [`MAX_HEADER`], is not JSON of the right form, names a
/// tensor twice, or states offsets that overlap, leave gaps, disagree with shape and dtype, or do not end
/// where the file ends.
pub(crate) fn parse(path: &Path, file: &[u8]) -> Result<Header> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(Error::format(
            path,
            format!(
                "not a safetensors file: {} bytes, shorter than the 8-byte header length",
                file.len()
            ),
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER {
        return Err(Error::format(
            path,
            format!(
                "not a safetensors file: states a header of {length} bytes (limit {MAX_HEADER})"
            ),
        ));
    }
    let json = usize::try_from(length)
        .ok()
        .and_then(|n| rest.get(..n))
        .ok_or_else(|| {
            Error::format(
                path,
                format!(
                    "truncated: states a header of {length} bytes, the file has {}",
                    file.len()
                ),
            )
        })?;
    let json = std::str::from_utf8(json)
        .map_err(|e| Error::format(path, format!("the header is not UTF-8: {e}")))?;
    let mut reader = serde_json::Deserializer::from_str(json);
    let raw = reader
        .deserialize_map(HeaderVisitor)
        .and_then(|raw| reader.end().map(|()| raw))
        .map_err(|e| Error::format(path, format!("bad safetensors header: {e}")))?;

    let mut entries = raw.entries;
    // Stable, so that empty tensors sharing an offset keep the header's order.
    entries.sort_by_key(|e| (e.start, e.end));
    let data_len = rest.len() - json.len();
    check_offsets(path, &entries, data_len)?;
    Ok(Header {
        entries,
        metadata: raw.metadata,
        data_start: 8 + json.len(),
    })
}

fn check_offsets(path: &Path, entries: &[Entry], data_len: usize) -> Result<()> {
    let mut at = 0;
    for entry in entries {
        let fail = |detail: String| Err(Error::tensor(path, &entry.name, detail));
        let (start, end) = (entry.start, entry.end);
        if end < start {
            return fail(format!("data_offsets [{start}, {end}] run backwards"));
        }
        if end > data_len {
            return fail(format!(
                "data_offsets [{start}, {end}] reach past the {data_len} bytes of data (file truncated?)"
            ));
        }
        match start.cmp(&at) {
            std::cmp::Ordering::Less => {
                return fail(format!(
                    "data_offsets [{start}, {end}] overlap another tensor"
                ));
            }
            std::cmp::Ordering::Greater => {
                return fail(format!(
                    "data_offsets [{start}, {end}] leave bytes {at}..{start} unused"
                ));
            }
            std::cmp::Ordering::Equal => at = end,
        }
        let Some(want) = tensor_bytes(entry.dtype, &entry.shape) else {
            return fail(format!(
                "shape {:?} of {} overflows",
                entry.shape, entry.dtype
            ));
        };
        if end - start != want {
            return fail(format!(
                "shape {:?} of {} takes {want} bytes, data_offsets give {}",
                entry.shape,
                entry.dtype,
                end - start
            ));
        }
    }
    if at != data_len {
        return Err(Error::format(
            path,
            format!("the header describes {at} bytes of data, the file holds {data_len}"),
        ));
    }
    Ok(())
}

#[derive(Default)]
struct RawHeader {
    entries: Vec<Entry>,
    metadata: BTreeMap<String, String>,
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format_args!(
                    "tensor `{name}` is named twice"
                )));
            }
            if name == "__metadata__" {
                header.metadata = map
                    .next_value::<Option<BTreeMap<String, String>>>()
                    .map_err(|e| A::Error::custom(format_args!("__metadata__: {e}")))?
                    .unwrap_or_default();
                continue;
            }
            let info: TensorInfo = map
                .next_value()
                .map_err(|e| A::Error::custom(format_args!("tensor `{name}`: {e}")))?;
            let (start, end) = info.data_offsets;
            header.entries.push(Entry {
                name,
                dtype: info.dtype,
                shape: info.shape,
                start,
                end,
            });
        }
        Ok(header)
    }
}

/// The header's bytes (length field included) for tensors laid out in the given order, and the entries
/// with their offsets. Padded with blanks to a multiple of 8, so that data starts aligned.
///
/// # Errors
/// When a shape overflows, or the header would pass [`MAX_HEADER`].
pub(crate) fn build(
    path: &Path,
    tensors: &[(String, Dtype, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<Entry>)> {
    let mut map = serde_json::Map::new();
    if !metadata.is_empty() {
        map.insert("__metadata__".to_owned(), serde_json::json!(metadata));
    }
    let mut entries = Vec::with_capacity(tensors.len());
    let mut at = 0usize;
    for (name, dtype, shape) in tensors {
        let overflow =
            || Error::tensor(path, name, format!("shape {shape:?} of {dtype} overflows"));
        let end = tensor_bytes(*dtype, shape)
            .and_then(|n| at.checked_add(n))
            .ok_or_else(overflow)?;
        let info = serde_json::json!({
            "dtype": dtype, "shape": shape, "data_offsets": [at, end],
        });
        if name == "__metadata__" || map.insert(name.clone(), info).is_some() {
            return Err(Error::tensor(path, name, "the name is taken"));
        }
        entries.push(Entry {
            name: name.clone(),
            dtype: *dtype,
            shape: shape.clone(),
            start: at,
            end,
        });
        at = end;
    }
    let mut json = serde_json::Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > MAX_HEADER {
        return Err(Error::format(
            path,
            format!(
                "a header of {} bytes passes the limit of {MAX_HEADER}",
                json.len()
            ),
        ));
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok((bytes, entries))
}
