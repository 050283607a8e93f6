//! Products of tiles of bfloat16, for processors with AMX: sixteen times the rate of f32's, so that products of f32 are
//! made of them too.
//!
//! In single precision, a value is a sum of three of bfloat16 that has all its bits ([`parts`](super::parts)). A weight that
//! is stored in bfloat16 is one: the product is exact then, three times the work, and only sums are rounded, as they are in
//! any product of f32. Other weights are cut as well; of the nine products of parts the six are made that are not smaller
//! than what rounding the sum loses. The instructions take denormal numbers as zero, so a value below 2^-110 loses its
//! smaller parts: an error of at most 2^-126.
//!
//! Where all rows of `x` stay in a second-level cache, threads take columns of the result, for which they pack the weight as they
//! go. Else a slab of the weight is packed once for all of them, and threads take rows, which they pack themselves where they
//! do so once.

mod attend;
mod left;
mod out;
mod square;
mod task;

use std::ops::Range;

pub(super) use self::attend::{Backward, Forward};
use self::left::Left;
use self::out::Window;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(in crate::cpu) use self::square::Amx;
#[cfg(test)]
pub(super) use self::square::Plain;
pub(super) use self::square::{LINE, SQUARE, TILE, Tiles};
use self::task::{Columns, Lefts, PackRows, Piece, Right, Rights, by_columns, by_rows};
use super::columns::Region;
use super::lanes::Lanes;
use super::parts::ALL;
use super::side::Side;
use super::{Product, SLAB, columns, pack};
use crate::cpu::few::FEW;
use crate::cpu::matmul::View;
use crate::cpu::pool::Floats;
use crate::{FrozenWeight, Precision, WeightFormat};

/// Units of a left side that stays in a second-level cache of 2 MiB while columns go by, and beside it what goes by.
const WHOLE: usize = 224 * 1024;

/// As many units of the right side as are packed at a time there, about: rows of a weight.
const ROWS: usize = 64 * 1024;

/// The same where they are columns of a weight, [`WIDE`] strips of them, so that of each row as many bytes are read as it is
/// worth going there for. Not much less than all of the inner dimension: sums are stored and loaded in between.
const COLUMNS: usize = 256 * 1024;
const WIDE: usize = 12;

/// Least rows of a weight for which that is done, if it has more: what is added to a sum is to be more than reading it.
const LEAST: usize = 1024;

/// Parts of what is not rounded.
pub(super) fn parts(precision: Precision) -> usize {
    match precision {
        Precision::F32 => ALL,
        Precision::Bf16 => 1,
    }
}

/// Most rows that are multiplied with a weight sooner without tiles, where values of the left side have `parts`: by tiles one
/// row takes as long as a square's, else each takes its own time (measured with SmolLM2-135M's weights).
pub(super) fn few(w: &FrozenWeight, parts: usize) -> usize {
    match (parts, weight_parts(w, parts)) {
        (1, _) => SQUARE / 8,
        (_, 1) => SQUARE / 4,
        _ => FEW,
    }
}

/// Parts of a weight's values where those of the left side have `parts`.
fn weight_parts(w: &FrozenWeight, parts: usize) -> usize {
    match w.format() {
        WeightFormat::BF16 => 1,
        WeightFormat::F16 => parts.min(2),
        _ => parts,
    }
}

