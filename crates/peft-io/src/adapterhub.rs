//! Folders of AdapterHub's `adapters` library: `adapter_config.json` and `adapter.safetensors`, a head beside them where
//! one was trained, and fusions in folders of their own. What their fields and keys mean is said by each method
//! ([`peft_core::hub`]).

use std::collections::BTreeMap;
use std::path::Path;

use peft_core::hub::{self, HubFolder, HubModel};
use peft_core::{Device, Tensor, Tensors};
use serde_json::{Value, json};

use crate::adapter::ADAPTER_CONFIG;
use crate::files::pretty_json;
use crate::stage::Stage;
use crate::tensors::stage_tensors;
use crate::{AdapterFiles, Checkpoint, Error, NamedTensors, Result, check_finite, read_json};

/// The tensors' file name.
pub const ADAPTERHUB_WEIGHTS: &str = "adapter.safetensors";
const HEAD_CONFIG: &str = "head_config.json";
const HEAD_WEIGHTS: &str = "model_head.safetensors";
const FUSION_CONFIG: &str = "adapter_fusion_config.json";
const FUSION_WEIGHTS: &str = "model_adapter_fusion.safetensors";
/// All of them but the configuration that every adapter has.
pub(crate) const FILES: [&str; 5] = [
    ADAPTERHUB_WEIGHTS,
    HEAD_CONFIG,
    HEAD_WEIGHTS,
    FUSION_CONFIG,
    FUSION_WEIGHTS,
];
/// The same files as the library writes them unless asked for safetensors.
const PICKLES: [(&str, &str, &str); 3] = [
    ("pytorch_adapter.bin", ADAPTERHUB_WEIGHTS, "save_adapter"),
    ("pytorch_model_head.bin", HEAD_WEIGHTS, "save_adapter"),
    (
        "pytorch_model_adapter_fusion.bin",
        FUSION_WEIGHTS,
        "save_adapter_fusion",
    ),
];

/// Whether a folder holds an adapter of AdapterHub's.
pub fn is_adapterhub_folder(folder: &Path) -> bool {
    folder.join(ADAPTERHUB_WEIGHTS).is_file()
}

/// Whether a folder holds a fusion of AdapterHub's: what joins adapters that are in folders of their own.
pub fn is_fusion_folder(folder: &Path) -> bool {
    folder.join(FUSION_CONFIG).is_file()
}

/// Why a pickle of that library is not read, if there is one.
pub(crate) fn pickle(folder: &Path) -> Option<Error> {
    let found = PICKLES
        .iter()
        .find(|(bin, _, _)| folder.join(bin).is_file());
    found.map(|(bin, safe, save)| {
        Error::unsupported(
            folder.join(bin),
            format!(
                "a PyTorch pickle is not read, because unpickling runs code from the file; save it with \
                 `model.{save}(folder, name, use_safetensors=True)`, or convert it with Python: `import torch; from \
                 safetensors.torch import save_file; save_file({{k: v.clone() for k, v in torch.load(\"{bin}\", \
                 weights_only=True).items()}}, \"{safe}\")`"
            ),
        )
    })
}

fn tensors_of(path: &Path) -> Result<Tensors> {
    let file = Checkpoint::open(path)?;
    let mut out = Tensors::new();
    for name in file.names() {
        let (shape, values) = file.f32(name)?;
        check_finite(name, &values)?;
        let tensor = Tensor::from_vec(values, &shape, &Device::cpu())
            .map_err(|e| Error::tensor(path, name, e.to_string()))?;
        out.insert(name.to_owned(), tensor);
    }
    Ok(out)
}

fn named(folder: &Path, tensors: Tensors) -> Result<NamedTensors> {
    tensors
        .into_iter()
        .map(|(key, tensor)| match tensor.to_vec() {
            Ok(values) => Ok((key, (tensor.shape().to_vec(), values))),
            Err(e) => Err(Error::tensor(folder, key, e.to_string())),
        })
        .collect()
}

fn refused(folder: &Path, e: peft_core::Error) -> Error {
    Error::unsupported(folder, e.to_string())
}

