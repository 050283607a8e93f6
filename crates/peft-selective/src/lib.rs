//! Selective methods: train some of the parameters that are there.
//!
//! The crate works alone, on a network of one's own:
//!
//! ```
//! use peft_selective::core::ndarray::{Array1, Array2};
//! use peft_selective::core::{Base, Error, Network, Pass, RngKey, Tensor, serde_json::json};
//!
//! # fn main() -> peft_selective::core::Result<()> {
//! let weight = Array2::from_shape_fn((3, 4), |(i, j)| (i + j) as f32 / 7.0);
//! let mut network = Network::new(Base::custom().linear("fc", weight, Some(Array1::zeros(3)))?);
//! network.attach("mine", &json!({"peft_type": "BITFIT"}), 0)?;
//!
//! let x = Tensor::normal(RngKey::new(1), 0.0, 1.0, &[16, 4], network.device())?;
//! let loss = |network: &Network| {
//!     let out = network.run("fc", &x, &Pass::eval())?;
//!     Ok::<_, Error>(out.affine(1.0, -2.0)?.square()?.mean_all()?)
//! };
//! let before = loss(&network)?.item()?;
//! for _ in 0..100 {
//!     let grads = loss(&network)?.backward()?;
//!     for param in network.parameters() {
//!         let value = param.tensor();
//!         if let Some(grad) = grads.get(&value) {
//!             param.set(value.sub(&grad.scale(0.1)?)?)?;
//!         }
//!     }
//! }
//! let after = loss(&network)?.item()?;
//! assert!(after < 0.5 * before, "{before} -> {after}");
//!
//! // The trained bias, as an array.
//! let bias = network.parameters()[0].tensor().to_array()?;
//! assert_eq!(bias.shape(), [3]);
//! assert!(bias.iter().all(|b| *b > 0.5));
//! # Ok(())
//! # }
//! ```

mod fields;
mod gates;
mod places;
mod select;
mod sparse;
pub mod structured;
#[cfg(test)]
mod testing;
pub mod unstructured;

pub use fields::Places;
pub use peft_core as core;
