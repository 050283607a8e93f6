//! The loops of a product of tiles.
//!
//! Rounded values: blocks of both sides that fit into the first-level cache, of which the right one stays there for the
//! strips of the left side, and the sums between blocks in a place as near. Sums of parts make more of what they load, and are
//! as fast from the second-level cache, where blocks of theirs fit.

use std::ops::Range;

use super::super::side::{Panels, Side, cuts};
use super::left::Left;
use super::out::{Spot, Window};
use super::square::{Ahead, SQUARE, Square, Tiles};
use super::{GROUP, Places};
use crate::cpu::par;
use crate::cpu::pool::Floats;

/// Strips that take a column one after the other, and of a task at most.
const STRIPS: usize = 8;

/// Units of the left side that a task takes at most: half of a second-level cache.
const TASK: usize = 256 * 1024;

/// A left side and that of the product of low rank.
pub(super) struct Lefts<'a> {
    /// Units of the inner dimension from this one on.
    pub(super) begin: usize,
    pub(super) own: Left<'a>,
    pub(super) low: Left<'a>,
}

/// A right side, from one of the result's strips of columns on.
pub(super) struct Right<'a> {
    panels: Panels<'a>,
    first: usize,
}

/// A right side and that of the product of low rank, where there is one.
#[derive(Clone, Copy)]
pub(super) struct Rights<'a> {
    pub(super) own: &'a Right<'a>,
    pub(super) low: Option<&'a Right<'a>>,
}

impl<'a> Right<'a> {
    pub(super) fn new(side: &'a Side, units: &'a [u32], first: usize) -> Self {
        Self {
            panels: Panels::new(side, units),
            first,
        }
    }

    fn side(&self) -> &'a Side {
        self.panels.side
    }

    /// A range in each of the parts, from where the first begins; there may be parts that are not.
    #[inline(always)]
    fn units(&self, at: usize, apart: usize, units: &Range<usize>) -> [&'a [u32]; 3] {
        let last = self.side().parts - 1;
        [0, 1, 2].map(|part| self.panels.units(at + apart * part.min(last), units))
    }
}

/// Packs some strips of the left side over some units.
pub(super) type PackRows<'a> =
    dyn for<'u> Fn(Range<usize>, Range<usize>, &'u mut Places) -> Lefts<'u> + Sync + 'a;

/// Packs columns of the right side from one of the result on.
pub(super) type PackColumns<'a> = dyn Fn(usize, &Side, &mut [u32]) + Sync + 'a;

/// `out` is a product and, where there is one, that of low rank, added to it if `add`. Threads take rows, of values of so many
/// parts: all of them are packed, or those of a task are by who takes it.
pub(super) fn by_rows<T: Tiles>(
    tiles: T,
    parts: usize,
    (packed, pack): (Option<&Lefts<'_>>, &PackRows<'_>),
    rights: Rights<'_>,
    out: Window<'_>,
    add: bool,
) {
    let side = rights.own.side();
    // Of several parts, as many units as leave a task's strips in a second-level cache.
    let length = if parts == 1 { side.units } else { side.block };
    let ranges: Vec<_> = cuts(0..side.units, length.max(1)).collect();
    let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
    let size = (parts * longest * SQUARE).max(1);
    let strips = out.rows().div_ceil(SQUARE);
    let tasks = strips
        .div_ceil((TASK / size).clamp(1, STRIPS))
        .next_multiple_of(rayon::current_num_threads())
        .min(strips);
    let cuts = cut(strips, tasks, out, |out, strips| {
        out.split_rows(strips * SQUARE)
    });
    par::share(cuts, |(part, mut out)| {
        let mut places = Places::default();
        let mut sums = Floats::default();
        tiles.with(|square| {
            for units in &ranges {
                let made;
                let (lefts, strips) = match packed {
                    Some(lefts) => (lefts, part.clone()),
                    None => {
                        made = pack(part.clone(), units.clone(), &mut places);
                        (&made, 0..part.len())
                    }
                };
                let last = units.end == side.units;
                let task = Task {
                    lefts,
                    rights: Rights {
                        low: rights.low.filter(|_| last),
                        ..rights
                    },
                    strips,
                    units: units.clone(),
                    add: add || units.start > 0,
                    ahead: true,
                };
                task.run(square, 0..side.strips, &mut out, &mut sums);
            }
        });
    });
}

