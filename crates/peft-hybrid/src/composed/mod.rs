//! Several methods on one model.

pub mod adapter_fusion;
pub mod lora_ln;
pub mod mam;
pub mod union;
pub mod unipelt;
