//! Compositions in part: which of an adapter's members a merge can take, and the adapter with some of them alone.

use std::collections::HashMap;

use peft_tensor::{Tensor, no_grad};
use serde_json::Value;

use crate::attach::{Placed, Slot};
use crate::network::Attached;
use crate::{Error, ModuleId, ModuleKind, Network, Result, Tensors};

/// A member of an attached composition.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its method's `peft_type`.
    pub peft_type: String,
    /// Why it cannot be merged; None if it can.
    pub stays: Option<String>,
}

/// Whose a parameter or an adapter is: a member's, by number, or the composition's own.
type Owner = Option<usize>;

impl Network {
    /// The members of an adapter, none where its method is no composition. A merge of some of them is exact only if what
    /// stays acts around them: a member that acts around one that stays, or on what that one trains in its place, stays too.
    ///
    /// # Errors
    /// If there is no such adapter, or whatever the adapters' arithmetic returns.
    pub fn members(&self, name: &str) -> Result<Vec<Member>> {
        let attached = self.find(name)?;
        let members = attached.method.members();
        let scopes: Vec<String> = members.iter().map(|(scope, _)| scope.clone()).collect();
        let owner = |key: &str| scopes.iter().position(|scope| key.starts_with(scope));
        let mut stays: Vec<Option<String>> = vec![None; members.len()];
        for placed in &attached.store.sites {
            if let Some(member) = owner(&placed.scope)
                && stays[member].is_none()
            {
                stays[member] = no_grad(|| self.why_not(placed))?;
            }
        }
        while let Some((member, why)) = self.bound(attached, &owner, &stays)? {
            stays[member] = Some(why);
        }
        let named = members.into_iter().zip(stays);
        Ok(named
            .map(|((_, peft_type), stays)| Member { peft_type, stays })
            .collect())
    }

    /// An adapter as it is saved, with these of its members alone, in this order; what the composition has of its own (a
    /// head, rows of an embedding) is kept.
    ///
    /// # Errors
    /// If there is no such adapter, it has no such member, or it trains biases of its own: which ones that are, and their
    /// keys, depends on all members.
    pub fn export_members(&self, name: &str, keep: &[usize]) -> Result<(Value, Tensors)> {
        let (config, tensors) = self.export(name)?;
        if config["bias"].as_str().is_some_and(|bias| bias != "none") {
            let detail = "is set for the composition as a whole, which cannot be taken apart then; set it for a member";
            return Err(Error::config("bias", detail));
        }
        self.find(name)?.method.keep_members(keep, config, tensors)
    }

    /// Why a merge cannot take what is at this place; None if it can.
    fn why_not(&self, placed: &Placed) -> Result<Option<String>> {
        let adapter = &placed.adapter;
        let Some(id) = placed.site.id else {
            let virtual_tokens = adapter.prompt_len() > 0 || adapter.has_prefix();
            let why = "it adds virtual tokens, which no weight can hold";
            return Ok(virtual_tokens.then(|| why.to_owned()));
        };
        if adapter.only_in_training() {
            return Ok(None);
        }
        let info = self.tree().info(id);
        if info.weight.is_none() {
            return Ok(Some(format!("it acts on `{}` as that runs", info.path)));
        }
        // Whether there is a changed weight does not depend on the values.
        let (inside, out) = (info.in_features, info.out_features);
        let shape = match info.kind {
            ModuleKind::Norm => vec![out],
            ModuleKind::Embedding => vec![inside, out],
            _ => vec![out, inside],
        };
        let zeros = Tensor::zeros(&shape, self.device())?;
        if adapter.weight(zeros)?.is_none() {
            return Ok(Some(format!("it wraps `{}`", info.path)));
        }
        if info.bias.is_none() && adapter.bias(None)?.is_some() {
            let why = format!("it brings a bias, which `{}` has no place for", info.path);
            return Ok(Some(why));
        }
        Ok(None)
    }

    /// A member that could be merged, were it not for what stays.
    fn bound(
        &self,
        attached: &Attached,
        owner: &impl Fn(&str) -> Owner,
        stays: &[Option<String>],
    ) -> Result<Option<(usize, String)>> {
        let remains = |owner: Owner| owner.is_none_or(|member| stays[member].is_some());
        let mut below: HashMap<ModuleId, usize> = HashMap::new();
        for placed in &attached.store.sites {
            let (Some(id), Some(member)) = (placed.site.id, owner(&placed.scope)) else {
                continue;
            };
            if stays[member].is_some() {
                below.insert(id, member);
                continue;
            }
            if placed.adapter.only_in_training() {
                continue;
            }
            let path = &placed.site.path;
            if let Some(inner) = below.get(&id) {
                let why = format!("it acts around member {inner} on `{path}`");
                return Ok(Some((member, why)));
            }
            for slot in [Slot::Weight, Slot::Bias] {
                let stand_in = attached.store.selected.get(&(id, slot));
                if stand_in.is_some_and(|param| remains(owner(param.key())))
                    && self.moves(placed, id, slot)?
                {
                    let what = slot.name();
                    let why = format!("what stays trains the {what} of `{path}` in its place");
                    return Ok(Some((member, why)));
                }
            }
        }
        Ok(None)
    }

    /// Whether an adapter changes this parameter.
    fn moves(&self, placed: &Placed, id: ModuleId, slot: Slot) -> Result<bool> {
        if slot == Slot::Weight {
            return Ok(true);
        }
        let info = self.tree().info(id);
        let bias = Tensor::full(1.0, &[info.out_features], self.device())?;
        let after = no_grad(|| placed.adapter.bias(Some(bias.clone())))?;
        Ok(after.map(|b| b.to_vec()).transpose()? != Some(bias.to_vec()?))
    }
}
