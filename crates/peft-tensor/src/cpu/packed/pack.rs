//! Bringing both sides of a product into panels.
//!
//! A panel side is cut into strips of as many rows (of `x`) or columns (of the result) as a tile has; in a strip, the units
//! of one step along the inner dimension stand together. What is missing at the end of the inner dimension is zero; what is
//! missing of a last strip is anything.

use std::ops::Range;

use super::lanes::{Lanes, ROWS, WIDTH, Work};
use super::tiles::{SQUARE, TILE};
use crate::cpu::par;
use crate::cpu::pool::Floats;
use crate::{FrozenWeight, WeightFormat};

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
    low: usize,
    /// Units that are multiplied before the next strip comes (the last time fewer).
    block: usize,
    /// Units of a piece: what stands together first by strips, then by steps.
    pub(super) piece: usize,
}

/// Units of a piece where threads pack along the inner dimension.
const PIECE: usize = 96;

/// Units of the inner dimension that are multiplied at a time, so that a strip of the right side stays in the first-level
/// cache; two of them have room for 1536 values and a rank of 64.
pub(super) const BLOCK: usize = 400;

/// As [`BLOCK`] for tiles, which read strips from the second-level cache.
const TILES_BLOCK: usize = 1024;

impl Side {
    fn new(outside: usize, take: usize, inside: usize, low: usize, piece: usize) -> Self {
        let units = inside.div_ceil(2) + low.div_ceil(2);
        Self::of(outside, take, units, low, piece, BLOCK)
    }

    fn of(
        outside: usize,
        take: usize,
        units: usize,
        low: usize,
        piece: usize,
        block: usize,
    ) -> Self {
        let blocks = units.div_ceil(block).max(1);
        let block = units.div_ceil(blocks);
        // Whole pieces, or whole tiles where the side has such.
        let whole = if piece < units { piece } else { TILE };
        let block = block.next_multiple_of(whole);
        Self {
            outside,
            take,
            strips: outside.div_ceil(take),
            units,
            low,
            block: block.max(1),
            piece: piece.min(units).max(1),
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

    /// `n` columns for products of tiles, in whole steps along the inner dimension; packed in pieces where these are columns
    /// of the stored weight.
    pub(super) fn tiles(n: usize, inside: usize, pieces: bool) -> Self {
        let units = inside.div_ceil(2).next_multiple_of(TILE);
        let piece = if pieces { PIECE } else { usize::MAX };
        Self::of(n, SQUARE, units, 0, piece, TILES_BLOCK)
    }

    /// A side of a product that is not shared among threads.
    pub(super) fn dense(outside: usize, take: usize, inside: usize) -> Self {
        Self::new(outside, take, inside, 0, usize::MAX)
    }

    /// Units that do not come from a product of low rank.
    fn own(&self) -> usize {
        self.units - self.low.div_ceil(2)
    }

    /// Units of all panels.
    pub(super) fn len(&self) -> usize {
        self.strips * self.take * self.units
    }

    /// The blocks, as ranges of units.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        cuts(0..self.units, self.block)
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
fn cuts(whole: Range<usize>, length: usize) -> impl Iterator<Item = Range<usize>> {
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

    /// One strip over a range of the inner dimension that lies in one piece.
    #[inline(always)]
    pub(super) fn strip(&self, strip: usize, range: &Range<usize>) -> &'a [u32] {
        let Side {
            take,
            strips,
            units,
            piece,
            ..
        } = *self.side;
        let begin = range.start - range.start % piece;
        let length = piece.min(units - begin);
        let first = begin * strips + strip * length + range.start - begin;
        &self.units[first * take..(first + range.len()) * take]
    }
}

/// Values or units of which registers are made.
pub(super) trait Item: Copy + Default + Sync {
    /// Items of a register.
    const REGISTER: usize;
    /// The register of the first of them.
    fn register<L: Lanes>(l: L, items: &[Self]) -> L::V;
}

impl Item for f32 {
    const REGISTER: usize = 2 * WIDTH;

    #[inline(always)]
    fn register<L: Lanes>(l: L, items: &[Self]) -> L::V {
        l.units(items)
    }
}

/// Units that are stored as such.
impl Item for u32 {
    const REGISTER: usize = WIDTH;

    #[inline(always)]
    fn register<L: Lanes>(l: L, items: &[Self]) -> L::V {
        l.load(items)
    }
}

/// One strip of rows that are contiguous along the inner dimension: a transpose, square by square.
struct Strip<'a, T> {
    /// Rows `stride` apart, of which the first `inside` items count.
    rows: &'a [T],
    stride: usize,
    inside: usize,
    /// How many there are, and how many a full strip has.
    count: usize,
    take: usize,
    out: &'a mut [u32],
}

impl<L: Lanes, T: Item> Work<L> for Strip<'_, T> {
    #[inline(always)]
    fn on(self, l: L) {
        let (take, wide) = (self.take, T::REGISTER);
        for group in (0..take).step_by(WIDTH) {
            // Where the rows begin. Instead of one that is not there the last is taken: nobody looks at what comes of it.
            let mut starts = [0; WIDTH];
            for (i, start) in starts.iter_mut().enumerate() {
                *start = (group + i).min(self.count - 1) * self.stride;
            }
            let out = &mut self.out[group..];
            for at in (0..self.inside).step_by(wide) {
                let out = &mut out[at / wide * WIDTH * take..];
                let mut square = [l.zero(); WIDTH];
                if at + wide <= self.inside {
                    for i in 0..WIDTH {
                        square[i] = T::register(l, &self.rows[starts[i] + at..]);
                    }
                } else {
                    for i in 0..WIDTH {
                        let row = &self.rows[starts[i]..][..self.inside];
                        square[i] = remainder(l, &row[at..]);
                    }
                }
                transpose(l, &mut square);
                // A strip narrower than a register is overwritten by the step after it, but for the last steps.
                if out.len() >= (WIDTH - 1) * take + WIDTH {
                    for i in 0..WIDTH {
                        l.store(square[i], &mut out[i * take..]);
                    }
                } else {
                    cut(l, square, take, out);
                }
            }
        }
    }
}

