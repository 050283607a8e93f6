//! A file for what does not fit into memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::{Error, Result, create_folder};

/// A file without a name: it is gone when dropped, and when the process ends, however it ends. Parts of it are read and
/// written by position, also from several threads; nothing of it counts as the process's memory.
#[derive(Debug)]
pub struct Scratch {
    folder: PathBuf,
    file: File,
    len: u64,
}

impl Scratch {
    /// An empty one on the disk of `folder`, which is made if need be.
    ///
    /// # Errors
    /// When folder or file cannot be made.
    pub fn create(folder: &Path) -> Result<Self> {
        create_folder(folder)?;
        let file = tempfile::tempfile_in(folder)
            .map_err(|e| Error::io("make a temporary file in", folder, e))?;
        Ok(Self {
            folder: folder.to_owned(),
            file,
            len: 0,
        })
    }

    /// Makes room for `bytes` zeros at the end: where they begin.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn extend(&mut self, bytes: u64) -> Result<u64> {
        let start = self.len;
        self.file
            .set_len(start + bytes)
            .map_err(|e| self.error("extend a temporary file in", e))?;
        self.len += bytes;
        Ok(start)
    }

    /// Forgets everything in it.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn clear(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .map_err(|e| self.error("empty a temporary file in", e))?;
        self.len = 0;
        Ok(())
    }

    /// Reads `bytes.len()` bytes from position `at`.
    ///
    /// # Errors
    /// When they are not all there.
    pub fn read_at(&self, at: u64, bytes: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, at, bytes).map_err(|e| self.error("read a temporary file in", e))
    }

    /// Writes bytes from position `at`.
    ///
    /// # Errors
    /// When the disk refuses, as when it is full.
    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        write_all_at(&self.file, at, bytes).map_err(|e| self.error("write a temporary file in", e))
    }

    fn error(&self, what: &'static str, error: std::io::Error) -> Error {
        Error::io(what, &self.folder, error)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, at: u64, bytes: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, at: u64, bytes: &[u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut at: u64, mut bytes: &mut [u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => (at, bytes) = (at + n as u64, &mut bytes[n..]),
        }
    }
    Ok(())
}

#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut at: u64, mut bytes: &[u8]) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, at)? {
            0 => return Err(std::io::ErrorKind::WriteZero.into()),
            n => (at, bytes) = (at + n as u64, &bytes[n..]),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_where_they_were_put_and_nothing_is_left() {
        let root = tempfile::tempdir().unwrap();
        let mut scratch = Scratch::create(&root.path().join("run")).unwrap();
        assert_eq!(scratch.extend(6).unwrap(), 0);
        assert_eq!(scratch.extend(4).unwrap(), 6);
        scratch.write_at(5, &[1, 2, 3]).unwrap();
        let mut bytes = [9; 10];
        scratch.read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 1, 2, 3, 0, 0]);
        let error = scratch.read_at(8, &mut bytes).unwrap_err().to_string();
        assert!(error.contains("run"), "{error}");
        scratch.clear().unwrap();
        assert_eq!(scratch.extend(2).unwrap(), 0);
        scratch.read_at(0, &mut bytes[..2]).unwrap();
        assert_eq!(bytes[..2], [0, 0]);
        assert_eq!(
            std::fs::read_dir(root.path().join("run")).unwrap().count(),
            0
        );
    }
}