/// The folder's files, as they are.
fn raw(folder: &Path) -> Result<HubFolder> {
    let weights = folder.join(ADAPTERHUB_WEIGHTS);
    if !weights.is_file() {
        return Err(pickle(folder)
            .unwrap_or_else(|| Error::format(folder, format!("{ADAPTERHUB_WEIGHTS} is missing"))));
    }
    let head = folder.join(HEAD_WEIGHTS);
    Ok(HubFolder {
        config: read_json(&folder.join(ADAPTER_CONFIG))?,
        tensors: tensors_of(&weights)?,
        head: match head.is_file() {
            true => Some((read_json(&folder.join(HEAD_CONFIG))?, tensors_of(&head)?)),
            false => match folder.join(PICKLES[1].0).is_file() {
                true => return Err(pickle(folder).unwrap_or(Error::format(folder, "has no head"))),
                false => None,
            },
        },
    })
}

/// Reads an adapter, its fields and keys as ours.
///
/// # Errors
/// If a file is missing, a pickle, or damaged, or no method here computes what the adapter asks for.
pub fn read_adapterhub(folder: &Path) -> Result<AdapterFiles> {
    let files = raw(folder)?;
    let (config, tensors) = hub::from_folder(files).map_err(|e| refused(folder, e))?;
    Ok(files_of(folder, config, named(folder, tensors)?))
}

fn files_of(folder: &Path, config: Value, tensors: NamedTensors) -> AdapterFiles {
    AdapterFiles {
        folder: folder.to_owned(),
        config,
        tensors,
        formats: BTreeMap::new(),
        metadata: BTreeMap::from([("format".to_owned(), "adapterhub".to_owned())]),
    }
}

/// Names of the adapters that a fusion joins, in its order.
///
/// # Errors
/// If the folder holds no fusion.
pub fn fusion_members(folder: &Path) -> Result<Vec<String>> {
    let config = read_json(&folder.join(FUSION_CONFIG))?;
    let listed = config["adapter_names"].as_array();
    let names: Vec<String> = match (listed, config["name"].as_str()) {
        (Some(names), _) => names
            .iter()
            .filter_map(|n| n.as_str().map(str::to_owned))
            .collect(),
        (None, Some(name)) => name.split(',').map(str::to_owned).collect(),
        (None, None) => Vec::new(),
    };
    if names.len() < 2 {
        let detail = "names fewer than two adapters";
        return Err(Error::key(
            folder.join(FUSION_CONFIG),
            "adapter_names",
            detail,
        ));
    }
    Ok(names)
}

/// Reads a fusion with the adapters it joins, given in any order, as one adapter of ours.
///
/// # Errors
/// If a file is missing, a pickle or damaged, or the folders given are not those of its adapters.
pub fn read_fusion(folder: &Path, members: &[&Path]) -> Result<AdapterFiles> {
    let names = fusion_members(folder)?;
    let weights = folder.join(FUSION_WEIGHTS);
    if !weights.is_file() {
        return Err(pickle(folder)
            .unwrap_or_else(|| Error::format(folder, format!("{FUSION_WEIGHTS} is missing"))));
    }
    let mut found = Vec::new();
    for member in members {
        found.push((member, raw(member)?));
    }
    let (mut configs, mut tensors) = (Vec::new(), Tensors::new());
    for (i, name) in names.iter().enumerate() {
        let own = found
            .iter()
            .position(|(_, files)| files.config["name"] == **name);
        let Some(own) = own else {
            let given: Vec<String> = found
                .iter()
                .map(|(at, f)| format!("{} in {}", f.config["name"], at.display()))
                .collect();
            let detail = format!(
                "joins {}; give each of these as an adapter besides: {name:?} is missing among {}",
                names.join(", "),
                if given.is_empty() {
                    "none".to_owned()
                } else {
                    given.join(", ")
                }
            );
            return Err(Error::format(folder, detail));
        };
        let (at, files) = found.swap_remove(own);
        let (config, plain) =
            hub::plain(&files.config, files.tensors).map_err(|e| refused(at, e))?;
        configs.push(config);
        tensors.extend(
            plain
                .into_iter()
                .map(|(k, t)| (format!("members.{i}.{k}"), t)),
        );
    }
    if let Some((at, files)) = found.first() {
        let detail = format!(
            "is not joined by the fusion of {}: its adapters are {}",
            folder.display(),
            names.join(", ")
        );
        let what = format!("{} {detail}", files.config["name"]);
        return Err(Error::format(at, what));
    }
    let config = read_json(&folder.join(FUSION_CONFIG))?;
    let name = config["name"].as_str().unwrap_or_default();
    for (key, value) in tensors_of(&weights)? {
        let Some(plain) = without_fusion_name(&key, name) else {
            let detail = format!("is not the fusion {name:?}'s");
            return Err(Error::tensor(&weights, key, detail));
        };
        tensors.insert(plain, value);
    }
    let theirs = json!({"architecture": "fusion", "config": config["config"], "members": configs});
    let (ours, tensors) = hub::read(&theirs, tensors).map_err(|e| refused(folder, e))?;
    let mut ours = ours;
    if let (Some(fields), Some(base)) = (ours.as_object_mut(), config["model_name"].as_str())
        && !base.is_empty()
    {
        fields.insert("base_model_name_or_path".to_owned(), json!(base));
    }
    Ok(files_of(folder, ours, named(folder, tensors)?))
}

