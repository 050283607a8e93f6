//! The left side in tiles: sixteen rows of sixteen units each, the two of a strip side by side for each step.

use std::ops::Range;

use super::super::lanes::{Lanes, WIDTH, Work};
use super::super::pack::{pair, remainder, transpose};
use super::super::parts::Part;
use super::square::{SQUARE, STEP, TILE};
use crate::cpu::matmul::View;
use crate::cpu::par;

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
            let mut strip = Strip {
                x: View {
                    data: &x.data[first * x.rs..],
                    ..x
                },
                rows: (rows - first).min(SQUARE),
                inside,
                out,
            };
            if parts == 1 {
                return l.run(strip);
            }
            if x.cs == 1 {
                return l.run(Parts(strip));
            }
            let len = steps * STEP;
            Part::<L, 0>(l).run(strip.part(len, 0));
            Part::<L, 1>(l).run(strip.part(len, 1));
            Part::<L, 2>(l).run(strip.part(len, 2));
        };
        let size = (parts * steps * STEP).max(1);
        // A task long enough to be worth waking a thread.
        let together = (16 * 1024 / size).max(1);
        if threads {
            par::chunks(units, together * size, |task, units| {
                let strips = units.chunks_mut(size).enumerate();
                strips.for_each(|(i, units)| one((task * together + i, units)));
            });
        } else {
            units.chunks_mut(size).enumerate().for_each(one);
        }
        Self::packed(rows, inside, parts, units)
    }

    /// What [`Left::pack`] made in `units`.
    pub(super) fn packed(rows: usize, inside: usize, parts: usize, units: &'a [u32]) -> Self {
        Self {
            rows,
            parts,
            steps: inside.div_ceil(VALUES),
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

/// Rows in all parts.
struct Parts<'a>(Strip<'a>);

impl<L: Lanes> Work<L> for Parts<'_> {
    #[inline(always)]
    fn on(self, l: L) {
        let Strip {
            x,
            rows,
            inside,
            out,
        } = self.0;
        let steps = inside.div_ceil(VALUES);
        let (first, rest) = out.split_at_mut(steps * STEP);
        let (second, third) = rest.split_at_mut(steps * STEP);
        for row in 0..rows {
            let x = &x.data[row * x.rs..][..inside];
            for step in 0..steps {
                let parts = match x[step * VALUES..].first_chunk::<VALUES>() {
                    Some(values) => l.parts(values),
                    None => {
                        let mut values = [0.0; VALUES];
                        let rest = &x[step * VALUES..];
                        values[..rest.len()].copy_from_slice(rest);
                        l.parts(&values)
                    }
                };
                let at = step * STEP + row * TILE;
                l.store(parts[0], &mut first[at..]);
                l.store(parts[1], &mut second[at..]);
                l.store(parts[2], &mut third[at..]);
            }
        }
    }
}

impl<L: Lanes> Work<L> for Strip<'_> {
    #[inline(always)]
    fn on(self, l: L) {
        if self.x.cs == 1 {
            self.by_rows(l);
        } else {
            assert_eq!(self.x.rs, 1, "a side without contiguous rows or columns");
            self.by_columns(l);
        }
    }
}

impl Strip<'_> {
    /// The strip with the place of one of several parts, each of `len` units.
    fn part(&mut self, len: usize, part: usize) -> Strip<'_> {
        Strip {
            out: &mut self.out[part * len..][..len],
            ..*self
        }
    }

    #[inline(always)]
    fn by_rows<L: Lanes>(self, l: L) {
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
    fn by_columns<L: Lanes>(self, l: L) {
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
