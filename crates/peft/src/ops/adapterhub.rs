//! Adapters to and from AdapterHub's folders, as far as it takes a model.

use std::path::{Path, PathBuf};

use peft_core::hub::HubModel;
use peft_core::serde_json::Value;
use peft_core::{Error, ModuleTree, Result, Tensors};

use super::open::Subject;

/// In front of a module's path in a key.
const MODULE: &str = "base_model.model.";

/// Fits an adapter to the model's class: AdapterHub's model classes put `bert.` or `model.` in front of paths that others
/// do not have, or leave it out.
pub(super) fn reroot(tree: &ModuleTree, config: &mut Value, tensors: Tensors) -> Tensors {
    let path_of = |key: &str| key.split_once(MODULE).map(|(_, path)| path.to_owned());
    let Some(first) = tensors.keys().find_map(|k| path_of(k)) else {
        return tensors;
    };
    let known = |part: &str| {
        let start = format!("{part}.");
        tree.iter()
            .any(|(_, m)| m.path == part || m.path.starts_with(&start))
    };
    let head = first.split('.').next().unwrap_or_default();
    let fits = |path: &str| known(path.split('.').next().unwrap_or_default());
    let root = root_of(tree);
    let change: Box<dyn Fn(&str) -> String> = if known(head) {
        return tensors;
    } else if first.split_once('.').is_some_and(|(_, rest)| fits(rest)) {
        let prefix = format!("{head}.");
        Box::new(move |path| path.strip_prefix(&prefix).unwrap_or(path).to_owned())
    } else if !root.is_empty() && known(&format!("{root}.{head}")) {
        Box::new(move |path| format!("{root}.{path}"))
    } else {
        return tensors;
    };
    rename_targets(config, &change);
    let renamed = tensors.into_iter().map(|(key, value)| {
        let key = match key.split_once(MODULE) {
            Some((scope, path)) => format!("{scope}{MODULE}{}", change(path)),
            None => key,
        };
        (key, value)
    });
    renamed.collect()
}

fn rename_targets(config: &mut Value, change: &dyn Fn(&str) -> String) {
    if let Some(targets) = config["target_modules"].as_array_mut() {
        for target in targets {
            if let Some(path) = target.as_str() {
                *target = Value::from(change(path));
            }
        }
    }
    for member in config["members"].as_array_mut().into_iter().flatten() {
        rename_targets(member, change);
    }
}

/// What is in front of the encoder's or decoder's own paths in the model's class.
fn root_of(tree: &ModuleTree) -> String {
    let embedding = tree.facts().input_embedding.as_deref().unwrap_or_default();
    match embedding.split('.').next() {
        Some(root @ ("bert" | "model" | "transformer")) if embedding.contains('.') => {
            root.to_owned()
        }
        _ => String::new(),
    }
}

/// Writes an adapter on `model` to `output` in AdapterHub's layout, called `name` there. Returns the folders: one, or for a
/// fusion one for each member and one for the fusion.
///
/// # Errors
/// If model or adapter cannot be read, the adapter has no form there, or `output` holds an adapter and `overwrite` is
/// false.
pub fn export_adapterhub(
    model: &str,
    adapter: &str,
    name: &str,
    output: &Path,
    overwrite: bool,
) -> Result<Vec<PathBuf>> {
    let taken = [peft_io::ADAPTER_CONFIG, peft_io::ADAPTERHUB_WEIGHTS]
        .iter()
        .any(|file| output.join(file).exists())
        || output.join("fusion").exists();
    if taken && !overwrite {
        return Err(Error::file(
            output,
            "the folder already holds an adapter; choose another folder or allow overwriting (--overwrite)",
        ));
    }
    let (subject, opened) = Subject::with_adapters(model, &[adapter.to_owned()], false)?;
    let Some(opened) = opened.first() else {
        return Err(Error::other("no adapter was opened"));
    };
    let (config, tensors) = subject.network().export(&opened.name)?;
    let tree = subject.network().tree();
    let text = |key: &str| subject.config[key].as_str().unwrap_or_default().to_owned();
    let class = subject.config["architectures"][0].as_str();
    let made_for = config["base_model_name_or_path"]
        .as_str()
        .filter(|base| !base.is_empty());
    let target = HubModel {
        model_type: text("model_type"),
        model_class: class.unwrap_or_default().to_owned(),
        model_name: made_for.unwrap_or(model).to_owned(),
        hidden_size: tree.facts().hidden_size,
        num_layers: tree.facts().num_layers,
        root: root_of(tree),
    };
    Ok(peft_io::write_adapterhub(
        output, name, &target, &config, tensors,
    )?)
}
