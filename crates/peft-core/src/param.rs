//! Trainable parameters: live handles to their current value.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    value: RwLock<Tensor>,
    changes: AtomicU64,
    trainable: AtomicBool,
    role: Role,
}

/// What a parameter is to training and to files.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// Trained and saved.
    Plain,
    /// Trained, and in no file.
    Transient,
    /// Saved, never trained.
    Frozen,
    /// As plain; a file's last dimension may be another.
    Ragged,
    /// Whole numbers: as frozen, a file's last dimension may be another.
    Integers,
}

impl Param {
    /// A trainable parameter under its key on disk; `saved` is false for what a file does not hold.
    pub fn new(key: impl Into<String>, value: &Tensor, saved: bool) -> Self {
        let role = if saved { Role::Plain } else { Role::Transient };
        Self::with_role(key, value, role)
    }

    pub(crate) fn with_role(key: impl Into<String>, value: &Tensor, role: Role) -> Self {
        Self(Arc::new(Inner {
            key: key.into(),
            value: RwLock::new(value.leaf()),
            changes: AtomicU64::new(0),
            trainable: AtomicBool::new(!matches!(role, Role::Frozen | Role::Integers)),
            role,
        }))
    }

    /// Its key on disk.
    pub fn key(&self) -> &str {
        &self.0.key
    }

    /// Its shape.
    pub fn shape(&self) -> Vec<usize> {
        self.value().shape().to_vec()
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.value().numel()
    }

    fn value(&self) -> Tensor {
        self.0
            .value
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Whether a value of that shape can be taken over: the same one, or another last dimension where that is free.
    pub fn accepts(&self, shape: &[usize]) -> bool {
        let own = self.shape();
        let free = matches!(self.0.role, Role::Ragged | Role::Integers);
        own == shape
            || free
                && own.len() == shape.len()
                && own.iter().rev().skip(1).eq(shape.iter().rev().skip(1))
    }

    /// Its current value: a leaf that gets a gradient if the parameter is trainable.
    pub fn tensor(&self) -> Tensor {
        let value = self.value();
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
        if !self.accepts(value.shape()) {
            let detail = format!(
                "{} has shape {:?}, not {:?}",
                self.key(),
                self.shape(),
                value.shape()
            );
            return Err(Error::other(detail));
        }
        let mut present = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        *present = value.leaf();
        self.0.changes.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// How often it was given another value, for what is worked out from a value and kept. Ask before the value is read:
    /// what is kept is never older than its number then.
    pub fn changes(&self) -> u64 {
        self.0.changes.load(Ordering::Acquire)
    }

    /// Whether training changes it.
    pub fn is_trainable(&self) -> bool {
        self.0.trainable.load(Ordering::Relaxed)
    }

    /// Freezes or unfreezes it; one that is never trained stays frozen.
    pub fn set_trainable(&self, trainable: bool) {
        let trainable = trainable && !self.is_frozen();
        self.0.trainable.store(trainable, Ordering::Relaxed);
    }

    /// Whether it is never trained: part of the method's form, not of what it learns.
    pub fn is_frozen(&self) -> bool {
        matches!(self.0.role, Role::Frozen | Role::Integers)
    }

    /// Whether it holds whole numbers, which a file holds as such.
    pub fn is_integer(&self) -> bool {
        self.0.role == Role::Integers
    }

    /// Whether a file holds it.
    pub fn is_saved(&self) -> bool {
        self.0.role != Role::Transient
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
