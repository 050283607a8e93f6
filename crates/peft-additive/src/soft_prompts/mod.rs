//! Trained tokens, or keys and values, in front of the real ones.

pub mod prefix_tuning;
pub mod prompt_tuning;
