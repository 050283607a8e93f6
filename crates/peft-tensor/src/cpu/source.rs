//! Values that an operation reads once, whole or as they were packed: unpacked piece by piece in the first-level cache.

use std::ops::Range;

use super::codes::Codes;
use super::half::Halves;

/// Values of the longest block of a form; the others divide it.
pub(super) const BLOCK: usize = 64;

/// Values of a piece, whole blocks.
pub(super) const PIECE: usize = 16 * BLOCK;

/// Where values are.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Whole(&'a [f32]),
    Halves(&'a Halves),
    Codes(&'a Codes),
}

impl<'a> Source<'a> {
    pub(super) fn len(self) -> usize {
        match self {
            Self::Whole(values) => values.len(),
            Self::Halves(halves) => halves.len(),
            Self::Codes(codes) => codes.len(),
        }
    }

    /// Some of the values, from the beginning of a block of any form on; `place` has room for those that are packed.
    pub(super) fn read<'b>(self, range: Range<usize>, place: &'b mut [f32]) -> &'b [f32]
    where
        'a: 'b,
    {
        debug_assert!(range.start.is_multiple_of(BLOCK));
        let place = &mut place[..range.len()];
        match self {
            Self::Whole(values) => return &values[range],
            Self::Halves(halves) => halves.read(range.start, place),
            Self::Codes(codes) => codes.read(range.start, place),
        }
        place
    }
}
