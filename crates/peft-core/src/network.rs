//! A base model with adapters on it, run module by module.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use peft_tensor::{BaseWeight, Device, RngKey, Tensor};
use serde_json::Value;

use crate::attach::{Injector, Slot, Store};
use crate::call::Stacked;
use crate::compose::Composition;
use crate::merge::MergedModule;
use crate::{
    Base, Common, Error, MethodEntry, ModuleId, ModuleKind, ModuleTree, Originals, Param,
    PeftMethod, ReadTensors, Result, Tokenize, TrainHooks, builtin, entry_for,
};

/// One attached adapter: a method with its parameters on this model.
pub(crate) struct Attached {
    pub(crate) name: String,
    pub(crate) entry: &'static MethodEntry,
    pub(crate) method: Box<dyn PeftMethod>,
    /// As it will be saved.
    pub(crate) config: Value,
    pub(crate) store: Store,
}

/// A base model with adapters. Models call it for every module, so that adapters act; without any, it runs the base.
pub struct Network {
    pub(crate) base: Base,
    pub(crate) adapters: Vec<Attached>,
    active: Vec<String>,
    pub(crate) composition: Composition,
    /// For each module, the active adapters on it, innermost first.
    pub(crate) stacks: HashMap<ModuleId, Vec<Stacked>>,
    /// Active adapters of the model as a whole.
    pub(crate) roots: Vec<Stacked>,
    /// Trained stand-ins of the active adapters for base parameters.
    pub(crate) selected: HashMap<(ModuleId, Slot), Param>,
    /// Frozen stand-ins of the active adapters for base weights.
    pub(crate) replaced: HashMap<ModuleId, BaseWeight>,
    /// Trainable base parameters, in full-parameter training.
    pub(crate) base_params: BTreeMap<String, Param>,
    /// Biases and norm weights as tensors, made once.
    pub(crate) vectors: HashMap<String, Tensor>,
    pub(crate) merged: Option<HashMap<ModuleId, MergedModule>>,
    /// Adapters in layers below this one do not act.
    pub(crate) skipped: AtomicUsize,
}

impl Network {
    /// Without adapters.
    pub fn new(base: Base) -> Self {
        let vectors = base
            .tree()
            .iter()
            .flat_map(|(_, m)| {
                let weight = if m.kind == ModuleKind::Norm {
                    m.weight.clone()
                } else {
                    None
                };
                [weight, m.bias.clone()]
            })
            .flatten()
            .filter_map(|name| {
                let value = crate::attach::stored_values(base.weight(&name)?).ok()?;
                Some((name, value))
            })
            .collect();
        Self {
            base,
            adapters: Vec::new(),
            active: Vec::new(),
            composition: Composition::Stack,
            stacks: HashMap::new(),
            roots: Vec::new(),
            selected: HashMap::new(),
            replaced: HashMap::new(),
            base_params: BTreeMap::new(),
            vectors,
            merged: None,
            skipped: AtomicUsize::new(0),
        }
    }

    /// The modules.
    pub fn tree(&self) -> &ModuleTree {
        self.base.tree()
    }

