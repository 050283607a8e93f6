//! Writing a checkpoint tensor by tensor: the plan is made first, so headers and shards are known, and
//! the peak memory is the one tensor (or part of one) being written.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use safetensors::Dtype;
use serde_json::json;
use tempfile::NamedTempFile;

use crate::checkpoint::{INDEX, SINGLE, checkpoint_files, is_file_name};
use crate::files::pretty_json;
use crate::scratch::write_all_at;
use crate::stage::{Stage, sync_folder};
use crate::{Error, Result, header};

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanEntry {
    /// Name in the new checkpoint.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: Dtype,
}

/// Which tensor goes to which file of a new checkpoint.
#[derive(Debug, Clone)]
pub struct ShardPlan {
    shards: Vec<Vec<PlanEntry>>,
    total: u64,
}

impl ShardPlan {
    /// Fills shards in the given order, starting a new one when the next tensor would pass
    /// `max_shard_size` bytes of data; a larger tensor gets a shard of its own. Inside a shard wider
    /// element types come first, so that each tensor is aligned.
    ///
    /// # Errors
    /// When two tensors share a name, a shape overflows, or `max_shard_size` is 0.
    pub fn new(entries: Vec<PlanEntry>, max_shard_size: u64) -> Result<Self> {
        if max_shard_size == 0 {
            return Err(Error::Usage(
                "the maximum shard size must be above 0 bytes".into(),
            ));
        }
        let mut names = std::collections::HashSet::new();
        let mut shards = vec![Vec::new()];
        let (mut used, mut total) = (0u64, 0u64);
        for entry in entries {
            let bytes = header::tensor_bytes(entry.dtype, &entry.shape).map(|n| n as u64);
            let sum = bytes.and_then(|n| total.checked_add(n));
            let (Some(bytes), Some(sum)) = (bytes, sum) else {
                return Err(Error::Usage(format!(
                    "tensor `{}`: shape {:?} of {} overflows",
                    entry.name, entry.shape, entry.dtype
                )));
            };
            if !names.insert(entry.name.clone()) {
                return Err(Error::Usage(format!(
                    "tensor `{}` is planned twice",
                    entry.name
                )));
            }
            total = sum;
            match shards.last_mut() {
                Some(shard) if shard.is_empty() || used + bytes <= max_shard_size => {
                    used += bytes;
                    shard.push(entry);
                }
                _ => {
                    used = bytes;
                    shards.push(vec![entry]);
                }
            }
        }
        for shard in &mut shards {
            shard.sort_by_key(|e| std::cmp::Reverse(e.dtype.bitsize()));
        }
        Ok(Self { shards, total })
    }

    /// Every tensor in the order that is cheapest to write.
    pub fn entries(&self) -> impl Iterator<Item = &PlanEntry> {
        self.shards.iter().flatten()
    }

    /// Bytes of all tensors.
    pub fn total_size(&self) -> u64 {
        self.total
    }

    /// Names of the tensor files, `model.safetensors` or `model-00001-of-0000n.safetensors`.
    pub fn file_names(&self) -> Vec<String> {
        match self.shards.len() {
            0 | 1 => vec![SINGLE.to_owned()],
            n => (1..=n)
                .map(|i| format!("model-{i:05}-of-{n:05}.safetensors"))
                .collect(),
        }
    }
}

/// Where a tensor goes and how much of it is there.
#[derive(Debug)]
struct Slot {
    shard: usize,
    /// First byte in the file.
    start: u64,
    len: u64,
    state: Mutex<Written>,
}

/// How much of a tensor is there; a tensor without bytes is there once it was touched.
#[derive(Debug, Default, Clone, Copy)]
struct Written {
    bytes: u64,
    touched: bool,
}

impl Slot {
    fn complete(&self) -> bool {
        let state = lock(&self.state);
        state.touched && state.bytes == self.len
    }
}

/// One file being filled; opened at its first tensor, closed at its last.
#[derive(Debug)]
struct Shard {
    name: String,
    header: Vec<u8>,
    /// Bytes of the whole file.
    len: u64,
    state: Mutex<Open>,
}

