//! Finding and opening the files of a checkpoint, and putting their tensors into one table.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use peft_tensor::Bytes;
use serde_json::Value;

use super::{Checkpoint, StoredFormat, TensorMeta};
use crate::{Error, Result, gguf, header, read_json};

/// Name of an unsharded checkpoint in a folder.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Name of the index of a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

pub(super) fn open(path: &Path) -> Result<Checkpoint> {
    let kind = std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if kind.is_dir() {
        return open_folder(path);
    }
    if !kind.is_file() {
        return Err(Error::unsupported(path, "is neither a file nor a folder"));
    }
    open_file(path)
}

fn open_folder(folder: &Path) -> Result<Checkpoint> {
    let single = folder.join(SINGLE);
    let index = folder.join(INDEX);
    let mut checkpoint = if single.is_file() {
        open_file(&single)?
    } else if index.is_file() {
        open_shards(folder, &index)?
    } else {
        return Err(no_checkpoint(folder));
    };
    checkpoint.folder = Some(folder.to_owned());
    Ok(checkpoint)
}

/// Why a folder is not a checkpoint, and what to do about what is in it.
fn no_checkpoint(folder: &Path) -> Error {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    let ending = |endings: &[&str]| -> Option<String> {
        names
            .iter()
            .find(|n| endings.iter().any(|e| n.ends_with(e)))
            .cloned()
    };
    if names.iter().any(|n| n == crate::ADAPTER_WEIGHTS) {
        return Error::unsupported(
            folder,
            "holds an adapter, not a model: pass it as the adapter",
        );
    }
    if let Some(name) = ending(&[".gguf"]) {
        return Error::unsupported(
            folder,
            format!(
                "no {SINGLE} here; to use the GGUF, give its path: {}",
                folder.join(name).display()
            ),
        );
    }
    if let Some(name) = ending(&[".safetensors"]) {
        return Error::unsupported(
            folder,
            format!("neither {SINGLE} nor {INDEX} here; to use {name}, give its path"),
        );
    }
    if let Some(name) = ending(&[".bin", ".pt", ".pth", ".ckpt"]) {
        return pickle(&folder.join(name));
    }
    Error::unsupported(
        folder,
        format!("no checkpoint: neither {SINGLE} nor {INDEX} in this folder"),
    )
}

fn pickle(path: &Path) -> Error {
    Error::unsupported(
        path,
        "a PyTorch pickle is not read, because unpickling runs code from the file; convert it with \
         Python: `from transformers import AutoModel; \
         AutoModel.from_pretrained(\"DIR\").save_pretrained(\"NEW_DIR\")` writes safetensors",
    )
}

fn open_file(path: &Path) -> Result<Checkpoint> {
    let bytes = map(path)?;
    let extension = path
        .extension()
        .and_then(OsStr::to_str)
        .unwrap_or("")
        .to_ascii_lowercase();
    if bytes.starts_with(b"GGUF") || extension == "gguf" {
        return from_gguf(path, bytes);
    }
    if matches!(extension.as_str(), "bin" | "pt" | "pth" | "ckpt" | "pkl") {
        return Err(pickle(path));
    }
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(Error::format(
            path,
            "is a git-lfs pointer, not the file itself; run `git lfs pull`",
        ));
    }
    // Behind the length of its header, a safetensors file begins with `{`.
    if extension != "safetensors" && bytes.get(8) != Some(&b'{') {
        return Err(Error::unsupported(
            path,
            "is no model: give a folder with config.json and weights, a .safetensors file or a .gguf file",
        ));
    }
    let header = header::parse(path, &bytes)?;
    let mut checkpoint = Checkpoint {
        files: vec![(path.to_owned(), bytes)],
        metas: BTreeMap::new(),
        order: Vec::new(),
        quantised: BTreeMap::new(),
        gguf: None,
        folder: None,
        metadata: header.metadata,
    };
    for entry in header.entries {
        checkpoint.add(meta_of(entry, header.data_start, 0));
    }
    super::bnb::gather(&mut checkpoint)?;
    Ok(checkpoint)
}

fn from_gguf(path: &Path, bytes: Bytes) -> Result<Checkpoint> {
    let (gguf, tensors) = gguf::parse(path, &bytes)?;
    let mut checkpoint = Checkpoint {
        files: vec![(path.to_owned(), bytes)],
        metas: BTreeMap::new(),
        order: Vec::new(),
        quantised: BTreeMap::new(),
        gguf: Some(gguf),
        folder: None,
        metadata: BTreeMap::new(),
    };
    for t in tensors {
        checkpoint.add(TensorMeta {
            name: t.name,
            shape: t.shape,
            format: t.format,
            nbytes: (t.end - t.start) as u64,
            file: 0,
            offset: t.start as u64,
        });
    }
    Ok(checkpoint)
}

