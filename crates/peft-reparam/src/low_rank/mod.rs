//! Changes of low rank.

pub mod lora;
