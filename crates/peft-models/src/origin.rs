//! Where a model came from, and the tokenizer that is there, read on first use.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peft_core::{Device, Error, Result, Tensors, Tokenize};
use peft_io::Checkpoint;
use peft_tensor::Tensor;
use serde_json::Value;

use crate::source::io;
use crate::tokenizer::Tokenizer;

/// Where a model's tokenizer is.
pub(crate) enum Place {
    Folder(PathBuf),
    Gguf(Checkpoint),
    None,
}

/// A place with its tokenizer, shared by the model and the methods on it.
pub(crate) struct Origin {
    place: Place,
    tokenizer: Mutex<Loaded>,
}

/// A tokenizer that is in memory.
enum Loaded {
    No,
    /// It can be read again.
    Read(Arc<Tokenizer>),
    /// It came from elsewhere.
    Given(Arc<Tokenizer>),
}

impl Origin {
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place,
            tokenizer: Mutex::new(Loaded::No),
        }
    }

    pub(crate) fn folder(&self) -> Option<&Path> {
        match &self.place {
            Place::Folder(folder) => Some(folder),
            Place::Gguf(_) | Place::None => None,
        }
    }

    fn loaded(&self) -> MutexGuard<'_, Loaded> {
        self.tokenizer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tokenizer(&self) -> Result<Arc<Tokenizer>> {
        let mut loaded = self.loaded();
        if let Loaded::Read(tokenizer) | Loaded::Given(tokenizer) = &*loaded {
            return Ok(tokenizer.clone());
        }
        let made = match &self.place {
            Place::Folder(folder) => Tokenizer::from_folder(folder)?,
            Place::Gguf(checkpoint) => match checkpoint.gguf() {
                Some(gguf) => Tokenizer::from_gguf(gguf)?,
                None => return Err(Error::other("the model has no tokenizer")),
            },
            Place::None => {
                return Err(Error::other(
                    "a model made from a configuration has no tokenizer",
                ));
            }
        };
        let made = Arc::new(made);
        *loaded = Loaded::Read(made.clone());
        Ok(made)
    }

    pub(crate) fn set(&self, tokenizer: Tokenizer) -> Result<()> {
        let mut loaded = self.loaded();
        if !matches!(*loaded, Loaded::No) {
            return Err(Error::other("the model has a tokenizer already"));
        }
        *loaded = Loaded::Given(Arc::new(tokenizer));
        Ok(())
    }

    /// Gives up the memory of a tokenizer that can be read again.
    pub(crate) fn forget(&self) {
        let mut loaded = self.loaded();
        if matches!(*loaded, Loaded::Read(_)) {
            *loaded = Loaded::No;
        }
    }
}

impl Tokenize for Origin {
    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer()?.encode_with(text, true)
    }
}

/// Another adapter for methods that start from one: a folder or hub id, or a bare file of tensors.
pub(crate) fn other_adapter(path: &str) -> Result<(Value, Tensors)> {
    let file = Path::new(path);
    let (config, named) = if file.is_file() {
        (Value::Null, peft_io::read_tensors(file).map_err(io)?)
    } else {
        let folder = peft_io::resolve_adapter(path).map_err(io)?;
        let files = peft_io::read_adapter(&folder).map_err(io)?;
        (files.config, files.tensors)
    };
    let device = Device::cpu();
    let tensor = |(key, (shape, values)): (String, (Vec<usize>, Vec<f32>))| {
        Ok((key, Tensor::from_vec(values, &shape, &device)?))
    };
    let tensors = named.into_iter().map(tensor).collect::<Result<_>>()?;
    Ok((config, tensors))
}