/// Stores what there is room for.
#[inline(never)]
fn cut<L: Lanes>(l: L, square: [L::V; WIDTH], take: usize, out: &mut [u32]) {
    for (register, out) in square.into_iter().zip(out.chunks_mut(take)) {
        let mut whole = [0; WIDTH];
        l.store(register, &mut whole);
        let len = out.len().min(WIDTH);
        out[..len].copy_from_slice(&whole[..len]);
    }
}

/// The register of what is left of a row, zero beyond.
#[inline(never)]
pub(super) fn remainder<L: Lanes, T: Item>(l: L, items: &[T]) -> L::V {
    let mut padded = [T::default(); 2 * WIDTH];
    padded[..items.len()].copy_from_slice(items);
    T::register(l, &padded)
}

/// The first `WIDTH` registers as columns: each pass turns the bits of an element's place, its row's before its lane's, by
/// one, and half of all turns swap row and lane.
#[inline(always)]
pub(super) fn transpose<L: Lanes>(l: L, square: &mut [L::V; WIDTH]) {
    let half = WIDTH / 2;
    let mut width = 1;
    while width < WIDTH {
        let before = *square;
        for i in 0..half {
            (square[2 * i], square[2 * i + 1]) = l.zip(before[i], before[i + half]);
        }
        width *= 2;
    }
}

/// Packs `m` rows of `stride` values, the first `inside` of each, and the rows of `low` behind them.
pub(super) fn rows<L: Lanes>(
    l: L,
    side: &Side,
    x: &[f32],
    stride: usize,
    inside: usize,
    low: &[f32],
    out: &mut [u32],
) {
    strips(l, side, x, stride, inside, low, out);
}

/// Packs all strips of a side from its rows and those of `low`.
fn strips<L: Lanes, T: Item>(
    l: L,
    side: &Side,
    rows: &[T],
    stride: usize,
    inside: usize,
    low: &[f32],
    out: &mut [u32],
) {
    let size = (side.take * side.units).max(1);
    // A task long enough to be worth waking a thread.
    let together = (16 * 1024 / size).max(1);
    par::chunks(out, size * together, |task, out| {
        for (i, out) in out.chunks_mut(size).enumerate() {
            let strip = task * together + i;
            one_strip(l, side, rows, stride, inside, strip, out);
            low_strip(l, side, low, strip, out);
        }
    });
}

fn one_strip<L: Lanes, T: Item>(
    l: L,
    side: &Side,
    rows: &[T],
    stride: usize,
    inside: usize,
    strip: usize,
    out: &mut [u32],
) {
    let take = side.take;
    let first = strip * take;
    l.run(Strip {
        rows: &rows[first * stride..],
        stride,
        inside,
        count: (side.outside - first).min(take),
        take,
        out,
    });
}

