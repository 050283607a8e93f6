//! Products of tiles of bfloat16, for processors with AMX: sixteen times the rate of f32's, so that products of f32 are
//! made of them too.
//!
//! In single precision, a value is a sum of three of bfloat16 that has all its bits ([`parts`](super::parts)). A weight that
//! is stored in bfloat16 is one: the product is exact then, three times the work, and only sums are rounded, as they are in
//! any product of f32. Other weights are cut as well; of the nine products of parts the six are made that are not smaller
//! than what rounding the sum loses. The instructions take denormal numbers as zero, so a value below 2^-110 loses its
//! smaller parts: an error of at most 2^-126.
//!
//! As elsewhere in [`packed`](super), a slab of the weight is packed once for all rows of `x`, and threads take rows.

mod attend;
mod left;
mod square;

use std::ops::Range;

pub(super) use self::attend::{Backward, Forward};
use self::left::Left;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(in crate::cpu) use self::square::Amx;
#[cfg(test)]
pub(super) use self::square::Plain;
use self::square::Square;
pub(super) use self::square::{SQUARE, TILE, Tiles};
use super::lanes::Lanes;
use super::pack::{self, Panels, Side};
use super::parts::{ALL, Part};
use super::{Product, SLAB};
use crate::cpu::matmul::View;
use crate::cpu::par;
use crate::cpu::pool::Floats;
use crate::{FrozenWeight, Precision, WeightFormat};

/// Units of the left side that a task takes at most: half of a second-level cache of 2 MiB, where they stay while the columns
/// go by.
const TASK: usize = 256 * 1024;

/// Strips of a task at most.
const STRIPS: usize = 8;

/// Parts of what is not rounded.
pub(super) fn parts(precision: Precision) -> usize {
    match precision {
        Precision::F32 => ALL,
        Precision::Bf16 => 1,
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

/// Calls `pack` with the lanes that make each part and the memory it goes to.
macro_rules! each_part {
    ($all:expr, $side:expr, $units:expr, |$lanes:ident, $out:ident| $pack:expr) => {{
        let len = $side.len().max(1);
        let parts = $units.len() / len;
        for (part, $out) in $units.chunks_mut(len).enumerate() {
            match (parts, part) {
                (1, _) => {
                    let $lanes = $all;
                    $pack
                }
                (_, 0) => {
                    let $lanes = Part::<_, 0>($all);
                    $pack
                }
                (_, 1) => {
                    let $lanes = Part::<_, 1>($all);
                    $pack
                }
                _ => {
                    let $lanes = Part::<_, 2>($all);
                    $pack
                }
            }
        }
    }};
}

/// A product of two sides that are sums of parts.
struct Factors<'a> {
    left: &'a Left<'a>,
    right: Vec<Panels<'a>>,
}

impl<'a> Factors<'a> {
    fn new(left: &'a Left<'a>, side: &'a Side, units: &'a [u32]) -> Self {
        let right = units.chunks(side.len().max(1));
        Self {
            left,
            right: right.map(|units| Panels::new(side, units)).collect(),
        }
    }
}

impl Product<'_> {
    /// `x [m, cols] Wt`, by slabs of W's rows: columns of the result.
    pub(super) fn forward_by_tiles<L: Lanes, T: Tiles>(
        &self,
        (lanes, tiles): (L, T),
        parts: usize,
        out: &mut [f32],
        add: bool,
    ) {
        let (rows, cols, r) = (self.w.rows(), self.w.cols(), self.low.r);
        let step = (SLAB / cols).max(1).next_multiple_of(SQUARE);
        let mut left = [Floats::default(), Floats::default()];
        let left = self.left(lanes, parts, 0, cols, r, &mut left);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let side = Side::tiles(count, cols, false);
            let mut right = Floats::dirty(side.len() * weight_parts(self.w, parts));
            let right: &mut [u32] = bytemuck::cast_slice_mut(&mut right);
            each_part!(lanes, side, right, |l, out| pack::weight_rows(
                l,
                &side,
                self.w,
                first,
                &[],
                out
            ));
            let low_side = Side::tiles(count, r, false);
            let mut low = Floats::dirty(low_side.len() * parts);
            let low: &mut [u32] = bytemuck::cast_slice_mut(&mut low);
            let other = &self.low.other[first * r..];
            each_part!(lanes, low_side, low, |l, out| pack::rows(
                l,
                &low_side,
                other,
                r,
                r,
                &[],
                out
            ));
            let factors = Factors::new(&left[0], &side, right);
            let low = Factors::new(&left[1], &low_side, low);
            let low = (r > 0).then_some(&low);
            multiply(tiles, &factors, low, &mut out[first..], rows, add);
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
        let (rows, cols) = (self.w.rows(), self.w.cols());
        let step = (SLAB / cols).max(1).next_multiple_of(2 * SQUARE);
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            // What goes along does so with the last part.
            let r = if first + count == rows { self.low.r } else { 0 };
            let mut left = [Floats::default(), Floats::default()];
            let left = self.left(lanes, parts, first, count, r, &mut left);
            let side = Side::tiles(cols, count, true);
            let mut right = Floats::dirty(side.len() * weight_parts(self.w, parts));
            let right: &mut [u32] = bytemuck::cast_slice_mut(&mut right);
            each_part!(lanes, side, right, |l, out| pack::weight_columns(
                l,
                &side,
                self.w,
                first,
                count,
                &[],
                out
            ));
            let low_side = Side::tiles(cols, r, false);
            let mut low = Floats::dirty(low_side.len() * parts);
            let low: &mut [u32] = bytemuck::cast_slice_mut(&mut low);
            let (other, mut line) = (self.low.other, Vec::new());
            each_part!(lanes, low_side, low, |l, out| pack::dense_columns(
                l, &low_side, other, cols, r, out, &mut line
            ));
            let factors = Factors::new(&left[0], &side, right);
            let low = Factors::new(&left[1], &low_side, low);
            let low = (r > 0).then_some(&low);
            multiply(tiles, &factors, low, out, cols, add || first > 0);
        }
    }

    /// Columns `first..` of x, as many as `count`, and those of the product of low rank.
    fn left<'u, L: Lanes>(
        &self,
        l: L,
        parts: usize,
        first: usize,
        count: usize,
        r: usize,
        units: &'u mut [Floats; 2],
    ) -> [Left<'u>; 2] {
        let (m, width) = (self.m, self.x.len() / self.m);
        let pack = |x, inside, units: &'u mut Floats| {
            *units = Floats::dirty(left::len(m, inside, parts));
            let units = bytemuck::cast_slice_mut(units);
            Left::pack(l, x, m, inside, parts, units, true)
        };
        let [own, low] = units;
        [
            pack(View::rows(&self.x[first..], width), count, own),
            pack(View::rows(self.low.values, r), r, low),
        ]
    }
}

