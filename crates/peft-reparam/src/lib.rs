//! Reparameterized methods: a weight's change in a smaller form.
//!
//! The crate works alone: a program brings its own weights as `ndarray` arrays, attaches a method by its
//! configuration, trains with a loss of its own, merges, and takes its arrays back.
//!
//! ```
//! use peft_reparam::core::ndarray::{Array1, Array2, Ix2};
//! use peft_reparam::core::{Base, Network, Pass, RngKey, Tensor, serde_json::json};
//!
//! # fn main() -> peft_reparam::core::Result<()> {
//! // A two-layer network of one's own.
//! let w1 = Array2::from_shape_fn((16, 4), |(i, j)| ((i * 7 + j * 3) % 11) as f32 / 11.0 - 0.5);
//! let w2 = Array2::from_shape_fn((1, 16), |(_, j)| (j % 5) as f32 / 5.0 - 0.4);
//! let base = Base::custom().linear("fc1", w1.clone(), Some(Array1::zeros(16)))?.linear("fc2", w2, None)?;
//!
//! let mut network = Network::new(base);
//! network.attach("mine", &json!({"peft_type": "LORA", "r": 2, "target_modules": ["fc1"]}), 0)?;
//!
//! // One's own forward pass and loss: fit y = x0 - x1.
//! let device = network.device().clone();
//! let x = Tensor::normal(RngKey::new(1), 0.0, 1.0, &[32, 4], &device)?;
//! let y = x.narrow(1, 0, 1)?.sub(&x.narrow(1, 1, 1)?)?;
//! let loss = |network: &Network| {
//!     let hidden = network.run("fc1", &x, &Pass::train(RngKey::new(2)))?.tanh()?;
//!     let out = network.run("fc2", &hidden, &Pass::train(RngKey::new(2)))?;
//!     Ok::<_, peft_reparam::core::Error>(out.sub(&y)?.square()?.mean_all()?)
//! };
//! let before = loss(&network)?.item()?;
//! for _ in 0..50 {
//!     let grads = loss(&network)?.backward()?;
//!     for param in network.parameters() {
//!         let value = param.tensor();
//!         if let Some(grad) = grads.get(&value) {
//!             param.set(value.sub(&grad.scale(0.1)?)?)?; // plain gradient descent
//!         }
//!     }
//! }
//! let after = loss(&network)?.item()?;
//! assert!(after < 0.5 * before, "{before} -> {after}");
//!
//! // Merge and take the array back; the base itself was never touched.
//! network.merge()?;
//! let id = network.module("fc1")?;
//! let merged = network.weight(id)?.to_array()?.into_dimensionality::<Ix2>().expect("a matrix");
//! assert_eq!(merged.dim(), (16, 4));
//! assert_ne!(merged, w1);
//! network.unmerge();
//! assert_eq!(network.weight(id)?.to_array()?.into_dimensionality::<Ix2>().expect("a matrix"), w1);
//! # Ok(())
//! # }
//! ```

mod budget;
mod change;
mod drops;
pub mod factors;
mod fastfood;
mod fields;
mod fourier;
mod hub;
mod init;
mod kron;
mod loftq;
pub mod low_rank;
pub mod orthogonal;
mod rotate;
mod shared_pair;
mod shifted;
pub mod structured;
#[cfg(test)]
mod testing;
mod tied;
mod triplets;

pub use peft_core as core;
