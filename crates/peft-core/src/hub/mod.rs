//! AdapterHub's form of an adapter, the one of its `adapters` library: a configuration without a `peft_type`, and keys
//! that are paths in its own model class with the adapter's name in them. A method says in its registration how its
//! configuration and tensors look there; names and wrappers are handled here, files in peft-io.

mod places;

use serde_json::{Map, Value, json};

pub use places::{left_out, linear_places};

use crate::config::HF_HEADS;
use crate::{Error, MethodEntry, Result, Tensors, entry_for, methods};

/// How a method looks in AdapterHub's folders. Its *plain* keys are theirs without the adapter's name.
#[derive(Clone, Copy)]
pub struct Hub {
    /// Whether a configuration of theirs means this method.
    pub claims: fn(&Value) -> bool,
    /// Whether a plain key belongs to an adapter of that configuration, where several share a folder (a union).
    pub owns: fn(&Value, &str) -> bool,
    /// Their configuration and plain tensors to ours; `peft_type` is added to what it returns.
    pub read: fn(&Value, Tensors) -> Result<(Value, Tensors)>,
    /// The inverse.
    pub write: fn(&HubModel, &Value, Tensors) -> Result<(Value, Tensors)>,
}

/// The model an adapter is written for.
#[derive(Clone, Debug, Default)]
pub struct HubModel {
    /// `model_type` of its config.json.
    pub model_type: String,
    /// Its class in `transformers`.
    pub model_class: String,
    /// Where it came from.
    pub model_name: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of its layers.
    pub num_layers: usize,
    /// Name of the encoder or decoder in its class (`bert`, `model`); empty where the class is that itself.
    pub root: String,
}

impl HubModel {
    /// A path below the encoder or decoder.
    pub fn below(&self, path: &str) -> String {
        if self.root.is_empty() {
            path.to_owned()
        } else {
            format!("{}.{path}", self.root)
        }
    }
}

/// An adapter as AdapterHub's folder holds it.
#[derive(Clone, Debug)]
pub struct HubFolder {
    /// `adapter_config.json`
    pub config: Value,
    /// `adapter.safetensors`
    pub tensors: Tensors,
    /// `head_config.json` and `model_head.safetensors`, where a head was trained along.
    pub head: Option<(Value, Tensors)>,
}

/// Parts of a key in front of the adapter's name.
const MARKERS: [&str; 8] = [
    ".prefix_tunings.",
    ".prefix_gates.",
    ".prompt_tunings.",
    ".loras.",
    ".refts.",
    ".shared_parameters.",
    ".invertible_adapters.",
    ".adapters.",
];
/// In front of a module's path in our keys.
const MODULE: &str = "base_model.model.";
/// In front of a whole-model parameter in our keys.
const WHOLE: &str = "base_model.";
const SHARED: &str = "shared_parameters.";
/// What the library writes behind `adapters.` as its version.
const VERSION: &str = "adapters.1.3.0";

/// The method a configuration of theirs means.
///
/// # Errors
/// If there is none, with what is known.
pub fn entry(config: &Value) -> Result<(&'static MethodEntry, Hub)> {
    let with_hub = methods().into_iter().filter_map(|e| Some((e, e.hub?)));
    let claims: Vec<_> = with_hub
        .clone()
        .filter(|(_, hub)| (hub.claims)(config))
        .collect();
    match &claims[..] {
        [one] => Ok(*one),
        [] => {
            let known: Vec<_> = with_hub.map(|(e, _)| e.title).collect();
            let what = config["architecture"].as_str().unwrap_or("bottleneck");
            let detail = format!(
                "AdapterHub's {what:?} with these fields has no method here that computes the same; known: {}",
                known.join(", ")
            );
            Err(Error::config("config.architecture", detail))
        }
        several => {
            let ids: Vec<_> = several.iter().map(|(e, _)| e.id).collect();
            let detail = format!("several methods take it: {}", ids.join(", "));
            Err(Error::config("config", detail))
        }
    }
}

/// Their configuration and plain tensors as ours.
///
/// # Errors
/// If no method takes it, or its tensors do not fit.
pub fn read(config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    let (entry, hub) = entry(config)?;
    let (mut ours, tensors) = (hub.read)(config, tensors)?;
    let Some(fields) = ours.as_object_mut() else {
        return Err(Error::other("a configuration has to be a table"));
    };
    fields.insert("peft_type".to_owned(), json!(entry.peft_type));
    Ok((ours, tensors))
}

