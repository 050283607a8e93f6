//! Places for tensors inside few large mappings: a place that is free again joins its free neighbours and serves any
//! size, so a step neither maps nor unmaps, and huge pages hold many tensors.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use memmap2::{MmapMut, MmapRaw};

/// Values of a mapping; what no place was in yet takes no memory.
const CHUNK: usize = 64 << 20;

/// Values that every place begins at a multiple of: a cache line.
const STEP: usize = 16;

/// Values of a huge page: what becomes resident, and is given back, at a time.
const PAGE: usize = (2 << 20) / size_of::<f32>();

/// A part of a mapping that its owner has to itself.
pub(super) struct Place {
    map: Arc<MmapRaw>,
    /// In values.
    start: usize,
    len: usize,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.start + self.len)
    }
}

impl Place {
    pub(super) fn values(&self) -> &[f32] {
        let at = self.map.as_ptr().cast::<f32>();
        // SAFETY: `Arena::take` made the range inside the mapping, which `map` keeps; no other place has a value of it
        // until this one is given back, by value. Mappings begin at pages and are zeros: any bytes are floats.
        #[allow(unsafe_code, reason = "a slice of a mapping that several places share")]
        unsafe {
            std::slice::from_raw_parts(at.add(self.start), self.len)
        }
    }

    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        let at = self.map.as_mut_ptr().cast::<f32>();
        // SAFETY: as above, and `self` is borrowed alone.
        #[allow(unsafe_code, reason = "a slice of a mapping that several places share")]
        unsafe {
            std::slice::from_raw_parts_mut(at.add(self.start), self.len)
        }
    }
}

/// A mapping.
struct Chunk {
    map: Arc<MmapRaw>,
    /// What is free of it: lengths by where they begin, no two of them adjacent.
    free: BTreeMap<usize, usize>,
    /// Which pages a place has been in since they were mapped or given back.
    resident: Vec<bool>,
}

impl Chunk {
    fn len(&self) -> usize {
        self.map.len() / size_of::<f32>()
    }

    /// Pages that are resident.
    fn pages(&self) -> usize {
        self.resident.iter().filter(|page| **page).count()
    }

    fn is_idle(&self) -> bool {
        self.free.get(&0) == Some(&self.len())
    }

    /// The first free range that is long enough, so that low addresses stay full, and how many pages it makes resident.
    fn take(&mut self, len: usize) -> Option<(Place, usize)> {
        let (&start, &free) = self.free.iter().find(|(_, free)| **free >= len)?;
        self.free.remove(&start);
        if free > len {
            self.free.insert(start + len, free - len);
        }
        let mut new = 0;
        for page in &mut self.resident[start / PAGE..(start + len).div_ceil(PAGE)] {
            new += usize::from(!std::mem::replace(page, true));
        }
        let map = self.map.clone();
        Some((Place { map, start, len }, new))
    }

    /// Gives up to `most` pages that nothing is in back to the system, from the end: how many it were.
    fn release(&mut self, most: usize) -> usize {
        let mut released = 0;
        for (start, len) in self.free.iter().rev() {
            for page in (start.div_ceil(PAGE)..(start + len) / PAGE).rev() {
                if released == most {
                    return released;
                }
                if self.resident[page] && give_back(&self.map, page) {
                    self.resident[page] = false;
                    released += 1;
                }
            }
        }
        released
    }

    fn give(&mut self, mut start: usize, mut len: usize) {
        if let Some(next) = self.free.remove(&(start + len)) {
            len += next;
        }
        if let Some((&before, &free)) = self.free.range(..start).next_back()
            && before + free == start
        {
            (start, len) = (before, free + len);
        }
        self.free.insert(start, len);
    }
}

/// Gives a page to the system that no place has a part of; false where it stays.
#[cfg(target_os = "linux")]
fn give_back(map: &MmapRaw, page: usize) -> bool {
    let bytes = PAGE * size_of::<f32>();
    let what = memmap2::UncheckedAdvice::DontNeed;
    // SAFETY: nobody has a reference into a free range; its content becomes zeros, and any will do. The mapping has
    // whole pages, and a kernel that refuses leaves this one where it is.
    #[allow(unsafe_code, reason = "madvise(DONTNEED) has no safe interface")]
    unsafe { map.unchecked_advise_range(what, page * bytes, bytes) }.is_ok()
}

/// Elsewhere such advice frees nothing at once, or there is none: only whole mappings go back.
#[cfg(not(target_os = "linux"))]
fn give_back(_map: &MmapRaw, _page: usize) -> bool {
    false
}