#[derive(Debug)]
struct Open {
    file: Option<Arc<NamedTempFile>>,
    /// Tensors not complete yet.
    tensors: usize,
    /// Bytes written since the disk was last told to take them.
    waiting: u64,
    syncing: Option<JoinHandle<std::io::Result<()>>>,
}

/// Written bytes from which on the disk is told to take them while more are being made: otherwise it idles until the end,
/// and closing the file takes as long as writing all of it.
const AHEAD: u64 = 32 << 20;

impl Open {
    /// Counts `bytes` written to `file` and has them synced by a thread of its own once there are many. What that said
    /// is heard before the next time, and in [`settle`](Self::settle): a system tells of a failed write only once.
    fn wrote(&mut self, file: &NamedTempFile, bytes: u64) -> std::io::Result<()> {
        self.waiting += bytes;
        let busy = self.syncing.as_ref().is_some_and(|s| !s.is_finished());
        if self.waiting < AHEAD || busy {
            return Ok(());
        }
        self.settle()?;
        let file = file.as_file().try_clone()?;
        // Without a thread the bytes wait for the end.
        self.syncing = std::thread::Builder::new()
            .spawn(move || file.sync_data())
            .ok();
        self.waiting = 0;
        Ok(())
    }

    /// Waits for the thread that syncs.
    fn settle(&mut self) -> std::io::Result<()> {
        match self.syncing.take().map(JoinHandle::join) {
            Some(Ok(synced)) => synced,
            Some(Err(_)) => Err(std::io::Error::other("the thread that syncs panicked")),
            None => Ok(()),
        }
    }
}

/// A panic elsewhere leaves nothing half-done in what these locks guard.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a checkpoint that was planned. Tensors may come in any order, whole or in parts, from several threads; nothing
/// of it is visible before [`finish`](Self::finish), and nothing remains if that is never reached.
#[derive(Debug)]
pub struct StreamWriter {
    shards: Vec<Shard>,
    slots: HashMap<String, Slot>,
    stage: Mutex<Stage>,
    index: Option<String>,
    /// Old checkpoint files that no new file replaces.
    stale: Vec<std::path::PathBuf>,
}

impl StreamWriter {
    /// Prepares to write into `folder`, which is made if need be. `metadata` goes into every header;
    /// Hugging Face readers want `{"format": "pt"}`, which is added when it has no `format`.
    ///
    /// # Errors
    /// When the folder already holds a checkpoint and `overwrite` is false, or cannot be made.
    pub fn create(
        folder: &Path,
        plan: &ShardPlan,
        metadata: &BTreeMap<String, String>,
        overwrite: bool,
    ) -> Result<Self> {
        let mut stale = checkpoint_files(folder)?;
        if let (Some(file), false) = (stale.first(), overwrite) {
            return Err(Error::exists(
                file,
                "the folder already holds a checkpoint; choose another folder or allow overwriting (--overwrite)",
            ));
        }
        let mut metadata = metadata.clone();
        metadata
            .entry("format".into())
            .or_insert_with(|| "pt".into());

        let names = plan.file_names();
        let mut weight_map = serde_json::Map::new();
        let mut slots = HashMap::new();
        let mut shards = Vec::with_capacity(names.len());
        for (i, (entries, name)) in plan.shards.iter().zip(&names).enumerate() {
            let tensors: Vec<_> = entries
                .iter()
                .map(|e| (e.name.clone(), e.dtype, e.shape.clone()))
                .collect();
            let (head, placed) = header::build(&folder.join(name), &tensors, &metadata)?;
            let data = head.len() as u64;
            let end = placed.iter().map(|e| e.end as u64).max().unwrap_or(0);
            for e in placed {
                weight_map.insert(e.name.clone(), json!(name));
                let (start, len) = (data + e.start as u64, (e.end - e.start) as u64);
                slots.insert(
                    e.name,
                    Slot {
                        shard: i,
                        start,
                        len,
                        state: Mutex::default(),
                    },
                );
            }
            shards.push(Shard {
                name: name.clone(),
                header: head,
                len: data + end,
                state: Mutex::new(Open {
                    file: None,
                    tensors: entries.len(),
                    waiting: 0,
                    syncing: None,
                }),
            });
        }
        let index = (names.len() > 1).then(|| {
            pretty_json(&json!({
                "metadata": {"total_size": plan.total},
                "weight_map": weight_map,
            }))
        });
        stale.retain(|old| {
            let kept = |name: &str| old.file_name().is_some_and(|n| n == name);
            !(names.iter().any(|n| kept(n)) || (index.is_some() && kept(INDEX)))
        });
        Ok(Self {
            shards,
            slots,
            stage: Mutex::new(Stage::new(folder)?),
            index,
            stale,
        })
    }