    /// The base model.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        self.base.device()
    }

    /// Gives methods that start from text a tokenizer.
    pub fn set_tokenizer(&mut self, tokenizer: Arc<dyn Tokenize>) {
        self.base.set_tokenizer(tokenizer);
    }

    /// Gives methods that start from another adapter's tensors a way to read them.
    pub fn set_tensors(&mut self, read: Arc<ReadTensors>) {
        self.base.set_reader(read);
    }

    /// What reads weights as they were before they were quantised while the model loaded.
    pub fn set_originals(&mut self, read: Arc<Originals>) {
        self.base.set_originals(read);
    }

    /// Leaves the adapters of the first `layers` layers out, as AdapterDrop does; 0 = none. Merged weights and trained
    /// stand-ins for base parameters stay.
    pub fn set_skipped_layers(&self, layers: usize) {
        self.skipped.store(layers, Ordering::Relaxed);
    }

    // --- adapters ---

    /// Attaches a fresh adapter from its configuration and makes it active beside those that are.
    ///
    /// # Errors
    /// If the name is taken, or the configuration is wrong or does not fit the model; nothing is attached then.
    pub fn attach(&mut self, name: &str, config: &Value, seed: u64) -> Result<()> {
        let attached = self.build(name, config, seed, false)?;
        self.adapters.push(attached);
        self.active.push(name.to_owned());
        self.composition = Composition::Stack;
        self.restack();
        Ok(())
    }

    /// An adapter of that configuration; `loading` where a file has its parameters.
    pub(crate) fn build(
        &self,
        name: &str,
        config: &Value,
        seed: u64,
        loading: bool,
    ) -> Result<Attached> {
        if self.adapters.iter().any(|a| a.name == name) {
            return Err(Error::other(format!(
                "there is an adapter {name:?} already"
            )));
        }
        if self.merged.is_some() {
            return Err(Error::other("unmerge before another adapter is attached"));
        }
        let entry = entry_for(config)?;
        let parsed = (entry.parse)(config)?;
        let common = Common {
            finished: loading,
            ..Common::from_config(config)?
        };
        let mut store = Store::default();
        let mut cx = Injector {
            base: &self.base,
            common: &common,
            store: &mut store,
            key: RngKey::new(seed),
            scope: String::new(),
            prefix: parsed.method.module_prefix(),
            frozen: false,
            loading,
        };
        builtin::inject(&*parsed.method, &mut cx)?;
        if store.params.is_empty() {
            return Err(Error::config(
                "adapter",
                "has nothing to train on this model",
            ));
        }
        let config = self.saved_config(entry, &parsed, &common, config, &store);
        Ok(Attached {
            name: name.to_owned(),
            entry,
            method: parsed.method,
            config,
            store,
        })
    }

    pub(crate) fn push(&mut self, attached: Attached) {
        self.active.push(attached.name.clone());
        self.adapters.push(attached);
        self.composition = Composition::Stack;
        self.restack();
    }

    /// Names of the attached adapters, in the order they came.
    pub fn adapters(&self) -> Vec<&str> {
        self.adapters.iter().map(|a| a.name.as_str()).collect()
    }

    /// Names of those that act.
    pub fn active(&self) -> &[String] {
        &self.active
    }

    /// The registry entry of an adapter's method.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn method_of(&self, name: &str) -> Result<&'static MethodEntry> {
        self.find(name).map(|a| a.entry)
    }

    pub(crate) fn find(&self, name: &str) -> Result<&Attached> {
        self.adapters
            .iter()
            .find(|a| a.name == name)
            .ok_or_else(|| {
                Error::other(format!(
                    "there is no adapter {name:?}; attached: {}",
                    self.adapters().join(", ")
                ))
            })
    }

    /// Makes exactly these adapters act; none = the base model. On a weight the first named is innermost; where hidden
    /// states pass through adapters (junctions, streams), they pass the first named first. Which parameters are trainable
    /// does not change. Where two replace the same base parameter, the later one counts.
    ///
    /// # Errors
    /// If one is not attached, or the model is merged.
    pub fn set_active(&mut self, names: &[&str]) -> Result<()> {
        if self.merged.is_some() {
            return Err(Error::other(
                "unmerge before other adapters are made active",
            ));
        }
        for name in names {
            self.find(name)?;
        }
        self.active = names.iter().map(|&n| n.to_owned()).collect();
        self.composition = Composition::Stack;
        self.restack();
        Ok(())
    }

    /// Takes an adapter away.
    ///
    /// # Errors
    /// If it is not attached, or the model is merged.
    pub fn delete(&mut self, name: &str) -> Result<()> {
        self.find(name)?;
        if self.merged.is_some() {
            return Err(Error::other(format!("unmerge before {name:?} is deleted")));
        }
        self.adapters.retain(|a| a.name != name);
        self.active.retain(|n| n != name);
        self.composition = Composition::Stack;
        self.restack();
        Ok(())
    }

    pub(crate) fn restack(&mut self) {
        self.stacks.clear();
        self.roots.clear();
        self.selected.clear();
        self.replaced.clear();
        for name in &self.active {
            let Some(attached) = self.adapters.iter().find(|a| a.name == *name) else {
                continue;
            };
            for placed in &attached.store.sites {
                let stacked = Stacked {
                    name: name.clone(),
                    site: placed.site.clone(),
                    adapter: placed.adapter.clone(),
                    mirrored: placed.mirrored,
                };
                match placed.site.id {
                    // What hidden states pass is passed in the order given: the first is outermost.
                    Some(id) if passes_first(self.base.tree(), id) => {
                        self.stacks.entry(id).or_default().insert(0, stacked);
                    }
                    Some(id) => self.stacks.entry(id).or_default().push(stacked),
                    None => self.roots.push(stacked),
                }
            }
            let selected = attached
                .store
                .selected
                .iter()
                .map(|(at, param)| (*at, param.clone()));
            self.selected.extend(selected);
            let replaced = &attached.store.replaced;
            self.replaced
                .extend(replaced.iter().map(|(id, weight)| (*id, weight.clone())));
        }
        self.average();
    }

    /// Makes every base parameter trainable: full-parameter training.
    ///
    /// # Errors
    /// If adapters are attached.
    pub fn train_base(&mut self) -> Result<()> {
        if !self.adapters.is_empty() {
            return Err(Error::other("full-parameter training takes no adapter"));
        }
        for name in self.base.weights().keys() {
            let value = self.base.hf_values(name)?;
            self.base_params
                .insert(name.clone(), Param::new(name, &value, true));
        }
        Ok(())
    }

    /// The trainable parameters, in the order they were made.
    pub fn parameters(&self) -> Vec<Param> {
        let own = self.adapters.iter().flat_map(|a| &a.store.params);
        self.base_params
            .values()
            .chain(own)
            .filter(|p| p.is_trainable())
            .cloned()
            .collect()
    }

    /// All parameters of one adapter.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn adapter_parameters(&self, name: &str) -> Result<Vec<Param>> {
        self.find(name).map(|a| a.store.params.clone())
    }

    /// Freezes or unfreezes one adapter, and no other.
    ///
    /// # Errors
    /// If there is no such adapter.
    pub fn set_trainable(&mut self, name: &str, trainable: bool) -> Result<()> {
        self.find(name)?
            .store
            .params
            .iter()
            .for_each(|p| p.set_trainable(trainable));
        Ok(())
    }

    /// The hooks of every attached adapter's method.
    pub fn trainers(&self) -> Vec<(String, Box<dyn TrainHooks>)> {
        self.adapters
            .iter()
            .map(|a| (a.name.clone(), a.method.trainer()))
            .collect()
    }
}

/// Whether hidden states pass the adapters of a module one after the other, but for the place that undoes another.
fn passes_first(tree: &ModuleTree, id: ModuleId) -> bool {
    let info = tree.info(id);
    match info.kind {
        ModuleKind::Junction => true,
        ModuleKind::Stream => !info.path.ends_with("_rev"),
        _ => false,
    }
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Network({} modules, adapters {:?}, active {:?})",
            self.tree().iter().count(),
            self.adapters(),
            self.active
        )
    }
}
