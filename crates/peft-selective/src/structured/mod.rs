//! Whole parameters of some kinds.

pub mod bitfit;
pub mod ln_tuning;
