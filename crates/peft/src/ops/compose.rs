//! How several adapters on one model combine.

use std::path::PathBuf;

use peft_core::{Error, Network, Result};
use peft_io::AdapterFiles;

use super::adapters::read_adapter;
use super::open::OpenedAdapter;

/// How several adapters combine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compose {
    /// Later ones around earlier ones; a fusion that is among them is made from its members.
    #[default]
    Stack,
    /// By a fusion that is among them, and only by it.
    Fuse,
    /// The mean of what each gives, module by module.
    Average,
    /// Each on its own: one result for each.
    Parallel,
}

impl Compose {
    /// The words for them.
    pub const NAMES: [&str; 4] = ["stack", "fuse", "average", "parallel"];
}

impl std::str::FromStr for Compose {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let all = [Self::Stack, Self::Fuse, Self::Average, Self::Parallel];
        let at = Self::NAMES.iter().position(|name| *name == text);
        at.map(|at| all[at]).ok_or_else(|| {
            let detail = format!("{text:?} is not one of {}", Self::NAMES.join(", "));
            Error::config("compose", detail)
        })
    }
}

/// An adapter's files with the name it was given.
pub(super) type Named = (Option<String>, AdapterFiles);

/// `NAME=ADAPTER` as its two parts; a name is letters, digits, `_` and `-`.
fn named(spec: &str) -> (Option<&str>, &str) {
    match spec.split_once('=') {
        Some((name, adapter))
            if !name.is_empty()
                && name
                    .chars()
                    .all(|c| c.is_alphanumeric() || matches!(c, '_' | '-')) =>
        {
            (Some(name), adapter)
        }
        _ => (None, spec),
    }
}

/// Reads adapters; a fusion of AdapterHub's and the adapters it joins become one, in the fusion's place.
///
/// # Errors
/// If one cannot be found or read, or a fusion lacks an adapter.
pub(super) fn read_all(specs: &[String], compose: Compose) -> Result<Vec<Named>> {
    let mut folders: Vec<(Option<String>, PathBuf)> = Vec::new();
    for spec in specs {
        let (name, place) = named(spec);
        folders.push((name.map(str::to_owned), peft_io::resolve_adapter(place)?));
    }
    let fusions: Vec<usize> = (0..folders.len())
        .filter(|&i| peft_io::is_fusion_folder(&folders[i].1))
        .collect();
    let [at] = fusions[..] else {
        if fusions.len() > 1 {
            return Err(Error::config(
                "adapter",
                "more than one fusion: give one of them",
            ));
        }
        let files: Vec<Named> = folders
            .into_iter()
            .map(|(name, folder)| Ok((name, read_adapter(&folder.display().to_string())?)))
            .collect::<Result<_>>()?;
        if compose == Compose::Fuse && files.len() > 1 {
            let detail = "fuse needs a fusion among the adapters: train one over them first (its `members` take their \
                folders), or use stack, average or parallel";
            return Err(Error::config("compose", detail));
        }
        return Ok(files);
    };
    let (name, fusion) = folders.remove(at);
    let wanted = peft_io::fusion_members(&fusion)?;
    let (mut members, mut out) = (Vec::new(), Vec::new());
    let mut place = None;
    for (own, folder) in folders {
        let config = folder.join(peft_io::ADAPTER_CONFIG);
        let joined = peft_io::is_adapterhub_folder(&folder)
            && peft_io::read_json(&config)?["name"]
                .as_str()
                .is_some_and(|n| wanted.iter().any(|w| w == n));
        if joined {
            place.get_or_insert(out.len());
            members.push(folder);
        } else {
            out.push((own, read_adapter(&folder.display().to_string())?));
        }
    }
    let members: Vec<_> = members.iter().map(PathBuf::as_path).collect();
    let files = peft_io::read_fusion(&fusion, &members)?;
    out.insert(place.unwrap_or(out.len()).min(out.len()), (name, files));
    Ok(out)
}

/// Combines opened adapters. In parallel, the first is made active: callers go through them.
///
/// # Errors
/// If they cannot be averaged.
pub(super) fn combine(
    network: &mut Network,
    opened: &[OpenedAdapter],
    compose: Compose,
) -> Result<()> {
    match compose {
        Compose::Average if opened.len() > 1 => {
            let share = 1.0 / opened.len() as f64;
            let weighted: Vec<(&str, f64)> =
                opened.iter().map(|o| (o.name.as_str(), share)).collect();
            network.set_average(&weighted)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_for_combining() {
        for name in Compose::NAMES {
            assert!(name.parse::<Compose>().is_ok());
        }
        let error = "sum".parse::<Compose>().expect_err("refused").to_string();
        assert!(error.contains("average"), "{error}");
    }

    #[test]
    fn a_specification_may_have_a_name() {
        assert_eq!(named("a=x/y"), (Some("a"), "x/y"));
        assert_eq!(named("x/y=z"), (None, "x/y=z"));
        assert_eq!(named("x"), (None, "x"));
    }
}
