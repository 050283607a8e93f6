//! The loops of a product of tiles.
//!
//! Rounded values: blocks of both sides that fit into the first-level cache, of which the right one stays there for the
//! strips of the left side, and the sums between blocks in a place as near. Sums of parts make more of what they load, and are
//! as fast from the second-level cache, where blocks of theirs fit.

use std::ops::Range;

use super::super::columns::Region;
use super::super::side::{Panels, Side, cuts};
use super::Places;
use super::left::Left;
use super::out::{Spot, Window};
use super::square::{Ahead, SQUARE, Square, TILE, Tiles};
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

/// A right side, from one of the result's strips of columns and one of the units on.
pub(super) struct Right<'a> {
    panels: Panels<'a>,
    strip: usize,
    begin: usize,
}

/// A right side and that of the product of low rank, where there is one.
#[derive(Clone, Copy)]
pub(super) struct Rights<'a> {
    pub(super) own: &'a Right<'a>,
    pub(super) low: Option<&'a Right<'a>>,
}

impl<'a> Right<'a> {
    pub(super) fn new(side: &'a Side, units: &'a [u32]) -> Self {
        Self {
            panels: Panels::new(side, units),
            strip: 0,
            begin: 0,
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

/// A right side that is packed where it is wanted.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    /// Along the inner dimension.
    pub(super) units: usize,
    /// Units and strips of columns that are packed at a time.
    pub(super) step: usize,
    pub(super) strips: usize,
    /// Of a piece.
    pub(super) side: &'a (dyn Fn(&Piece) -> Side + Sync),
    pub(super) pack: &'a (dyn Fn(&Piece, &Side, &mut [u32]) + Sync),
    /// What it is packed from.
    pub(super) region: &'a (dyn Fn(&Piece) -> Region + Sync),
}

/// Some columns of the right side over some units.
pub(super) struct Piece {
    pub(super) columns: Range<usize>,
    pub(super) units: Range<usize>,
}

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
    let tasks = split(strips, tasks, out, |out, strips| {
        out.split_rows(strips * SQUARE)
    });
    par::share(tasks, |(part, mut out)| {
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
                };
                task.run(square, 0..side.strips, None, &mut out, &mut sums);
            }
        });
    });
}

/// As [`by_rows`] where threads take columns, for which they pack the right side.
pub(super) fn by_columns<T: Tiles>(
    tiles: T,
    lefts: &Lefts<'_>,
    low: Option<&Right<'_>>,
    right: Columns<'_>,
    out: Window<'_>,
    add: bool,
) {
    let (cols, strips) = (out.cols(), out.cols().div_ceil(SQUARE));
    // As long as they can be: short parts of rows are slow to read.
    let tasks = rayon::current_num_threads().min(strips);
    let tasks = split(strips, tasks, out, |out, strips| {
        out.split_columns(strips * SQUARE)
    });
    let ranges: Vec<_> = cuts(0..right.units, right.step.max(1)).collect();
    par::share(tasks, |(part, out)| {
        let mut rest = Some(out);
        let mut pieces = Vec::new();
        for strips in cuts(part, right.strips.max(1)) {
            let columns = strips.start * SQUARE..(strips.end * SQUARE).min(cols);
            let piece = |units: &Range<usize>| Piece {
                columns: columns.clone(),
                units: units.clone(),
            };
            pieces.extend(ranges.iter().map(piece));
        }
        let mut sums = Floats::default();
        let mut memory = Floats::default();
        tiles.with(|square| {
            let mut window: Option<Window<'_>> = None;
            for (i, piece) in pieces.iter().enumerate() {
                let Piece { columns, units } = piece;
                if units.start == 0 {
                    let Some((own, others)) =
                        rest.take().map(|out| out.split_columns(columns.len()))
                    else {
                        break;
                    };
                    (window, rest) = (Some(own), Some(others));
                }
                let Some(out) = &mut window else { break };
                let side = (right.side)(piece);
                if memory.len() < side.len() {
                    memory = Floats::dirty(side.len());
                }
                let packed = bytemuck::cast_slice_mut(&mut memory[..side.len()]);
                (right.pack)(piece, &side, packed);
                let strip = columns.start / SQUARE;
                let task = Task {
                    lefts,
                    rights: Rights {
                        own: &Right {
                            panels: Panels::new(&side, packed),
                            strip,
                            begin: units.start,
                        },
                        low: low.filter(|_| units.end == right.units),
                    },
                    strips: 0..lefts.own.rows.div_ceil(SQUARE),
                    units: units.clone(),
                    add: add || units.start > 0,
                };
                let next = pieces.get(i + 1).map(right.region);
                task.run(square, strip..strip + side.strips, next, out, &mut sums);
            }
        });
    });
}

/// Cuts a window into those of some tasks, each with so many of the strips.
fn split<'a>(
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
}