/// Our configuration and tensors as theirs, keys plain.
///
/// # Errors
/// If the method has no form there.
pub fn write(model: &HubModel, config: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    let entry = entry_for(config)?;
    let Some(hub) = entry.hub else {
        let known = methods().into_iter().filter(|e| e.hub.is_some());
        let known: Vec<_> = known.map(|e| e.title).collect();
        let detail = format!(
            "{} has no form in AdapterHub's folders; these have: {}",
            entry.title,
            known.join(", ")
        );
        return Err(Error::config("peft_type", detail));
    };
    // Members of compositions may leave fields at their defaults.
    let mut all = (entry.parse)(config)?.fields;
    if let (Some(all), Some(given)) = (all.as_object_mut(), config.as_object()) {
        for (field, value) in given {
            if !all.contains_key(field) {
                all.insert(field.clone(), value.clone());
            }
        }
    }
    (hub.write)(model, &all, tensors)
}

/// A plain key as ours.
pub fn our_key(plain: &str) -> String {
    match format!(".{plain}").find(&format!(".{SHARED}")) {
        Some(at) => format!("{WHOLE}{}", &plain[at..]),
        None => format!("{MODULE}{plain}"),
    }
}

/// Our key as a plain one.
///
/// # Errors
/// If it is no module's and no shared parameter's.
pub fn plain_key(model: &HubModel, ours: &str) -> Result<String> {
    if let Some(plain) = ours.strip_prefix(MODULE) {
        return Ok(plain.to_owned());
    }
    match ours.strip_prefix(WHOLE) {
        Some(rest) if rest.starts_with(SHARED) => Ok(model.below(rest)),
        _ => Err(Error::other(format!(
            "`{ours}` has no place in AdapterHub's folders"
        ))),
    }
}

/// All keys as ours.
pub fn our_keys(tensors: Tensors) -> Tensors {
    let renamed = tensors.into_iter().map(|(k, t)| (our_key(&k), t));
    renamed.collect()
}

/// All keys plain.
///
/// # Errors
/// As [`plain_key`].
pub fn plain_keys(model: &HubModel, tensors: Tensors) -> Result<Tensors> {
    let renamed = tensors
        .into_iter()
        .map(|(k, t)| Ok((plain_key(model, &k)?, t)));
    renamed.collect()
}

/// The paths in front of `marker` in plain keys, each once: the modules an adapter sits on.
pub fn paths(tensors: &Tensors, marker: &str) -> Vec<String> {
    let mut found: Vec<String> = tensors
        .keys()
        .filter_map(|k| Some(k[..k.find(marker)?].to_owned()))
        .collect();
    found.dedup();
    found
}

/// `key` without the adapter's name; None where it is not this adapter's.
fn without_name(key: &str, name: &str) -> Option<String> {
    let dotted = format!(".{key}");
    let marker = MARKERS
        .iter()
        .find(|m| dotted.contains(&format!("{m}{name}.")))?;
    let plain = dotted.replacen(&format!("{marker}{name}."), marker, 1);
    Some(plain[1..].to_owned())
}

fn with_name(plain: &str, name: &str) -> Result<String> {
    let dotted = format!(".{plain}");
    let Some(marker) = MARKERS.iter().find(|m| dotted.contains(*m)) else {
        return Err(Error::other(format!(
            "`{plain}` has no place in AdapterHub's folders"
        )));
    };
    let named = dotted.replacen(marker, &format!("{marker}{name}."), 1);
    Ok(named[1..].to_owned())
}

/// Plain keys with the adapter's name in them.
///
/// # Errors
/// If one has no place for a name.
pub fn named(name: &str, plain: Tensors) -> Result<Tensors> {
    let named = plain
        .into_iter()
        .map(|(k, t)| Ok((with_name(&k, name)?, t)));
    named.collect()
}

/// Their configuration with the mistakes of old versions set right: activations of before 3.0, whose gelu was the tanh
/// form, and LoRA of before 1.1.0, which was trained without its factor.
fn mended(folder: &Value) -> Value {
    let mut config = folder["config"].clone();
    let version = folder["version"].as_str();
    if version.is_none() {
        match config["non_linearity"].as_str() {
            Some("gelu") => config["non_linearity"] = json!("gelu_new"),
            Some("gelu_orig") => config["non_linearity"] = json!("gelu"),
            _ => {}
        }
    }
    let old = version
        .and_then(|v| v.strip_prefix("adapters."))
        .is_some_and(|v| {
            let mut parts = v.split('.').map(|p| p.parse::<u32>().unwrap_or(0));
            (parts.next().unwrap_or(0), parts.next().unwrap_or(0)) < (1, 1)
        });
    // Only low-rank updates are composed in a mode.
    if old && config.get("composition_mode").is_some() {
        config["alpha"] = config["r"].clone();
    }
    config
}

