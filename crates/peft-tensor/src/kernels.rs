//! Where backends keep what they compile between two processes.

/// A store of bytes by name. A crate that may write files submits one; backends find it by [`KernelStore::linked`].
#[derive(Clone, Copy, Debug)]
pub struct KernelStore {
    /// What was saved under a name; None if nothing was, or it cannot be read.
    pub load: fn(name: &str) -> Option<Vec<u8>>,
    /// Saves bytes in place of those there; whether that worked.
    pub save: fn(name: &str, bytes: &[u8]) -> bool,
}

inventory::collect!(KernelStore);

impl KernelStore {
    /// The store that is linked in, if one is.
    pub fn linked() -> Option<Self> {
        inventory::iter::<Self>.into_iter().next().copied()
    }
}