    /// Writes a whole tensor.
    ///
    /// # Errors
    /// When it is not in the plan, was written before, has another size, or the disk refuses.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        // One that is complete already is `write_part`'s to refuse.
        let open = self.slots.get(name).filter(|slot| !slot.complete());
        let len = open.map(|slot| slot.len - lock(&slot.state).bytes);
        if let Some(len) = len.filter(|&len| len != bytes.len() as u64) {
            let detail = format!("{} bytes given, the plan has {len}", bytes.len());
            return Err(Error::tensor(self.path_of(name), name, detail));
        }
        self.write_part(name, bytes)
    }

    /// Writes the next part of a tensor, after the parts already given.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn write_part(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path_of(name);
        let fail = |detail: String| Error::tensor(&path, name, detail);
        let slot = self
            .slots
            .get(name)
            .ok_or_else(|| fail("is not in the plan".into()))?;
        let shard = self
            .shards
            .get(slot.shard)
            .ok_or_else(|| fail("has no shard".into()))?;
        // Held while writing: the parts of a tensor come one after the other. Other tensors do not wait.
        let mut state = lock(&slot.state);
        if state.touched && state.bytes == slot.len {
            return Err(fail("is already written".into()));
        }
        if bytes.len() as u64 > slot.len - state.bytes {
            return Err(fail(format!(
                "{} bytes given, {} of {} are left to write",
                bytes.len(),
                slot.len - state.bytes,
                slot.len
            )));
        }
        let io = |e| Error::io("write", &path, e);
        let file = self.file(shard, &path)?;
        write_all_at(file.as_file(), slot.start + state.bytes, bytes).map_err(io)?;
        state.bytes += bytes.len() as u64;
        state.touched = true;
        let mut open = lock(&shard.state);
        open.wrote(&file, bytes.len() as u64).map_err(io)?;
        drop(file);
        if state.bytes < slot.len {
            return Ok(());
        }
        open.tensors -= 1;
        if open.tensors > 0 {
            return Ok(());
        }
        open.settle().map_err(|e| Error::io("sync", &path, e))?;
        // Whoever completes the last tensor closes the file: nobody else has it then.
        if let Some(file) = open.file.take()
            && let Some(file) = Arc::into_inner(file)
        {
            lock(&self.stage).push(&shard.name, file)?;
        }
        Ok(())
    }

    /// A shard's file, with its header where it is new.
    fn file(&self, shard: &Shard, path: &Path) -> Result<Arc<NamedTempFile>> {
        let mut open = lock(&shard.state);
        if let Some(file) = &open.file {
            return Ok(file.clone());
        }
        let file = Arc::new(lock(&self.stage).temp(&shard.name)?);
        // Its length at once: tensors come in any order.
        let begun = file.as_file().set_len(shard.len);
        begun
            .and_then(|()| write_all_at(file.as_file(), 0, &shard.header))
            .map_err(|e| Error::io("write", path, e))?;
        open.file = Some(file.clone());
        Ok(file)
    }

    /// Adds a small file, such as `config.json`, that appears together with the tensors.
    ///
    /// # Errors
    /// When `name` is not a plain file name or the file cannot be written.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        if !is_file_name(name) {
            return Err(Error::Usage(format!("`{name}` is not a file name")));
        }
        lock(&self.stage).add(name, bytes)
    }

    /// Puts everything in place: shards, index, added files; removes files of an overwritten checkpoint
    /// that no new file replaced.
    ///
    /// # Errors
    /// When a planned tensor was not written (all are listed) or a file cannot be put in place; the
    /// folder is then as it was.
    pub fn finish(self) -> Result<()> {
        let mut missing: Vec<&str> = self
            .slots
            .iter()
            .filter(|(_, s)| !s.complete())
            .map(|(n, _)| n.as_str())
            .collect();
        if !missing.is_empty() {
            missing.sort_unstable();
            return Err(Error::Usage(format!(
                "{} planned tensors were not written completely: {}",
                missing.len(),
                missing.join(", ")
            )));
        }
        let mut stage = self
            .stage
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        // A plan without tensors has one shard, which no write has opened.
        for shard in self.shards.iter().filter(|_| self.slots.is_empty()) {
            stage.add(&shard.name, &shard.header)?;
        }
        if let Some(index) = &self.index {
            stage.add(INDEX, index.as_bytes())?;
        }
        let folder = stage.target("");
        stage.commit()?;
        for old in &self.stale {
            std::fs::remove_file(old).map_err(|e| Error::io("remove", old, e))?;
        }
        sync_folder(&folder)
    }

    fn path_of(&self, name: &str) -> std::path::PathBuf {
        let shard = self
            .slots
            .get(name)
            .and_then(|slot| self.shards.get(slot.shard));
        lock(&self.stage).target(shard.map_or("", |s| s.name.as_str()))
    }
}

