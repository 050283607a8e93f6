//! Files written under temporary names in their final folder, then put in place together.
//!
//! When anything fails before or during [`Stage::commit`], the temporaries are removed, files that were
//! replaced are restored, and folders that were made for the purpose disappear again. A process that is
//! told to end can remove the temporaries too ([`abandon_writes`](crate::abandon_writes)); one killed midway
//! can leave hidden `.tmp` files behind, but never a file of the final name with partial content.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempPath};

use crate::{Error, Result, pending};

/// Files waiting to be put in place. Fields are dropped in order: temporaries before their folder.
#[derive(Debug)]
pub(crate) struct Stage {
    files: Vec<(PathBuf, TempPath)>,
    folder: MadeFolder,
}

impl Stage {
    /// Makes `folder` if it is not there.
    pub(crate) fn new(folder: &Path) -> Result<Self> {
        Ok(Self {
            files: Vec::new(),
            folder: MadeFolder::new(folder)?,
        })
    }

    /// An empty temporary beside where `name` will be.
    pub(crate) fn temp(&self, name: &str) -> Result<NamedTempFile> {
        temp_in(&self.folder.path, name)
    }

    /// Writes `bytes` to a temporary that will become `name`.
    pub(crate) fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut temp = self.temp(name)?;
        temp.write_all(bytes)
            .map_err(|e| Error::io("write", self.target(name), e))?;
        self.push(name, temp)
    }

    /// Takes a written temporary that will become `name`; syncs and closes it.
    pub(crate) fn push(&mut self, name: &str, temp: NamedTempFile) -> Result<()> {
        let target = self.target(name);
        temp.as_file()
            .sync_all()
            .map_err(|e| Error::io("sync", &target, e))?;
        self.files.push((target, temp.into_temp_path()));
        Ok(())
    }

    /// Where `name` will be.
    pub(crate) fn target(&self, name: &str) -> PathBuf {
        self.folder.path.join(name)
    }

    /// Puts every file in place, replacing what is there, and syncs the folder.
    pub(crate) fn commit(self) -> Result<()> {
        let _placing = pending::placing();
        let Self { files, folder } = self;
        let mut placed = Placed::default();
        // One rename is atomic by itself and needs no way back.
        let backups = files.len() > 1;
        for (target, temp) in files {
            placed.put(target, temp, backups)?;
        }
        sync_folder(&folder.path)?;
        placed.keep();
        folder.keep();
        Ok(())
    }
}

/// Files already renamed, with the way back: undone when dropped before [`keep`](Self::keep).
#[derive(Default)]
struct Placed {
    done: Vec<(PathBuf, Option<TempPath>)>,
}

impl Placed {
    fn put(&mut self, target: PathBuf, temp: TempPath, backup: bool) -> Result<()> {
        let old = if backup && target.is_file() {
            Some(save(&target)?)
        } else {
            None
        };
        temp.persist(&target)
            .map_err(|e| Error::io("rename to", &target, e.error))?;
        self.done.push((target, old));
        Ok(())
    }

    fn keep(mut self) {
        self.done.clear();
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        for (target, old) in self.done.drain(..).rev() {
            // Already on an error path: what cannot be undone has nobody left to tell.
            let _ = match old {
                Some(old) => old.persist(&target).map_err(|e| e.error),
                None => std::fs::remove_file(&target),
            };
        }
    }
}

/// A second name for a file that is about to be replaced.
fn save(target: &Path) -> Result<TempPath> {
    let folder = parent(target);
    let name = target
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let temp = temp_in(folder, &name)?.into_temp_path();
    std::fs::remove_file(&temp)
        .and_then(|()| std::fs::hard_link(target, &temp))
        // Some file systems have no hard links.
        .or_else(|_| std::fs::copy(target, &temp).map(|_| ()))
        .map_err(|e| Error::io("back up", target, e))?;
    Ok(temp)
}

/// A folder that is removed again when dropped, with the ancestors made for it, unless it is kept or
/// something is in it.
#[derive(Debug)]
pub(crate) struct MadeFolder {
    path: PathBuf,
    made: Vec<PathBuf>,
}