/// Names of old for what is now called `adapters`.
fn modern(key: &str) -> String {
    const OLD: [(&str, &str); 5] = [
        ("attention_text_task_adapters", "adapters"),
        ("attention_text_lang_adapters", "adapters"),
        ("layer_text_task_adapters", "adapters"),
        ("layer_text_lang_adapters", "adapters"),
        ("invertible_lang_adapters", "invertible_adapters"),
    ];
    OLD.iter()
        .fold(key.to_owned(), |key, (old, new)| key.replace(old, new))
}

/// The configuration and plain tensors of a folder.
///
/// # Errors
/// If a field is missing, or a tensor is another adapter's.
pub fn plain(folder: &Value, tensors: Tensors) -> Result<(Value, Tensors)> {
    let Some(name) = folder["name"].as_str() else {
        return Err(Error::config("name", "is missing"));
    };
    if !folder["config"].is_object() {
        let detail = "has to be the configuration itself; names of presets are not resolved";
        return Err(Error::config("config", detail));
    }
    let mut out = Tensors::new();
    for (key, value) in tensors {
        // A prefix hangs at every layer that uses it, besides its own place.
        if key.contains(".prefix_tuning.pool.") {
            continue;
        }
        let Some(plain) = without_name(&modern(&key), name) else {
            let detail = format!("`{key}` is not the adapter {name:?}'s");
            return Err(Error::config("adapter.safetensors", detail));
        };
        out.insert(plain, value);
    }
    Ok((mended(folder), out))
}

/// A folder as an adapter of ours.
///
/// # Errors
/// If no method here computes what it asks for, or tensors or head do not fit.
pub fn from_folder(folder: HubFolder) -> Result<(Value, Tensors)> {
    let (config, tensors) = plain(&folder.config, folder.tensors)?;
    let (mut ours, mut tensors) = read(&config, tensors)?;
    if let Some((config, head)) = folder.head {
        add_head(&mut ours, &mut tensors, &config, head)?;
    }
    if let (Some(fields), Some(base)) = (ours.as_object_mut(), folder.config["model_name"].as_str())
        && !base.is_empty()
    {
        fields.insert("base_model_name_or_path".to_owned(), json!(base));
    }
    Ok((ours, tensors))
}

/// A head of theirs as modules that we save whole. A flexible classification head of two layers is BERT's pooler and
/// classifier.
fn add_head(ours: &mut Value, tensors: &mut Tensors, config: &Value, head: Tensors) -> Result<()> {
    let (mut saved, mut classifies) = (Vec::new(), false);
    let flexible = &config["config"];
    for (key, value) in head {
        let key = if flexible.is_null() {
            key
        } else {
            flexible_key(config, &key)?
        };
        let module = key.rsplit_once('.').map_or(&*key, |(module, _)| module);
        let leaf = module.split('.').next_back().unwrap_or(module);
        classifies |= HF_HEADS.contains(&leaf);
        if !saved.iter().any(|s: &Value| s == module) {
            saved.push(json!(module));
        }
        tensors.insert(format!("{MODULE}{key}"), value);
    }
    if let Some(fields) = ours.as_object_mut() {
        fields.insert("modules_to_save".to_owned(), Value::Array(saved));
        if classifies {
            fields.insert("task_type".to_owned(), json!("SEQ_CLS"));
        }
    }
    Ok(())
}

fn flexible_key(folder: &Value, key: &str) -> Result<String> {
    let config = &folder["config"];
    let known = folder["model_type"] == "bert"
        && config["head_type"] == "classification"
        && config["layers"] == 2
        && config["activation_function"] == "tanh"
        && config["use_pooler"] != true;
    let name = folder["name"].as_str().unwrap_or_default();
    let layer = key
        .strip_prefix("heads.")
        .and_then(|k| k.strip_prefix(name)?.strip_prefix('.')?.split_once('.'));
    match layer {
        Some(("1", last)) if known => Ok(format!("bert.pooler.dense.{last}")),
        Some(("4", last)) if known => Ok(format!("classifier.{last}")),
        _ => {
            let detail = "only BERT's classification heads of two layers with tanh, and heads of plain transformers \
                classes, are read; save the adapter without its head";
            Err(Error::config("head_config.json", detail))
        }
    }
}