/// The mappings.
pub(super) struct Arena {
    chunks: Vec<Chunk>,
    /// Pages that are.
    resident: usize,
}

impl Arena {
    pub(super) const fn new() -> Self {
        Self {
            chunks: Vec::new(),
            resident: 0,
        }
    }

    /// Values in pages that are resident, in use or not.
    #[cfg(test)]
    fn resident(&self) -> usize {
        self.resident * PAGE
    }

    /// Values a place for `len` of them has.
    pub(super) const fn rounded(len: usize) -> usize {
        len.next_multiple_of(STEP)
    }

    /// A place of any content where there is one, and whether more is resident for it.
    pub(super) fn take(&mut self, len: usize) -> Option<(Place, bool)> {
        let len = Self::rounded(len);
        let (place, new) = self.chunks.iter_mut().find_map(|chunk| chunk.take(len))?;
        self.resident += new;
        Some((place, new > 0))
    }

    /// Maps room for places of up to `len` values.
    ///
    /// # Errors
    /// Where the system refuses.
    pub(super) fn grow(&mut self, len: usize) -> std::io::Result<()> {
        let pages = Self::rounded(len).div_ceil(PAGE).max(CHUNK / PAGE);
        let bytes = pages * PAGE * size_of::<f32>();
        let map = MmapMut::map_anon(bytes)?;
        #[cfg(target_os = "linux")]
        // One fault instead of hundreds, and fewer address translations. A kernel without huge pages says no.
        let _ = map.advise(memmap2::Advice::HugePage);
        self.chunks.push(Chunk {
            map: Arc::new(map.into()),
            free: BTreeMap::from([(0, pages * PAGE)]),
            resident: vec![false; pages],
        });
        Ok(())
    }

    /// Takes a place back.
    pub(super) fn give(&mut self, place: Place) {
        let of = |chunk: &&mut Chunk| Arc::ptr_eq(&chunk.map, &place.map);
        if let Some(chunk) = self.chunks.iter_mut().find(of) {
            chunk.give(place.start, place.len);
        }
    }

    /// Gives pages of together at most `values` that nothing is in back to the system: what is left of a page.
    pub(super) fn release(&mut self, values: usize) -> usize {
        let pages = values / PAGE;
        if pages > 0 {
            self.shrink_to(self.resident.saturating_sub(pages) * PAGE);
        }
        values % PAGE
    }

    /// Gives pages that nothing is in back to the system until at most `most` values are resident, as far as that goes.
    pub(super) fn shrink_to(&mut self, most: usize) {
        for chunk in self.chunks.iter_mut().rev() {
            let over = self.resident.saturating_sub(most / PAGE);
            self.resident -= chunk.release(over);
        }
        self.unmap_idle(most);
    }

