//! From what a user writes, a path or a hub id, to a folder or file: looks on disk, then in the Hugging
//! Face cache, then (feature `hub`) downloads into that cache, whose layout is the Python library's:
//! `models--owner--name/{refs/<revision>, snapshots/<commit>/}`.

#[cfg(feature = "hub")]
mod download;

use std::env;
use std::path::{Path, PathBuf};

use crate::checkpoint::{has_checkpoint, is_file_name};
use crate::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, Error, Result, is_adapter_folder};

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Model,
    Adapter,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Adapter => "adapter",
        }
    }

    /// Whether a snapshot has all the files that are needed.
    fn complete(self, folder: &Path) -> bool {
        match self {
            Self::Model => folder.join("config.json").is_file() && has_checkpoint(folder),
            Self::Adapter => is_adapter_folder(folder),
        }
    }

    fn files(self) -> String {
        match self {
            Self::Model => "config.json and safetensors weights".to_owned(),
            Self::Adapter => format!("{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"),
        }
    }
}

/// A model on this machine for `spec`: an existing folder or file, or a hub id `owner/name[@revision]`
/// that is cached or can be downloaded.
///
/// # Errors
/// [`Error::NotFound`] with everything that was tried.
pub fn resolve_model(spec: &str) -> Result<PathBuf> {
    HubCache::from_env().resolve_model(spec)
}

/// An adapter folder on this machine for `spec`, found as [`resolve_model`] finds models.
///
/// # Errors
/// [`Error::NotFound`] with everything that was tried.
pub fn resolve_adapter(spec: &str) -> Result<PathBuf> {
    HubCache::from_env().resolve_adapter(spec)
}

/// A Hugging Face cache folder, and whether what it lacks may be downloaded.
#[derive(Debug, Clone)]
pub struct HubCache {
    /// The folder with `models--owner--name` in it.
    pub root: PathBuf,
    /// Never download.
    pub offline: bool,
    /// Server to download from; `https://huggingface.co` when not set.
    pub endpoint: Option<String>,
}

impl HubCache {
    /// The cache that the Python library would use: `HF_HUB_CACHE`, `HF_HOME/hub`,
    /// `XDG_CACHE_HOME/huggingface/hub` or `~/.cache/huggingface/hub`; offline when `HF_HUB_OFFLINE` or
    /// `TRANSFORMERS_OFFLINE` is set; `HF_ENDPOINT` as the server.
    pub fn from_env() -> Self {
        Self::from_vars(|name| env::var(name).ok().filter(|v| !v.is_empty()))
    }

    fn from_vars(var: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| var(name).map(PathBuf::from);
        let root = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| path("HF_HOME").map(|p| p.join("hub")))
            .or_else(|| path("XDG_CACHE_HOME").map(|p| p.join("huggingface/hub")))
            .or_else(|| {
                path("HOME")
                    .or_else(|| path("USERPROFILE"))
                    .map(|p| p.join(".cache/huggingface/hub"))
            })
            .unwrap_or_else(|| PathBuf::from(".cache/huggingface/hub"));
        let on = |name: &str| {
            var(name).is_some_and(|v| {
                matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE")
            })
        };
        Self {
            root,
            offline: on("HF_HUB_OFFLINE") || on("TRANSFORMERS_OFFLINE"),
            endpoint: var("HF_ENDPOINT"),
        }
    }

    /// As the free function [`resolve_model`], in this cache.
    ///
    /// # Errors
    /// [`Error::NotFound`] with everything that was tried.
    pub fn resolve_model(&self, spec: &str) -> Result<PathBuf> {
        self.resolve(spec, Kind::Model)
    }

    /// As the free function [`resolve_adapter`], in this cache.
    ///
    /// # Errors
    /// [`Error::NotFound`] with everything that was tried.
    pub fn resolve_adapter(&self, spec: &str) -> Result<PathBuf> {
        self.resolve(spec, Kind::Adapter)
    }

    fn resolve(&self, spec: &str, kind: Kind) -> Result<PathBuf> {
        let path = local_path(spec);
        if path.exists() {
            return Ok(path);
        }
        let mut tried = vec![format!("the path {}: nothing there", path.display())];
        let give_up = |mut tried: Vec<String>| {
            tried.push(format!("give the path of a folder with {}", kind.files()));
            Err(Error::NotFound {
                what: kind.name(),
                spec: spec.to_owned(),
                tried,
            })
        };
        let Some((id, revision)) = hub_id(spec) else {
            tried.push(
                "a hub id: it does not have the form owner/name or owner/name@revision".to_owned(),
            );
            return give_up(tried);
        };
        match self.cached(id, revision, kind) {
            Ok(folder) => return Ok(folder),
            Err(why) => tried.push(format!("the cache {}: {why}", self.root.display())),
        }
        match self.download(id, revision, kind) {
            Ok(folder) => Ok(folder),
            Err(why) => {
                tried.push(format!("download: {why}"));
                give_up(tried)
            }
        }
    }

    /// The complete snapshot of a revision, or why there is none.
    fn cached(&self, id: &str, revision: &str, kind: Kind) -> std::result::Result<PathBuf, String> {
        let repo = self.root.join(format!("models--{}", id.replace('/', "--")));
        if !repo.is_dir() {
            return Err(format!("no {id} in it"));
        }
        let commit = match std::fs::read_to_string(repo.join("refs").join(revision)) {
            Ok(text) => text.trim().to_owned(),
            // A commit is its own name.
            Err(_) => revision.to_owned(),
        };
        let snapshot = repo.join("snapshots").join(&commit);
        if !is_file_name(&commit) || !snapshot.is_dir() {
            return Err(format!("{id} is there, its revision {revision} is not"));
        }
        if !kind.complete(&snapshot) {
            return Err(format!("{id} is there without {}", kind.files()));
        }
        Ok(snapshot)
    }

    #[cfg(feature = "hub")]
    fn download(
        &self,
        id: &str,
        revision: &str,
        kind: Kind,
    ) -> std::result::Result<PathBuf, String> {
        if self.offline {
            return Err("not tried, HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set".to_owned());
        }
        let folder = download::download(self, id, revision, kind)?;
        if kind.complete(&folder) {
            Ok(folder)
        } else {
            Err(format!("{id} has no {}", kind.files()))
        }
    }

    #[cfg(not(feature = "hub"))]
    fn download(&self, _: &str, _: &str, _: Kind) -> std::result::Result<PathBuf, String> {
        Err("not tried, this build has no feature `hub`".to_owned())
    }
}