/// Bytes of a size such as `5GB`, `500MiB` or `1024`; powers of 1000 or, with an `i`, of 1024, as
/// Hugging Face reads `max_shard_size`.
///
/// # Errors
/// When it is not a positive number with one of the units B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.
pub fn parse_size(text: &str) -> Result<u64> {
    let fail = || {
        Error::Usage(format!(
            "`{text}` is not a size; write a number above 0 with one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        ))
    };
    let trimmed = text.trim();
    let split = trimmed
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let number: f64 = number.parse().map_err(|_| fail())?;
    let factor: u64 = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        "TIB" => 1 << 40,
        _ => return Err(fail()),
    };
    let bytes = number * factor as f64;
    if (1.0..9e18).contains(&bytes) {
        Ok(bytes as u64)
    } else {
        Err(fail())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("1024", 1024),
            ("5GB", 5_000_000_000),
            ("5gib", 5 << 30),
            ("1.5 MB", 1_500_000),
            ("2KiB", 2048),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for bad in [
            "",
            "GB",
            "-1GB",
            "0",
            "5XB",
            "5 G B",
            "1e3",
            "99999999TB",
            ".",
            "nan",
        ] {
            let error = parse_size(bad).unwrap_err().to_string();
            assert!(error.contains("MiB"), "{bad}: {error}");
        }
    }

    #[test]
    fn shards_fill_in_order_and_keep_tensors_aligned() {
        let entry = |name: &str, n: usize, dtype| PlanEntry {
            name: name.into(),
            shape: vec![n],
            dtype,
        };
        let plan = ShardPlan::new(
            vec![
                entry("a", 3, Dtype::BF16),
                entry("b", 1, Dtype::F32),
                entry("big", 100, Dtype::U8),
                entry("c", 1, Dtype::U8),
            ],
            10,
        )
        .unwrap();
        let names: Vec<Vec<&str>> = plan
            .shards
            .iter()
            .map(|s| s.iter().map(|e| e.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["b", "a"], vec!["big"], vec!["c"]]);
        assert_eq!(plan.total_size(), 6 + 4 + 100 + 1);
        assert_eq!(plan.file_names()[2], "model-00003-of-00003.safetensors");
    }
}
