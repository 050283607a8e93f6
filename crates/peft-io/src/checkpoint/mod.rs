//! One checkpoint, whatever its files: a safetensors file, an HF folder of shards, or a GGUF, opened by
//! memory map and read tensor by tensor.

mod bnb;
mod convert;
mod open;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use peft_tensor::{Bytes, FrozenWeight, WeightFormat};
use safetensors::Dtype;

use crate::{Error, Gguf, Result};
pub(crate) use open::{INDEX, SINGLE, checkpoint_files, has_checkpoint, is_file_name};

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredFormat {
    /// A format that weights are computed with.
    Weight(WeightFormat),
    /// Another element type: integers, booleans, f64, fp8.
    Plain(Dtype),
    /// A block format of ggml that can be listed but not decoded.
    Ggml(&'static str),
}

impl StoredFormat {
    /// The format of a safetensors element type.
    pub fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::Weight(WeightFormat::F32),
            Dtype::F16 => Self::Weight(WeightFormat::F16),
            Dtype::BF16 => Self::Weight(WeightFormat::BF16),
            other => Self::Plain(other),
        }
    }

    /// The safetensors element type, if there is one for this format.
    pub fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Weight(WeightFormat::F32) => Some(Dtype::F32),
            Self::Weight(WeightFormat::F16) => Some(Dtype::F16),
            Self::Weight(WeightFormat::BF16) => Some(Dtype::BF16),
            Self::Plain(dtype) => Some(dtype),
            Self::Weight(_) | Self::Ggml(_) => None,
        }
    }
}

impl fmt::Display for StoredFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Weight(format) => f.write_str(format.name()),
            Self::Plain(dtype) => write!(f, "{dtype}"),
            Self::Ggml(name) => f.write_str(name),
        }
    }
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone)]
pub struct TensorMeta {
    /// Name as stored.
    pub name: String,
    /// Row-major shape, outermost dimension first (GGUF's own order is reversed).
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub format: StoredFormat,
    /// Stored bytes.
    pub nbytes: u64,
    /// Which of [`Checkpoint::files`] holds it.
    pub file: usize,
    /// First byte in that file.
    pub offset: u64,
}

/// An open checkpoint. Nothing is read until asked for; weights are views of mapped files.
#[derive(Clone)]
pub struct Checkpoint {
    files: Vec<(PathBuf, Bytes)>,
    metas: BTreeMap<String, TensorMeta>,
    /// Names by file, then by offset.
    order: Vec<String>,
    /// Weights that several stored tensors make, see [`bnb`].
    quantised: BTreeMap<String, bnb::Quantised>,
    gguf: Option<Gguf>,
    folder: Option<PathBuf>,
    metadata: BTreeMap<String, String>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("files", &self.files().collect::<Vec<_>>())
            .field("tensors", &self.metas.len())
            .finish_non_exhaustive()
    }
}

impl Checkpoint {
    /// Opens an HF folder (`model.safetensors`, or `model.safetensors.index.json` with its shards), a
    /// `.safetensors` file or a `.gguf` file.
    ///
    /// # Errors
    /// When there is no such checkpoint, it is a pickle (`.bin`, `.pt`), a shard is missing or lacks a
    /// tensor, or a header is damaged; the message names file and tensor.
    pub fn open(path: &Path) -> Result<Self> {
        open::open(path)
    }