/// As [`by_rows`] where threads take columns, for which they pack the right side.
pub(super) fn by_columns<T: Tiles>(
    tiles: T,
    lefts: &Lefts<'_>,
    low: Option<&Right<'_>>,
    (side, pack): (&(dyn Fn(usize) -> Side + Sync), &PackColumns<'_>),
    out: Window<'_>,
    add: bool,
) {
    let (cols, strips) = (out.cols(), out.cols().div_ceil(SQUARE));
    // As long as they can be: short parts of rows are slow to read.
    let tasks = rayon::current_num_threads().min(strips);
    let group = (GROUP / side(SQUARE).len().max(1)).max(1);
    let cuts = cut(strips, tasks, out, |out, strips| {
        out.split_columns(strips * SQUARE)
    });
    par::share(cuts, |(part, out)| {
        let mut rest = Some(out);
        let mut sums = Floats::default();
        let mut units = Floats::default();
        tiles.with(|square| {
            for first in part.clone().step_by(group) {
                let last = (first + group).min(part.end);
                let count = (last * SQUARE).min(cols) - first * SQUARE;
                let Some((mut out, others)) = rest.take().map(|rest| rest.split_columns(count))
                else {
                    break;
                };
                rest = Some(others);
                let side = side(count);
                if units.len() < side.len() {
                    units = Floats::dirty(side.len());
                }
                let units = bytemuck::cast_slice_mut(&mut units[..side.len()]);
                pack(first * SQUARE, &side, units);
                let task = Task {
                    lefts,
                    rights: Rights {
                        own: &Right::new(&side, units, first),
                        low,
                    },
                    strips: 0..lefts.own.rows.div_ceil(SQUARE),
                    units: 0..side.units,
                    add,
                    ahead: false,
                };
                task.run(square, first..last, &mut out, &mut sums);
            }
        });
    });
}

/// Cuts a window into those of some tasks, each with so many of the strips.
fn cut<'a>(
    strips: usize,
    tasks: usize,
    out: Window<'a>,
    split: impl Fn(Window<'a>, usize) -> (Window<'a>, Window<'a>),
) -> Vec<(Range<usize>, Window<'a>)> {
    let mut rest = Some(out);
    let one = |i| {
        let part = par::part(strips, tasks, i);
        let (own, others) = split(rest.take()?, part.len());
        rest = Some(others);
        Some((part, own))
    };
    (0..tasks).filter_map(one).collect()
}

/// Some strips of rows against some columns.
struct Task<'a> {
    lefts: &'a Lefts<'a>,
    rights: Rights<'a>,
    strips: Range<usize>,
    /// Along the inner dimension.
    units: Range<usize>,
    add: bool,
    /// Whether the right side is far away, and every strip of it wanted once.
    ahead: bool,
}

impl Task<'_> {
    /// The window begins with the first strip and column.
    fn run(
        &self,
        square: &mut dyn Square,
        columns: Range<usize>,
        out: &mut Window<'_>,
        sums: &mut Floats,
    ) {
        let side = self.rights.own.side();
        for column in columns.clone() {
            let ahead = self.ahead && column + 1 < columns.end;
            let col = (column - columns.start) * SQUARE;
            for first in self.strips.clone().step_by(STRIPS) {
                let some = first..(first + STRIPS).min(self.strips.end);
                let lines = SQUARE.div_ceil(some.len());
                for block in cuts(self.units.clone(), side.block) {
                    let is_first = block.start == self.units.start;
                    let is_last = block.end == self.units.end;
                    if !(is_first && is_last) && sums.is_empty() {
                        *sums = Floats::dirty(STRIPS * SQUARE * SQUARE);
                    }
                    for (i, strip) in some.clone().enumerate() {
                        let row = (strip - self.strips.start) * SQUARE;
                        let between = i * SQUARE * SQUARE;
                        if !is_first {
                            square.load(Spot::of(&mut sums[between..], SQUARE));
                        } else if let (true, Some(spot)) = (self.add, out.spot(row, col)) {
                            square.load(spot);
                        } else {
                            square.zero();
                        }
                        let first = i * lines;
                        let ahead = ahead.then_some(Lines { first, lines });
                        let own = (&self.lefts.own, strip, self.lefts.begin);
                        add(square, own, (self.rights.own, column), &block, ahead);
                        if !is_last {
                            square.store(Spot::of(&mut sums[between..], SQUARE));
                            continue;
                        }
                        if let Some(right) = self.rights.low {
                            let (low, all) = ((&self.lefts.low, strip, 0), 0..right.side().units);
                            add(square, low, (right, column), &all, None);
                        }
                        finish(square, out, (row, col), self.add);
                    }
                }
            }
        }
    }
}

/// Adds the products of a block, asking for some lines of each step of the next column's.
#[inline(always)]
fn add(
    square: &mut dyn Square,
    (left, row, begin): (&Left<'_>, usize, usize),
    (right, column): (&Right<'_>, usize),
    block: &Range<usize>,
    ahead: Option<Lines>,
) {
    let (parts, right_parts) = (left.parts, right.side().parts);
    for units in right.side().pieces(block) {
        let of_left = units.start - begin..units.end - begin;
        let lefts = [0, 1, 2].map(|part| left.strip(row, part.min(parts - 1), &of_left));
        let [at, of_parts, of_strips] = right.side().place(column - right.first, &units);
        let rights = right.units(at, of_parts, &units);
        let (lefts, rights) = (&lefts[..parts], &rights[..right_parts]);
        match ahead {
            Some(Lines { first, lines }) => {
                let next = right.units(at + of_strips, of_parts, &units);
                let right = &next[..right_parts];
                square.add(
                    lefts,
                    rights,
                    Ahead {
                        right,
                        first,
                        lines,
                    },
                );
            }
            None => square.add(lefts, rights, Ahead::default()),
        }
    }
}

/// Lines of each step.
#[derive(Clone, Copy)]
struct Lines {
    first: usize,
    lines: usize,
}

/// Writes what there is of a square.
fn finish(square: &mut dyn Square, out: &mut Window<'_>, (row, col): (usize, usize), add: bool) {
    if let Some(spot) = out.spot(row, col) {
        return square.store(spot);
    }
    let mut whole = [0.0; SQUARE * SQUARE];
    square.store(Spot::of(&mut whole, SQUARE));
    for (row, sums) in (row..out.rows()).zip(whole.chunks(SQUARE)) {
        for (out, sum) in out.row(row, col).iter_mut().zip(sums) {
            *out = if add { *out + sum } else { *sum };
        }
    }
}
