//! What the command's verbs do, as functions: open a model with adapters on it, merge them into a checkpoint
//! tensor by tensor, look at a model's modules, write logits, make a fresh adapter.
//!
//! Paths may be hub ids wherever [`peft_io::resolve_model`] and [`peft_io::resolve_adapter`] take them.

mod adapterhub;
mod adapters;
mod bench;
mod compose;
mod count;
mod evaluate;
mod inspect;
mod logits;
mod merge;
mod open;

pub use adapterhub::export_adapterhub;
pub use adapters::{named_tensors, read_adapter, tensors_of, write_adapter};
pub use bench::{Speed, bench, kernels};
pub use compose::Compose;
pub use count::count_parameters;
pub use evaluate::{EvaluateOptions, evaluate, vote};
pub use inspect::{Inspection, ModuleRow, inspect};
pub use logits::{LogitsInput, LogitsReport, write_logits};
pub use merge::{
    MergeDType, MergeOptions, MergeReport, Onto, QuantizeOptions, QuantizeReport, merge, quantize,
};
pub use open::{OpenedAdapter, Subject, open, open_composed, task_of_adapters};
