//! Trained tokens, or keys and values, in front of the real ones.

pub mod cpt;
pub mod llama_adapter;
pub mod multitask_prompt_tuning;
pub mod p_tuning;
pub mod p_tuning_v2;
pub mod prefix_tuning;
pub mod prompt_tuning;
