//! Values that an operation reads once, whole or as they were packed: unpacked piece by piece in the first-level cache.

use std::ops::Range;

use super::codes::Codes;
use super::half::Halves;

/// Values of a piece, whole blocks of all forms.
pub(super) const PIECE: usize = 1024;

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

    /// At most a piece of the values, from a multiple of its length on; `place` is for those that are packed.
    pub(super) fn read<'b>(self, range: Range<usize>, place: &'b mut [f32; PIECE]) -> &'b [f32]
    where
        'a: 'b,
    {
        debug_assert!(range.start.is_multiple_of(PIECE) && range.len() <= PIECE);
        let place = &mut place[..range.len()];
        match self {
            Self::Whole(values) => return &values[range],
            Self::Halves(halves) => halves.read(range.start, place),
            Self::Codes(codes) => codes.read(range.start, place),
        }
        place
    }
}
