//! Merging: the base's weights as the active adapters change them. Derived from the facets; no method writes any.

use std::collections::{BTreeSet, HashMap};

use peft_tensor::{BaseWeight, Tensor, no_grad};

use crate::attach::{Slot, stored_values};
use crate::{Error, ModuleId, ModuleKind, Network, Result};

/// A module after the merge.
#[derive(Clone)]
pub(crate) struct MergedModule {
    pub(crate) weight: BaseWeight,
    pub(crate) bias: Option<Tensor>,
}

/// A module's merged parameters in their stored layout; None where the merge leaves one as it is.
#[derive(Clone, Debug, Default)]
pub struct Merged {
    /// The weight.
    pub weight: Option<Tensor>,
    /// The bias; also where the base has none and an adapter brings one.
    pub bias: Option<Tensor>,
}

impl Network {
    /// Whether the active adapters change this module's parameters.
    pub fn changes(&self, id: ModuleId) -> bool {
        self.stacks.contains_key(&id)
            || [Slot::Weight, Slot::Bias]
                .iter()
                .any(|&slot| self.selected.contains_key(&(id, slot)))
    }

    /// The merged parameters of one module, from the base parameters given: the streaming merge hands them in one
    /// module at a time. Values are not looked at: whoever keeps or writes them checks that they are finite.
    ///
    /// # Errors
    /// If an adapter cannot be merged there.
    pub fn merged(
        &self,
        id: ModuleId,
        weight: Option<&BaseWeight>,
        bias: Option<&Tensor>,
    ) -> Result<Merged> {
        no_grad(|| self.merge_module(id, weight, bias))
    }

    fn merge_module(
        &self,
        id: ModuleId,
        weight: Option<&BaseWeight>,
        bias: Option<&Tensor>,
    ) -> Result<Merged> {
        let info = self.tree().info(id);
        let stack = self.stacks.get(&id).map_or(&[][..], Vec::as_slice);
        let mut out = Merged::default();
        if let Some(weight) = weight {
            let replaced = self.selected.get(&(id, Slot::Weight));
            if replaced.is_some() || !stack.is_empty() {
                let mut merged = match replaced {
                    Some(param) => self.stand_in(id, param).to_dense()?.detach(),
                    None if info.kind == ModuleKind::Norm => stored_values(weight)?,
                    None => self.replaced.get(&id).unwrap_or(weight).to_dense()?,
                };
                if info.offset != 0.0 {
                    merged = merged.affine(1.0, info.offset)?;
                }
                for stacked in stack {
                    merged = stacked.adapter.weight(merged)?.ok_or_else(|| {
                        let detail = format!(
                            "adapter {:?} wraps it and cannot be merged into its weight",
                            stacked.name
                        );
                        Error::module(&info.path, detail)
                    })?;
                }
                if info.offset != 0.0 {
                    merged = merged.affine(1.0, -info.offset)?;
                }
                out.weight = Some(if weight.is_transposed() {
                    merged.t()?
                } else {
                    merged
                });
            }
        } else if let Some(stacked) = stack.iter().find(|s| !s.adapter.only_in_training()) {
            let detail = format!(
                "adapter {:?} acts on the {} as it runs and cannot be merged",
                stacked.name,
                info.kind.name()
            );
            return Err(Error::module(&info.path, detail));
        }
        let own = self
            .selected
            .get(&(id, Slot::Bias))
            .map(|p| p.tensor().detach());
        let changed_bias = own.is_some();
        let mut merged_bias = own.or_else(|| bias.map(Tensor::detach));
        let had = merged_bias.is_some();
        for stacked in stack {
            merged_bias = stacked.adapter.bias(merged_bias)?;
        }
        // An adapter that leaves the bias alone hands back what it got; comparing values tells, without a method's help.
        let moved = match (&merged_bias, bias) {
            (Some(new), Some(old)) => changed_bias || new.to_vec()? != old.to_vec()?,
            (Some(_), None) => true,
            (None, _) => had,
        };
        if moved {
            out.bias = merged_bias;
        }
        Ok(out)
    }

