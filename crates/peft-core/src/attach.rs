//! Attaching a method: making its parameters under their keys.

use std::collections::HashMap;
use std::sync::Arc;

use peft_tensor::{Device, RngKey, Tensor};

use crate::param::Role;
use crate::{
    Adapter, Base, BaseWeight, Common, Error, Init, ModuleId, ModuleTree, Param, Result, Site,
    Targets, Tensors,
};

/// Which parameter of a module.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Slot {
    /// Its weight.
    Weight,
    /// Its bias.
    Bias,
}

impl Slot {
    /// The parameter's last name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }
}

/// Everything one adapter owns.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) params: Vec<Param>,
    index: HashMap<String, usize>,
    /// Trained stand-ins for base parameters.
    pub(crate) selected: HashMap<(ModuleId, Slot), Param>,
    /// Frozen stand-ins for base weights.
    pub(crate) replaced: HashMap<ModuleId, BaseWeight>,
    pub(crate) sites: Vec<Placed>,
    /// Module paths, where the configuration did not list them.
    pub(crate) resolved_targets: Option<Vec<String>>,
}

/// An adapter at its place.
#[derive(Clone)]
pub(crate) struct Placed {
    pub(crate) site: Site,
    pub(crate) adapter: Arc<dyn Adapter>,
    pub(crate) mirrored: bool,
    /// In front of the keys of what placed it.
    pub(crate) scope: String,
}

impl Store {
    pub(crate) fn get(&self, key: &str) -> Option<&Param> {
        self.index.get(key).map(|&i| &self.params[i])
    }

    pub(crate) fn insert(&mut self, param: Param) -> Result<Param> {
        if self.index.contains_key(param.key()) {
            let detail = format!("two parameters would be saved as {:?}", param.key());
            return Err(Error::config("adapter", detail));
        }
        self.index.insert(param.key().to_owned(), self.params.len());
        self.params.push(param.clone());
        Ok(param)
    }

    /// The trained stand-in for a base parameter, made at the first call.
    pub(crate) fn select(
        &mut self,
        base: &Base,
        module: ModuleId,
        slot: Slot,
        key: String,
    ) -> Result<Param> {
        if let Some(param) = self.selected.get(&(module, slot)) {
            return Ok(param.clone());
        }
        let info = base.tree().info(module);
        let name = match slot {
            Slot::Weight => &info.weight,
            Slot::Bias => &info.bias,
        };
        let name = name.as_ref().filter(|n| base.weight(n).is_some());
        let Some(name) = name else {
            return Err(Error::module(
                &info.path,
                format!("has no {} to train", slot.name()),
            ));
        };
        let param = self.insert(Param::new(key, &base.hf_values(name)?, true))?;
        self.selected.insert((module, slot), param.clone());
        Ok(param)
    }
}

/// A weight's values in the layout it is stored in, vectors as vectors.
pub(crate) fn stored_values(weight: &BaseWeight) -> Result<Tensor> {
    let dense = weight.to_dense()?;
    let dense = if weight.is_transposed() {
        dense.t()?
    } else {
        dense
    };
    match *dense.shape() {
        [1, n] if weight.as_frozen().is_some() => Ok(dense.reshape(&[n])?),
        _ => Ok(dense),
    }
}

/// Goes over the sites of a method.
pub struct Injector<'a> {
    pub(crate) base: &'a Base,
    pub(crate) common: &'a Common,
    pub(crate) store: &'a mut Store,
    pub(crate) key: RngKey,
    /// In front of every key; compositions keep their members apart with it.
    pub(crate) scope: String,
    /// In front of a base module's path in a key.
    pub(crate) prefix: &'static str,
    /// Whether what is made is never trained: a member of a composition that only uses it.
    pub(crate) frozen: bool,
    /// Whether values of a file follow for everything that is saved.
    pub(crate) loading: bool,
}

