//! The state of a training run: a folder of tensors and JSON that appears under its name only when it is
//! complete, so that a run killed at any moment finds whole states or none.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::NamedTempFile;

use crate::checkpoint::is_file_name;
use crate::files::pretty_json;
use crate::stage::{Stage, sync_folder};
use crate::tensors::stage_tensors;
use crate::{
    Checkpoint, Error, NamedTensors, PlanEntry, Result, create_folder, header, read_json,
    read_tensors,
};

const TENSORS: &str = "state.safetensors";
const JSON: &str = "state.json";
/// Start of the names of states being written; a killed run may leave one.
const PARTIAL: &str = ".partial-";
/// Start of the name under which a state waits while its replacement takes its place.
const REPLACED: &str = ".replaced-";

/// Writes `dir/name/` with the tensors (bit for bit) and the JSON. A state of that name is replaced.
/// Leftovers of killed writes in `dir` are removed: one run at a time may write to it.
///
/// JSON floats may lose their last bit when read; keep what must be exact in tensors or as integers.
///
/// # Errors
/// When `name` is not a plain file name or starts with a dot, a shape disagrees with its values, or a
/// file cannot be written.
pub fn write_state(dir: &Path, name: &str, tensors: &NamedTensors, json: &Value) -> Result<()> {
    let partial = Partial::new(dir, name)?;
    let mut stage = Stage::new(&partial.path)?;
    stage_tensors(&mut stage, TENSORS, tensors, &[], &BTreeMap::new())?;
    stage.add(JSON, pretty_json(json).as_bytes())?;
    stage.commit()?;
    swap(dir, name, &partial.path)
}

/// The folder a state is made in; what is left of it when dropped is removed.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
}

