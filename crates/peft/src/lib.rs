//! Parameter-efficient fine-tuning: every family behind one facade, one feature each.
//!
//! [`methods`] is what this build knows. Models load with [`models`], run with adapters on them through
//! [`core::Network`], train with [`train`], and their files are [`io`]'s.

pub mod ops;

pub use peft_core as core;
pub use peft_io as io;
pub use peft_models as models;
pub use peft_tensor as tensor;
pub use peft_train as train;

// A family that is linked but never named would lose its registrations without a word.
#[cfg(feature = "additive")]
pub use peft_additive as additive;
#[cfg(feature = "hybrid")]
pub use peft_hybrid as hybrid;
#[cfg(feature = "reparam")]
pub use peft_reparam as reparam;
#[cfg(feature = "selective")]
pub use peft_selective as selective;
// Nor would a device be found.
#[cfg(feature = "wgpu")]
pub use peft_wgpu as wgpu;

pub use peft_core::{Error, MethodEntry, Result, methods};
