//! What this process is writing just now, so that nothing of it stays when somebody ends the process.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Temporaries and folders made for them, in the order they were made; some are in place or gone by now.
struct Pending {
    files: Vec<PathBuf>,
    folders: Vec<PathBuf>,
}

static PENDING: Mutex<Pending> = Mutex::new(Pending {
    files: Vec::new(),
    folders: Vec::new(),
});

/// Held while temporaries get their final names.
static PLACING: Mutex<()> = Mutex::new(());

/// A panic elsewhere leaves nothing half-done in what these locks guard.
fn lock<T>(mutex: &'static Mutex<T>) -> MutexGuard<'static, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a temporary, which [`abandon_writes`] knows from then on.
pub(crate) fn file<T>(
    make: impl FnOnce() -> std::io::Result<T>,
    path: impl Fn(&T) -> &Path,
) -> std::io::Result<T> {
    let mut pending = lock(&PENDING);
    let made = make()?;
    pending.files.retain(|old| old.exists());
    pending.files.push(path(&made).to_owned());
    Ok(made)
}

/// Makes a folder and those above it, `made` of which were not there.
pub(crate) fn folder(path: &Path, made: &[PathBuf]) -> std::io::Result<()> {
    let mut pending = lock(&PENDING);
    pending.folders.retain(|old| old.exists());
    pending.folders.extend_from_slice(made);
    std::fs::create_dir_all(path)
}

/// These folders are there to stay.
pub(crate) fn keep(made: &[PathBuf]) {
    lock(&PENDING).folders.retain(|old| !made.contains(old));
}

/// While it is held, [`abandon_writes`] waits: several files are about to get their names.
pub(crate) fn placing() -> MutexGuard<'static, ()> {
    lock(&PLACING)
}

/// For a process that is told to end: waits until what is being put in place is, then removes all temporaries of this
/// process and the folders that were made for them. Whoever writes after that waits for ever, so the process has to end
/// next.
pub fn abandon_writes() {
    let placing = lock(&PLACING);
    let pending = lock(&PENDING);
    // One that is in place by now has another name; a folder with something in it stays.
    for file in &pending.files {
        let _ = std::fs::remove_file(file);
    }
    for folder in pending.folders.iter().rev() {
        let _ = std::fs::remove_dir(folder);
    }
    std::mem::forget((placing, pending));
}
