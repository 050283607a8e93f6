//! What any method's configuration may ask for besides: biases, whole modules, single rows of embeddings.

use crate::attach::Injector;
use crate::config::Bias;
use crate::tokens::TokenRows;
use crate::{Error, ModuleId, PeftMethod, Result, Slot};

/// Injects a method and what its configuration asks for besides.
pub(crate) fn inject(method: &dyn PeftMethod, cx: &mut Injector<'_>) -> Result<()> {
    let first = cx.store.sites.len();
    method.inject(cx)?;
    train_biases(cx, first)?;
    save_modules(cx)?;
    train_tokens(cx)
}

pub(crate) fn key_of(cx: &Injector<'_>, path: &str, name: &str) -> String {
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
        return Ok(());
    }
    cx.common.unused(Error::config(
        "bias",
        "none of these modules has a bias to train",
    ))
}

/// `modules_to_save`, and a fresh classification head, which is useless untrained.
fn save_modules(cx: &mut Injector<'_>) -> Result<()> {
    let mut names = cx.common.saved_modules(cx.tree());
    if cx.common.finished {
        let known = |name: &String| {
            cx.tree()
                .subtree("modules_to_save", std::slice::from_ref(name))
        };
        for error in names.iter().filter_map(|name| known(name).err()) {
            cx.common.unused(error)?;
        }
        names.retain(|name| known(name).is_ok());
    }
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
    for (module, ids) in &cx.common.trainable_token_indices {
        let key = "token_adapter.trainable_tokens_delta";
        TokenRows::attach(cx, module.as_deref(), ids, "trainable_token_indices", key)?;
    }
    Ok(())
}
