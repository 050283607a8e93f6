//! How many parameters a configuration would train.

use peft_core::serde_json::Value;
use peft_core::{Network, Result};

/// Trainable parameters of a fresh adapter on this network; nothing stays attached.
///
/// # Errors
/// If the configuration does not fit.
pub fn count_parameters(network: &mut Network, config: &Value) -> Result<usize> {
    const NAME: &str = "(counted)";
    network.attach(NAME, config, 0)?;
    let count = network
        .adapter_parameters(NAME)?
        .iter()
        .map(peft_core::Param::numel)
        .sum();
    network.delete(NAME)?;
    Ok(count)
}
