//! Whole parameters of some kinds.

pub mod bitfit;
pub mod cross_attention;
pub mod last_layers;
pub mod ln_tuning;
pub mod trainable_tokens;
pub mod whole_modules;
