//! What of a composition a merge leaves over: a smaller adapter, for the merged model.

use std::path::{Path, PathBuf};

use peft_core::{Error, Member, Network, Result};
use peft_train::LabelNames;

use crate::ops::adapters::{check_free, write_adapter};
use crate::ops::{OpenedAdapter, Subject};

/// The rest's name on the network.
const REST: &str = "the rest";

/// An adapter of the members that stay, attached and not active.
pub(super) struct Rest<'a> {
    folder: &'a Path,
    labels: Option<LabelNames>,
    pub(super) notes: Vec<String>,
}

/// Leaves of the adapters on the network what a merge can take, and keeps the rest for `folder`. None where a merge can
/// take all, or there is no telling members apart.
///
/// # Errors
/// If a member cannot be merged and there is no folder, more than one adapter, or none that can.
pub(super) fn set_aside<'a>(
    subject: &mut Subject,
    opened: &[OpenedAdapter],
    folder: Option<&'a Path>,
    overwrite: bool,
) -> Result<Option<Rest<'a>>> {
    let network = subject.network_mut()?;
    for adapter in opened {
        let members = network.members(&adapter.name)?;
        if members.iter().all(|m| m.stays.is_none()) {
            continue;
        }
        let (Some(folder), true) = (folder, members.iter().any(|m| m.stays.is_none())) else {
            return Err(Error::config("members", refusal(&members)));
        };
        if opened.len() > 1 {
            let detail = "takes what is left of one adapter: merge the others by themselves";
            return Err(Error::config("rest", detail));
        }
        check_free(folder, overwrite)?;
        part(network, &adapter.name, &members)?;
        return Ok(Some(Rest {
            folder,
            labels: LabelNames::read(&adapter.folder)?,
            notes: notes(&members),
        }));
    }
    Ok(None)
}

/// The adapter becomes one of what can be merged, and one of what cannot.
fn part(network: &mut Network, name: &str, members: &[Member]) -> Result<()> {
    let (merging, staying): (Vec<usize>, Vec<usize>) =
        (0..members.len()).partition(|&i| members[i].stays.is_none());
    let (merged, merged_tensors) = network.export_members(name, &merging)?;
    let (rest, rest_tensors) = network.export_members(name, &staying)?;
    network.delete(name)?;
    network.load(name, &merged, merged_tensors, false)?;
    network.load(REST, &rest, rest_tensors, false)?;
    network.set_active(&[name])
}

fn notes(members: &[Member]) -> Vec<String> {
    let stays = members.iter().enumerate().filter_map(|(i, m)| {
        let why = m.stays.as_ref()?;
        Some(format!("member {i} ({}) stays: {why}", m.peft_type))
    });
    stays.collect()
}

fn refusal(members: &[Member]) -> String {
    let merging = members
        .iter()
        .enumerate()
        .filter(|(_, m)| m.stays.is_none());
    let merging: Vec<String> = merging
        .map(|(i, m)| format!("member {i} ({}) can be merged", m.peft_type))
        .collect();
    let advice = if merging.is_empty() {
        "none of its members can be merged"
    } else {
        "with a folder for the `rest`, those that can be are merged and the others kept as an adapter"
    };
    let told: Vec<String> = notes(members).into_iter().chain(merging).collect();
    format!("{}; {advice}", told.join("; "))
}

impl Rest<'_> {
    /// Writes it, for the model in `base`.
    pub(super) fn write(&self, network: &Network, base: &Path) -> Result<PathBuf> {
        let base = base.display().to_string();
        let folder = write_adapter(network, REST, &base, self.folder, true)?;
        if let Some(labels) = &self.labels {
            labels.write(&folder)?;
        }
        Ok(folder)
    }
}
