//! Merging a composition in part.

use peft::core::{Base, BaseWeight, Network};
use serde_json::{Value, json};

use crate::compare::{Check, close, differ};
use crate::subject::{Subject, told};

/// A union of `members`: number `own`, the subject's, merges if its method does; what is merged by itself, and the rest
/// on that base, are together what the union was.
///
/// # Errors
/// Says what is not so.
pub fn merges_in_part(s: &Subject<'_>, members: &[Value], own: usize) -> Check {
    let config = json!({"peft_type": "UNION", "members": members});
    let mut whole = s.toy()?;
    told(
        "attach the union",
        whole.network.attach("a", &config, s.case.seed),
    )?;
    s.perturb(&whole, "a")?;
    let found = told("members", whole.network.members("a"))?;
    let stays = |i: usize| found[i].stays.is_some();
    // A file has no place for a bias that the base does not have; the merge in memory has.
    let brings_bias = |why: &String| why.contains("brings a bias");
    let unplaced = found[own].stays.as_ref().is_some_and(brings_bias);
    if stays(own) == s.entry.mergeable && !unplaced {
        return Err(format!(
            "member {own} of {members:?} is registered with mergeable = {}: {:?}",
            s.entry.mergeable, found[own].stays
        ));
    }
    let (staying, merging): (Vec<usize>, Vec<usize>) = (0..found.len()).partition(|&i| stays(i));
    // Around what stays on its own modules a member cannot be merged, behind it it can.
    if own > 0 && merging.is_empty() {
        return Err(format!("nothing merges: {found:?}"));
    }
    if merging.is_empty() {
        return Ok(());
    }
    let adapted = s.run(&whole)?;
    differ("the union and the base", &adapted, &s.run(&s.toy()?)?)?;
    let part = |keep: &[usize]| told("a part", whole.network.export_members("a", keep));
    let mut merged = s.toy()?;
    let (config, tensors) = part(&merging)?;
    told(
        "load what merges",
        merged.network.load("m", &config, tensors, false),
    )?;
    // One weight cannot hold both sides of a tied pair that part ways, nor a configuration's positions.
    if merged.network.unties() || merged.network.position_scale() != 1.0 {
        return Ok(());
    }
    let base = merged_base(&merged.network)?;
    let mut last = s.toy()?;
    last.network = Network::new(base);
    if !staying.is_empty() {
        let (config, tensors) = part(&staying)?;
        told(
            "load the rest",
            last.network.load("r", &config, tensors, true),
        )?;
    }
    close(
        "the rest on the merged base",
        &s.run(&last)?,
        &adapted,
        s.tolerance(),
    )
}

/// The base with the active adapters merged in.
fn merged_base(network: &Network) -> Result<Base, String> {
    let mut base = network.base().clone();
    for id in network.changed_modules() {
        let info = network.tree().info(id);
        let weight = info.weight.as_ref().and_then(|n| network.base().weight(n));
        let bias = info.bias.as_ref().map(|n| network.param(n)).transpose();
        let bias = told("bias", bias)?;
        let merged = told(&info.path, network.merged(id, weight, bias.as_ref()))?;
        if let (Some(name), Some(old), Some(new)) = (&info.weight, weight, merged.weight) {
            base.insert(name.clone(), BaseWeight::dense(new, old.is_transposed()));
        }
        if let (Some(name), Some(new)) = (&info.bias, merged.bias) {
            base.insert(name.clone(), BaseWeight::dense(new, false));
        }
    }
    Ok(base)
}