impl MadeFolder {
    pub(crate) fn new(path: &Path) -> Result<Self> {
        let mut made: Vec<PathBuf> = path
            .ancestors()
            .filter(|p| !p.as_os_str().is_empty())
            .take_while(|p| !p.exists())
            .map(Path::to_owned)
            .collect();
        made.reverse();
        let folder = Self {
            path: path.to_owned(),
            made,
        };
        pending::folder(path, &folder.made).map_err(|e| Error::io("make folder", path, e))?;
        Ok(folder)
    }

    pub(crate) fn keep(mut self) {
        pending::keep(&self.made);
        self.made.clear();
    }
}

impl Drop for MadeFolder {
    fn drop(&mut self) {
        for folder in self.made.iter().rev() {
            // Fails when someone else has put something in it, which is right.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// The folder a path lies in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

fn temp_in(folder: &Path, name: &str) -> Result<NamedTempFile> {
    let prefix = format!(".{name}.");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    {
        // The default for temporaries is private to the user; the final file should obey the umask.
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    pending::file(|| builder.tempfile_in(folder), NamedTempFile::path)
        .map_err(|e| Error::io("make a temporary file in", folder, without_name(e)))
}

/// An error of making a temporary without the random name, which would only puzzle.
fn without_name(error: std::io::Error) -> std::io::Error {
    match error.kind() {
        // Of which there is nothing else to say.
        std::io::ErrorKind::Other => error,
        kind => kind.into(),
    }
}

/// Makes renames in `folder` durable.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        let path = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        };
        std::fs::File::open(path)
            .and_then(|f| f.sync_all())
            .map_err(|e| Error::io("sync", path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_that_takes_no_file_is_named_without_the_temporary() {
        let root = tempfile::tempdir().unwrap();
        let missing = root.path().join("missing");
        let error = temp_in(&missing, "x").unwrap_err();
        let said = peft_core::Error::from(error).to_string();
        let (folder, why) = said.split_once(": ").unwrap();
        assert_eq!(Path::new(folder), missing);
        assert_eq!(why, "cannot make a temporary file: entity not found");
    }

    #[test]
    fn a_failed_commit_restores_what_was_there() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("a"), "old a").unwrap();
        // A folder in the way of the third file makes its rename fail.
        std::fs::create_dir(root.path().join("c")).unwrap();
        let mut stage = Stage::new(root.path()).unwrap();
        stage.add("a", b"new a").unwrap();
        stage.add("b", b"new b").unwrap();
        stage.add("c", b"new c").unwrap();
        let error = stage.commit().unwrap_err().to_string();
        assert!(error.contains("/c"), "{error}");
        assert_eq!(names(root.path()), ["a", "c"]);
        assert_eq!(std::fs::read(root.path().join("a")).unwrap(), b"old a");
    }

    #[test]
    fn a_dropped_stage_leaves_no_folder() {
        let root = tempfile::tempdir().unwrap();
        let mut stage = Stage::new(&root.path().join("x/y")).unwrap();
        stage.add("a", b"new").unwrap();
        assert_eq!(names(&root.path().join("x/y")).len(), 1);
        drop(stage);
        assert_eq!(names(root.path()), [""; 0]);
    }

    #[test]
    fn a_commit_replaces_and_leaves_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("x");
        for text in ["one", "two"] {
            let mut stage = Stage::new(&folder).unwrap();
            stage.add("a", text.as_bytes()).unwrap();
            stage.add("b", text.as_bytes()).unwrap();
            stage.commit().unwrap();
            assert_eq!(names(&folder), ["a", "b"]);
            assert_eq!(std::fs::read_to_string(folder.join("a")).unwrap(), text);
        }
    }

    #[cfg(unix)]
    #[test]
    fn written_files_are_not_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let root = tempfile::tempdir().unwrap();
        let plain = root.path().join("plain");
        std::fs::write(&plain, "").unwrap();
        let mut stage = Stage::new(root.path()).unwrap();
        stage.add("staged", b"").unwrap();
        stage.commit().unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode();
        assert_eq!(mode(&root.path().join("staged")), mode(&plain));
    }
}
