//! Training data: from the lines of a file to padded batches.
//!
//! 1. [`RawData::read`] reads JSONL or CSV into rows and refuses what is not one, with its line.
//! 2. [`LabelNames`] numbers the classes, where there are any.
//! 3. [`Dataset::encode`] turns rows into token ids and labels, cut to the longest length allowed.
//! 4. [`Dataset::packed`] puts texts into common rows, where that is wanted.
//! 5. [`plan_epoch`] says which rows share a batch, [`collate`] pads them or [`join`] puts them into one row.

mod batches;
mod csv;
mod dataset;
mod encode;
mod jsonl;
mod labels;
mod pack;
mod raw;

pub use batches::{Collated, collate, join, plan_epoch};
pub(crate) use batches::{beginning, joins};
pub use dataset::{Dataset, Example, Goal, Text};
pub(crate) use encode::learned_from;
pub use encode::{EncodeOptions, Encoder};
pub use labels::{LABELS_FILE, LabelNames};
pub use raw::{RawData, RawLabel, RawRow, RowKind};

#[cfg(test)]
pub(crate) mod tests;
