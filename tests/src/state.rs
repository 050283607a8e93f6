//! What a network holds, to be compared before and after.

use std::collections::BTreeMap;

use peft::core::{Network, Tensor};

use crate::compare::{Check, bits, same_bits, stored_bits};
use crate::subject::told;

/// An adapter's tensors as they are saved.
///
/// # Errors
/// If there is no such adapter.
pub fn exported(network: &Network, name: &str) -> Result<BTreeMap<String, Tensor>, String> {
    told("export", network.export(name)).map(|(_, tensors)| tensors)
}

/// The same keys with the same bits.
///
/// # Errors
/// Says what differs.
pub fn same_tensors(got: &BTreeMap<String, Tensor>, want: &BTreeMap<String, Tensor>) -> Check {
    let (got_keys, want_keys): (Vec<_>, Vec<_>) = (got.keys().collect(), want.keys().collect());
    if got_keys != want_keys {
        return Err(format!("the keys are {got_keys:?}, not {want_keys:?}"));
    }
    want.iter()
        .try_for_each(|(key, value)| same_bits(key, &got[key], value))
}

/// All parameters' values.
///
/// # Errors
/// Whatever the device says.
pub fn values(network: &Network) -> Result<Vec<Vec<u64>>, String> {
    network
        .parameters()
        .iter()
        .map(|p| bits(&p.tensor()).map(|(_, values)| values))
        .collect()
}

/// The base's weights, byte by byte as stored.
///
/// # Errors
/// Whatever the device says.
pub fn base_bits(network: &Network) -> Result<BTreeMap<String, Vec<u8>>, String> {
    network
        .base()
        .weights()
        .iter()
        .map(|(name, weight)| Ok((name.clone(), stored_bits(weight)?)))
        .collect()
}

/// The weights that run, by module.
///
/// # Errors
/// Whatever the device says.
pub fn running_weights(network: &Network) -> Result<BTreeMap<String, Tensor>, String> {
    let with_weight = network.tree().iter().filter(|(_, m)| m.weight.is_some());
    with_weight
        .map(|(id, m)| Ok((m.path.clone(), told(&m.path, network.weight(id))?)))
        .collect()
}
