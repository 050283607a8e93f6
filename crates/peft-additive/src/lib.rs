//! Additive methods: modules and tokens added to a frozen model.
//!
//! The crate works alone: a program with a network of its own says where a sublayer's output meets its residual, and
//! a bottleneck is trained there.
//!
//! ```
//! use peft_additive::core::ndarray::{Array2, Ix2};
//! use peft_additive::core::{Base, Error, Network, Pass, RngKey, Tensor, serde_json::json};
//!
//! # fn main() -> peft_additive::core::Result<()> {
//! let weight = Array2::from_shape_fn((4, 4), |(i, j)| if i == j { 0.5 } else { 0.1 });
//! let base = Base::custom().linear("layers.0.fc", weight.clone(), None)?.junction("layers.0.output_adapters", 4);
//! let mut network = Network::new(base);
//! network.attach("mine", &json!({"peft_type": "PFEIFFER", "reduction_factor": 2}), 0)?;
//!
//! let x = Tensor::normal(RngKey::new(1), 0.0, 1.0, &[16, 4], network.device())?;
//! let wanted = x.scale(-1.0)?;
//! let (fc, place) = (network.module("layers.0.fc")?, network.module("layers.0.output_adapters")?);
//! let loss = |network: &Network| {
//!     let hidden = network.linear(fc, &x, &Pass::eval())?;
//!     let out = network.junction(place, &hidden, &x, None, &Pass::eval())?;
//!     Ok::<_, Error>(out.sub(&wanted)?.square()?.mean_all()?)
//! };
//! let before = loss(&network)?.item()?;
//! for _ in 0..200 {
//!     let grads = loss(&network)?.backward()?;
//!     for param in network.parameters() {
//!         let value = param.tensor();
//!         if let Some(grad) = grads.get(&value) {
//!             param.set(value.sub(&grad.scale(0.1)?)?)?;
//!         }
//!     }
//! }
//! let after = loss(&network)?.item()?;
//! assert!(after < 0.8 * before, "{before} -> {after}");
//!
//! // The frozen weight comes back as it went in.
//! assert_eq!(network.weight(fc)?.to_array()?.into_dimensionality::<Ix2>().expect("a matrix"), weight);
//! # Ok(())
//! # }
//! ```

mod activation;
mod adapter_drop;
pub mod adapters;
mod balls;
pub mod bottleneck;
mod coupling;
mod deep_prefix;
mod fields;
mod hub;
mod inserted;
mod lstm;
mod model_fields;
mod orthonormal;
mod phm;
pub mod rescaling;
pub mod soft_prompts;
#[cfg(test)]
mod try_out;
mod virtual_tokens;

pub use adapter_drop::AdapterDrop;
pub use deep_prefix::PrefixFields;
pub use fields::{All, Layers};
pub use model_fields::ModelFields;
pub use peft_core as core;
pub use virtual_tokens::PromptStart;
