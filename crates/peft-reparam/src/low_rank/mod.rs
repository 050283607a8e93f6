//! Changes of low rank.

pub mod adalora;
pub mod delta_lora;
pub mod dora;
pub mod dylora;
pub mod intrinsic_said;
pub mod longlora;
pub mod lora;
pub mod lora_drop;
pub mod lora_fa;
pub mod lora_plus;
pub mod moslora;
pub mod sora;
pub mod vera;
