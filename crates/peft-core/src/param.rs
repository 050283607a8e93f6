//! Trainable parameters: live handles to their current value.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use peft_tensor::{Device, RngKey, Tensor};

use crate::{Error, Result};

/// Tensors by their key on disk.
pub type Tensors = BTreeMap<String, Tensor>;

/// A parameter. Cloning gives another handle to the same one.
#[derive(Clone)]
pub struct Param(Arc<Inner>);

struct Inner {
    key: String,
    shape: Vec<usize>,
    value: RwLock<Tensor>,
    trainable: AtomicBool,
    saved: bool,
}

impl Param {
    /// A trainable parameter under its key on disk; `saved` is false for what a file does not hold.
    pub fn new(key: impl Into<String>, value: &Tensor, saved: bool) -> Self {
        Self(Arc::new(Inner {
            key: key.into(),
            shape: value.shape().to_vec(),
            value: RwLock::new(value.leaf()),
            trainable: AtomicBool::new(true),
            saved,
        }))
    }

    /// Its key on disk.
    pub fn key(&self) -> &str {
        &self.0.key
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.0.shape.iter().product()
    }

    /// Its current value: a leaf that gets a gradient if the parameter is trainable.
    pub fn tensor(&self) -> Tensor {
        let value = self
            .0
            .value
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if self.is_trainable() {
            value
        } else {
            value.detach()
        }
    }

    /// Gives it another value.
    ///
    /// # Errors
    /// If the shape differs.
    pub fn set(&self, value: Tensor) -> Result<()> {
        if value.shape() != self.shape() {
            let detail = format!(
                "{} has shape {:?}, not {:?}",
                self.key(),
                self.shape(),
                value.shape()
            );
            return Err(Error::other(detail));
        }
        *self.0.value.write().unwrap_or_else(PoisonError::into_inner) = value.leaf();
        Ok(())
    }

    /// Whether training changes it.
    pub fn is_trainable(&self) -> bool {
        self.0.trainable.load(Ordering::Relaxed)
    }

    /// Freezes or unfreezes it.
    pub fn set_trainable(&self, trainable: bool) {
        self.0.trainable.store(trainable, Ordering::Relaxed);
    }

    /// Whether a file holds it.
    pub fn is_saved(&self) -> bool {
        self.0.saved
    }
}

impl std::fmt::Debug for Param {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Param({} {:?})", self.key(), self.shape())
    }
}

/// Initial values.
#[derive(Clone, Debug)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All the same.
    Constant(f32),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f32,
    },
    /// Uniform on `[-bound, bound)`.
    Uniform {
        /// Largest magnitude.
        bound: f32,
    },
    /// PyTorch's default for a linear layer: uniform with bound `1 / sqrt(fan_in)`, which is what
    /// `kaiming_uniform_(a = sqrt 5)` comes to.
    LinearDefault {
        /// Width of the input.
        fan_in: usize,
    },
    /// These values.
    Value(Tensor),
}

impl Init {
    /// A tensor of that shape, the same for the same key.
    ///
    /// # Errors
    /// If given values have another shape.
    pub fn tensor(&self, shape: &[usize], key: RngKey, device: &Device) -> Result<Tensor> {
        Ok(match self {
            Self::Zeros => Tensor::zeros(shape, device)?,
            Self::Constant(value) => Tensor::full(*value, shape, device)?,
            Self::Normal { std } => Tensor::normal(key, 0.0, *std, shape, device)?,
            Self::Uniform { bound } => Tensor::uniform(key, -bound, *bound, shape, device)?,
            Self::LinearDefault { fan_in } => {
                let bound = 1.0 / (*fan_in.max(&1) as f32).sqrt();
                Tensor::uniform(key, -bound, bound, shape, device)?
            }
            Self::Value(value) if value.shape() == shape => value.to_device(device)?,
            Self::Value(value) => {
                return Err(Error::other(format!(
                    "initial values {:?} for shape {shape:?}",
                    value.shape()
                )));
            }
        })
    }
}
