//! GGUF, ggml's checkpoint format, versions 2 and 3, little endian: metadata, then tensor descriptions,
//! then aligned data. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! [`Gguf`] is the metadata with typed look-ups whose errors name file and key; the tensors are read
//! through [`Checkpoint`](crate::Checkpoint). [`GgufBuilder`] writes small files.

mod read;
mod types;
mod value;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub(crate) use read::parse;
pub use value::{MetaArray, MetaValue};
pub use write::GgufBuilder;

use crate::{Error, Result};

/// The metadata of a `.gguf` file: model hyper-parameters, tokenizer, chat template.
#[derive(Debug, Clone)]
pub struct Gguf {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Every key with its value.
    pub metadata: BTreeMap<String, MetaValue>,
    /// Tensor data starts at a multiple of this many bytes (`general.alignment`, 32 unless set).
    pub alignment: u64,
    path: PathBuf,
}

impl Gguf {
    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The value of `key`, if it is there.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.metadata.get(key)
    }

    /// `general.architecture`: `llama`, `qwen2`, ...; the prefix of the hyper-parameter keys.
    ///
    /// # Errors
    /// When it is missing or not a string.
    pub fn architecture(&self) -> Result<&str> {
        self.str("general.architecture")
    }

    /// A string.
    ///
    /// # Errors
    /// When the key is missing or holds another type; both name file and key.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.typed(key, "a string", MetaValue::as_str)
    }

    /// A non-negative integer of any stored width.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.typed(key, "a non-negative integer", MetaValue::as_u64)
    }

    /// A number of any stored width.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn f64(&self, key: &str) -> Result<f64> {
        self.typed(key, "a number", MetaValue::as_f64)
    }

    /// A boolean.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.typed(key, "a boolean", MetaValue::as_bool)
    }

    /// An array of strings, such as `tokenizer.ggml.tokens`.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn strings(&self, key: &str) -> Result<&[String]> {
        self.typed(key, "an array of strings", |v| match v {
            MetaValue::Array(MetaArray::String(items)) => Some(items.as_slice()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        take: impl FnOnce(&'a MetaValue) -> Option<T>,
    ) -> Result<T> {
        let value = self
            .metadata
            .get(key)
            .ok_or_else(|| Error::key(&self.path, key, format!("missing; {wanted} is needed")))?;
        take(value).ok_or_else(|| {
            Error::key(
                &self.path,
                key,
                format!("holds {}, not {wanted}", value.type_name()),
            )
        })
    }
}
