//! Memory that is used again: a training step asks for the same sizes as the step before, and mapping, clearing and
//! unmapping them anew would cost more than the elementwise arithmetic does.
//!
//! Tensors of middle size share the mappings of an [`Arena`], large ones have mappings of their own. What is free never
//! makes the process larger than its busiest moment was: before memory is asked of the system, idle blocks and holes are
//! given back until busy and idle together fit under the largest amount that was ever busy at once.
//!
//! Neither is the allocator's: glibc raises the size from which it maps up to 32 MB once such a block is freed, and from
//! then on holes between blocks stay resident.

use std::collections::BTreeMap;
use std::mem::take;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use memmap2::MmapMut;

use super::arena::{Arena, Place};

/// Values from which on a block is mapped and kept; the allocator is good at smaller ones.
const SMALLEST: usize = 4096;

/// Values from which on a block has a mapping of its own: a hole of such a size in an arena would not be filled soon.
const LARGE: usize = 16 << 20;

/// Values of a tensor, in memory that goes back to the pool.
#[derive(Default)]
pub(super) struct Floats {
    /// As long as the pool made it, so that taking it again initialises nothing.
    all: Block,
    len: usize,
}

/// Where the values are.
enum Block {
    Heap(Vec<f32>),
    Shared(Place),
    Own(MmapMut),
}

impl Default for Block {
    fn default() -> Self {
        Self::Heap(Vec::new())
    }
}

impl Block {
    /// `len` zeros in a mapping of their own.
    fn own(len: usize) -> Self {
        match MmapMut::map_anon(len * size_of::<f32>()) {
            Ok(map) => {
                #[cfg(target_os = "linux")]
                // One fault instead of hundreds, and fewer address translations. A kernel without huge pages says no.
                let _ = map.advise(memmap2::Advice::HugePage);
                Self::Own(map)
            }
            // A limit on mappings; the allocator has its own way to say that there is no memory.
            Err(_) => Self::Heap(vec![0.0; len]),
        }
    }

    fn values(&self) -> &[f32] {
        match self {
            Self::Heap(values) => values,
            Self::Shared(place) => place.values(),
            Self::Own(map) => bytemuck::cast_slice(map),
        }
    }

    fn values_mut(&mut self) -> &mut [f32] {
        match self {
            Self::Heap(values) => values,
            Self::Shared(place) => place.values_mut(),
            Self::Own(map) => bytemuck::cast_slice_mut(map),
        }
    }
}

/// Blocks nobody uses.
struct Idle {
    arena: Arena,
    /// Large ones by their length.
    blocks: BTreeMap<usize, Vec<Block>>,
    /// Values in `blocks`, in use, in use in the arena, and the most that were in use.
    idle: usize,
    busy: usize,
    shared: usize,
    peak: usize,
    /// Values that room was asked for and that are less than a page of the arena.
    owed: usize,
}

static POOL: Mutex<Idle> = Mutex::new(Idle {
    arena: Arena::new(),
    blocks: BTreeMap::new(),
    idle: 0,
    busy: 0,
    shared: 0,
    peak: 0,
    owed: 0,
});

impl Idle {
    /// A block of `size` values, or the smallest large one that is at most an eighth larger.
    fn find(&mut self, size: usize) -> Option<Block> {
        if size < LARGE {
            return self.share(size);
        }
        let (&len, blocks) = self.blocks.range_mut(size..=size + size / 8).next()?;
        let block = blocks.pop()?;
        if blocks.is_empty() {
            self.blocks.remove(&len);
        }
        self.idle -= len;
        Some(block)
    }

    /// Makes room for `size` values where nothing was found, and a block if that is the arena's; what is returned beside
    /// it goes back to the system.
    fn make(&mut self, size: usize) -> (Option<Block>, Vec<Block>) {
        let given_back = self.shrink(size);
        if size >= LARGE {
            self.shrink_arena(size, size);
            return (None, given_back);
        }
        let grown = self.arena.grow(size);
        let found = grown.ok().and_then(|()| self.share(size));
        (found, given_back)
    }

    /// A place in the arena, for which holes elsewhere in it are given back: see above.
    fn share(&mut self, size: usize) -> Option<Block> {
        let (place, more) = self.arena.take(size)?;
        if more {
            self.shrink_arena(size, 0);
        }
        self.shared += place.values().len();
        Some(Block::Shared(place))
    }

    /// Gives holes of the arena back that, with `size` more values in use and `large` of them beside it, would raise the
    /// most there ever was.
    fn shrink_arena(&mut self, size: usize, large: usize) {
        let beside = self.busy - self.shared + self.idle + large;
        let most = self.peak.max(self.busy + size);
        self.arena.shrink_to(most.saturating_sub(beside));
    }

    /// Takes blocks out, largest first, until `size` more values would not raise the most there ever was.
    fn shrink(&mut self, size: usize) -> Vec<Block> {
        let most = self.peak.saturating_sub(self.busy + size);
        self.shrink_to(most)
    }

    /// Takes blocks out, largest first, until at most `most` values are idle.
    fn shrink_to(&mut self, most: usize) -> Vec<Block> {
        let mut out = Vec::new();
        while self.idle > most {
            let Some((len, mut blocks)) = self.blocks.pop_last() else {
                break;
            };
            out.extend(blocks.pop());
            self.idle -= len;
            if !blocks.is_empty() {
                self.blocks.insert(len, blocks);
            }
        }
        out
    }

    fn count(&mut self, len: usize) {
        self.busy += len;
        self.peak = self.peak.max(self.busy);
    }
}

