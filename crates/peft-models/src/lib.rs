//! Models to adapt: the decoder family (Llama, Mistral, Qwen 2 and 3, Gemma and Gemma 2, Phi-3), GPT-2 and BERT, over
//! frozen weights in the format they are stored in; their tokenizers, chat templates and text generation.
//!
//! A model is code over the modules of a [`peft_core::Network`]: it never runs a layer by itself but asks the network
//! for it, and that is where adapters act. Modules and parameters have Hugging Face's names.
//!
//! ```no_run
//! use peft_models::{GenerateOptions, LoadOptions, Model};
//! let model = Model::load("model.gguf".as_ref(), &LoadOptions::default())?;
//! let answer = model.generate("Once upon a time", true, &GenerateOptions::default(), &mut |_| {})?;
//! println!("{}", answer.text);
//! # Ok::<(), peft_core::Error>(())
//! ```
//!
//! The base model's own dropout is never applied: training is deterministic but for an adapter's dropout.

mod arch;
mod attend;
mod bert;
mod chat;
mod config;
mod decoder;
mod fields;
mod generate;
mod gguf;
mod gguf_tokenizer;
mod gpt2;
mod loss;
mod model;
mod origin;
mod quantize;
mod rope;
mod source;
mod tokenizer;

pub use chat::ChatTemplate;
pub use config::{Activation, MODEL_TYPES, ModelConfig};
pub use generate::{Finish, GenerateOptions, Generated};
pub use loss::{Labels, LossOutput, Scored, logit_rows};
pub use model::{Batch, LoadOptions, Model, Task};
pub use peft_tensor::IGNORE;
pub use quantize::Quantize;
pub use rope::{RopeConfig, RopeScaling};
pub use tokenizer::Tokenizer;
