//! Bringing columns into panels: the rows of a matrix are steps along the inner dimension.

use std::ops::Range;

use super::lanes::{Lanes, WIDTH, Work};
use super::pack::{Item, TASK, registers, stored};
use super::side::{Side, cuts};
use super::tiles::LINE;
use crate::FrozenWeight;
use crate::cpu::par;

/// Rows that are asked for before they are read: the processor does not see by itself where the next one goes on.
const AHEAD: usize = 8;

/// Rows that are decoded at a time.
const DECODED: usize = 8;

/// From a part of a strip to the next, and to that of the next strip.
#[derive(Clone, Copy)]
struct Apart {
    part: usize,
    strip: usize,
}

/// Steps along the inner dimension, for all strips: the values of two rows side by side.
struct Steps<'a, T> {
    /// So many items of each, `stride` apart, and so many rows; zero beyond them.
    rows: &'a [T],
    width: usize,
    stride: usize,
    count: usize,
    /// How many steps.
    units: usize,
    /// From the place of the first step in the first strip on.
    out: &'a mut [u32],
    take: usize,
    apart: Apart,
    /// A place of [`line`] for the units of a whole row.
    line: &'a mut [u32],
    /// Whether nothing of a strip comes after, where strips are less than two registers.
    last: bool,
}

impl<'a, T: Item> Steps<'a, T> {
    /// For strips of two registers; of the rows the width, the stride and how many.
    fn wide(
        rows: &'a [T],
        [width, stride, count]: [usize; 3],
        units: usize,
        out: &'a mut [u32],
        apart: Apart,
    ) -> Self {
        Self {
            rows,
            width,
            stride,
            count,
            units,
            out,
            take: 2 * WIDTH,
            apart,
            line: &mut [],
            last: false,
        }
    }

    fn pack<L: Lanes>(self, l: L, parts: usize) {
        match parts {
            1 => l.run(InParts::<T, 1>(self)),
            2 => l.run(InParts::<T, 2>(self)),
            _ => l.run(InParts::<T, 3>(self)),
        }
    }
}

/// Of values that are sums of so many parts.
struct InParts<'a, T, const PARTS: usize>(Steps<'a, T>);

impl<L: Lanes, T: Item, const PARTS: usize> Work<L> for InParts<'_, T, PARTS> {
    #[inline(always)]
    fn on(self, l: L) {
        let Steps {
            rows,
            width,
            stride,
            count,
            units,
            out,
            take,
            apart,
            line,
            last,
        } = self.0;
        for unit in 0..units {
            let out = &mut out[unit * take..];
            let at = 2 * unit;
            if at >= count {
                blank(out, take, apart.part);
                continue;
            }
            let a = &rows[at * stride..][..width];
            let b = match at + 1 < count {
                true => &rows[(at + 1) * stride..][..width],
                false => &[],
            };
            let ahead = if at + AHEAD < count {
                AHEAD * stride
            } else {
                0
            };
            if take == 2 * WIDTH {
                wide::<L, T, PARTS>(l, a, b, out, apart, ahead);
            } else {
                debug_assert_eq!(PARTS, 1);
                let last = last && unit + 1 == units;
                narrow(l, a, b, out, take, apart.strip, line, last);
            }
        }
    }
}

/// One step for strips of two registers, which are what those of both rows make.
#[inline(always)]
fn wide<L: Lanes, T: Item, const PARTS: usize>(
    l: L,
    a: &[T],
    b: &[T],
    out: &mut [u32],
    apart: Apart,
    ahead: usize,
) {
    let whole = a.len().min(b.len()) / T::REGISTER;
    let mut strips = out.chunks_mut(apart.strip);
    let rows = a.chunks_exact(T::REGISTER).zip(b.chunks_exact(T::REGISTER));
    for ((a, b), out) in rows.zip(strips.by_ref()) {
        if ahead > 0 {
            for line in (0..T::REGISTER).step_by(LINE / size_of::<T>()) {
                l.prefetch(a.as_ptr().wrapping_add(ahead + line));
                l.prefetch(b.as_ptr().wrapping_add(ahead + line));
            }
        }
        let a: [L::V; PARTS] = T::registers(l, a);
        let b: [L::V; PARTS] = T::registers(l, b);
        weave(l, a, b, out, apart.part);
    }
    for (i, out) in (whole..a.len().div_ceil(T::REGISTER)).zip(strips) {
        let at = i * T::REGISTER;
        let a: [L::V; PARTS] = registers(l, a, at);
        let b: [L::V; PARTS] = registers(l, b, at);
        weave(l, a, b, out, apart.part);
    }
}

