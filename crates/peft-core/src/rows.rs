//! Rows of one batch through different adapters: `Pass::adapter_names`, as HF PEFT's argument of that name.

use std::collections::BTreeMap;

use peft_tensor::{Tensor, concat};

use crate::attach::Slot;
use crate::call::{Call, Input, Stacked};
use crate::{Error, ModuleId, ModuleKind, Network, Pass, Result};

/// The rows of the batch that one adapter, or none, acts on.
type Groups<'a> = BTreeMap<Option<&'a str>, Vec<usize>>;

impl Network {
    /// Checks that rows can be given to these adapters: active ones that act in modules. Prompts may differ by row too.
    ///
    /// # Errors
    /// Names the adapter that cannot be used like that, and the choices.
    pub fn check_adapter_names(&self, names: &[Option<String>]) -> Result<()> {
        const FIELD: &str = "adapter_names";
        if self.is_merged() {
            return Err(Error::config(
                FIELD,
                "the adapters are merged: unmerge first",
            ));
        }
        for name in names.iter().flatten() {
            if !self.active().contains(name) {
                let detail = format!(
                    "{name:?} is not active; active: {}",
                    self.active().join(", ")
                );
                return Err(Error::config(FIELD, detail));
            }
        }
        if let Some(root) = self.roots.iter().find(|s| s.adapter.has_prefix()) {
            let detail = format!(
                "{:?} puts keys and values in front of every layer, which all rows of a batch share",
                root.name
            );
            return Err(Error::config(FIELD, detail));
        }
        Ok(())
    }

    /// Each group's rows through its own adapter alone, put together again.
    pub(crate) fn call_by_rows(
        &self,
        id: ModuleId,
        input: Input<'_>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let names = pass.adapter_names.as_deref().map_or(&[][..], Vec::as_slice);
        self.check_adapter_names(names)?;
        let mut groups = Groups::new();
        for (row, name) in names.iter().enumerate() {
            groups.entry(name.as_deref()).or_default().push(row);
        }
        let untouched = self.stack(id).is_empty()
            && ![Slot::Weight, Slot::Bias]
                .iter()
                .any(|&slot| self.selected.contains_key(&(id, slot)));
        if untouched || groups.len() == 1 {
            let name = groups.keys().next().copied().flatten();
            return self.call_as(id, name, input, pass);
        }
        let mut parts = Vec::new();
        for (&name, rows) in &groups {
            parts.push(match input {
                Input::Rows(x) => {
                    let x = self.some_rows(id, x, rows, names.len())?;
                    self.call_as(id, name, Input::Rows(&x), pass)?
                }
                Input::Norm { x, apply } => {
                    let x = self.some_rows(id, x, rows, names.len())?;
                    self.call_as(id, name, Input::Norm { x: &x, apply }, pass)?
                }
                Input::Ids(ids) => {
                    let seq = self.per_row(id, ids.len(), names.len())?;
                    let ids: Vec<u32> = rows
                        .iter()
                        .flat_map(|&r| ids[r * seq..(r + 1) * seq].iter().copied())
                        .collect();
                    self.call_as(id, name, Input::Ids(&ids), pass)?
                }
                // These look at whole rows of the batch: their norms, masks and projections belong to all of it.
                whole => {
                    let all = self.call_as(id, name, whole, pass)?;
                    self.some_rows(id, &all, rows, names.len())?
                }
            });
        }
        let order: Vec<usize> = groups.values().flatten().copied().collect();
        let mut back = vec![0; order.len()];
        for (at, &row) in order.iter().enumerate() {
            back[row] = at;
        }
        let all = concat(&parts.iter().collect::<Vec<_>>(), 0)?;
        self.some_rows(id, &all, &back, names.len())
    }

    /// The leading positions of `n` that belong to one of `batch` rows.
    fn per_row(&self, id: ModuleId, n: usize, batch: usize) -> Result<usize> {
        if batch == 0 || !n.is_multiple_of(batch) {
            let detail = format!("{n} rows cannot be divided among {batch} adapter_names");
            return Err(Error::module(&self.tree().info(id).path, detail));
        }
        Ok(n / batch)
    }