impl<'a> Injector<'a> {
    /// The model.
    pub fn tree(&self) -> &'a ModuleTree {
        self.base.tree()
    }

    /// The shared fields of the configuration.
    pub fn common(&self) -> &'a Common {
        self.common
    }

    /// Attaches an adapter at each of `sites`.
    ///
    /// # Errors
    /// If there are none, a pattern is unused, or an adapter cannot be attached.
    pub fn attach_all(
        &mut self,
        sites: Vec<Site>,
        mut attach: impl FnMut(&Site, &mut Attach<'_>) -> Result<Box<dyn Adapter>>,
    ) -> Result<()> {
        self.common
            .check_patterns(sites.iter().map(|s| s.path.as_str()))?;
        let listed = matches!(
            &self.common.target_modules,
            Some(Targets::Names(_) | Targets::Pattern(_))
        );
        if !listed && self.scope.is_empty() {
            let paths = sites
                .iter()
                .filter(|s| s.id.is_some())
                .map(|s| s.path.clone());
            self.store.resolved_targets = Some(paths.collect());
        }
        for site in sites {
            let adapter: Arc<dyn Adapter> = attach(
                &site,
                &mut Attach {
                    cx: self,
                    site: &site,
                },
            )?
            .into();
            self.store.sites.push(Placed {
                site: site.clone(),
                adapter: adapter.clone(),
                mirrored: false,
                scope: self.scope.clone(),
            });
        }
        Ok(())
    }

    /// Puts an adapter that another one already owns the parameters of at a second place (the other side of a tied
    /// pair); `mirrored` says that both merge into the same values.
    pub fn place(&mut self, site: Site, adapter: Arc<dyn Adapter>, mirrored: bool) {
        self.store.sites.push(Placed {
            site,
            adapter,
            mirrored,
            scope: self.scope.clone(),
        });
    }

    /// Runs `place` and takes the adapters it placed out of the network's stacks, so that a composition can wrap and
    /// [`Injector::place`] them itself. Their parameters stay this adapter's.
    ///
    /// # Errors
    /// Whatever `place` returns.
    pub fn capture(
        &mut self,
        place: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<Vec<(Site, Arc<dyn Adapter>)>> {
        let before = self.store.sites.len();
        place(self)?;
        let placed = self.store.sites.split_off(before);
        Ok(placed.into_iter().map(|p| (p.site, p.adapter)).collect())
    }

    /// Both sides of a tied pair of embeddings, input and output.
    pub fn tied_pair(&self) -> Option<(Site, Site)> {
        let facts = self.tree().facts();
        let side = |path: &Option<String>| {
            path.as_ref()
                .and_then(|p| self.tree().get(p))
                .map(|id| self.tree().site(id))
        };
        if facts.tied {
            side(&facts.input_embedding).zip(side(&facts.output_embedding))
        } else {
            None
        }
    }
}

/// Makes the parameters of one adapter at one site.
pub struct Attach<'a> {
    pub(crate) cx: &'a mut dyn Injection,
    pub(crate) site: &'a Site,
}

/// Erases the injector's lifetime, so that [`Attach`] needs only one of its own.
pub(crate) trait Injection {
    fn base(&self) -> &Base;
    fn common(&self) -> &Common;
    fn store(&mut self) -> &mut Store;
    fn select(&mut self, module: ModuleId, slot: Slot, key: String) -> Result<Param>;
    fn key(&self) -> RngKey;
    fn scope(&self) -> &str;
    fn frozen(&self) -> bool;
    fn loading(&self) -> bool;
}

impl Injection for Injector<'_> {
    fn base(&self) -> &Base {
        self.base
    }
    fn common(&self) -> &Common {
        self.common
    }
    fn store(&mut self) -> &mut Store {
        self.store
    }
    fn select(&mut self, module: ModuleId, slot: Slot, key: String) -> Result<Param> {
        self.store.select(self.base, module, slot, key)
    }
    fn key(&self) -> RngKey {
        self.key
    }
    fn scope(&self) -> &str {
        &self.scope
    }
    fn frozen(&self) -> bool {
        self.frozen
    }
    fn loading(&self) -> bool {
        self.loading
    }
}

