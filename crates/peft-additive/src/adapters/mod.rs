//! Small networks inserted into a layer.

pub mod pfeiffer;