    /// Merges the active adapters into the weights that run. The base's own are kept aside untouched, so that
    /// [`Network::unmerge`] is exact.
    ///
    /// # Errors
    /// If an active adapter cannot be merged, naming the place; nothing is merged then.
    pub fn merge(&mut self) -> Result<()> {
        if self.merged.is_some() {
            return Ok(());
        }
        self.check_mergeable()?;
        let mut merged = HashMap::new();
        for id in self.changed_modules() {
            let info = self.tree().info(id);
            let weight = info
                .weight
                .as_ref()
                .and_then(|n| self.base.weight(n))
                .cloned();
            let bias = info
                .bias
                .as_ref()
                .and_then(|n| self.base.weight(n))
                .map(stored_values)
                .transpose()?;
            let change = self.merged(id, weight.as_ref(), bias.as_ref())?;
            for values in [&change.weight, &change.bias].into_iter().flatten() {
                finite(&info.path, values)?;
            }
            let Some(weight) = weight else { continue };
            let weight = match change.weight {
                Some(values) => BaseWeight::dense(values, weight.is_transposed()),
                None => weight,
            };
            merged.insert(
                id,
                MergedModule {
                    weight,
                    bias: change.bias.or(bias),
                },
            );
        }
        self.merged = Some(merged);
        Ok(())
    }

    /// Modules the active adapters change, in tree order.
    pub fn changed_modules(&self) -> Vec<ModuleId> {
        let all: BTreeSet<ModuleId> = self
            .stacks
            .keys()
            .copied()
            .chain(self.selected.keys().map(|(id, _)| *id))
            .collect();
        all.into_iter().collect()
    }

    /// Checks that every active adapter is a change of weights.
    ///
    /// # Errors
    /// Names the first that is not.
    pub fn check_mergeable(&self) -> Result<()> {
        if self.prompt_len() > 0 || self.roots.iter().any(|s| s.adapter.has_prefix()) {
            return Err(Error::other(
                "an active adapter adds virtual tokens, which no weight can hold: it cannot be merged",
            ));
        }
        Ok(())
    }

    /// Makes other adapters act, also where those that did are merged: their change is taken out of the weights and the
    /// others' put in, both from the base's own values, so that nothing is left of the first however often one switches.
    ///
    /// # Errors
    /// If one is not attached or cannot be merged; everything is as before then.
    pub fn switch(&mut self, names: &[&str]) -> Result<()> {
        let merged = self.merged.take();
        let before = self.active().to_vec();
        let was_merged = merged.is_some();
        let mut switched = self.set_active(names);
        if was_merged && switched.is_ok() {
            switched = self.merge();
        }
        if switched.is_err() {
            let before: Vec<&str> = before.iter().map(String::as_str).collect();
            self.set_active(&before)?;
            self.merged = merged;
        }
        switched
    }

    /// Goes back to the base's weights with the adapters beside them, bit for bit.
    pub fn unmerge(&mut self) {
        self.merged = None;
    }

    /// Whether the weights are merged.
    pub fn is_merged(&self) -> bool {
        self.merged.is_some()
    }

    /// Whether a tied pair of embeddings no longer shares one weight once the active adapters are merged: one side is
    /// changed alone, or each in its own way.
    pub fn unties(&self) -> bool {
        let facts = self.tree().facts();
        let side = |path: &Option<String>| path.as_ref().and_then(|p| self.tree().get(p));
        let (Some(input), Some(output)) =
            (side(&facts.input_embedding), side(&facts.output_embedding))
        else {
            return false;
        };
        if !facts.tied {
            return false;
        }
        let param = |id| {
            self.selected
                .get(&(id, Slot::Weight))
                .map(|p| p.key().to_owned())
        };
        let stack = |id| self.stacks.get(&id).map_or(&[][..], Vec::as_slice);
        let together = param(input) == param(output)
            && stack(input).len() == stack(output).len()
            && stack(input)
                .iter()
                .zip(stack(output))
                .all(|(a, b)| a.name == b.name && (a.mirrored || b.mirrored));
        !together
    }
}

fn finite(path: &str, values: &Tensor) -> Result<()> {
    let values = values.values()?;
    if peft_tensor::all_finite(&values) {
        return Ok(());
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(Error::module(
            path,
            format!(
                "the merged parameter is not finite at element {at}: the adapter or the base is broken"
            ),
        )),
        None => Ok(()),
    }
}
