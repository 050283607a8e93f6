//! Small networks inserted into a layer.

pub mod adapter_plus;
pub mod compacter;
pub mod compacter_plus;
pub mod houlsby;
pub mod loreft;
pub mod nice;
pub mod parallel_adapter;
pub mod pfeiffer;
pub mod scaled_parallel_adapter;