/// The end of a strip, after the rest of it: rows of `low`.
fn low_strip<L: Lanes>(l: L, side: &Side, low: &[f32], strip: usize, out: &mut [u32]) {
    if side.low > 0 {
        let out = &mut out[side.own() * side.take..];
        one_strip(l, side, low, side.low, side.low, strip, out);
    }
}

/// Packs rows of a dense matrix, `stride` apart, the first `inside` values of each.
pub(super) fn dense_rows<L: Lanes>(
    l: L,
    side: &Side,
    x: &[f32],
    stride: usize,
    inside: usize,
    out: &mut [u32],
) {
    let size = (side.take * side.units).max(1);
    for (strip, out) in out.chunks_mut(size).enumerate() {
        one_strip(l, side, x, stride, inside, strip, out);
    }
}

/// Packs columns of a dense matrix of `inside` rows, `stride` apart; `line` is memory to work in.
pub(super) fn dense_columns<L: Lanes>(
    l: L,
    side: &Side,
    x: &[f32],
    stride: usize,
    inside: usize,
    out: &mut [u32],
    line: &mut Vec<u32>,
) {
    dense_pairs(l, side, (x, stride, inside), 0..side.units, out, line);
}

/// As [`dense_columns`] for some of the units along the inner dimension.
pub(super) fn dense_pairs<L: Lanes>(
    l: L,
    side: &Side,
    (x, stride, inside): (&[f32], usize, usize),
    units: Range<usize>,
    out: &mut [u32],
    line: &mut Vec<u32>,
) {
    let (take, apart) = (side.take, side.units * side.take);
    line.clear();
    line.resize(self::line(side), 0);
    let there = inside.div_ceil(2).min(units.len());
    for unit in units.start + there..units.end {
        blank(&mut out[unit * take..], take, apart);
    }
    for unit in 0..there {
        let row = |i: usize| match i < inside {
            true => &x[i * stride..][..side.outside],
            false => &[],
        };
        let place = units.start + unit;
        l.run(Step {
            rows: [row(2 * unit), row(2 * unit + 1)],
            line,
            out: &mut out[place * take..],
            take,
            apart,
            last: place + 1 == side.units,
        });
    }
}

/// The stored units of a bfloat16 matrix, where they are what the lanes want and can be read as such.
fn stored(w: &FrozenWeight) -> Option<&[u32]> {
    let fits = w.format() == WeightFormat::BF16 && w.cols().is_multiple_of(2);
    if !fits || cfg!(target_endian = "big") {
        return None;
    }
    bytemuck::try_cast_slice(w.bytes()).ok()
}

/// Packs rows `first..` of a weight, as many as the side has, as columns of the right side, and behind each a row of `low`.
pub(super) fn weight_rows<L: Lanes>(
    l: L,
    side: &Side,
    w: &FrozenWeight,
    first: usize,
    low: &[f32],
    out: &mut [u32],
) {
    let (take, cols) = (side.take, w.cols());
    if let Some(all) = stored(w) {
        let units = cols / 2;
        return strips(l, side, &all[first * units..], units, units, low, out);
    }
    if let Some(values) = w.as_f32() {
        return strips(l, side, &values[first * cols..], cols, cols, low, out);
    }
    par::chunks(out, take * side.units, |strip, out| {
        let count = (side.outside - strip * take).min(take);
        let from = first + strip * take;
        let mut rows = Floats::dirty(count * cols);
        w.decode_rows(from..from + count, &mut rows);
        l.run(Strip {
            rows: &rows,
            stride: cols,
            inside: cols,
            count,
            take,
            out,
        });
        low_strip(l, side, low, strip, out);
    });
}

/// One step along the inner dimension, for all strips: the values of two rows side by side.
struct Step<'a> {
    /// The second is empty beyond the last.
    rows: [&'a [f32]; 2],
    /// A place of [`line`] for the units of the whole row, zero beyond it.
    line: &'a mut [u32],
    /// From the place of the step in the first strip on; strips are `apart`.
    out: &'a mut [u32],
    take: usize,
    apart: usize,
    /// Whether nothing of a strip comes after.
    last: bool,
}

