//! The left side in tiles: sixteen rows of sixteen units each, the two of a strip side by side for each step.

use std::ops::Range;

use rayon::prelude::*;

use super::super::lanes::{Lanes, WIDTH, Work};
use super::super::pack::{pair, remainder, transpose};
use super::super::parts::Part;
use super::square::{SQUARE, STEP, TILE};
use crate::cpu::matmul::View;

/// Values of a step along the inner dimension.
const VALUES: usize = 2 * WIDTH;

/// The left side: strips of rows, in each the parts, in these the steps.
pub(super) struct Left<'a> {
    pub(super) rows: usize,
    pub(super) parts: usize,
    steps: usize,
    units: &'a [u32],
}

/// Units of a left side.
pub(super) fn len(rows: usize, inside: usize, parts: usize) -> usize {
    rows.div_ceil(SQUARE) * parts * inside.div_ceil(VALUES) * STEP
}

impl<'a> Left<'a> {
    /// Packs `rows` rows of `inside` values, with contiguous rows or columns, into `units`; values are rounded, or sums of
    /// several parts.
    pub(super) fn pack<L: Lanes>(
        l: L,
        x: View<'_>,
        rows: usize,
        inside: usize,
        parts: usize,
        units: &'a mut [u32],
        threads: bool,
    ) -> Self {
        let steps = inside.div_ceil(VALUES);
        let units = &mut units[..len(rows, inside, parts)];
        let one = |(strip, out): (usize, &mut [u32])| {
            let first = strip * SQUARE;
            for (part, out) in out.chunks_mut(steps * STEP).enumerate() {
                let strip = Strip {
                    x: View {
                        data: &x.data[first * x.rs..],
                        ..x
                    },
                    rows: (rows - first).min(SQUARE),
                    inside,
                    out,
                };
                match (parts, part) {
                    (1, _) => l.run(strip),
                    (_, 0) => Part::<L, 0>(l).run(strip),
                    (_, 1) => Part::<L, 1>(l).run(strip),
                    _ => Part::<L, 2>(l).run(strip),
                }
            }
        };
        let size = (parts * steps * STEP).max(1);
        // A task long enough to be worth waking a thread.
        let together = (16 * 1024 / size).max(1);
        if threads && units.len() > together * size {
            let tasks = units.par_chunks_mut(size).enumerate();
            tasks.with_min_len(together).for_each(one);
        } else {
            units.chunks_mut(size).enumerate().for_each(one);
        }
        Self {
            rows,
            parts,
            steps,
            units,
        }
    }

    /// Some units along the inner dimension, whole steps, of one part of a strip.
    #[inline(always)]
    pub(super) fn strip(&self, strip: usize, part: usize, units: &Range<usize>) -> &'a [u32] {
        let first = (strip * self.parts + part) * self.steps * STEP;
        &self.units[first + units.start * SQUARE..first + units.end * SQUARE]
    }
}

/// One strip in one part; what is missing of its rows is anything.
struct Strip<'a> {
    x: View<'a>,
    rows: usize,
    inside: usize,
    out: &'a mut [u32],
}

impl<L: Lanes> Work<L> for Strip<'_> {
    #[inline(always)]
    fn on(self, l: L) {
        if self.x.cs == 1 {
            self.from_rows(l);
        } else {
            assert_eq!(self.x.rs, 1, "a side without contiguous rows or columns");
            self.from_columns(l);
        }
    }
}

impl Strip<'_> {
    #[inline(always)]
    fn from_rows<L: Lanes>(self, l: L) {
        for row in 0..self.rows {
            let x = &self.x.data[row * self.x.rs..][..self.inside];
            let out = &mut self.out[row * TILE..];
            let whole = self.inside / VALUES;
            for step in 0..whole {
                l.store(l.units(&x[step * VALUES..]), &mut out[step * STEP..]);
            }
            if whole * VALUES < self.inside {
                let rest = remainder(l, &x[whole * VALUES..]);
                l.store(rest, &mut out[whole * STEP..]);
            }
        }
    }

    /// Pairs of values below each other are units; squares of them are transposed.
    #[inline(always)]
    fn from_columns<L: Lanes>(self, l: L) {
        for (step, out) in self.out.chunks_mut(STEP).enumerate() {
            for (half, out) in out.chunks_mut(STEP / 2).enumerate() {
                let first = half * TILE;
                let mut square = [l.zero(); WIDTH];
                if first >= self.rows {
                    continue;
                }
                let count = (self.rows - first).min(TILE);
                for (i, line) in square.iter_mut().enumerate() {
                    let (mut a, mut b) = ([0.0; WIDTH], [0.0; WIDTH]);
                    for (j, row) in [&mut a, &mut b].into_iter().enumerate() {
                        let at = step * VALUES + 2 * i + j;
                        if at < self.inside {
                            let from = &self.x.data[at * self.x.cs + first..];
                            match from.first_chunk::<WIDTH>() {
                                Some(from) if count == WIDTH => *row = *from,
                                _ => row[..count].copy_from_slice(&from[..count]),
                            }
                        }
                    }
                    let mut units = [0; WIDTH];
                    pair(l, &a, &b, &mut units);
                    *line = l.load(&units);
                }
                transpose(l, &mut square);
                for i in 0..WIDTH {
                    l.store(square[i], &mut out[i * TILE..]);
                }
            }
        }
    }
}
