//! What any method's configuration may ask for besides: biases, whole modules, single rows of embeddings.

use std::sync::Arc;

use peft_tensor::Tensor;

use crate::attach::Injector;
use crate::config::Bias;
use crate::{Adapter, Call, Error, Init, ModuleId, ModuleKind, Param, PeftMethod, Result, Slot};

/// Injects a method and what its configuration asks for besides.
pub(crate) fn inject(method: &dyn PeftMethod, cx: &mut Injector<'_>) -> Result<()> {
    let first = cx.store.sites.len();
    method.inject(cx)?;
    train_biases(cx, first)?;
    save_modules(cx)?;
    train_tokens(cx)
}

fn key_of(cx: &Injector<'_>, path: &str, name: &str) -> String {
    format!("{}{}{path}.{name}", cx.scope, cx.prefix)
}

/// HF writes the bias of an adapted module with `base_layer` in its key, because the module is wrapped.
fn train_biases(cx: &mut Injector<'_>, first: usize) -> Result<()> {
    let mode = cx.common.bias;
    if mode == Bias::None {
        return Ok(());
    }
    let adapted: Vec<ModuleId> = cx.store.sites[first..]
        .iter()
        .filter_map(|p| p.site.id)
        .collect();
    let mut any = false;
    for (id, module) in cx.tree().iter() {
        let inside = adapted.contains(&id);
        if module.bias.is_none() || !(inside || mode == Bias::All) {
            continue;
        }
        let name = if inside { "base_layer.bias" } else { "bias" };
        cx.store
            .select(cx.base, id, Slot::Bias, key_of(cx, &module.path, name))?;
        any = true;
    }
    if any {
        Ok(())
    } else {
        Err(Error::config(
            "bias",
            "none of these modules has a bias to train",
        ))
    }
}

/// `modules_to_save`, and a fresh classification head, which is useless untrained.
fn save_modules(cx: &mut Injector<'_>) -> Result<()> {
    let names = cx.common.saved_modules(cx.tree());
    for id in cx.tree().subtree("modules_to_save", &names)? {
        let info = cx.tree().info(id);
        for (slot, name) in [(Slot::Weight, &info.weight), (Slot::Bias, &info.bias)] {
            if name.is_some() {
                cx.store
                    .select(cx.base, id, slot, key_of(cx, &info.path, slot.name()))?;
            }
        }
        tie_saved(cx, id);
    }
    Ok(())
}

/// With `ensure_weight_tying`, a trained copy of one side of a tied pair stands in for both.
fn tie_saved(cx: &mut Injector<'_>, id: ModuleId) {
    if !cx.common.ensure_weight_tying {
        return;
    }
    if let Some(other) = tied_partner(cx, id)
        && let Some(param) = cx.store.selected.get(&(id, Slot::Weight)).cloned()
    {
        cx.store
            .selected
            .entry((other, Slot::Weight))
            .or_insert(param);
    }
}

/// The other module that uses the same weight.
pub(crate) fn tied_partner(cx: &Injector<'_>, id: ModuleId) -> Option<ModuleId> {
    let weight = cx.tree().info(id).weight.as_ref()?;
    cx.tree()
        .iter()
        .find(|(other, m)| *other != id && m.weight.as_ref() == Some(weight))
        .map(|(other, _)| other)
}

fn train_tokens(cx: &mut Injector<'_>) -> Result<()> {
    const FIELD: &str = "trainable_token_indices";
    for (name, ids) in &cx.common.trainable_token_indices {
        let name = match name {
            Some(name) => name.clone(),
            None => cx.tree().facts().input_embedding.clone().ok_or_else(|| {
                Error::config(
                    FIELD,
                    "the model has no input embedding; give {\"module\": [rows]}",
                )
            })?,
        };
        let found = cx.tree().subtree(FIELD, std::slice::from_ref(&name))?;
        for id in found {
            if cx.tree().info(id).weight.is_none() {
                continue;
            }
            let site = cx.tree().site(id);
            let rows = if site.kind == ModuleKind::Embedding {
                site.in_features
            } else {
                site.out_features
            };
            let mut unique = ids.clone();
            unique.sort_unstable();
            unique.dedup();
            if ids.is_empty()
                || unique.len() != ids.len()
                || ids.iter().any(|&i| i as usize >= rows)
            {
                let detail = format!(
                    "has to be different rows of `{}`, 0 to {}",
                    site.path,
                    rows.saturating_sub(1)
                );
                return Err(Error::config(FIELD, detail));
            }
            if cx.store.selected.contains_key(&(id, Slot::Weight)) {
                let detail = format!(
                    "`{}` is in modules_to_save, which trains all of its rows",
                    site.path
                );
                return Err(Error::config(FIELD, detail));
            }
            let weight = cx
                .tree()
                .info(id)
                .weight
                .as_ref()
                .and_then(|n| cx.base.weight(n));
            let weight = weight.ok_or_else(|| Error::module(&site.path, "has no weight"))?;
            let table = weight.to_dense()?;
            let value = Init::Value(table.gather_rows(ids)?).tensor(
                &[ids.len(), table.last_dim()],
                cx.key,
                cx.base.device(),
            )?;
            let key = key_of(cx, &site.path, "token_adapter.trainable_tokens_delta");
            let rows = cx.store.insert(Param::new(key, &value, true))?;
            let adapter: Arc<dyn Adapter> = Arc::new(TokenRows {
                ids: ids.clone(),
                rows,
            });
            cx.place(site, adapter.clone(), false);
            if let Some(other) = tied_partner(cx, id) {
                cx.place(cx.tree().site(other), adapter, true);
            }
        }
    }
    Ok(())
}

/// Some rows of an embedding, trained; saved as the rows themselves. On the tied head the same rows act as outputs.
struct TokenRows {
    ids: Vec<u32>,
    /// `[ids, dim]`
    rows: Param,
}

impl TokenRows {
    /// Trained rows minus what is there, `[ids, dim]`.
    fn change(&self, present: &Tensor) -> Result<Tensor> {
        Ok(self.rows.tensor().sub(present)?)
    }
}

impl Adapter for TokenRows {
    fn weight(&self, w: &Tensor) -> Result<Option<Tensor>> {
        let rows = w.shape().first().copied().unwrap_or(0);
        let change = self.change(&w.gather_rows(&self.ids)?)?;
        Ok(Some(w.add(&change.scatter_rows(&self.ids, rows)?)?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        if !call.is_embedding() {
            return call.through_weight(self);
        }
        // Only the positions that hold one of the trained ids change.
        let (mut positions, mut which) = (Vec::new(), Vec::new());
        for (position, id) in call.ids()?.iter().enumerate() {
            if let Some(row) = self.ids.iter().position(|known| known == id) {
                positions.push(position as u32);
                which.push(row as u32);
            }
        }
        let base = call.base()?;
        if positions.is_empty() {
            return Ok(base);
        }
        let rows = base.shape()[0];
        let change = self
            .rows
            .tensor()
            .gather_rows(&which)?
            .sub(&base.gather_rows(&positions)?)?;
        Ok(base.add(&change.scatter_rows(&positions, rows)?)?)
    }
}