/// The units of registers of two rows into a strip and its parts, `apart`.
#[inline(always)]
fn weave<L: Lanes, const PARTS: usize>(
    l: L,
    a: [L::V; PARTS],
    b: [L::V; PARTS],
    out: &mut [u32],
    apart: usize,
) {
    for part in 0..PARTS {
        let (low, high) = l.weave(a[part], b[part]);
        let out = &mut out[part * apart..][..2 * WIDTH];
        l.store(low, out);
        l.store(high, &mut out[WIDTH..]);
    }
}

/// One step for strips of less than two registers: the whole row, which is cut into strips then.
#[inline(always)]
fn narrow<L: Lanes, T: Item>(
    l: L,
    a: &[T],
    b: &[T],
    out: &mut [u32],
    take: usize,
    apart: usize,
    line: &mut [u32],
    last: bool,
) {
    let registers_of = a.len().div_ceil(T::REGISTER);
    for i in 0..registers_of {
        let at = i * T::REGISTER;
        let a: [L::V; 1] = registers(l, a, at);
        let b: [L::V; 1] = registers(l, b, at);
        weave(l, a, b, &mut line[i * 2 * WIDTH..], 0);
    }
    let strips = (a.len() * 2 * WIDTH / T::REGISTER).div_ceil(take);
    for (strip, out) in (0..strips).zip(out.chunks_mut(apart)) {
        let line = &line[strip * take..];
        // Less than a register: the next step overwrites what is too much.
        let len = if last { take } else { WIDTH };
        out[..len].copy_from_slice(&line[..len]);
    }
}

/// Zeroes one step of all strips and their parts, `apart`.
#[inline(never)]
fn blank(out: &mut [u32], take: usize, apart: usize) {
    for out in out.chunks_mut(apart) {
        out[..take].fill(0);
    }
}

