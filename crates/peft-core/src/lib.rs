//! The seams of `peft`: what a method is, where it acts, and how a network runs with adapters on it.
//!
//! - [`PeftMethod`] is a method: a serde struct that is its `adapter_config.json`, registered by [`register!`].
//! - [`Adapter`] is one method at one place of a model; its facets are the ways there are of acting on it.
//! - [`ModuleTree`] is what a method sees of a model: names, kinds and sizes, no code.
//! - [`Network`] holds base weights and adapters and runs modules; models are written over it.
//! - [`TrainHooks`] is what a method does between steps.
//!
//! There is no list of methods here: [`methods`] is whatever is linked in.

mod attach;
mod base;
mod builtin;
mod call;
mod compose;
mod config;
mod error;
mod export;
mod hooks;
pub mod hub;
pub mod matcher;
mod members;
mod merge;
mod method;
mod network;
mod param;
mod registry;
mod rows;
mod run;
mod split;
mod tokens;
mod tree;

pub use attach::{Attach, Injector, Slot};
pub use base::{Base, Originals, ReadTensors, Tokenize};
pub use call::{AttentionCall, Call, Pass, ProjectFn, Tokens};
pub use config::Common;
pub use error::{Error, Result, in_words, nearest};
pub use hooks::{GroupRule, ParamGroups, TrainCx, TrainData, TrainHooks};
pub use matcher::Targets;
pub use merge::Merged;
pub use method::{
    Adapter, PeftMethod, Prefix, PrefixCx, PromptCx, PromptLabel, PromptPlace, Selected,
};
pub use network::Network;
pub use param::{Init, Param, Tensors};
pub use registry::{Family, MethodEntry, Parsed, entry_for, known_fields, methods, parse_fields};
pub use split::Member;
pub use tokens::TokenRows;
pub use tree::{ModelFacts, ModuleId, ModuleInfo, ModuleKind, ModuleTree, Site};

pub use inventory;
pub use ndarray;
pub use peft_tensor;
pub use peft_tensor::{BaseWeight, Device, Grads, RngKey, Tensor, TensorError};
pub use serde_json;
