//! Hybrid methods: compositions of the other families, written over the registry and knowing no member by name.

pub mod composed;
mod fusion;
mod gate;
pub mod members;
#[cfg(test)]
mod probe;

pub use peft_core as core;

use peft_core::serde_json::Value;

/// Whether every part of a union of AdapterHub's has a gate, which makes it more than a union.
pub(crate) fn all_gated(config: &Value) -> bool {
    let parts = config["configs"].as_array();
    parts.is_some_and(|parts| !parts.is_empty() && parts.iter().all(|p| p["use_gating"] == true))
}

/// AdapterHub's union of these configurations.
pub(crate) fn union_of(configs: Vec<Value>) -> Value {
    let mut whole: Value =
        peft_core::serde_json::from_str(include_str!("adapterhub.json")).unwrap_or_default();
    whole["configs"] = Value::Array(configs);
    whole
}