impl Product<'_> {
    /// `x [m, cols] Wt`: the weight's rows are columns of the result.
    pub(super) fn forward_by_tiles<L: Lanes, T: Tiles>(
        &self,
        (lanes, tiles): (L, T),
        parts: usize,
        out: &mut [f32],
        add: bool,
    ) {
        let (m, rows, cols, r) = (self.m, self.w.rows(), self.w.cols(), self.low.r);
        let whole = left::len(m, cols, parts) <= WHOLE;
        let step = match whole {
            true => rows,
            false => (SLAB / cols).max(1).next_multiple_of(SQUARE),
        };
        let of_weight = weight_parts(self.w, parts);
        let of_rows: &PackRows<'_> =
            &|strips, units, places| self.lefts(lanes, parts, strips, (0, cols), units, r, places);
        let mut places = Places::default();
        let all = 0..m.div_ceil(SQUARE);
        // Rows that would be packed for one slab after the other are packed for all of them.
        let shared = (whole || step < rows).then(|| of_rows(all, units(cols), &mut places));
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let low_side = Side::tiles(count, r, false, parts, parts);
            let mut low = Floats::dirty(low_side.len());
            let low: &mut [u32] = bytemuck::cast_slice_mut(&mut low);
            let other = &self.low.other[first * r..];
            pack::rows(lanes, &low_side, other, r, r, &[], low);
            let low = Right::new(&low_side, low);
            let low = (r > 0).then_some(&low);
            let out = Window::new(&mut out[first..], m, count, rows);
            if let (Some(left), true) = (&shared, whole) {
                let units = units(cols).end;
                let right = Columns {
                    units,
                    step: units,
                    strips: ROWS / (units * SQUARE * of_weight).max(1),
                    side: &|piece| Side::tiles(piece.columns.len(), cols, false, parts, of_weight),
                    pack: &|Piece { columns, .. }, side, units| {
                        pack::weight_rows(lanes, side, self.w, columns.start, &[], units);
                    },
                    region: &|piece| Region::of_rows(self.w, piece.columns.clone()),
                };
                by_columns(tiles, left, low, right, out, add);
                continue;
            }
            let side = Side::tiles(count, cols, false, parts, of_weight);
            let mut units = Floats::dirty(side.len());
            let units: &mut [u32] = bytemuck::cast_slice_mut(&mut units);
            pack::weight_rows(lanes, &side, self.w, first, &[], units);
            let rights = Rights {
                own: &Right::new(&side, units),
                low,
            };
            by_rows(tiles, parts, (shared.as_ref(), of_rows), rights, out, add);
        }
    }

    /// `x [m, rows] W`, by slabs of W's rows: parts of the sums.
    pub(super) fn backward_by_tiles<L: Lanes, T: Tiles>(
        &self,
        (lanes, tiles): (L, T),
        parts: usize,
        out: &mut [f32],
        add: bool,
    ) {
        let (m, rows, cols) = (self.m, self.w.rows(), self.w.cols());
        // As many rows of the weight as leave the left side in the cache. Whole rows are decoded: not for some of their columns.
        let fit = WHOLE / (m.div_ceil(SQUARE) * SQUARE * parts).max(1) / TILE * 2 * TILE;
        let whole = columns::has_columns(self.w) && fit >= rows.min(LEAST);
        let step = match whole {
            true => fit.min(rows),
            false => (SLAB / cols).max(1).next_multiple_of(2 * SQUARE),
        };
        let of_weight = weight_parts(self.w, parts);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            // What goes along does so with the last part.
            let r = if first + count == rows { self.low.r } else { 0 };
            let of_rows: &PackRows<'_> = &|strips, units, places| {
                self.lefts(lanes, parts, strips, (first, count), units, r, places)
            };
            let low_side = Side::tiles(cols, r, false, parts, parts);
            let mut low = Floats::dirty(low_side.len());
            let low: &mut [u32] = bytemuck::cast_slice_mut(&mut low);
            let other = self.low.other;
            columns::dense_columns(lanes, &low_side, other, cols, r, low, &mut Vec::new());
            let low = Right::new(&low_side, low);
            let low = (r > 0).then_some(&low);
            let (out, add) = (Window::new(out, m, cols, cols), add || first > 0);
            if whole {
                let mut places = Places::default();
                let left = of_rows(0..m.div_ceil(SQUARE), units(count), &mut places);
                let strips = WIDE.min(cols.div_ceil(SQUARE));
                let step = COLUMNS / (strips * SQUARE * of_weight).max(1);
                let in_rows = |piece: &Piece| {
                    let Range { start, end } = piece.units;
                    first + 2 * start..first + (2 * end).min(count)
                };
                let right = Columns {
                    units: units(count).end,
                    step: step.next_multiple_of(TILE),
                    strips,
                    side: &|piece| {
                        let inside = in_rows(piece).len();
                        Side::tiles(piece.columns.len(), inside, true, parts, of_weight)
                    },
                    pack: &|piece, side, units| {
                        let (of, from) = (in_rows(piece), piece.columns.start);
                        let rows = (of.start, of.len());
                        columns::weight_columns(lanes, side, self.w, rows, from, &[], units);
                    },
                    region: &|piece| {
                        Region::of_columns(self.w, in_rows(piece), piece.columns.clone())
                    },
                };
                by_columns(tiles, &left, low, right, out, add);
                continue;
            }
            let side = Side::tiles(cols, count, true, parts, of_weight);
            let mut units = Floats::dirty(side.len());
            let units: &mut [u32] = bytemuck::cast_slice_mut(&mut units);
            columns::weight_columns(lanes, &side, self.w, (first, count), 0, &[], units);
            let rights = Rights {
                own: &Right::new(&side, units),
                low,
            };
            by_rows(tiles, parts, (None, of_rows), rights, out, add);
        }
    }

    /// Some strips over some units of the columns `first..` of x, as many as `count`, and of the product of low rank.
    fn lefts<'u, L: Lanes>(
        &self,
        l: L,
        parts: usize,
        strips: Range<usize>,
        (first, count): (usize, usize),
        units: Range<usize>,
        r: usize,
        places: &'u mut Places,
    ) -> Lefts<'u> {
        let width = self.x.len() / self.m;
        let rows = strips.start * SQUARE..(strips.end * SQUARE).min(self.m);
        let pack = |x, inside, place: &'u mut Floats| {
            *place = Floats::dirty(left::len(rows.len(), inside, parts));
            let units = bytemuck::cast_slice_mut(place);
            Left::pack(l, x, rows.len(), inside, parts, units, true)
        };
        let Places { own, low } = places;
        let inside = 2 * units.start..(2 * units.end).min(count);
        let x = &self.x[rows.start * width + first + inside.start..];
        Lefts {
            begin: units.start,
            own: pack(View::rows(x, width), inside.len(), own),
            low: pack(View::rows(&self.low.values[rows.start * r..], r), r, low),
        }
    }
}

/// All units of so many values, in whole steps.
fn units(inside: usize) -> Range<usize> {
    0..inside.div_ceil(2 * TILE) * TILE
}

/// Memory of packed rows.
#[derive(Default)]
struct Places {
    own: Floats,
    low: Floats,
}