const FUSION_LAYER: &str = ".adapter_fusion_layer.";

fn without_fusion_name(key: &str, name: &str) -> Option<String> {
    let marker = format!("{FUSION_LAYER}{name}.");
    key.contains(&marker)
        .then(|| key.replacen(&marker, FUSION_LAYER, 1))
}

/// What was written, by folder: one, or for a fusion each member's and `fusion`.
///
/// # Errors
/// If the adapter has no form in AdapterHub's folders, or a file cannot be written.
pub fn write_adapterhub(
    folder: &Path,
    name: &str,
    model: &HubModel,
    config: &Value,
    tensors: Tensors,
) -> Result<Vec<std::path::PathBuf>> {
    let refused = |e| refused(folder, e);
    let files = hub::to_folder(model, name, config, tensors).map_err(refused)?;
    if files.config["config"]["architecture"] != "fusion" {
        write_one(folder, files)?;
        return Ok(vec![folder.to_owned()]);
    }
    let Some(members) = files.config["config"]["members"].as_array() else {
        return Err(Error::format(folder, "a fusion without members"));
    };
    let names: Vec<String> = (0..members.len()).map(|i| format!("{name}_{i}")).collect();
    let joined = names.join(",");
    let (mut written, mut rest) = (Vec::new(), files.tensors);
    for (i, (config, own_name)) in members.iter().zip(&names).enumerate() {
        let scope = format!("members.{i}.");
        let (own, others): (Tensors, Tensors) =
            rest.into_iter().partition(|(k, _)| k.starts_with(&scope));
        rest = others;
        let plain = own
            .into_iter()
            .map(|(k, t)| (k[scope.len()..].to_owned(), t));
        let place = folder.join(own_name);
        let one = HubFolder {
            config: hub::full(model, Some(own_name), config.clone()),
            tensors: hub::named(own_name, plain.collect()).map_err(refused)?,
            head: if i == 0 { files.head.clone() } else { None },
        };
        write_one(&place, one)?;
        written.push(place);
    }
    let layers = rest.into_iter().map(|(k, t)| {
        let marker = format!("{FUSION_LAYER}{joined}.");
        (k.replacen(FUSION_LAYER, &marker, 1), t)
    });
    let layers = named(folder, layers.collect())?;
    let mut config = hub::full(
        model,
        Some(&joined),
        files.config["config"]["config"].clone(),
    );
    config["adapter_names"] = json!(names);
    let place = folder.join("fusion");
    let mut stage = Stage::new(&place)?;
    stage_tensors(&mut stage, FUSION_WEIGHTS, &layers, &[], &format_pt())?;
    stage.add(FUSION_CONFIG, pretty_json(&config).as_bytes())?;
    stage.commit()?;
    written.push(place);
    Ok(written)
}

fn format_pt() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

fn write_one(folder: &Path, files: HubFolder) -> Result<()> {
    let mut stage = Stage::new(folder)?;
    let tensors = named(folder, files.tensors)?;
    stage_tensors(&mut stage, ADAPTERHUB_WEIGHTS, &tensors, &[], &format_pt())?;
    stage.add(ADAPTER_CONFIG, pretty_json(&files.config).as_bytes())?;
    if let Some((config, head)) = files.head {
        let head = named(folder, head)?;
        stage_tensors(&mut stage, HEAD_WEIGHTS, &head, &[], &format_pt())?;
        stage.add(HEAD_CONFIG, pretty_json(&config).as_bytes())?;
    }
    stage.commit()
}
