//! The forms that large values are held in.

use crate::{Result, TensorError};

/// What a device keeps large values in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Single precision throughout.
    #[default]
    F32,
    /// Base weights that are stored in single precision in bfloat16, and by default the activations that wait for the
    /// backward pass ([`Keep`]). Sums, norms, softmax, losses, adapter parameters, gradients and moments are single precision.
    /// Products may round what they multiply to 16 bits, where the device does that faster: to bfloat16 on a processor, to
    /// f16 scaled by powers of two on a card.
    Bf16,
}

impl std::str::FromStr for Precision {
    type Err = TensorError;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            other => Err(TensorError::Unsupported(format!(
                "{other:?} is not one of f32, bf16"
            ))),
        }
    }
}

/// The form in which activations wait for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// As they were computed.
    #[default]
    F32,
    /// Rounded to bfloat16: half the memory, a relative error of at most 2^-8.
    Bf16,
    /// Blocks of 64 values as whole numbers of -127 to 127 times a scale: 27 % of the memory, an error of at most 1/254 of
    /// the largest value of the block. Activation-compressed training: ActNN (Chen et al. 2021, arXiv 2104.14129), GACT
    /// (Liu et al. 2022, arXiv 2206.11357). The forward pass is not touched by it.
    Int8,
}

impl Keep {
    /// Every form, by the name that configurations have for it.
    pub const NAMES: [(&str, Self); 3] = [
        ("f32", Self::F32),
        ("bf16", Self::Bf16),
        ("int8", Self::Int8),
    ];

    /// Bytes that a tensor of so many values takes on the processor, kept in this form.
    pub fn bytes(self, values: usize) -> u64 {
        crate::cpu::kept_bytes(self, values)
    }
}

impl From<Precision> for Keep {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

impl std::str::FromStr for Keep {
    type Err = TensorError;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, keep)| *keep).ok_or_else(|| {
            TensorError::Unsupported(format!("{name:?} is not one of f32, bf16, int8"))
        })
    }
}