    /// Names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.metas.keys().map(String::as_str)
    }

    /// Names in the order of the data on disk: the cheapest order to read a whole checkpoint in.
    pub fn file_order(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(String::as_str)
    }

    /// What is known of one tensor.
    pub fn meta(&self, name: &str) -> Option<&TensorMeta> {
        self.metas.get(name)
    }

    /// What is known of every tensor, by name.
    pub fn metas(&self) -> &BTreeMap<String, TensorMeta> {
        &self.metas
    }

    /// The files the tensors lie in.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// Metadata, when the checkpoint is a GGUF.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.gguf.as_ref()
    }

    /// The folder, when the checkpoint was opened as one; `config.json` and the tokenizer are in it.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// `__metadata__` of the safetensors header (of the first file, when sharded).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The stored bytes of a tensor, as a view of the mapped file; of a weight that bitsandbytes quantised, its codes.
    ///
    /// # Errors
    /// When there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<Bytes> {
        match self.quantised.get(name) {
            Some(parts) => self.slice(&parts.codes),
            None => self.slice(self.require(name)?),
        }
    }

    /// Whether bitsandbytes quantised this weight. Such a weight is stored `[out, in]` whatever its module.
    pub fn is_quantised(&self, name: &str) -> bool {
        self.quantised.contains_key(name)
    }

    fn slice(&self, meta: &TensorMeta) -> Result<Bytes> {
        let outside = || Error::tensor(self.path_of(meta), &meta.name, "lies outside of its file");
        let (_, file) = self.files.get(meta.file).ok_or_else(outside)?;
        let start = usize::try_from(meta.offset).map_err(|_| outside())?;
        let len = usize::try_from(meta.nbytes).map_err(|_| outside())?;
        let end = start.checked_add(len).ok_or_else(outside)?;
        file.slice(start..end).ok_or_else(outside)
    }

    /// The tensor as a frozen matrix, mapped and not copied (bitsandbytes' weights are put together in memory): 2-D as `[rows, cols]`, 1-D `[1, n]`, N-D
    /// `[d0, product of the rest]`, a scalar `[1, 1]`.
    ///
    /// # Errors
    /// When there is no such tensor or it is not stored in a [`WeightFormat`].
    pub fn weight(&self, name: &str) -> Result<FrozenWeight> {
        let meta = self.require(name)?;
        let fail = |detail: String| Error::tensor(self.path_of(meta), name, detail);
        let StoredFormat::Weight(format) = meta.format else {
            let known: Vec<_> = WeightFormat::all().iter().map(|f| f.name()).collect();
            return Err(fail(format!(
                "is stored as {}, which cannot be used as a weight; formats that can: {}",
                meta.format,
                known.join(", ")
            )));
        };
        let (rows, rest) = match meta.shape.as_slice() {
            [] => (1, &[][..]),
            [_] => (1, &meta.shape[..]),
            [rows, rest @ ..] => (*rows, rest),
        };
        let cols = rest
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .ok_or_else(|| fail(format!("shape {:?} overflows", meta.shape)))?;
        if let Some(parts) = self.quantised.get(name) {
            return bnb::weight(self, name, parts, rows, cols);
        }
        FrozenWeight::new(rows, cols, format, self.bytes(name)?).map_err(|e| fail(e.to_string()))
    }

    /// The tensor's shape and its values in f32, whatever they are stored as.
    ///
    /// # Errors
    /// When there is no such tensor, its format cannot be decoded, or an integer or f64 of it cannot be
    /// held in f32 (integers exactly, f64 within f32's range).
    pub fn f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let meta = self.require(name)?;
        let values = match meta.format {
            StoredFormat::Plain(dtype) => convert::to_f32(dtype, &self.bytes(name)?)
                .map_err(|detail| Error::tensor(self.path_of(meta), name, detail))?,
            StoredFormat::Weight(_) | StoredFormat::Ggml(_) => self.weight(name)?.to_f32(),
        };
        Ok((meta.shape.clone(), values))
    }

    fn require(&self, name: &str) -> Result<&TensorMeta> {
        self.metas.get(name).ok_or_else(|| {
            let path = self
                .folder
                .as_deref()
                .or_else(|| self.files().next())
                .unwrap_or(Path::new(""));
            let nearest = peft_core::nearest(name, self.names());
            let hint = if nearest.is_empty() {
                String::new()
            } else {
                format!("; nearest: {}", nearest.join(", "))
            };
            Error::tensor(
                path,
                name,
                format!("is not among the {} tensors{hint}", self.metas.len()),
            )
        })
    }

    fn path_of(&self, meta: &TensorMeta) -> &Path {
        self.files
            .get(meta.file)
            .map_or(Path::new(""), |(path, _)| path)
    }
}
