//! What configurations of this crate share.

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Common, ModuleId, ModuleKind, ModuleTree, Result, Selected, Site, Slot,
    Targets,
};
use serde::{Deserialize, Serialize};

/// Where a method acts, as in HF PEFT's configurations; the core reads them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Places {
    /// Modules to act on: names, a regular expression or `all-linear`.
    pub target_modules: Option<Value>,
    /// Modules left alone.
    pub exclude_modules: Option<Value>,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Value>,
}

/// Kinds of modules that have parameters.
pub(crate) const WITH_PARAMETERS: &[ModuleKind] = &[
    ModuleKind::Linear,
    ModuleKind::Conv1d,
    ModuleKind::Embedding,
    ModuleKind::Norm,
];

/// The modules with parameters that `wanted` says, less those the configuration excludes.
pub(crate) fn sites_of(
    tree: &ModuleTree,
    common: &Common,
    wanted: impl Fn(ModuleId) -> bool,
) -> Result<Vec<Site>> {
    let ids: Vec<ModuleId> = tree
        .iter()
        .filter(|(id, m)| (m.weight.is_some() || m.bias.is_some()) && wanted(*id))
        .map(|(id, _)| id)
        .collect();
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    // The core's matcher does the rest of the fields; a whole path may be the end of another, hence the second look.
    let paths = ids.iter().map(|id| tree.info(*id).path.clone()).collect();
    let mut exact = common.clone();
    exact.target_modules = Some(Targets::Names(paths));
    let mut sites = tree.matching(&exact, WITH_PARAMETERS, None)?;
    sites.retain(|site| site.id.is_some_and(|id| ids.contains(&id)));
    Ok(sites)
}

/// Trains every parameter of a module in its place.
pub(crate) fn train_whole(cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
    for slot in [Slot::Weight, Slot::Bias] {
        if cx.has(slot) {
            cx.select(slot, slot.name())?;
        }
    }
    Ok(Box::new(Selected))
}