impl Task<'_> {
    /// The window begins with the first strip and column. What is wanted after it is asked for meanwhile; if that is not
    /// known, the right side is far away and its next column is.
    fn run(
        &self,
        square: &mut dyn Square,
        columns: Range<usize>,
        next: Option<Region>,
        out: &mut Window<'_>,
        sums: &mut Floats,
    ) {
        let side = self.rights.own.side();
        let steps = columns.len() * self.strips.len() * self.units.len() / TILE;
        let mut coming = next.map(|region| Coming {
            each: region.runs.div_ceil(steps.max(1)),
            region,
        });
        for column in columns.clone() {
            let col = (column - columns.start) * SQUARE;
            for first in self.strips.clone().step_by(STRIPS) {
                let some = first..(first + STRIPS).min(self.strips.end);
                for block in cuts(self.units.clone(), side.block) {
                    let is_first = block.start == self.units.start;
                    let is_last = block.end == self.units.end;
                    if !(is_first && is_last) && sums.is_empty() {
                        *sums = Floats::dirty(STRIPS * SQUARE * SQUARE);
                    }
                    for (i, strip) in some.clone().enumerate() {
                        let place = ((strip - self.strips.start) * SQUARE, col);
                        let between = i * SQUARE * SQUARE;
                        if !is_first {
                            square.load(Spot::of(&mut sums[between..], SQUARE));
                        } else if self.add {
                            load(square, out, place);
                        } else {
                            square.zero();
                        }
                        let next = match &mut coming {
                            Some(coming) => Next::Region(coming),
                            None if column + 1 < columns.end => Next::Column(i, some.len()),
                            None => Next::Nothing,
                        };
                        // What is added to was just read.
                        let to = match is_last && !(is_first && self.add) {
                            true => out.spot(place.0, place.1).map(|spot| spot.start()),
                            false => None,
                        };
                        let own = (&self.lefts.own, strip, self.lefts.begin);
                        add(square, own, (self.rights.own, column), &block, (next, to));
                        if !is_last {
                            square.store(Spot::of(&mut sums[between..], SQUARE));
                            continue;
                        }
                        if let Some(right) = self.rights.low {
                            let (low, all) = ((&self.lefts.low, strip, 0), 0..right.side().units);
                            add(square, low, (right, column), &all, (Next::Nothing, None));
                        }
                        store(square, out, place);
                    }
                }
            }
        }
    }
}

/// What is asked for while a product is made.
enum Next<'a> {
    Nothing,
    /// A part of the next column of the right side: which, and of how many.
    Column(usize, usize),
    Region(&'a mut Coming),
}

/// What is left of a region, and how many of its runs each step asks for.
struct Coming {
    region: Region,
    each: usize,
}

impl Coming {
    /// Where those begin that so many steps ask for, and how many each of them does.
    fn take(&mut self, steps: usize) -> (*const u8, usize) {
        let Region {
            at, runs, apart, ..
        } = self.region;
        let taken = (steps * self.each).min(runs);
        self.region.at = at.wrapping_add(taken * apart);
        self.region.runs -= taken;
        (at, taken.div_ceil(steps.max(1)))
    }
}

/// Adds the products of a block.
#[inline(always)]
fn add(
    square: &mut dyn Square,
    (left, row, begin): (&Left<'_>, usize, usize),
    (right, column): (&Right<'_>, usize),
    block: &Range<usize>,
    (mut next, to): (Next<'_>, Option<(*const f32, usize)>),
) {
    let (side, parts) = (right.side(), left.parts);
    let block = block.start - right.begin..block.end - right.begin;
    for units in side.pieces(&block) {
        let first = right.begin + units.start - begin;
        let of_left = first..first + units.len();
        let lefts = [0, 1, 2].map(|part| left.strip(row, part.min(parts - 1), &of_left));
        let [at, of_parts, of_strips] = side.place(column - right.strip, &units);
        let rights = right.units(at, of_parts, &units);
        let (lefts, rights) = (&lefts[..parts], &rights[..side.parts]);
        match &mut next {
            Next::Nothing => {
                let ahead = Ahead {
                    to,
                    ..Ahead::default()
                };
                square.add(lefts, rights, ahead);
            }
            Next::Column(i, of) => {
                let lines = SQUARE.div_ceil(*of);
                let from = right.units(at + of_strips, of_parts, &units);
                let from = from.map(|part| part[*i * lines * TILE..].as_ptr().cast());
                let ahead = Ahead {
                    from: &from[..side.parts],
                    runs: 1,
                    apart: TILE * SQUARE * size_of::<u32>(),
                    lines,
                    to,
                };
                square.add(lefts, rights, ahead);
            }
            Next::Region(coming) => {
                let (from, runs) = coming.take(units.len() / TILE);
                let Region { apart, lines, .. } = coming.region;
                let ahead = Ahead {
                    from: &[from],
                    runs,
                    apart,
                    lines,
                    to,
                };
                square.add(lefts, rights, ahead);
            }
        }
    }
}

/// The sums from where what there is of a square is.
fn load(square: &mut dyn Square, out: &mut Window<'_>, (row, col): (usize, usize)) {
    if let Some(spot) = out.spot(row, col) {
        return square.load(spot);
    }
    let mut whole = [0.0; SQUARE * SQUARE];
    for (row, sums) in (row..out.rows()).zip(whole.chunks_mut(SQUARE)) {
        let there = out.row(row, col);
        sums[..there.len()].copy_from_slice(there);
    }
    square.load(Spot::of(&mut whole, SQUARE));
}

/// Writes what there is of a square.
fn store(square: &mut dyn Square, out: &mut Window<'_>, (row, col): (usize, usize)) {
    if let Some(spot) = out.spot(row, col) {
        return square.store(spot);
    }
    let mut whole = [0.0; SQUARE * SQUARE];
    square.store(Spot::of(&mut whole, SQUARE));
    for (row, sums) in (row..out.rows()).zip(whole.chunks(SQUARE)) {
        let there = out.row(row, col);
        there.copy_from_slice(&sums[..there.len()]);
    }
}