/// The length of a place for the units of one step of all strips, in whole pairs of registers and one more register to read
/// beyond; strips of two registers need none.
fn line(side: &Side) -> usize {
    match side.take == 2 * WIDTH {
        true => 0,
        false => (side.strips * side.take).next_multiple_of(2 * WIDTH) + WIDTH,
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
    let (take, part) = (side.take, side.units * side.take);
    line.clear();
    line.resize(self::line(side), 0);
    if side.outside == 0 || units.is_empty() {
        return;
    }
    let steps = Steps {
        rows: x,
        width: side.outside,
        stride,
        count: inside,
        units: units.len(),
        out: &mut out[units.start * take..],
        take,
        apart: Apart {
            part,
            strip: side.parts * part,
        },
        line,
        last: units.end == side.units,
    };
    steps.pack(l, side.parts);
}

/// Whether some columns of a weight are as easy to read as all of them.
pub(super) fn has_columns(w: &FrozenWeight) -> bool {
    stored(w).is_some() || w.as_f32().is_some()
}

/// Packs rows `first..first + count` of a weight, and those of `low` after them, as steps of the inner dimension of the right
/// side, of their columns those from `from` on.
pub(super) fn weight_columns<L: Lanes>(
    l: L,
    side: &Side,
    w: &FrozenWeight,
    rows: (usize, usize),
    from: usize,
    low: &[f32],
    out: &mut [u32],
) {
    let of_unit = side.parts * side.take;
    let of_pieces = out.chunks_mut(side.piece * of_unit * side.strips);
    let tasks = of_pieces.enumerate().flat_map(|(piece, out)| {
        let units = out.len() / (of_unit * side.strips);
        let together = match has_columns(w) {
            true => (TASK / (units * of_unit)).max(1),
            false => side.strips,
        };
        let of_strips = out.chunks_mut(together * units * of_unit).enumerate();
        of_strips.map(move |(i, out)| Columns {
            side,
            w,
            rows,
            from,
            low,
            first: piece * side.piece,
            units,
            strips: i * together..((i + 1) * together).min(side.strips),
            out,
        })
    });
    par::share(tasks.collect(), |task: Columns<'_>| task.pack(l));
}

/// Some strips of a piece.
struct Columns<'a> {
    side: &'a Side,
    w: &'a FrozenWeight,
    rows: (usize, usize),
    from: usize,
    low: &'a [f32],
    /// The first unit, and how many.
    first: usize,
    units: usize,
    strips: Range<usize>,
    out: &'a mut [u32],
}

impl Columns<'_> {
    fn pack<L: Lanes>(self, l: L) {
        let Self { side, w, out, .. } = self;
        let (take, cols) = (side.take, w.cols());
        let apart = Apart {
            part: self.units * take,
            strip: side.parts * self.units * take,
        };
        let columns = self.strips.start * take..(self.strips.end * take).min(side.outside);
        let (from, width) = (self.from + columns.start, columns.len());
        let own = side.own().saturating_sub(self.first).min(self.units);
        let (at, end) = (self.rows.0 + 2 * self.first, self.rows.0 + self.rows.1);
        let count = end.saturating_sub(at).min(2 * own);
        assert_eq!(take, 2 * WIDTH, "strips of a weight have two registers");
        if own > 0 {
            if let Some(all) = stored(w) {
                let rows = [width.div_ceil(2), cols / 2, count];
                let steps = Steps::wide(&all[(at * cols + from) / 2..], rows, own, out, apart);
                steps.pack(l, 1);
            } else if let Some(values) = w.as_f32() {
                let rows = [width, cols, count];
                let steps = Steps::wide(&values[at * cols + from..], rows, own, out, apart);
                steps.pack(l, side.parts);
            } else {
                let mut decoded = vec![0.0; DECODED * cols];
                for units in cuts(0..own, DECODED / 2) {
                    let first = (2 * units.start).min(count);
                    let count = (2 * units.end).min(count) - first;
                    w.decode_rows(at + first..at + first + count, &mut decoded[..count * cols]);
                    let (rows, out) = ([width, cols, count], &mut out[units.start * take..]);
                    let steps = Steps::wide(&decoded[from..], rows, units.len(), out, apart);
                    steps.pack(l, side.parts);
                }
            }
        }
        if own < self.units {
            let (first, all) = (2 * (self.first + own - side.own()), side.outside);
            let low = &self.low[first * all + columns.start..];
            let (rows, out) = ([width, all, side.low - first], &mut out[own * take..]);
            Steps::wide(low, rows, self.units - own, out, apart).pack(l, side.parts);
        }
    }
}

/// Memory: so many runs of cache lines, so many bytes apart.
#[derive(Clone, Copy)]
pub(super) struct Region {
    pub(super) at: *const u8,
    pub(super) runs: usize,
    pub(super) apart: usize,
    pub(super) lines: usize,
}

impl Region {
    /// Some rows of a weight, about.
    pub(super) fn of_rows(w: &FrozenWeight, rows: Range<usize>) -> Self {
        let row = w.bytes().len() / w.rows();
        Self {
            at: w.bytes().as_ptr().wrapping_add(rows.start * row),
            runs: (rows.len() * row).div_ceil(LINE),
            apart: LINE,
            lines: 1,
        }
    }

    /// Some columns of some rows of a weight that [has them](has_columns).
    pub(super) fn of_columns(w: &FrozenWeight, rows: Range<usize>, columns: Range<usize>) -> Self {
        let row = w.bytes().len() / w.rows();
        let value = row / w.cols();
        let first = rows.start * row + columns.start * value;
        Self {
            at: w.bytes().as_ptr().wrapping_add(first),
            runs: rows.len(),
            apart: row,
            lines: (columns.len() * value).div_ceil(LINE),
        }
    }
}
