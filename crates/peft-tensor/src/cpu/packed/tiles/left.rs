//! The left side in tiles: sixteen rows of sixteen units each, the two of a strip side by side for each step.

use std::ops::Range;

use super::super::lanes::{Lanes, WIDTH, Work};
use super::super::pack::{remainder, transpose};
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
            let strip = Strip {
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
            unreachable!("columns of values that are sums of parts");
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
                let rest = remainder::<L, f32, 1>(l, &x[whole * VALUES..]);
                l.store(rest[0], &mut out[whole * STEP..]);
            }
        }
    }

    /// Pairs of values below each other are units; squares of them are transposed.
    #[inline(always)]
    fn by_columns<L: Lanes>(self, l: L) {
        let Self {
            x,
            rows,
            inside,
            out,
        } = self;
        for (step, out) in out.chunks_mut(STEP).enumerate() {
            let mut squares = [[l.zero(); WIDTH]; 2];
            for i in 0..WIDTH {
                let at = step * VALUES + 2 * i;
                let pair = [at, at + 1].map(|at| match at < inside {
                    true => &x.data[at * x.cs..][..rows],
                    false => &[],
                });
                let (a, b) = (column(l, pair[0]), column(l, pair[1]));
                (squares[0][i], squares[1][i]) = l.weave(a, b);
            }
            for (mut square, out) in squares.into_iter().zip(out.chunks_mut(STEP / 2)) {
                transpose(l, &mut square);
                for i in 0..WIDTH {
                    l.store(square[i], &mut out[i * TILE..]);
                }
            }
        }
    }
}

/// The units of at most a square's rows, zero beyond.
#[inline(always)]
fn column<L: Lanes>(l: L, values: &[f32]) -> L::V {
    match values.len() == SQUARE {
        true => l.units(values),
        false => remainder::<L, f32, 1>(l, values)[0],
    }
}
