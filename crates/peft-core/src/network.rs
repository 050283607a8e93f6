//! A base model with adapters on it, run module by module.

use std::collections::{BTreeMap, HashMap};

use peft_tensor::{BaseWeight, Device, RngKey, Tensor, concat};
use serde_json::Value;

use crate::attach::{Injector, Slot, Store};
use crate::call::{Call, Input, NormFn, Stacked};
use crate::merge::MergedModule;
use crate::{
    Base, Common, Error, MethodEntry, ModuleId, ModuleKind, ModuleTree, Param, Pass, PeftMethod,
    Prefix, PrefixCx, PromptCx, Result, TrainHooks, builtin, entry_for,
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
    /// For each module, the active adapters on it, innermost first.
    pub(crate) stacks: HashMap<ModuleId, Vec<Stacked>>,
    /// Active adapters of the model as a whole.
    roots: Vec<Stacked>,
    /// Trained stand-ins of the active adapters for base parameters.
    pub(crate) selected: HashMap<(ModuleId, Slot), Param>,
    /// Trainable base parameters, in full-parameter training.
    base_params: BTreeMap<String, Param>,
    /// Biases and norm weights as tensors, made once.
    vectors: HashMap<String, Tensor>,
    pub(crate) merged: Option<HashMap<ModuleId, MergedModule>>,
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
            stacks: HashMap::new(),
            roots: Vec::new(),
            selected: HashMap::new(),
            base_params: BTreeMap::new(),
            vectors,
            merged: None,
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

    // --- adapters ---

    /// Attaches a fresh adapter from its configuration and makes it active beside those that are.
    ///
    /// # Errors
    /// If the name is taken, or the configuration is wrong or does not fit the model; nothing is attached then.
    pub fn attach(&mut self, name: &str, config: &Value, seed: u64) -> Result<()> {
        let attached = self.build(name, config, seed)?;
        self.adapters.push(attached);
        self.active.push(name.to_owned());
        self.restack();
        Ok(())
    }

    pub(crate) fn build(&self, name: &str, config: &Value, seed: u64) -> Result<Attached> {
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
        let common = Common::from_config(config)?;
        let mut store = Store::default();
        let mut cx = Injector {
            base: &self.base,
            common: &common,
            store: &mut store,
            key: RngKey::new(seed),
            scope: String::new(),
            prefix: parsed.method.module_prefix(),
        };
        builtin::inject(&*parsed.method, &mut cx)?;
        if store.params.is_empty() {
            return Err(Error::config(
                "adapter",
                "has nothing to train on this model",
            ));
        }
        let config = self.saved_config(entry, &parsed, config, &store);
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

    /// Makes exactly these adapters act, innermost first; none = the base model. Which parameters are trainable does
    /// not change.
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
        self.restack();
        Ok(())
    }

    fn restack(&mut self) {
        self.stacks.clear();
        self.roots.clear();
        self.selected.clear();
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
        }
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

    // --- running ---

    fn base_weight(&self, name: &str) -> Result<BaseWeight> {
        let weight = self
            .base
            .weight(name)
            .ok_or_else(|| Error::other(format!("the base model has no parameter {name:?}")))?;
        Ok(match self.base_params.get(name) {
            Some(param) => BaseWeight::dense(param.tensor(), self.base.is_conv1d(name)),
            None => weight.clone(),
        })
    }

    fn vector(&self, name: &str) -> Result<Tensor> {
        if let Some(param) = self.base_params.get(name) {
            return Ok(param.tensor());
        }
        match self.vectors.get(name) {
            Some(value) => Ok(value.clone()),
            None => self.param(name),
        }
    }

    /// A base parameter as a tensor in its stored layout: for small ones that are no module's weight.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn param(&self, name: &str) -> Result<Tensor> {
        if let Some(param) = self.base_params.get(name) {
            return Ok(param.tensor());
        }
        crate::attach::stored_values(&self.base_weight(name)?)
    }

    /// A module's weight: the trained stand-in of an active adapter, or the base's.
    pub(crate) fn weight_of(&self, id: ModuleId) -> Result<Option<BaseWeight>> {
        let info = self.tree().info(id);
        let Some(name) = &info.weight else {
            return Ok(None);
        };
        match self.selected.get(&(id, Slot::Weight)) {
            Some(param) => Ok(Some(self.stand_in(id, param))),
            None => self.base_weight(name).map(Some),
        }
    }

    /// A trained weight in a module's place. It is kept in the layout of HF's class, whatever the checkpoint's.
    pub(crate) fn stand_in(&self, id: ModuleId, param: &Param) -> BaseWeight {
        BaseWeight::dense(
            param.tensor(),
            self.tree().info(id).kind == ModuleKind::Conv1d,
        )
    }

    pub(crate) fn bias_of(&self, id: ModuleId) -> Result<Option<Tensor>> {
        match (
            self.selected.get(&(id, Slot::Bias)),
            &self.tree().info(id).bias,
        ) {
            (Some(param), _) => Ok(Some(param.tensor())),
            (None, Some(name)) => self.vector(name).map(Some),
            (None, None) => Ok(None),
        }
    }

    /// Runs a module through the adapters on it.
    fn call(&self, id: ModuleId, input: Input<'_>, pass: &Pass) -> Result<Tensor> {
        let run = || {
            if let Some(merged) = self.merged.as_ref().and_then(|m| m.get(&id)) {
                return Call {
                    input,
                    below: &[],
                    current: None,
                    weight: Some(&merged.weight),
                    bias: merged.bias.as_ref(),
                    pass,
                }
                .base();
            }
            let (weight, bias) = (self.weight_of(id)?, self.bias_of(id)?);
            let below = self.stacks.get(&id).map_or(&[][..], Vec::as_slice);
            Call {
                input,
                below,
                current: None,
                weight: weight.as_ref(),
                bias: bias.as_ref(),
                pass,
            }
            .base()
        };
        run().map_err(|e| match e {
            Error::Tensor(e) => Error::module(&self.tree().info(id).path, e.to_string()),
            e => e,
        })
    }

    /// A Linear or Conv1D module: `[.., in] -> [.., out]`.
    ///
    /// # Errors
    /// If `x` does not fit.
    pub fn linear(&self, id: ModuleId, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        self.call(id, Input::Rows(x), pass)
    }

    /// An Embedding module: `[ids, dim]`.
    ///
    /// # Errors
    /// If an id is out of range.
    pub fn embed(&self, id: ModuleId, ids: &[u32], pass: &Pass) -> Result<Tensor> {
        self.call(id, Input::Ids(ids), pass)
    }

    /// Where a sublayer's output `x` meets its residual: `norm(x + residual)`.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn junction(
        &self,
        id: ModuleId,
        x: &Tensor,
        residual: &Tensor,
        norm: Option<NormFn<'_>>,
        pass: &Pass,
    ) -> Result<Tensor> {
        self.call(id, Input::Junction { x, residual, norm }, pass)
    }

    fn norm_weight(&self, id: ModuleId) -> Result<Tensor> {
        let info = self.tree().info(id);
        if let Some(merged) = self.merged.as_ref().and_then(|m| m.get(&id)) {
            return crate::attach::stored_values(&merged.weight);
        }
        match (self.selected.get(&(id, Slot::Weight)), &info.weight) {
            (Some(param), _) => Ok(param.tensor()),
            (None, Some(name)) => self.vector(name),
            (None, None) => Err(Error::module(&info.path, "has no weight")),
        }
    }

    /// An RMSNorm whose weight is `weight + offset` (Gemma's offset is 1).
    ///
    /// # Errors
    /// If `x` does not fit.
    pub fn rms_norm(
        &self,
        id: ModuleId,
        x: &Tensor,
        eps: f32,
        offset: f32,
        _pass: &Pass,
    ) -> Result<Tensor> {
        let mut weight = self.norm_weight(id)?;
        if offset != 0.0 {
            weight = weight.affine(1.0, offset)?;
        }
        x.rms_norm(&weight, eps)
            .map_err(|e| Error::module(&self.tree().info(id).path, e.to_string()))
    }

    /// A LayerNorm.
    ///
    /// # Errors
    /// If `x` does not fit.
    pub fn layer_norm(&self, id: ModuleId, x: &Tensor, eps: f32, _pass: &Pass) -> Result<Tensor> {
        let merged = self.merged.as_ref().and_then(|m| m.get(&id));
        let bias = match merged {
            Some(m) => m.bias.clone(),
            None => self.bias_of(id)?,
        };
        let weight = self.norm_weight(id)?;
        x.layer_norm(&weight, bias.as_ref(), eps)
            .map_err(|e| Error::module(&self.tree().info(id).path, e.to_string()))
    }

    /// Any module by its path, for programs without a model: `x [.., in] -> [.., out]`.
    ///
    /// # Errors
    /// If there is no such module, or `x` does not fit.
    pub fn run(&self, path: &str, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let id = self.module(path)?;
        let info = self.tree().info(id);
        match info.kind {
            ModuleKind::Linear | ModuleKind::Conv1d => self.linear(id, x, pass),
            kind => Err(Error::module(
                path,
                format!("is of kind {}; run takes Linear and Conv1D", kind.name()),
            )),
        }
    }

    /// A module's weight as it runs now (merged or not, without adapters beside it), in its logical shape.
    ///
    /// # Errors
    /// If the module has none.
    pub fn weight(&self, id: ModuleId) -> Result<Tensor> {
        let merged = self
            .merged
            .as_ref()
            .and_then(|m| m.get(&id))
            .map(|m| m.weight.clone());
        let weight = match merged {
            Some(weight) => Some(weight),
            None => self.weight_of(id)?,
        };
        let weight =
            weight.ok_or_else(|| Error::module(&self.tree().info(id).path, "has no weight"))?;
        Ok(weight.to_dense()?.detach())
    }

    /// The module at `path`.
    ///
    /// # Errors
    /// If there is none, with the nearest names.
    pub fn module(&self, path: &str) -> Result<ModuleId> {
        self.tree().get(path).ok_or_else(|| {
            let nearest = crate::nearest(path, self.tree().iter().map(|(_, m)| m.path.as_str()));
            Error::NoMatch {
                field: "module".to_owned(),
                name: path.to_owned(),
                nearest,
            }
        })
    }

    fn around(&self, attention: ModuleId) -> impl Iterator<Item = &Stacked> {
        self.roots
            .iter()
            .chain(self.stacks.get(&attention).into_iter().flatten())
    }

    /// Keys and values to put in front of a layer's own, `[P, kv]` or `[batch, P, kv]`.
    ///
    /// # Errors
    /// Whatever the adapters return.
    pub fn prefix(&self, attention: ModuleId, batch: usize, pass: &Pass) -> Result<Option<Prefix>> {
        let layer = self.tree().info(attention).layer.unwrap_or(0);
        let mut all = Vec::new();
        for stacked in self.around(attention) {
            let at = PrefixCx {
                layer,
                facts: self.tree().facts(),
                batch,
                pass,
            };
            all.extend(stacked.adapter.prefix(&at)?);
        }
        let axis = all.first().map_or(0, |p| p.k.rank() - 2);
        let k: Vec<&Tensor> = all.iter().map(|p| &p.k).collect();
        let v: Vec<&Tensor> = all.iter().map(|p| &p.v).collect();
        if all.is_empty() {
            return Ok(None);
        }
        Ok(Some(Prefix {
            k: concat(&k, axis)?,
            v: concat(&v, axis)?,
        }))
    }

    /// Positions [`Network::prefix`] adds to every layer.
    pub fn prefix_len(&self) -> usize {
        self.roots.iter().map(|s| s.adapter.prefix_len()).sum()
    }

    /// Virtual tokens to put in front of the input embeddings, `[V, hidden]` or `[batch, V, hidden]`.
    ///
    /// # Errors
    /// Whatever the adapters return.
    pub fn prompt(&self, batch: usize, pass: &Pass) -> Result<Option<Tensor>> {
        let mut all = Vec::new();
        for stacked in &self.roots {
            all.extend(stacked.adapter.prompt(&PromptCx {
                facts: self.tree().facts(),
                batch,
                pass,
            })?);
        }
        match &all[..] {
            [] => Ok(None),
            [first, ..] => {
                let parts: Vec<&Tensor> = all.iter().collect();
                Ok(Some(concat(&parts, first.rank() - 2)?))
            }
        }
    }

    /// Positions [`Network::prompt`] adds.
    pub fn prompt_len(&self) -> usize {
        self.roots.iter().map(|s| s.adapter.prompt_len()).sum()
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
