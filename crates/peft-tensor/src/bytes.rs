//! Read-only bytes that a frozen weight points into: a vector, or a window of a memory mapped file.
//!
//! A clone or a slice shares the storage, so a checkpoint is mapped once and every tensor of it is a
//! window. Mapped pages that a pass is done with can be given back, which keeps streaming jobs (merging a
//! checkpoint tensor by tensor) at a few tensors of resident memory.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use memmap2::Mmap;

/// Page sizes of the platforms we run on divide this, so a range aligned to it is whole pages.
const PAGE: usize = if cfg!(target_arch = "x86_64") {
    4 << 10
} else {
    64 << 10
};

/// Gives memory that the allocator holds but nobody uses back to the system: reading a tokenizer or a configuration leaves
/// tens of megabytes of it behind. Does nothing where the C library is not glibc.
pub fn release_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        #[allow(unsafe_code, reason = "a function of the C library")]
        // SAFETY: the declaration is glibc's (malloc.h); it takes any number and touches only free memory.
        unsafe {
            unsafe extern "C" {
                fn malloc_trim(pad: usize) -> std::ffi::c_int;
            }
            malloc_trim(0);
        }
    }
}

/// Read-only bytes, owned or memory mapped, cheap to clone and slice.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<Owner>,
    start: usize,
    len: usize,
}

enum Owner {
    Vec(Vec<u8>),
    /// Kept as floats so that the bytes stay aligned for an `f32` view.
    F32(Vec<f32>),
    Map(Mmap),
}

impl Owner {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Owner::Vec(v) => v,
            Owner::F32(v) => bytemuck::cast_slice(v),
            Owner::Map(m) => m,
        }
    }
}

impl Bytes {
    fn whole(owner: Owner) -> Self {
        let len = owner.as_bytes().len();
        Bytes {
            owner: Arc::new(owner),
            start: 0,
            len,
        }
    }

    /// Takes over a vector of bytes.
    pub fn from_vec(v: Vec<u8>) -> Self {
        Self::whole(Owner::Vec(v))
    }

    /// Takes over a vector of floats without a copy; the bytes are in the machine's order and aligned to 4.
    pub fn from_f32(v: Vec<f32>) -> Self {
        Self::whole(Owner::F32(v))
    }

    /// Maps a whole file for reading. An empty file gives empty bytes.
    ///
    /// The file must not be shortened or rewritten in place while the bytes live, as with every mapped
    /// file; writers in this project write a new file and rename it, which is safe.
    ///
    /// # Errors
    /// What the operating system says about the file or the mapping.
    pub fn map(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self::from_vec(Vec::new()));
        }
        // SAFETY: the mapping is read-only and is only ever handed out as `&[u8]` whose lifetime is tied to
        // the map; that nobody truncates the file meanwhile is the documented duty of the caller.
        #[allow(unsafe_code, reason = "mapping a file has no safe interface")]
        let map = unsafe { Mmap::map(file)? };
        Ok(Self::whole(Owner::Map(map)))
    }

    /// Whether they are a window of a mapped file, whose pages the system can take back.
    pub fn is_mapped(&self) -> bool {
        matches!(&*self.owner, Owner::Map(_))
    }

    /// The bytes `range` of these bytes, sharing their storage; `None` where the range is not inside.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        Some(Bytes {
            owner: Arc::clone(&self.owner),
            start: self.start + range.start,
            len: range.end - range.start,
        })
    }

    /// Gives the resident pages that lie wholly inside this slice back to the operating system.
    ///
    /// The bytes stay readable: a later access reads them from the file again. Does nothing for owned bytes.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Owner::Map(map) = &*self.owner {
            let first = self.start.next_multiple_of(PAGE);
            let end = self.start + self.len;
            // The last page of the file is whole even when the file ends inside it.
            let last = if end == map.len() {
                end
            } else {
                end / PAGE * PAGE
            };
            if first < last {
                // SAFETY: the range lies in a read-only mapping of a file, for which DONTNEED only drops
                // the pages from memory; reading them again gives the file's bytes, so no `&[u8]` changes.
                #[allow(unsafe_code, reason = "madvise(DONTNEED) has no safe interface")]
                let _ = unsafe {
                    map.unchecked_advise_range(
                        memmap2::UncheckedAdvice::DontNeed,
                        first,
                        last - first,
                    )
                };
            }
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.owner.as_bytes()[self.start..self.start + self.len]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &*self.owner {
            Owner::Vec(_) => "owned",
            Owner::F32(_) => "owned f32",
            Owner::Map(_) => "mapped",
        };
        write!(f, "Bytes({kind}, {} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn temp_file(content: &[u8]) -> (std::path::PathBuf, File) {
        let unique = content.len() as u64 + std::process::id() as u64 * 1_000_003;
        let path = std::env::temp_dir().join(format!("peft-bytes-{unique}"));
        File::create(&path)
            .and_then(|mut f| f.write_all(content))
            .unwrap();
        let file = File::open(&path).unwrap();
        (path, file)
    }

    #[test]
    fn slices_are_windows_and_refuse_to_leave_their_parent() {
        let all = Bytes::from_vec((0..10).collect());
        let mid = all.slice(2..8).unwrap();
        assert_eq!(&*mid, [2, 3, 4, 5, 6, 7]);
        assert_eq!(&*mid.slice(1..3).unwrap(), [3, 4]);
        assert_eq!(mid.slice(6..6).unwrap().len(), 0);
        // Byte 8 exists in the parent, but not in this window.
        assert!(mid.slice(0..7).is_none());
        #[allow(clippy::reversed_empty_ranges, reason = "the point of the test")]
        let reversed = 3..2;
        assert!(mid.slice(reversed).is_none());
        assert!(mid.slice(usize::MAX..usize::MAX).is_none());
    }

    #[test]
    fn floats_stay_aligned() {
        let b = Bytes::from_f32(vec![1.0, -2.5, 3.25]);
        assert_eq!(
            bytemuck::try_cast_slice::<u8, f32>(&b).unwrap(),
            [1.0, -2.5, 3.25]
        );
    }

    #[test]
    fn a_released_map_reads_the_same_again() {
        let content: Vec<u8> = (0..300_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let (path, file) = temp_file(&content);
        let map = Bytes::map(&file).unwrap();
        std::fs::remove_file(path).unwrap();
        let part = map.slice(1_000..299_000).unwrap();
        assert_eq!(&*map, &content[..]);
        part.release();
        map.release();
        assert_eq!(&*part, &content[1_000..299_000]);
    }

    #[test]
    fn an_empty_file_maps_to_nothing() {
        let (path, file) = temp_file(&[]);
        assert!(Bytes::map(&file).unwrap().is_empty());
        std::fs::remove_file(path).unwrap();
    }
}
