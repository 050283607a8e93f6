//! Downloads the files of one hub repository into the cache, at the commit the revision stands for.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::{HubCache, Kind};
use crate::adapterhub::FILES as ADAPTERHUB_FILES;
use crate::checkpoint::{INDEX, SINGLE, is_file_name};
use crate::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, SIDE_FILES, read_json};

/// The snapshot folder with what `kind` needs of `id`, or why it could not be had.
pub(super) fn download(
    hub: &HubCache,
    id: &str,
    revision: &str,
    kind: Kind,
) -> Result<PathBuf, String> {
    let cache = Cache::new(hub.root.clone());
    let mut builder = ApiBuilder::from_cache(cache.clone())
        .with_progress(std::io::stderr().is_terminal())
        .with_retries(2);
    if let Some(endpoint) = &hub.endpoint {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|t| !t.is_empty()) {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().map_err(|e| e.to_string())?;
    let at =
        |revision: &str| Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
    let info = api.repo(at(revision)).info().map_err(|e| e.to_string())?;
    if !is_file_name(&info.sha) {
        return Err(format!(
            "the server answered with the commit `{}`",
            info.sha
        ));
    }

    // By commit, so that files of two revisions never mix.
    let repo = api.repo(at(&info.sha));
    let snapshot = cache.repo(at(revision)).pointer_path(&info.sha);
    let offered: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
    let has = |name: &str| offered.contains(&name);
    match kind {
        Kind::Adapter => {
            let files = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
                .into_iter()
                .chain(ADAPTERHUB_FILES);
            for name in files.filter(|n| has(n)) {
                fetch(&repo, &snapshot, name)?;
            }
        }
        Kind::Model => {
            for name in SIDE_FILES
                .iter()
                .copied()
                .chain(["config.json"])
                .filter(|n| has(n))
            {
                fetch(&repo, &snapshot, name)?;
            }
            for name in weight_files(&repo, &snapshot, has)? {
                fetch(&repo, &snapshot, &name)?;
            }
        }
    }
    cache
        .repo(at(revision))
        .create_ref(&info.sha)
        .map_err(|e| e.to_string())?;
    Ok(snapshot)
}

fn weight_files(
    repo: &ApiRepo,
    snapshot: &Path,
    has: impl Fn(&str) -> bool,
) -> Result<Vec<String>, String> {
    if has(SINGLE) {
        return Ok(vec![SINGLE.to_owned()]);
    }
    if !has(INDEX) {
        return Err(format!("the repository has neither {SINGLE} nor {INDEX}"));
    }
    let index = read_json(&fetch(repo, snapshot, INDEX)?).map_err(|e| e.to_string())?;
    let map = index.get("weight_map").and_then(|m| m.as_object());
    let mut shards: Vec<String> = map
        .into_iter()
        .flat_map(|m| m.values())
        .filter_map(|v| v.as_str())
        .map(str::to_owned)
        .collect();
    shards.sort();
    shards.dedup();
    match shards.iter().find(|s| !is_file_name(s)) {
        Some(bad) => Err(format!(
            "{INDEX} names `{bad}`, which is not a file beside it"
        )),
        None => Ok(shards),
    }
}

fn fetch(repo: &ApiRepo, snapshot: &Path, name: &str) -> Result<PathBuf, String> {
    let cached = snapshot.join(name);
    if cached.is_file() {
        return Ok(cached);
    }
    tracing::info!("downloading {name}");
    repo.download(name).map_err(|e| format!("{name}: {e}"))
}