/// `out` is the first product and, where there is one, the low one, added to it if `add`; rows of `out` are `width` apart,
/// its columns are the first of each.
fn multiply<T: Tiles>(
    tiles: T,
    factors: &Factors<'_>,
    low: Option<&Factors<'_>>,
    out: &mut [f32],
    width: usize,
    add: bool,
) {
    let strips = factors.left.rows.div_ceil(SQUARE);
    let task = |strips, out: &mut [f32]| {
        let task = Task {
            factors,
            low,
            strips,
            width,
        };
        tiles.with(|square| task.run(square, out, add));
    };
    let threads = rayon::current_num_threads();
    if threads == 1 {
        return task(0..strips, out);
    }
    let strip = factors.left.parts * SQUARE * factors.right[0].side.units;
    let tasks = strips
        .div_ceil((TASK / strip).clamp(1, STRIPS))
        .next_multiple_of(threads)
        .min(strips);
    let mut left_over = out;
    let cut = |i| {
        let part = par::part(strips, tasks, i);
        let len = (part.len() * SQUARE * width).min(left_over.len());
        let (out, rest) = std::mem::take(&mut left_over).split_at_mut(len);
        left_over = rest;
        (part, out)
    };
    par::share((0..tasks).map(cut).collect(), |(part, out)| task(part, out));
}

/// Some strips of rows against all columns.
struct Task<'a> {
    factors: &'a Factors<'a>,
    low: Option<&'a Factors<'a>>,
    strips: Range<usize>,
    width: usize,
}

impl Task<'_> {
    fn run(&self, square: &mut dyn Square, out: &mut [f32], add: bool) {
        let (m, side) = (self.factors.left.rows, self.factors.right[0].side);
        for block in side.blocks() {
            let add = add || block.start > 0;
            let low = self.low.filter(|_| block.end == side.units);
            for column in 0..side.strips {
                let cols = (side.outside - column * SQUARE).min(SQUARE);
                for row in self.strips.clone() {
                    let rows = (m - row * SQUARE).min(SQUARE);
                    let first = (row - self.strips.start) * SQUARE * self.width;
                    let out = &mut out[first + column * SQUARE..];
                    let whole = rows == SQUARE && cols == SQUARE;
                    match add && whole {
                        true => square.load(out, self.width),
                        false => square.zero(),
                    }
                    self.factors.add_to(square, &block, row, column);
                    if let Some(low) = low {
                        low.add_to(square, &(0..low.right[0].side.units), row, column);
                    }
                    match whole {
                        true => square.store(out, self.width),
                        false => cut(square, out, self.width, rows, cols, add),
                    }
                }
            }
        }
    }
}

impl Factors<'_> {
    /// Adds the products of a block.
    #[inline]
    fn add_to(&self, square: &mut dyn Square, block: &Range<usize>, row: usize, column: usize) {
        let side = self.right[0].side;
        let (parts, right_parts) = (self.left.parts, self.right.len());
        for units in side.pieces(block) {
            let left = |part: usize| self.left.strip(row, part.min(parts - 1), &units);
            let right = |part: usize| self.right[part.min(right_parts - 1)].strip(column, &units);
            let (left, right) = ([left(0), left(1), left(2)], [right(0), right(1), right(2)]);
            square.add(&left[..parts], &right[..right_parts]);
        }
    }
}

/// Writes what there is of a square at the edge.
fn cut(
    square: &mut dyn Square,
    out: &mut [f32],
    width: usize,
    rows: usize,
    cols: usize,
    add: bool,
) {
    let mut whole = [0.0; SQUARE * SQUARE];
    square.store(&mut whole, SQUARE);
    let rows = out.chunks_mut(width).zip(whole.chunks(SQUARE)).take(rows);
    for (out, sums) in rows {
        for (out, sum) in out[..cols].iter_mut().zip(sums) {
            *out = if add { *out + sum } else { *sum };
        }
    }
}
