//! A model's modules, which of them adapters change, and what training them costs.

use std::collections::HashMap;

use peft_core::serde_json::{Value, json};
use peft_core::{ModuleKind, Network};

use super::Subject;

/// One module of the table.
#[derive(Clone, Debug)]
pub struct ModuleRow {
    /// Dotted path.
    pub path: String,
    /// What it computes.
    pub kind: ModuleKind,
    /// Its weight's shape as stored; None without a weight.
    pub shape: Option<Vec<usize>>,
    /// Its weight's stored format; None without a weight.
    pub format: Option<String>,
    /// The other module whose weight this is, in a tied pair.
    pub shares: Option<String>,
    /// Whether an adapter acts on it.
    pub adapted: bool,
    /// Adapter parameters at it.
    pub trainable: usize,
}

/// A model as [`inspect`] sees it.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// `model_type`, or empty.
    pub model_type: String,
    /// Whether its architecture can be run by this build.
    pub runnable: bool,
    /// Modules in the model's order, containers left out.
    pub modules: Vec<ModuleRow>,
    /// Parameters of the base.
    pub parameters: usize,
    /// Bytes of the base as stored.
    pub base_bytes: u64,
    /// Parameters of the adapters.
    pub trainable: usize,
    /// Bytes of the adapters' files, in f32.
    pub adapter_bytes: u64,
    /// Bytes of AdamW's two moments, in f32.
    pub optimizer_bytes: u64,
    /// Positions that adapters put in front of every text.
    pub virtual_tokens: usize,
}

/// The table of a model's modules and the totals, with the adapters attached to it.
pub fn inspect(subject: &Subject) -> Inspection {
    let network = subject.network();
    let tree = network.tree();
    let changed = network.changed_modules();
    let by_module = adapter_parameters(network);
    let mut owner: HashMap<&str, &str> = HashMap::new();
    let mut modules = Vec::new();
    for (id, info) in tree.iter().filter(|(_, m)| m.kind != ModuleKind::Container) {
        let shares = info
            .weight
            .as_deref()
            .and_then(|name| match owner.get(name) {
                Some(path) => Some((*path).to_owned()),
                None => {
                    owner.insert(name, &info.path);
                    None
                }
            });
        let stored = info
            .weight
            .as_ref()
            .and_then(|name| subject.stored_name(name));
        let meta = stored.and_then(|name| subject.checkpoint.meta(&name));
        let loaded = info
            .weight
            .as_ref()
            .and_then(|name| network.base().weight(name));
        modules.push(ModuleRow {
            path: info.path.clone(),
            kind: info.kind,
            shape: info.weight.as_ref().map(|_| info.weight_shape()),
            format: info.weight.as_ref().map(|_| match (meta, loaded) {
                (Some(meta), _) => meta.format.to_string(),
                (None, Some(weight)) => weight
                    .as_frozen()
                    .map_or("F32", |w| w.format().name())
                    .to_owned(),
                (None, None) => "?".to_owned(),
            }),
            shares,
            adapted: changed.contains(&id),
            trainable: by_module.get(info.path.as_str()).copied().unwrap_or(0),
        });
    }
    let params: Vec<_> = network
        .adapters()
        .iter()
        .filter_map(|name| network.adapter_parameters(name).ok())
        .flatten()
        .collect();
    let trainable: usize = params.iter().map(peft_core::Param::numel).sum();
    let saved: usize = params
        .iter()
        .filter(|p| p.is_saved())
        .map(peft_core::Param::numel)
        .sum();
    let metas = subject.checkpoint.metas().values();
    Inspection {
        model_type: tree.facts().model_type.clone(),
        runnable: subject.model().is_some(),
        modules,
        parameters: metas
            .clone()
            .map(|m| m.shape.iter().product::<usize>())
            .sum(),
        base_bytes: metas.map(|m| m.nbytes).sum(),
        trainable,
        adapter_bytes: saved as u64 * 4,
        optimizer_bytes: trainable as u64 * 8,
        virtual_tokens: network.prefix_len() + network.prompt_len(),
    }
}

/// Adapter parameters by the module their key names.
fn adapter_parameters(network: &Network) -> HashMap<String, usize> {
    let tree = network.tree();
    let mut counts = HashMap::new();
    for name in network.adapters() {
        for param in network.adapter_parameters(name).into_iter().flatten() {
            let key = param
                .key()
                .rsplit_once("base_model.model.")
                .map_or("", |(_, rest)| rest);
            let ends = key.rmatch_indices('.').map(|(i, _)| &key[..i]);
            if let Some(path) = ends.into_iter().find(|path| tree.get(path).is_some()) {
                *counts.entry(path.to_owned()).or_insert(0) += param.numel();
            }
        }
    }
    counts
}

impl Inspection {
    /// Trainable parameters in percent of all.
    pub fn percent(&self) -> f64 {
        100.0 * self.trainable as f64 / (self.parameters + self.trainable).max(1) as f64
    }

    /// For machines.
    pub fn to_json(&self) -> Value {
        let modules: Vec<Value> = self
            .modules
            .iter()
            .map(|m| {
                json!({
                    "path": m.path, "kind": m.kind.name(), "shape": m.shape, "dtype": m.format, "shares": m.shares,
                    "adapted": m.adapted, "trainable": m.trainable,
                })
            })
            .collect();
        json!({
            "model_type": self.model_type, "runnable": self.runnable, "modules": modules,
            "parameters": self.parameters, "base_bytes": self.base_bytes, "trainable": self.trainable,
            "trainable_percent": self.percent(), "adapter_bytes": self.adapter_bytes,
            "optimizer_bytes": self.optimizer_bytes, "virtual_tokens": self.virtual_tokens,
        })
    }
}