/// An adapter of ours as a folder called `name`.
///
/// # Errors
/// If the method has no form there, or something is trained along that has none.
pub fn to_folder(
    model: &HubModel,
    name: &str,
    config: &Value,
    tensors: Tensors,
) -> Result<HubFolder> {
    if name.is_empty() || name.contains('.') {
        let detail = format!("{name:?} has to be a word without dots");
        return Err(Error::config("name", detail));
    }
    let saved: Vec<String> = config["modules_to_save"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|n| n.as_str().map(str::to_owned))
        .chain(HF_HEADS.map(str::to_owned))
        .collect();
    let is_head = |key: &str| {
        let module = key.strip_prefix(MODULE).and_then(|k| k.rsplit_once('.'));
        module.is_some_and(|(m, _)| {
            saved
                .iter()
                .any(|s| m == s || m.ends_with(&format!(".{s}")) || m.contains(&format!("{s}.")))
        })
    };
    let (head, own): (Tensors, Tensors) = tensors.into_iter().partition(|(k, _)| is_head(k));
    let (theirs, plain) = write(model, config, own)?;
    // A fusion is several folders, each with a name of its own.
    let tensors = match theirs["architecture"] == "fusion" {
        true => plain,
        false => named(name, plain)?,
    };
    Ok(HubFolder {
        config: full(model, Some(name), theirs),
        tensors,
        head: static_head(model, head)?,
    })
}

/// A head of a plain transformers class, as their folders keep it.
fn static_head(model: &HubModel, head: Tensors) -> Result<Option<(Value, Tensors)>> {
    if head.is_empty() {
        return Ok(None);
    }
    let mut out = Tensors::new();
    let mut labels = None;
    for (key, value) in head {
        let key = key.strip_prefix(MODULE).unwrap_or(&key).to_owned();
        if !model.root.is_empty() && key.starts_with(&format!("{}.", model.root)) {
            let detail = format!(
                "`{key}` is trained whole; AdapterHub's folders hold the adapter and the head alone"
            );
            return Err(Error::config("modules_to_save", detail));
        }
        let leaf = key.rsplit('.').nth(1).unwrap_or_default();
        if HF_HEADS.contains(&leaf) {
            labels = value.shape().first().copied();
        }
        out.insert(key, value);
    }
    let mut config = full(model, None, Value::Null);
    if let (Some(fields), Some(labels)) = (config.as_object_mut(), labels) {
        let ids: Map<String, Value> = (0..labels)
            .map(|i| (format!("LABEL_{i}"), json!(i)))
            .collect();
        fields.insert("num_labels".to_owned(), json!(labels));
        fields.insert("label2id".to_owned(), Value::Object(ids));
    }
    Ok(Some((config, out)))
}

/// The object their files wrap a configuration in.
pub fn full(model: &HubModel, name: Option<&str>, config: Value) -> Value {
    json!({
        "config": config,
        "hidden_size": model.hidden_size,
        "model_class": model.model_class,
        "model_name": model.model_name,
        "model_type": model.model_type,
        "name": name,
        "version": VERSION,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_in_and_out() {
        let pairs = [
            (
                "bert.encoder.layer.0.output.adapters.x.adapter_up.bias",
                "bert.encoder.layer.0.output.adapters.adapter_up.bias",
            ),
            (
                "model.layers.1.attention_adapters.adapters.x.gate.bias",
                "model.layers.1.attention_adapters.adapters.gate.bias",
            ),
            (
                "invertible_adapters.x.F.0.weight",
                "invertible_adapters.F.0.weight",
            ),
            (
                "bert.shared_parameters.x.phm_rule",
                "bert.shared_parameters.phm_rule",
            ),
            (
                "model.layers.0.reft_layer.refts.x.units.0.learned_source.bias",
                "model.layers.0.reft_layer.refts.units.0.learned_source.bias",
            ),
        ];
        for (named, plain) in pairs {
            assert_eq!(without_name(named, "x").as_deref(), Some(plain));
            assert_eq!(with_name(plain, "x").expect("a place"), named);
            assert_eq!(without_name(named, "y"), None);
        }
    }

    #[test]
    fn shared_parameters_lose_the_model() {
        let model = HubModel {
            root: "bert".to_owned(),
            ..HubModel::default()
        };
        let ours = our_key("bert.shared_parameters.phm_rule");
        assert_eq!(ours, "base_model.shared_parameters.phm_rule");
        let back = plain_key(&model, &ours).expect("a place");
        assert_eq!(back, "bert.shared_parameters.phm_rule");
        let own = our_key("bert.pooler.adapters.scaling");
        assert_eq!(own, "base_model.model.bert.pooler.adapters.scaling");
    }

    #[test]
    fn an_old_lora_was_trained_without_its_factor() {
        let folder = |version: &str| json!({"version": version, "config": {"composition_mode": "add", "r": 8, "alpha": 16}});
        assert_eq!(mended(&folder("adapters.1.0.2"))["alpha"], 8);
        assert_eq!(mended(&folder("adapters.1.1.0"))["alpha"], 16);
    }
}