    /// Rows of the batch out of `x`, whose leading dimension is a multiple of the batch.
    fn some_rows(&self, id: ModuleId, x: &Tensor, rows: &[usize], batch: usize) -> Result<Tensor> {
        let mut shape = x.shape().to_vec();
        let lead = shape.first().copied().unwrap_or(0);
        let each = self.per_row(id, lead, batch)?;
        let flat = x.reshape(&[batch, x.numel() / batch.max(1)])?;
        let rows: Vec<u32> = rows.iter().map(|&r| r as u32).collect();
        let picked = flat.gather_rows(&rows)?;
        shape[0] = rows.len() * each;
        Ok(picked.reshape(&shape)?)
    }

    /// The module as it is with one adapter alone, or with none.
    fn call_as(
        &self,
        id: ModuleId,
        name: Option<&str>,
        input: Input<'_>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let stack = self.stack(id);
        let mine = |s: &Stacked| Some(s.name.as_str()) == name;
        // An adapter's places on a module lie next to each other.
        let start = stack.iter().position(mine).unwrap_or(0);
        let end = stack.iter().rposition(mine).map_or(start, |last| last + 1);
        let selected = |slot| {
            let attached = self.find(name?).ok()?;
            attached.store.selected.get(&(id, slot)).cloned()
        };
        let info = self.tree().info(id);
        let weight = match selected(Slot::Weight) {
            Some(param) => Some(self.stand_in(id, &param)),
            None => match name.and_then(|n| self.find(n).ok()?.store.replaced.get(&id)) {
                Some(weight) => Some(weight.clone()),
                None => self.own_weight(id)?,
            },
        };
        let weight = match weight {
            Some(w) if info.kind == ModuleKind::Norm => {
                Some(self.effective_norm(id, &crate::attach::stored_values(&w)?)?)
            }
            weight => weight,
        };
        let bias = match (selected(Slot::Bias), &info.bias) {
            (Some(param), _) => Some(param.tensor()),
            (None, Some(name)) => Some(self.vector(name)?),
            (None, None) => None,
        };
        let call = Call {
            input,
            below: &stack[start..end],
            current: None,
            weight: weight.as_ref(),
            bias: bias.as_ref(),
            pass,
        };
        call.base().map_err(|e| self.named(id, e))
    }

    /// Virtual tokens of each row's own adapter, `[batch, V, hidden]`.
    pub(crate) fn prompt_by_rows(
        &self,
        names: &[Option<String>],
        pass: &Pass,
    ) -> Result<Option<Tensor>> {
        let mut rows = Vec::new();
        for name in names {
            let mut own = Vec::new();
            for stacked in self.roots.iter().filter(|s| Some(&s.name) == name.as_ref()) {
                if let Some(part) = self.prompt_of(stacked, 1, pass)? {
                    let (n, dim) = (part.shape()[part.rank() - 2], part.last_dim());
                    own.push(part.reshape(&[1, n, dim])?);
                }
            }
            if !own.is_empty() {
                rows.push(concat(&own.iter().collect::<Vec<_>>(), 1)?);
            }
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let len = rows[0].shape()[1];
        if rows.len() != names.len() || rows.iter().any(|r| r.shape()[1] != len) {
            return Err(Error::config(
                "adapter_names",
                "rows of one batch need the same number of virtual tokens",
            ));
        }
        Ok(Some(concat(&rows.iter().collect::<Vec<_>>(), 0)?))
    }

    /// Virtual tokens in front of the input in a pass: [`Network::prompt_len`], or those of its `adapter_names`.
    pub fn prompt_len_in(&self, pass: &Pass) -> usize {
        let Some(first) = pass.adapter_names.as_ref().and_then(|n| n.first()) else {
            return self.prompt_len();
        };
        let own = self
            .roots
            .iter()
            .filter(|s| Some(&s.name) == first.as_ref());
        own.map(|s| s.adapter.prompt_len()).sum()
    }
}
