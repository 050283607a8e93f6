//! Hybrid methods: compositions of the other families, written over the registry and knowing no member by name.

pub mod composed;

pub use peft_core as core;