fn open_shards(folder: &Path, index: &Path) -> Result<Checkpoint> {
    let weight_map = weight_map(index)?;
    let shards: BTreeSet<&str> = weight_map.values().map(String::as_str).collect();
    let missing: Vec<&str> = shards
        .iter()
        .copied()
        .filter(|s| !folder.join(s).is_file())
        .collect();
    if !missing.is_empty() {
        return Err(Error::format(
            index,
            format!(
                "{} of {} shards are missing: {}",
                missing.len(),
                shards.len(),
                missing.join(", ")
            ),
        ));
    }

    let mut checkpoint = Checkpoint {
        files: Vec::new(),
        metas: BTreeMap::new(),
        order: Vec::new(),
        quantised: BTreeMap::new(),
        gguf: None,
        folder: None,
        metadata: BTreeMap::new(),
    };
    let mut unlisted = 0;
    for shard in shards {
        let path = folder.join(shard);
        let bytes = map(&path)?;
        let header = header::parse(&path, &bytes)?;
        let file = checkpoint.files.len();
        if file == 0 {
            checkpoint.metadata = header.metadata;
        }
        for entry in header.entries {
            if weight_map.get(&entry.name).is_some_and(|s| s == shard) {
                checkpoint.add(meta_of(entry, header.data_start, file));
            } else {
                unlisted += 1;
            }
        }
        checkpoint.files.push((path, bytes));
    }
    if unlisted > 0 {
        tracing::warn!(
            "{}: {unlisted} tensors of the shards are not in the index and are left out",
            index.display()
        );
    }

    let absent: Vec<String> = weight_map
        .iter()
        .filter(|(name, _)| !checkpoint.metas.contains_key(*name))
        .map(|(name, shard)| format!("`{name}` (in {shard})"))
        .collect();
    if !absent.is_empty() {
        return Err(Error::format(
            index,
            format!(
                "{} tensors are not in the shard the index names: {}",
                absent.len(),
                some(&absent)
            ),
        ));
    }
    super::bnb::gather(&mut checkpoint)?;
    Ok(checkpoint)
}

/// `weight_map` of an index: tensor name to the name of a file beside the index.
fn weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    let json = read_json(index)?;
    let Some(Value::Object(map)) = json.get("weight_map") else {
        return Err(Error::key(
            index,
            "weight_map",
            "missing, or not an object of file names",
        ));
    };
    map.iter()
        .map(|(name, shard)| match shard.as_str() {
            Some(shard) if is_file_name(shard) => Ok((name.clone(), shard.to_owned())),
            Some(shard) => Err(Error::key(
                index,
                format!("weight_map.{name}"),
                format!("names `{shard}`, which is not a file beside the index"),
            )),
            None => Err(Error::key(
                index,
                format!("weight_map.{name}"),
                "is not a file name",
            )),
        })
        .collect()
}

/// A single plain path component: no separators of any system, no `..`, no root.
pub(crate) fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.contains(['/', '\\', ':', '\0'])
}

/// The first few of a list, for a message.
fn some(items: &[String]) -> String {
    const SHOWN: usize = 20;
    let more = items.len().saturating_sub(SHOWN);
    let shown = items
        .iter()
        .take(SHOWN)
        .map(String::as_str)
        .collect::<Vec<_>>()
        .join(", ");
    if more == 0 {
        shown
    } else {
        format!("{shown}, and {more} more")
    }
}

fn map(path: &Path) -> Result<Bytes> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    Bytes::map(&file).map_err(|e| Error::io("map", path, e))
}

fn meta_of(entry: header::Entry, data_start: usize, file: usize) -> TensorMeta {
    TensorMeta {
        name: entry.name,
        shape: entry.shape,
        format: StoredFormat::of(entry.dtype),
        nbytes: (entry.end - entry.start) as u64,
        file,
        offset: (data_start + entry.start) as u64,
    }
}

impl Checkpoint {
    fn add(&mut self, meta: TensorMeta) {
        self.order.push(meta.name.clone());
        self.metas.insert(meta.name.clone(), meta);
    }
}

/// Whether a folder holds the files of a checkpoint, without opening them: a single file, or an index
/// whose shards are all there.
pub(crate) fn has_checkpoint(folder: &Path) -> bool {
    let index = folder.join(INDEX);
    folder.join(SINGLE).is_file()
        || (index.is_file()
            && weight_map(&index)
                .is_ok_and(|map| map.values().all(|shard| folder.join(shard).is_file())))
}

/// Checkpoint files directly in `folder`: what a new checkpoint there would replace.
pub(crate) fn checkpoint_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| Error::io("list", folder, e))?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| Error::io("list", folder, e))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let shard =
            name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        if name == SINGLE || name == INDEX || shard {
            files.push(folder.join(name));
        }
    }
    files.sort();
    Ok(files)
}