impl Partial {
    fn new(dir: &Path, name: &str) -> Result<Self> {
        check_name(name)?;
        create_folder(dir)?;
        recover(dir)?;
        let path = dir.join(format!("{PARTIAL}{name}"));
        Ok(Self { path })
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Renamed away if all went well; otherwise the first error is the one to tell.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Writes a state tensor by tensor, as [`write_state`] writes one that is in memory.
#[derive(Debug)]
pub struct StateWriter {
    dir: PathBuf,
    name: String,
    path: PathBuf,
    // Dropped in order: the temporary, the stage, the folder.
    out: std::io::BufWriter<NamedTempFile>,
    stage: Stage,
    partial: Partial,
    /// Bytes that are still to come.
    left: u64,
}

impl StateWriter {
    /// Begins the state `dir/name/` with these tensors: their bytes have to come in this order. Wide element types should
    /// come first, so that each tensor is aligned.
    ///
    /// # Errors
    /// As [`write_state`].
    pub fn create(dir: &Path, name: &str, plan: &[PlanEntry]) -> Result<Self> {
        let partial = Partial::new(dir, name)?;
        let stage = Stage::new(&partial.path)?;
        let path = stage.target(TENSORS);
        let entries: Vec<_> = plan
            .iter()
            .map(|e| (e.name.clone(), e.dtype, e.shape.clone()))
            .collect();
        let (head, placed) = header::build(&path, &entries, &BTreeMap::new())?;
        let mut writer = Self {
            dir: dir.to_owned(),
            name: name.to_owned(),
            path,
            out: std::io::BufWriter::with_capacity(1 << 20, stage.temp(TENSORS)?),
            stage,
            partial,
            left: head.len() as u64 + placed.last().map_or(0, |e| e.end as u64),
        };
        writer.write(&head)?;
        Ok(writer)
    }

    /// Writes the next bytes.
    ///
    /// # Errors
    /// When they are more than was planned, or the disk refuses.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        use std::io::Write as _;
        let Some(left) = self.left.checked_sub(bytes.len() as u64) else {
            let detail = format!(
                "{} bytes come after {} planned ones",
                bytes.len(),
                self.left
            );
            return Err(Error::format(&self.path, detail));
        };
        self.left = left;
        self.out
            .write_all(bytes)
            .map_err(|e| Error::io("write", &self.path, e))
    }

    /// Puts the state in place.
    ///
    /// # Errors
    /// When bytes are missing or something cannot be written; then nothing remains.
    pub fn finish(mut self, json: &Value) -> Result<()> {
        if self.left > 0 {
            let detail = format!("{} planned bytes did not come", self.left);
            return Err(Error::format(&self.path, detail));
        }
        let temp = self
            .out
            .into_inner()
            .map_err(|e| Error::io("write", &self.path, e.into_error()))?;
        self.stage.push(TENSORS, temp)?;
        self.stage.add(JSON, pretty_json(json).as_bytes())?;
        self.stage.commit()?;
        swap(&self.dir, &self.name, &self.partial.path)
    }
}

fn swap(dir: &Path, name: &str, partial: &Path) -> Result<()> {
    let _placing = crate::pending::placing();
    let target = dir.join(name);
    let replaced = dir.join(format!("{REPLACED}{name}"));
    if target.exists() {
        fs::rename(&target, &replaced).map_err(|e| Error::io("rename", &target, e))?;
    }
    if let Err(e) = fs::rename(partial, &target) {
        // Put the old state back; if even that fails, the next `recover` does it.
        let _ = fs::rename(&replaced, &target);
        return Err(Error::io("rename to", &target, e));
    }
    sync_folder(dir)?;
    if replaced.exists() {
        fs::remove_dir_all(&replaced).map_err(|e| Error::io("remove", &replaced, e))?;
    }
    Ok(())
}

/// Undoes what a killed write left: partial states go, replaced states whose successor never came return.
fn recover(dir: &Path) -> Result<()> {
    for name in entries(dir)? {
        let path = dir.join(&name);
        let remove = |p: &PathBuf| fs::remove_dir_all(p).map_err(|e| Error::io("remove", p, e));
        if name.starts_with(PARTIAL) {
            remove(&path)?;
        } else if let Some(original) = name.strip_prefix(REPLACED) {
            let original = dir.join(original);
            if original.exists() {
                remove(&path)?;
            } else {
                fs::rename(&path, &original).map_err(|e| Error::io("rename", &path, e))?;
            }
        }
    }
    Ok(())
}

/// Reads a state written by [`write_state`].
///
/// # Errors
/// When it is not there or a file of it is damaged.
pub fn read_state(dir: &Path, name: &str) -> Result<(NamedTensors, Value)> {
    let folder = state_folder(dir, name)?;
    Ok((
        read_tensors(&folder.join(TENSORS))?,
        read_json(&folder.join(JSON))?,
    ))
}

/// As [`read_state`], with the tensors in their file until they are asked for.
///
/// # Errors
/// As [`read_state`].
pub fn open_state(dir: &Path, name: &str) -> Result<(Checkpoint, Value)> {
    let folder = state_folder(dir, name)?;
    Ok((
        Checkpoint::open(&folder.join(TENSORS))?,
        read_json(&folder.join(JSON))?,
    ))
}

fn state_folder(dir: &Path, name: &str) -> Result<PathBuf> {
    check_name(name)?;
    let mut folder = dir.join(name);
    let replaced = dir.join(format!("{REPLACED}{name}"));
    // A run killed between the two renames of a replacement.
    if !folder.exists() && replaced.exists() {
        folder = replaced;
    }
    if !folder.is_dir() {
        let known = list_states(dir)?;
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        return Err(Error::format(
            dir.join(name),
            format!("no such state; there are: {known}"),
        ));
    }
    Ok(folder)
}

/// Names of the complete states in `dir`, sorted with numbers in numeric order (`step-9` before
/// `step-10`). A folder that does not exist has none.
///
/// # Errors
/// When the folder cannot be listed.
pub fn list_states(dir: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = entries(dir)?
        .into_iter()
        .filter(|name| !name.starts_with(PARTIAL))
        .filter(|name| {
            dir.join(name).join(JSON).is_file() && dir.join(name).join(TENSORS).is_file()
        })
        .map(|name| {
            name.strip_prefix(REPLACED)
                .map_or(name.clone(), str::to_owned)
        })
        .collect();
    names.sort_by_key(|name| {
        let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
        let prefix = name[..name.len() - digits.len()].to_owned();
        (
            prefix,
            digits.parse::<u128>().unwrap_or(0),
            digits.to_owned(),
        )
    });
    names.dedup();
    Ok(names)
}

/// Removes a state; one that is not there is fine.
///
/// # Errors
/// When it cannot be removed.
pub fn remove_state(dir: &Path, name: &str) -> Result<()> {
    check_name(name)?;
    recover(dir)?;
    let path = dir.join(name);
    if !path.exists() {
        return Ok(());
    }
    // Renamed first, so that a kill midway leaves no half-removed state under a valid name.
    let partial = dir.join(format!("{PARTIAL}{name}"));
    fs::rename(&path, &partial)
        .and_then(|()| fs::remove_dir_all(&partial))
        .map_err(|e| Error::io("remove", &path, e))
}

fn check_name(name: &str) -> Result<()> {
    if is_file_name(name) && !name.starts_with('.') {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "`{name}` cannot name a state: it must be a plain file name without a leading dot"
    )))
}

fn entries(dir: &Path) -> Result<Vec<String>> {
    let list = match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| Error::io("list", dir, e))?,
    };
    let mut names = Vec::new();
    for entry in list {
        let name = entry.map_err(|e| Error::io("list", dir, e))?.file_name();
        names.extend(name.into_string().ok());
    }
    Ok(names)
}
