//! Tensors, a reverse-mode tape, frozen weights in the formats checkpoints have,
//! and the kernels under all of it.
//!
//! - [`Tensor`] is a cheap handle: shape, device, values, and how it came to be if a gradient may be asked for.
//! - [`Backend`] is the small closed set of operations a device implements; [`Device`] is a handle to one.
//! - [`FrozenWeight`] is a matrix in its stored format; [`BaseWeight`] is what methods see of it.
//! - [`checkpoint`] recomputes a block in the backward pass; [`eager`] and [`Eager`] differentiate at once.
//!
//! Every `unsafe` of the workspace is in this crate, beside its reason, but for calls that `wgpu` asks it for.

mod adamw;
mod backend;
mod base_weight;
mod bytes;
mod cpu;
mod device;
mod error;
mod frozen;
mod kept;
mod kernels;
mod late;
pub mod linalg;
mod low_rank;
mod memo;
mod ops;
mod precision;
#[cfg(feature = "reference")]
mod reference;
mod rng;
mod tape;
mod tensor;
pub mod torch_rng;

pub use adamw::{AdamWMove, AdamWMoved, AdamWRule, AdamWState, DeviceAdamW};
pub use backend::{Attention, Backend, Binary, Buffer, Glu, KernelSpeed, Mask, Rope, Unary};
pub use base_weight::BaseWeight;
pub use bytes::{Bytes, release_heap};
pub use cpu::simd::all_finite;
pub use device::{AUTO, BackendEntry, Chosen, Device, DeviceFacts};
pub use error::{Result, TensorError};
pub use frozen::{FrozenWeight, WeightFormat, bnb, encode, encode_onto};
pub use kernels::KernelStore;
pub use low_rank::{LowRank, LowRankBack, LowRankGrad};
pub use ops::{CustomOp, IGNORE, concat, custom};
pub use precision::{Keep, Precision};
#[cfg(feature = "reference")]
pub use reference::tested;
pub use rng::RngKey;
pub use tape::{Eager, Grads, checkpoint, eager, grad_enabled, no_grad};
pub use tensor::Tensor;

pub use inventory;
