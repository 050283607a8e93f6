//! Where the units of a packed side lie.

use std::ops::Range;

use super::lanes::{ROWS, WIDTH};
use super::tiles::{SQUARE, TILE};

/// Units of a piece where threads pack along the inner dimension.
const PIECE: usize = 96;

/// Units of the inner dimension that are multiplied at a time, so that a strip of the right side stays in the first-level
/// cache; two of them have room for 1536 values and a rank of 64.
pub(super) const BLOCK: usize = 400;

/// As [`BLOCK`] for tiles of rounded values, in whole steps, and for those of several parts, whose strips stay in the second-level
/// cache.
const STEPS: usize = 10;
const STEPS_OF_PARTS: usize = 24;

/// Where the strips of a side lie.
pub(super) struct Side {
    /// Rows or columns without the padding.
    pub(super) outside: usize,
    /// In a strip.
    pub(super) take: usize,
    pub(super) strips: usize,
    /// Units along the inner dimension.
    pub(super) units: usize,
    /// Values at its end that come from a product of low rank, after whole units.
    pub(super) low: usize,
    /// Units that are multiplied before the next strip comes (the last time fewer).
    pub(super) block: usize,
    /// Units of a piece: what stands together first by strips, then by parts, then by steps.
    pub(super) piece: usize,
    /// Parts that values are sums of.
    pub(super) parts: usize,
}

impl Side {
    fn new(outside: usize, take: usize, inside: usize, low: usize, piece: usize) -> Self {
        let units = inside.div_ceil(2) + low.div_ceil(2);
        let blocks = units.div_ceil(BLOCK).max(1);
        let block = units.div_ceil(blocks);
        // Whole pieces.
        let whole = if piece < units { piece } else { 1 };
        Self {
            outside,
            take,
            strips: outside.div_ceil(take),
            units,
            low,
            block: block.next_multiple_of(whole).max(1),
            piece: piece.min(units).max(1),
            parts: 1,
        }
    }

    /// `m` rows of `inside` values and `low` more.
    pub(super) fn rows(m: usize, inside: usize, low: usize) -> Self {
        Self::new(m, ROWS, inside, low, usize::MAX)
    }

    /// `n` columns that are rows of the stored weight.
    pub(super) fn weight_rows(n: usize, inside: usize, low: usize) -> Self {
        Self::new(n, 2 * WIDTH, inside, low, usize::MAX)
    }

    /// `n` columns that are columns of the stored weight.
    pub(super) fn weight_columns(n: usize, inside: usize, low: usize) -> Self {
        Self::new(n, 2 * WIDTH, inside, low, PIECE)
    }

    /// `n` columns for products of tiles, in whole steps along the inner dimension; packed in pieces where these are columns of
    /// the stored weight. Their values are sums of `parts`, those of one of the sides of `all`.
    pub(super) fn tiles(n: usize, inside: usize, pieces: bool, all: usize, parts: usize) -> Self {
        let steps = inside.div_ceil(2 * TILE);
        let most = if all == 1 { STEPS } else { STEPS_OF_PARTS };
        let block = steps.div_ceil(steps.div_ceil(most).max(1)).max(1) * TILE;
        let units = steps * TILE;
        Self {
            outside: n,
            take: SQUARE,
            strips: n.div_ceil(SQUARE),
            units,
            low: 0,
            block,
            piece: if pieces { block } else { units.max(1) },
            parts,
        }
    }

    /// A side of a product that is not shared among threads.
    pub(super) fn dense(outside: usize, take: usize, inside: usize) -> Self {
        Self::new(outside, take, inside, 0, usize::MAX)
    }

    /// Units that do not come from a product of low rank.
    pub(super) fn own(&self) -> usize {
        self.units - self.low.div_ceil(2)
    }

    /// Units of all panels.
    pub(super) fn len(&self) -> usize {
        self.strips * self.parts * self.take * self.units
    }

    /// The blocks, as ranges of units.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        cuts(0..self.units, self.block)
    }

    /// Where a strip's range begins that lies in one piece, from there to its next part and to the next strip's.
    #[inline(always)]
    pub(super) fn place(&self, strip: usize, range: &Range<usize>) -> [usize; 3] {
        let Self { take, units, .. } = *self;
        let begin = match self.piece < units {
            true => range.start - range.start % self.piece,
            false => 0,
        };
        let part = self.piece.min(units - begin) * take;
        let whole = begin * take * self.parts * self.strips;
        let first = whole + strip * self.parts * part + (range.start - begin) * take;
        [first, part, self.parts * part]
    }

    /// The pieces of a block.
    #[inline(always)]
    pub(super) fn pieces(
        &self,
        block: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        // A block is in one piece, or begins where a piece does.
        cuts(block.clone(), self.piece)
    }
}

/// Ranges of `length`, the last perhaps shorter.
#[inline(always)]
pub(super) fn cuts(whole: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
    let end = whole.end;
    whole
        .step_by(length)
        .map(move |first| first..(first + length).min(end))
}

/// A packed side.
pub(super) struct Panels<'a> {
    pub(super) side: &'a Side,
    units: &'a [u32],
}

impl<'a> Panels<'a> {
    pub(super) fn new(side: &'a Side, units: &'a [u32]) -> Self {
        Self { side, units }
    }

    /// One strip, the first part of it, over a range of the inner dimension that lies in one piece.
    #[inline(always)]
    pub(super) fn strip(&self, strip: usize, range: &Range<usize>) -> &'a [u32] {
        self.units(self.side.place(strip, range)[0], range)
    }

    /// The units of a range from where it begins.
    #[inline(always)]
    pub(super) fn units(&self, at: usize, range: &Range<usize>) -> &'a [u32] {
        &self.units[at..][..range.len() * self.side.take]
    }
}
