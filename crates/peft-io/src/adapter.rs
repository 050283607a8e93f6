//! Adapter folders in Hugging Face PEFT's layout: `adapter_config.json`, `adapter_model.safetensors` and
//! a model card, as `PeftModel.save_pretrained` writes and `PeftModel.from_pretrained` reads them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::files::pretty_json;
use crate::stage::Stage;
use crate::tensors::stage_tensors;
use crate::{Checkpoint, Error, NamedTensors, Result, StoredFormat, check_finite, read_json};

/// The configuration's file name.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The tensors' file name.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
const CARD: &str = "README.md";

/// An adapter as it lies on disk, its keys and fields untouched.
#[derive(Debug, Clone)]
pub struct AdapterFiles {
    /// The folder.
    pub folder: PathBuf,
    /// `adapter_config.json`, always an object.
    pub config: Value,
    /// Tensors in f32, by key as stored.
    pub tensors: NamedTensors,
    /// What each tensor was stored as.
    pub formats: BTreeMap<String, StoredFormat>,
    /// `__metadata__` of the safetensors header.
    pub metadata: BTreeMap<String, String>,
}

/// Whether a folder has the files of an adapter in Hugging Face PEFT's layout, or in AdapterHub's.
pub fn is_adapter_folder(folder: &Path) -> bool {
    let ours = || folder.join(ADAPTER_WEIGHTS).is_file() || crate::is_adapterhub_folder(folder);
    folder.join(ADAPTER_CONFIG).is_file() && ours() || crate::is_fusion_folder(folder)
}

/// Reads an adapter folder; one in AdapterHub's layout with its fields and keys as ours.
///
/// # Errors
/// When a file is missing, a pickle, or damaged, or a tensor holds a NaN or an infinity.
pub fn read_adapter(folder: &Path) -> Result<AdapterFiles> {
    if !folder.is_dir() {
        return Err(Error::format(
            folder,
            "is not a folder; an adapter is a folder of files",
        ));
    }
    let weights = folder.join(ADAPTER_WEIGHTS);
    if !weights.is_file() && crate::is_adapterhub_folder(folder) {
        return crate::read_adapterhub(folder);
    }
    if !weights.is_file() {
        return Err(no_weights(folder));
    }
    let config_path = folder.join(ADAPTER_CONFIG);
    let config = read_json(&config_path)?;
    if !config.is_object() {
        return Err(Error::format(config_path, "is not a JSON object"));
    }
    let file = Checkpoint::open(&weights)?;
    let mut tensors = NamedTensors::new();
    let mut formats = BTreeMap::new();
    for (name, meta) in file.metas() {
        let tensor = file.f32(name)?;
        check_finite(name, &tensor.1)?;
        tensors.insert(name.clone(), tensor);
        formats.insert(name.clone(), meta.format);
    }
    let metadata = file.metadata().clone();
    Ok(AdapterFiles {
        folder: folder.to_owned(),
        config,
        tensors,
        formats,
        metadata,
    })
}

/// Why a folder is not a readable adapter, and what to do about what is in it.
fn no_weights(folder: &Path) -> Error {
    let pickle = folder.join("adapter_model.bin");
    if pickle.is_file() {
        return Error::unsupported(
            pickle,
            "a PyTorch pickle is not read, because unpickling runs code from the file; convert it with \
             Python: `import torch; from safetensors.torch import save_file; \
             save_file(torch.load(\"adapter_model.bin\", weights_only=True), \
             \"adapter_model.safetensors\", metadata={\"format\": \"pt\"})`",
        );
    }
    if let Some(pickle) = crate::adapterhub::pickle(folder) {
        return pickle;
    }
    if crate::is_fusion_folder(folder) {
        return Error::unsupported(
            folder,
            "holds a fusion of AdapterHub's: give the adapters it joins as adapters besides",
        );
    }
    if folder.join("config.json").is_file() {
        return Error::unsupported(
            folder,
            "holds a model, not an adapter: pass it as the model",
        );
    }
    Error::format(
        folder,
        format!("no adapter here: {ADAPTER_WEIGHTS} is missing"),
    )
}

/// Writes an adapter folder in f32: tensors, configuration (indent 2, sorted keys) and, if there is none
/// yet, a model card. The files appear together or not at all.
///
/// # Errors
/// When the configuration is not an object, a shape disagrees with its values, a value is not finite, or
/// a file cannot be written; the folder is then as before.
pub fn write_adapter(folder: &Path, config: &Value, tensors: &NamedTensors) -> Result<()> {
    write_adapter_with(folder, config, tensors, &[])
}

/// As [`write_adapter`], with the tensors named in `integers` written as whole numbers (I32).
///
/// # Errors
/// As [`write_adapter`], and when one of those values is no whole number.
pub fn write_adapter_with(
    folder: &Path,
    config: &Value,
    tensors: &NamedTensors,
    integers: &[String],
) -> Result<()> {
    if !config.is_object() {
        return Err(Error::format(
            folder.join(ADAPTER_CONFIG),
            "would not be a JSON object",
        ));
    }
    for (name, (_, values)) in tensors {
        check_finite(name, values)?;
    }
    let mut stage = Stage::new(folder)?;
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    stage_tensors(&mut stage, ADAPTER_WEIGHTS, tensors, integers, &metadata)?;
    stage.add(ADAPTER_CONFIG, pretty_json(config).as_bytes())?;
    if !folder.join(CARD).exists() {
        stage.add(CARD, card(config).as_bytes())?;
    }
    stage.commit()
}

/// A model card that the Hugging Face hub understands.
fn card(config: &Value) -> String {
    let text = |key: &str| {
        config
            .get(key)
            .and_then(Value::as_str)
            .filter(|s| !s.is_empty())
    };
    let mut card = String::from("---\n");
    if let Some(base) = text("base_model_name_or_path") {
        // A JSON string is a YAML string, whatever is in it.
        card.push_str(&format!("base_model: {}\n", Value::from(base)));
    }
    card.push_str("library_name: peft\n---\n\n# Adapter\n\n");
    if let Some(kind) = text("peft_type") {
        card.push_str(&format!("Method: {kind}.\n"));
    }
    card.push_str("Load it with Hugging Face PEFT or with the `peft` command.\n");
    card
}