impl Attach<'_> {
    /// The shared fields of the configuration.
    pub fn common(&self) -> &Common {
        self.cx.common()
    }

    /// The model.
    pub fn tree(&self) -> &ModuleTree {
        self.cx.base().tree()
    }

    /// Where new parameters are to be.
    pub fn device(&self) -> Device {
        self.cx.base().device().clone()
    }

    /// Whether a file's values follow for every saved parameter: a start that is costly to find need not be.
    pub fn loading(&self) -> bool {
        self.cx.loading()
    }

    /// Randomness of one's own, the same for the same seed, key and label.
    pub fn key(&self, label: &str) -> RngKey {
        self.cx.key().fork(&self.site.path).fork(label)
    }

    /// A parameter of this site, saved as `base_model.model.<module>.<name>`.
    ///
    /// # Errors
    /// If there is one of that name already, or given values have another shape.
    pub fn param(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let path = if self.site.path.is_empty() {
            String::new()
        } else {
            format!("{}.", self.site.path)
        };
        self.make(
            format!("base_model.model.{path}{name}"),
            shape,
            init,
            Role::Plain,
        )
    }

    /// As [`Attach::param`], but never trained.
    ///
    /// # Errors
    /// As [`Attach::param`].
    pub fn frozen(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let key = format!("base_model.model.{}.{name}", self.site.path);
        self.make(key, shape, init, Role::Frozen)
    }

    /// As [`Attach::param`]; a file may hold another last dimension, which the parameter then takes over.
    ///
    /// # Errors
    /// As [`Attach::param`].
    pub fn ragged(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let key = format!("base_model.model.{}.{name}", self.site.path);
        self.make(key, shape, init, Role::Ragged)
    }

    /// Whole numbers, at most 2^24, saved as such and never trained; a file may hold another last dimension.
    ///
    /// # Errors
    /// As [`Attach::param`].
    pub fn integers(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let key = format!("base_model.model.{}.{name}", self.site.path);
        self.make(key, shape, init, Role::Integers)
    }

    /// The ids of a text, special tokens included.
    ///
    /// # Errors
    /// If the network was given no tokenizer, or it cannot encode the text.
    pub fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        match self.cx.base().tokenizer() {
            Some(tokenizer) => tokenizer.tokens(text),
            None => Err(Error::other(
                "this start needs the model's tokenizer, and none was found beside the model",
            )),
        }
    }

    /// The tensors of a file or an adapter's folder, on this network's device.
    ///
    /// # Errors
    /// If the network was given nothing to read with, or the file cannot be read.
    pub fn tensors(&self, path: &str) -> Result<Tensors> {
        crate::members::read(self.cx.base(), path).map(|(_, tensors)| tensors)
    }

    /// As [`Attach::bare`], but never trained.
    ///
    /// # Errors
    /// As [`Attach::bare`].
    pub fn bare_frozen(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        self.make(name.to_owned(), shape, init, Role::Frozen)
    }

    /// A parameter saved under `name` alone, as prompt methods do.
    ///
    /// # Errors
    /// If there is one of that name already, or given values have another shape.
    pub fn bare(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        self.make(name.to_owned(), shape, init, Role::Plain)
    }

    /// A parameter of the whole model, saved as `base_model.<name>`, made at the first site that asks for it.
    ///
    /// # Errors
    /// If given values have another shape.
    pub fn shared(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let key = format!("{}base_model.{name}", self.cx.scope());
        match self.cx.store().get(&key) {
            Some(param) => Ok(param.clone()),
            None => self.make(format!("base_model.{name}"), shape, init, Role::Plain),
        }
    }

    /// A parameter that training moves and no file holds (a reparameterization that is flattened when saved).
    ///
    /// # Errors
    /// If there is one of that name already, or given values have another shape.
    pub fn transient(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        self.make(name.to_owned(), shape, init, Role::Transient)
    }

    /// A parameter of the whole model that is saved as `base_model.<name>` and never trained.
    ///
    /// # Errors
    /// As [`Attach::shared`].
    pub fn shared_frozen(&mut self, name: &str, shape: &[usize], init: &Init) -> Result<Param> {
        let key = format!("{}base_model.{name}", self.cx.scope());
        match self.cx.store().get(&key) {
            Some(param) => Ok(param.clone()),
            None => self.make(format!("base_model.{name}"), shape, init, Role::Frozen),
        }
    }

    fn make(&mut self, key: String, shape: &[usize], init: &Init, role: Role) -> Result<Param> {
        let role = match role {
            Role::Plain | Role::Transient if self.cx.frozen() => Role::Frozen,
            role => role,
        };
        let value = init.tensor(shape, self.cx.key().fork(&key), self.cx.base().device())?;
        let key = format!("{}{key}", self.cx.scope());
        self.cx.store().insert(Param::with_role(key, &value, role))
    }

    /// Trains a copy of a parameter of this module in its place, saved as `base_model.model.<module>.<name>`.
    ///
    /// # Errors
    /// If the module has no such parameter.
    pub fn select(&mut self, slot: Slot, name: &str) -> Result<Param> {
        let Some(id) = self.site.id else {
            return Err(Error::other(
                "the model as a whole has no parameters to select",
            ));
        };
        let key = format!(
            "{}base_model.model.{}.{name}",
            self.cx.scope(),
            self.site.path
        );
        self.cx.select(id, slot, key)
    }

    /// Whether this module has that parameter.
    pub fn has(&self, slot: Slot) -> bool {
        let Some(id) = self.site.id else { return false };
        let info = self.tree().info(id);
        match slot {
            Slot::Weight => info.weight.is_some(),
            Slot::Bias => info.bias.is_some(),
        }
    }

    /// The base weight of this module.
    ///
    /// # Errors
    /// If it has none.
    pub fn base_weight(&self) -> Result<&BaseWeight> {
        let base = self.cx.base();
        let name = self
            .site
            .id
            .and_then(|id| base.tree().info(id).weight.as_deref());
        name.and_then(|n| base.weight(n))
            .ok_or_else(|| Error::module(&self.site.path, "has no weight"))
    }

    /// The same as it was before the model was quantised while it loaded; None where the base is as it is stored.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn original_weight(&self) -> Result<Option<BaseWeight>> {
        let base = self.cx.base();
        let name = self
            .site
            .id
            .and_then(|id| base.tree().info(id).weight.as_deref());
        name.map_or(Ok(None), |name| base.original(name))
    }

    /// Puts another frozen weight in the place of this module's while the adapter is active. It is in no file: a method
    /// makes it again from the base when it is loaded. The base itself stays as it is.
    pub fn replace_weight(&mut self, weight: BaseWeight) {
        if let Some(id) = self.site.id {
            self.cx.store().replaced.insert(id, weight);
        }
    }

    /// A parameter of the base model by its full name, as values.
    ///
    /// # Errors
    /// If there is none.
    pub fn base_values(&self, name: &str) -> Result<Tensor> {
        match self.cx.base().weight(name) {
            Some(weight) => stored_values(weight),
            None => Err(Error::other(format!(
                "the base model has no parameter {name:?}"
            ))),
        }
    }
}
