//! Adapters between their files and a network's tensors.

use std::path::{Path, PathBuf};

use peft_core::serde_json::Value;
use peft_core::{Device, Error, Network, Result, Tensor};
use peft_io::{AdapterFiles, NamedTensors};

/// An adapter by path or hub id.
///
/// # Errors
/// If it cannot be found or read.
pub fn read_adapter(spec: &str) -> Result<AdapterFiles> {
    let folder = peft_io::resolve_adapter(spec)?;
    Ok(peft_io::read_adapter(&folder)?)
}

/// Tensors out of a file as a network takes them.
///
/// # Errors
/// If a shape and its values disagree.
pub fn tensors_of(named: NamedTensors, device: &Device) -> Result<peft_core::Tensors> {
    named
        .into_iter()
        .map(|(key, (shape, values))| Ok((key, Tensor::from_vec(values, &shape, device)?)))
        .collect()
}

/// A network's tensors as a file takes them.
///
/// # Errors
/// Whatever the device says.
pub fn named_tensors(tensors: &peft_core::Tensors) -> Result<NamedTensors> {
    tensors
        .iter()
        .map(|(key, tensor)| Ok((key.clone(), (tensor.shape().to_vec(), tensor.to_vec()?))))
        .collect()
}

/// Writes the adapter `name` of `network` to `folder` with the model it was made for; the files appear together or
/// not at all.
///
/// # Errors
/// If there is no such adapter, `folder` holds one and `overwrite` is false, or a file cannot be written.
pub fn write_adapter(
    network: &Network,
    name: &str,
    base: &str,
    folder: &Path,
    overwrite: bool,
) -> Result<PathBuf> {
    check_free(folder, overwrite)?;
    let (mut config, tensors) = network.export(name)?;
    if let Some(fields) = config.as_object_mut() {
        fields.insert("base_model_name_or_path".to_owned(), Value::from(base));
    }
    let integers = network.integer_keys(name)?;
    peft_io::write_adapter_with(folder, &config, &named_tensors(&tensors)?, &integers)?;
    Ok(folder.to_owned())
}

/// That `folder` holds no adapter, or one that may be overwritten.
pub(super) fn check_free(folder: &Path, overwrite: bool) -> Result<()> {
    let files = [peft_io::ADAPTER_CONFIG, peft_io::ADAPTER_WEIGHTS];
    if !overwrite && files.iter().any(|file| folder.join(file).exists()) {
        return Err(Error::file(
            folder,
            "the folder already holds an adapter; choose another folder or allow overwriting (--overwrite)",
        ));
    }
    Ok(())
}