/// The path a user means, `~/` expanded as a shell would.
fn local_path(spec: &str) -> PathBuf {
    match (spec.strip_prefix("~/"), env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => PathBuf::from(spec),
    }
}

/// `owner/name[@revision]` or `name[@revision]` as repository and revision, or `None` when it can only be
/// a path. The rules are the hub's: letters, digits, `-`, `_`, `.`; no `--` or `..`; 96 characters.
fn hub_id(spec: &str) -> Option<(&str, &str)> {
    let (id, revision) = spec.split_once('@').unwrap_or((spec, "main"));
    let plain = |part: &str| {
        !part.is_empty()
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    let model_file = [".gguf", ".safetensors", ".bin", ".json"]
        .iter()
        .any(|e| id.ends_with(e));
    let id_ok =
        id.len() <= 96 && id.split('/').count() <= 2 && id.split('/').all(plain) && !model_file;
    let revision_ok = revision.len() <= 255
        && revision
            .split('/')
            .all(|part| is_file_name(part) && part.chars().all(|c| !c.is_whitespace()));
    (id_ok && revision_ok).then_some((id, revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_and_what_is_none() {
        assert_eq!(hub_id("owner/name"), Some(("owner/name", "main")));
        assert_eq!(hub_id("gpt2"), Some(("gpt2", "main")));
        assert_eq!(
            hub_id("o/n-1.5_B@refs/pr/3"),
            Some(("o/n-1.5_B", "refs/pr/3"))
        );
        for bad in [
            "", "/a/b", "./a", "../a", "a/b/c", "a//b", "a/..", "a\\b", "a b/c", "o/n@",
            "o/n@../x", "o/n@/etc", "o/m.gguf", "a--b/c", "o/n@a b",
        ] {
            assert_eq!(hub_id(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_cache_folder_follows_pythons_variables() {
        let from = |vars: &[(&str, &str)]| {
            HubCache::from_vars(|name| {
                vars.iter()
                    .find(|(k, _)| *k == name)
                    .map(|(_, v)| (*v).to_owned())
            })
        };
        let all = [
            ("HF_HUB_CACHE", "/a"),
            ("HF_HOME", "/b"),
            ("XDG_CACHE_HOME", "/c"),
            ("HOME", "/d"),
        ];
        let roots = [
            "/a",
            "/b/hub",
            "/c/huggingface/hub",
            "/d/.cache/huggingface/hub",
        ];
        for (skip, root) in roots.iter().enumerate() {
            assert_eq!(from(&all[skip..]).root, Path::new(root));
        }
        for (value, offline) in [("1", true), ("true", true), ("0", false), ("no", false)] {
            assert_eq!(
                from(&[("HF_HUB_OFFLINE", value)]).offline,
                offline,
                "{value}"
            );
        }
    }
}