    /// Unmaps idle mappings: those without a resident page, and others, which a system did not take page by page, as long as
    /// more than `most` values are resident.
    fn unmap_idle(&mut self, most: usize) {
        let resident = &mut self.resident;
        self.chunks.retain(|chunk| {
            let pages = chunk.pages();
            if !chunk.is_idle() || pages > resident.saturating_sub(most / PAGE) {
                return true;
            }
            *resident -= pages;
            false
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(arena: &Arena) -> Vec<Vec<(usize, usize)>> {
        let ranges = |c: &Chunk| c.free.iter().map(|(s, l)| (*s, *l)).collect();
        arena.chunks.iter().map(ranges).collect()
    }

    #[test]
    fn free_neighbours_join_and_the_lowest_is_taken() {
        let mut arena = Arena::new();
        assert!(arena.take(100).is_none());
        arena.grow(100).unwrap();
        let all = CHUNK;
        let places: Vec<_> = [100, 16, 33, 200]
            .into_iter()
            .map(|n| arena.take(n).unwrap().0)
            .collect();
        let starts: Vec<_> = places.iter().map(|p| (p.start, p.len)).collect();
        assert_eq!(starts, [(0, 112), (112, 16), (128, 48), (176, 208)]);
        assert_eq!(free(&arena), [[(384, all - 384)]]);
        let [a, b, c, d] = places.try_into().unwrap();
        arena.give(a);
        arena.give(c);
        assert_eq!(free(&arena), [[(0, 112), (128, 48), (384, all - 384)]]);
        // Too long for the first hole, fits the second.
        let (e, _) = arena.take(113).unwrap();
        assert_eq!(e.start, 384);
        arena.give(e);
        arena.give(b);
        assert_eq!(free(&arena), [[(0, 176), (384, all - 384)]]);
        arena.give(d);
        assert_eq!(free(&arena), [[(0, all)]]);
        arena.shrink_to(0);
        assert!(arena.chunks.is_empty());
    }

    #[test]
    fn places_keep_apart_whatever_the_order() {
        let mut arena = Arena::new();
        arena.grow(1).unwrap();
        let mut held: Vec<(Place, f32)> = Vec::new();
        // A congruential generator: sizes and victims that follow no pattern.
        let mut state = 12345_u32;
        let mut next = |below: usize| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as usize % below
        };
        for round in 0..4000 {
            if held.len() > 40 || (held.len() > 5 && next(3) == 0) {
                let (place, mark) = held.swap_remove(next(held.len()));
                assert!(place.values().iter().all(|v| *v == mark));
                arena.give(place);
            }
            let (mut place, _) = arena.take(1 + next(500_000)).unwrap();
            let mark = round as f32;
            place.values_mut().fill(mark);
            held.push((place, mark));
            if round % 100 == 99 {
                arena.shrink_to(0);
            }
        }
        for (place, mark) in held {
            assert!(place.values().iter().all(|v| *v == mark));
            arena.give(place);
        }
        assert!(arena.chunks.iter().all(Chunk::is_idle));
    }

    #[test]
    fn a_place_longer_than_a_mapping_gets_one_of_its_own() {
        let mut arena = Arena::new();
        let len = CHUNK + 5;
        arena.grow(len).unwrap();
        let (place, _) = arena.take(len).unwrap();
        assert_eq!(place.values().len(), Arena::rounded(len));
        arena.give(place);
    }

    /// What is left to do where pages are not taken one by one.
    #[test]
    fn idle_mappings_go_whole_and_are_counted() {
        let mut arena = Arena::new();
        arena.grow(1).unwrap();
        let (a, _) = arena.take(CHUNK - STEP).unwrap();
        arena.grow(1).unwrap();
        let (b, _) = arena.take(3 * PAGE).unwrap();
        let pages = CHUNK / PAGE;
        assert_eq!(arena.resident(), CHUNK + 3 * PAGE);
        arena.unmap_idle(0);
        assert_eq!(arena.chunks.len(), 2, "something is in both");
        arena.give(a);
        // A mapping is more than what is to go.
        arena.unmap_idle(4 * PAGE);
        assert_eq!(arena.chunks.len(), 2);
        assert_eq!(arena.resident(), CHUNK + 3 * PAGE);
        arena.unmap_idle(3 * PAGE);
        assert_eq!(arena.chunks.len(), 1);
        assert_eq!(arena.resident(), 3 * PAGE);
        assert!(pages > 3);
        arena.give(b);
        arena.unmap_idle(0);
        assert_eq!(arena.resident(), 0);
        assert!(arena.chunks.is_empty());
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_without_a_place_are_given_back_from_the_end() {
        let mut arena = Arena::new();
        arena.grow(1).unwrap();
        let mut take = |n: usize| arena.take(n).unwrap();
        let (mut a, new) = take(PAGE / 2);
        assert!(new);
        let (b, new) = take(PAGE / 2);
        assert!(!new);
        let (c, _) = take(3 * PAGE);
        let (mut d, _) = take(PAGE + STEP);
        assert_eq!(arena.resident(), 6 * PAGE);
        a.values_mut().fill(1.0);
        d.values_mut().fill(4.0);
        arena.give(b);
        arena.shrink_to(0);
        // Half of the first page is free: it stays.
        assert_eq!(arena.resident(), 6 * PAGE);
        arena.give(c);
        arena.shrink_to(5 * PAGE);
        assert_eq!(
            arena.chunks[0].resident[..6],
            [true, true, true, false, true, true]
        );
        assert_eq!(arena.release(PAGE - 1), PAGE - 1);
        assert_eq!(arena.resident(), 5 * PAGE);
        assert_eq!(arena.release(PAGE + 7), 7);
        assert_eq!(arena.resident(), 4 * PAGE);
        arena.shrink_to(0);
        assert_eq!(arena.resident(), 3 * PAGE);
        assert!(a.values().iter().all(|v| *v == 1.0) && d.values().iter().all(|v| *v == 4.0));
        assert!(arena.take(3 * PAGE).unwrap().1);
    }
}
