//! Training: configuration, data, optimisers, schedules, the loop and its checkpoints, evaluation.
//!
//! [`train`] runs a whole [`TrainConfig`]; [`Trainer`] runs on a model and data that are already there;
//! [`evaluate`] measures a model. This crate is the only caller of [`peft_core::TrainHooks`].

pub mod config;
pub mod data;
mod evaluate;
pub mod optim;
mod predict;
mod report;
mod schedule;
mod tokenizer;
mod trainer;
mod vote;

pub use config::{Checkpointing, TrainConfig, apply_set, validate_keys};
pub use data::{Dataset, LabelNames, RawData};
pub use evaluate::{EvalOptions, EvalReport, evaluate};
pub use predict::{Forecast, Memory, predict};
pub use report::{Observer, StepReport, Summary, TIMING_FIELDS};
pub use schedule::Schedule;
pub use trainer::{ADAPTER_NAME, Trainer, encode_for, task_for, train};
pub use vote::{VoteReport, vote};

/// An error about a file in this workspace's terms.
pub(crate) fn io(error: peft_io::Error) -> peft_core::Error {
    peft_core::Error::other(error.to_string())
}