impl<L: Lanes> Work<L> for Step<'_> {
    #[inline(always)]
    fn on(self, l: L) {
        let [a, b] = self.rows;
        let zero = [0.0; WIDTH];
        let (blocks, tail) = a.as_chunks::<WIDTH>();
        let (b_blocks, b_tail) = b.as_chunks::<WIDTH>();
        let lines = self.line.as_chunks_mut::<WIDTH>().0;
        for (i, (line, a)) in lines.iter_mut().zip(blocks).enumerate() {
            pair(l, a, b_blocks.get(i).unwrap_or(&zero), line);
        }
        if !tail.is_empty() {
            let (mut a, mut b) = (zero, zero);
            a[..tail.len()].copy_from_slice(tail);
            b[..b_tail.len()].copy_from_slice(b_tail);
            pair(l, &a, &b, &mut lines[blocks.len()]);
        }
        let take = self.take;
        for (strip, line) in (0..a.len().div_ceil(take)).map(|i| (i, &self.line[i * take..])) {
            let out = &mut self.out[strip * self.apart..];
            if take == 2 * WIDTH {
                out[..2 * WIDTH].copy_from_slice(&line[..2 * WIDTH]);
            } else if self.last {
                out[..take].copy_from_slice(&line[..take]);
            } else {
                // Less than a register: the next step overwrites what is too much.
                out[..WIDTH].copy_from_slice(&line[..WIDTH]);
            }
        }
    }
}

/// Zeroes one step of all strips, `apart`.
fn blank(out: &mut [u32], take: usize, apart: usize) {
    for out in out.chunks_mut(apart) {
        out[..take].fill(0);
    }
}

/// The length of a place for the units of one step of all strips, in whole registers and one more to read beyond.
fn line(side: &Side) -> usize {
    (side.strips * side.take).next_multiple_of(WIDTH) + WIDTH
}

/// The units of values that stand next to each other along the inner dimension.
#[inline(always)]
pub(super) fn pair<L: Lanes>(l: L, a: &[f32; WIDTH], b: &[f32; WIDTH], units: &mut [u32; WIDTH]) {
    for i in 0..WIDTH {
        units[i] = l.unit(a[i], b[i]);
    }
}

/// As [`Step`] for two rows of bfloat16, each unit two values of one row.
struct StoredStep<'a> {
    rows: [&'a [u32]; 2],
    out: &'a mut [u32],
    take: usize,
    apart: usize,
}

impl<L: Lanes> Work<L> for StoredStep<'_> {
    #[inline(always)]
    fn on(self, _l: L) {
        let [a, b] = self.rows;
        for (strip, a) in a.chunks(self.take / 2).enumerate() {
            let out = &mut self.out[strip * self.apart..][..self.take];
            let at = strip * self.take / 2;
            for (i, (out, a)) in out.as_chunks_mut::<2>().0.iter_mut().zip(a).enumerate() {
                let b = b.get(at + i).copied().unwrap_or(0);
                *out = [a & 0xffff | b << 16, a >> 16 | b & 0xffff_0000];
            }
            out[2 * a.len()..].fill(0);
        }
    }
}

/// Packs rows `first..first + count` of a weight, and those of `low` after them, as steps of the inner dimension of the right
/// side.
pub(super) fn weight_columns<L: Lanes>(
    l: L,
    side: &Side,
    w: &FrozenWeight,
    first: usize,
    count: usize,
    low: &[f32],
    out: &mut [u32],
) {
    let (take, cols) = (side.take, w.cols());
    let stored = stored(w);
    let dense = w.as_f32();
    let size = side.piece * take * side.strips;
    par::chunks(out, size, |piece, out| {
        let units = out.len() / (take * side.strips);
        let apart = units * take;
        let mut decoded = Vec::new();
        let mut line = vec![0; line(side)];
        for unit in 0..units {
            let out = &mut out[unit * take..];
            // The step, of the weight's or, behind them, of the low rank's.
            let step = piece * side.piece + unit;
            let own = step < side.own();
            let (at, end) = match own {
                true => (first + step * 2, first + count),
                false => ((step - side.own()) * 2, side.low),
            };
            if at >= end {
                blank(out, take, apart);
                continue;
            }
            let there = 2.min(end - at);
            if let (Some(all), true) = (stored, own) {
                let row = |i: usize| match i < there {
                    true => &all[(at + i) * cols / 2..][..cols / 2],
                    false => &[],
                };
                let rows = [row(0), row(1)];
                l.run(StoredStep {
                    rows,
                    out,
                    take,
                    apart,
                });
                continue;
            }
            let values = match (own, dense) {
                (false, _) => &low[at * cols..(at + there) * cols],
                (true, Some(values)) => &values[at * cols..(at + there) * cols],
                (true, None) => {
                    decoded.resize(there * cols, 0.0);
                    w.decode_rows(at..at + there, &mut decoded);
                    &decoded[..]
                }
            };
            let rows = [&values[..cols], &values[cols..]];
            l.run(Step {
                rows,
                line: &mut line,
                out,
                take,
                apart,
                last: unit + 1 == units,
            });
        }
    });
}