fn pool<R>(f: impl FnOnce(&mut Idle) -> R) -> R {
    f(&mut POOL.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Gives so many bytes of holes and as many of idle blocks back to the system, or all there are.
pub(super) fn make_room(bytes: usize) {
    let values = bytes / size_of::<f32>();
    let _given_back = pool(|p| {
        // Gradients come one by one, most of them smaller than a page.
        p.owed = p.arena.release(p.owed + values);
        p.shrink_to(p.idle.saturating_sub(values))
    });
}

/// Values that a block for `len` of them has. Large ones come in steps of a sixteenth, so that batches of nearly the same
/// length share blocks.
pub(super) fn rounded(len: usize) -> usize {
    if len < SMALLEST {
        return len;
    }
    if len < LARGE {
        return Arena::rounded(len);
    }
    let step = (len.next_power_of_two() / 32).max(1);
    len.next_multiple_of(step)
}

impl Floats {
    /// `len` values of any content, for an output that is written in full.
    pub(super) fn dirty(len: usize) -> Self {
        if len < SMALLEST {
            return Self::from(vec![0.0; len]);
        }
        let size = rounded(len);
        // What is given back is unmapped outside of the lock.
        let (found, _given_back) = pool(|p| {
            let (found, given_back) = match p.find(size) {
                Some(found) => (Some(found), Vec::new()),
                None => p.make(size),
            };
            let got = found.as_ref().map_or(size, |block| block.values().len());
            p.count(got);
            (found, given_back)
        });
        Self {
            all: found.unwrap_or_else(|| Block::own(size)),
            len,
        }
    }

    /// `len` zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let mut new = Self::dirty(len);
        new.fill(0.0);
        new
    }

    /// Puts `more` behind the values: in place where there is room, else in twice the room.
    pub(super) fn append(&mut self, more: &[f32]) {
        let len = self.len + more.len();
        if len > self.all.values().len() {
            let mut roomy = Self::dirty(2 * len);
            roomy[..self.len].copy_from_slice(self);
            roomy.len = self.len;
            *self = roomy;
        }
        self.all.values_mut()[self.len..len].copy_from_slice(more);
        self.len = len;
    }

    /// A copy.
    pub(super) fn copied(values: &[f32]) -> Self {
        let mut new = Self::dirty(values.len());
        new.copy_from_slice(values);
        new
    }
}

impl From<Vec<f32>> for Floats {
    fn from(all: Vec<f32>) -> Self {
        let len = all.len();
        if len >= SMALLEST {
            pool(|p| p.count(len));
        }
        Self {
            all: Block::Heap(all),
            len,
        }
    }
}

impl Drop for Floats {
    fn drop(&mut self) {
        let mut all = take(&mut self.all);
        let len = all.values().len();
        if len < SMALLEST {
            return;
        }
        if matches!(all, Block::Heap(_)) {
            // Brought along by somebody: it goes back to the allocator.
            return pool(|p| p.busy -= len);
        }
        if cfg!(any(test, feature = "reference")) {
            // Whoever reads what they did not write shall see it.
            all.values_mut().fill(f32::NAN);
        }
        pool(|p| {
            p.busy -= len;
            match all {
                Block::Shared(place) => {
                    p.shared -= len;
                    p.arena.give(place);
                }
                all => {
                    p.idle += len;
                    p.blocks.entry(len).or_default().push(all);
                }
            }
        });
    }
}

impl Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.all.values()[..self.len]
    }
}

impl DerefMut for Floats {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.all.values_mut()[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_comes_back_and_zeros_are_zeros() {
        // A size no other test of this process uses, and large: those of the arena come back to whoever is first.
        let n = LARGE + 1_234_577;
        let mut a = Floats::dirty(n);
        a.fill(3.0);
        let at = a.as_ptr();
        drop(a);
        let b = Floats::zeros(n - 1000);
        assert_eq!((b.as_ptr(), b.len()), (at, n - 1000));
        assert!(b.iter().all(|v| *v == 0.0));
    }

    #[test]
    fn values_grow_in_place() {
        let mut all = Floats::copied(&[1.0; 5000]);
        all.append(&[2.0; 200]);
        let at = all.as_ptr();
        all.append(&[3.0; 4990]);
        assert_eq!((at, all.len()), (all.as_ptr(), 10_190));
        let places = [4999, 5000, 5199, 5200].map(|i: usize| all[i]);
        assert_eq!(places, [1.0, 2.0, 2.0, 3.0]);
        let mut few = Floats::default();
        few.append(&[4.0]);
        few.append(&[5.0, 6.0]);
        assert_eq!(few[..], [4.0, 5.0, 6.0]);
    }

    #[test]
    fn idle_memory_is_given_back_before_more_is_asked_for() {
        let hundred = 100 << 20;
        let mut p = Idle {
            arena: Arena::new(),
            blocks: BTreeMap::new(),
            idle: 3 * hundred,
            busy: 5 * hundred,
            shared: 0,
            peak: 10 * hundred,
            owed: 0,
        };
        // Mapped, never touched.
        p.blocks
            .insert(hundred, (0..3).map(|_| Block::own(hundred)).collect());
        assert_eq!(p.shrink(2 * hundred).len(), 0);
        assert_eq!(p.shrink(7 * hundred / 2).len(), 2);
        assert_eq!(p.idle, hundred);
        assert_eq!(p.shrink_to(hundred).len(), 0);
        assert!(p.find(80 << 20).is_none() && p.find(90 << 20).is_some());
        assert_eq!(p.idle, 0);
    }
}
