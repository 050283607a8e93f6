//! Attention by tiles: strips of queries against keys and values that are packed once for all of them.
//!
//! A strip's scores against some of the keys it sees stay in the first-level cache from the product to the softmax to the
//! next product, for which they are packed there. The backward pass takes several strips at a time, so that the sums of dk and
//! dv, which it holds transposed, are read and written once for all of them.

use std::ops::Range;

use super::super::lanes::{self, Lanes, WIDTH};
use super::super::pack::transpose;
use super::super::side::{Panels, Side};
use super::super::{columns, pack};
use super::left::{self, Left};
use super::out::Spot;
use super::square::{Ahead, SQUARE, Square, TILE, Tiles};
use crate::cpu::attention::{Geometry, Keys, Seen, row_grad, softmax_of, weights};
use crate::cpu::matmul::View;
use crate::cpu::par;
use crate::cpu::pool::Floats;
use crate::cpu::simd::dot;

/// Keys that a strip's scores are of at a time.
const KEYS: usize = 256;

/// Strips of the backward pass that are taken together, at least.
const STRIPS: usize = 4;

/// Keys or values of all heads as right sides, one after the other.
struct Rights {
    side: Side,
    units: Floats,
}

impl Rights {
    /// Keys as columns: what queries are multiplied with.
    fn across<L: Lanes>(l: L, g: &Geometry<'_>, x: &[f32]) -> Self {
        let (t, d) = (g.t, g.spec.head_dim);
        Self::pack(Side::tiles(t, d, false, 1, 1), g, |side, first, units| {
            pack::dense_rows(l, side, &x[first..], g.kv_width, d, units);
        })
    }

    /// Keys one below the other: what weights are multiplied with.
    fn along<L: Lanes>(l: L, g: &Geometry<'_>, x: &[f32]) -> Self {
        let (t, d) = (g.t, g.spec.head_dim);
        Self::pack(Side::tiles(d, t, false, 1, 1), g, |side, first, units| {
            columns::dense_columns(l, side, &x[first..], g.kv_width, t, units, &mut Vec::new());
        })
    }

    /// Calls `pack` for each head with where it begins and its place.
    fn pack(side: Side, g: &Geometry<'_>, pack: impl Fn(&Side, usize, &mut [u32]) + Sync) -> Self {
        let heads = g.spec.kv_heads;
        let mut units = Floats::dirty(g.b * heads * side.len());
        par::chunks(&mut units, side.len(), |i, units| {
            let first = i / heads * g.t * g.kv_width + i % heads * g.spec.head_dim;
            pack(&side, first, bytemuck::cast_slice_mut(units));
        });
        Self { side, units }
    }

    /// Those of one key/value head.
    fn of(&self, head: usize) -> Panels<'_> {
        let len = self.side.len();
        let units = bytemuck::cast_slice(&self.units[head * len..][..len]);
        Panels::new(&self.side, units)
    }
}

/// Adds to a square the products of some units of a strip of the left side and as many from `first` on of one of the right.
fn add(
    square: &mut dyn Square,
    (left, row, units): (&Left<'_>, usize, Range<usize>),
    (right, column, first): (&Panels<'_>, usize, usize),
) {
    let right = right.strip(column, &(first..first + units.len()));
    square.add(&[left.strip(row, 0, &units)], &[right], Ahead::default());
}

/// Units of so many values along the inner dimension, whole steps.
fn units(values: usize) -> usize {
    values.div_ceil(SQUARE) * TILE
}

/// `out = q keys^T` for a strip and some keys, rows of `out` `stride` apart.
fn scores(
    square: &mut dyn Square,
    left: &Left<'_>,
    row: usize,
    right: &Panels<'_>,
    inside: usize,
    keys: &Keys,
    out: &mut [f32],
) {
    for (first, len, column) in keys.spans() {
        for strip in 0..len.div_ceil(SQUARE) {
            square.zero();
            let left = (left, row, 0..units(inside));
            add(square, left, (right, first / SQUARE + strip, 0));
            square.store(Spot::of(&mut out[column + strip * SQUARE..], keys.stride));
        }
    }
}

/// `out = weights values` for a strip and some keys, `out [SQUARE, width]`, added to it if `more`.
fn product(
    square: &mut dyn Square,
    left: &Left<'_>,
    right: &Panels<'_>,
    keys: &Keys,
    out: &mut [f32],
    width: usize,
    more: bool,
) {
    for strip in 0..width / SQUARE {
        let out = &mut out[strip * SQUARE..];
        match more {
            true => square.load(Spot::of(out, width)),
            false => square.zero(),
        }
        for (first, len, column) in keys.spans() {
            let first_unit = column / 2;
            let left = (left, 0, first_unit..first_unit + units(len));
            add(square, left, (right, strip, first / 2));
        }
        square.store(Spot::of(out, width));
    }
}

/// What attention multiplies with.
pub(in super::super) struct Forward<L, T> {
    way: (L, T),
    keys: Rights,
    values: Rights,
}

impl<L: Lanes, T: Tiles> Forward<L, T> {
    pub(in super::super) fn new(way: (L, T), g: &Geometry<'_>, k: &[f32], v: &[f32]) -> Self {
        let (l, _) = way;
        Self {
            way,
            keys: Rights::across(l, g, k),
            values: Rights::along(l, g, v),
        }
    }

    /// A block of queries: `out [queries, heads]` and `lse [heads, queries]`, whatever was in them.
    pub(in super::super) fn block(
        &self,
        g: &Geometry<'_>,
        q: &[f32],
        batch: usize,
        queries: &Range<usize>,
        out: &mut [f32],
        lse: &mut [f32],
    ) {
        let (l, tiles) = self.way;
        let (d, width) = (g.spec.head_dim, g.spec.head_dim.next_multiple_of(SQUARE));
        let group = g.spec.heads / g.spec.kv_heads;
        let mut left = Floats::dirty(left::len(SQUARE, d, 1));
        let mut packed = Floats::dirty(left::len(SQUARE, KEYS, 1));
        let mut tile = Floats::dirty(SQUARE * KEYS);
        let [mut sum, mut more] = [(); 2].map(|()| Floats::dirty(SQUARE * width));
        tiles.with(|square| {
            for start in queries.clone().step_by(SQUARE) {
                let strip = start..(start + SQUARE).min(queries.end);
                let keys = g.keys(batch, &strip, SQUARE);
                let parts_of = keys.parts(KEYS);
                for h in 0..g.spec.heads {
                    let head = batch * g.spec.kv_heads + h / group;
                    let (keys_of, values_of) = (self.keys.of(head), self.values.of(head));
                    let left = as_units(&mut left);
                    let rows = View::rows(&q[g.place(batch * g.s + start, h)..], g.q_width);
                    let left = Left::pack(l, rows, strip.len(), d, 1, left, false);
                    let mut seen = [Seen::default(); SQUARE];
                    sum.fill(0.0);
                    for (n, (at, part)) in parts_of.iter().enumerate() {
                        let tile = &mut tile[..SQUARE * part.stride];
                        scores(square, &left, 0, &keys_of, d, part, tile);
                        for (r, row) in tile.chunks_mut(part.stride).take(strip.len()).enumerate() {
                            let columns = g.columns_of(batch, start + r, &keys, *at, part);
                            let bias = part.bias.as_deref();
                            let (max, total) =
                                weights(row, &columns, bias, g.spec.scale, g.spec.softcap);
                            seen[r].add(max, total);
                        }
                        let packed = as_units(&mut packed);
                        let rows = View::rows(tile, part.stride);
                        let left = Left::pack(l, rows, strip.len(), part.stride, 1, packed, false);
                        if n == 0 {
                            product(square, &left, &values_of, part, &mut sum, width, false);
                            continue;
                        }
                        product(square, &left, &values_of, part, &mut more, width, false);
                        let both = sum.chunks_mut(width).zip(more.chunks(width));
                        for ((sum, more), seen) in both.zip(&seen).take(strip.len()) {
                            for (sum, more) in sum.iter_mut().zip(more) {
                                *sum = *sum * seen.before + more * seen.last;
                            }
                        }
                    }
                    for (r, (row, seen)) in
                        sum.chunks(width).zip(&seen).take(strip.len()).enumerate()
                    {
                        let i = start - queries.start + r;
                        let inverse;
                        (inverse, lse[h * queries.len() + i]) = softmax_of(seen.max, seen.sum);
                        let out = &mut out[g.place(i, h)..][..d];
                        for (o, v) in out.iter_mut().zip(row) {
                            *o = v * inverse;
                        }
                    }
                }
            }
        });
    }
}

/// What the gradient of attention multiplies with.
pub(in super::super) struct Backward<L, T> {
    way: (L, T),
    keys: [Rights; 2],
    values: Rights,
}

/// A strip of queries of one head.
struct Strip {
    head: usize,
    queries: Range<usize>,
}

/// Strips one after the other, in rows and in columns: of queries, or of the gradients of outputs.
struct Lefts {
    rows: Floats,
    by_row: Floats,
    by_column: Floats,
}

/// What a task of the backward pass works with.
struct Work<'a> {
    g: &'a Geometry<'a>,
    batch: usize,
    /// A head's keys, across and along, and its values.
    rights: [Panels<'a>; 3],
    lse: &'a [f32],
    /// The sums of dk and dv, transposed: `[width, keys]`, both in whole squares.
    sums: [Floats; 2],
    width: usize,
    keys: usize,
}

impl<L: Lanes, T: Tiles> Backward<L, T> {
    pub(in super::super) fn new(way: (L, T), g: &Geometry<'_>, k: &[f32], v: &[f32]) -> Self {
        let (l, _) = way;
        Self {
            way,
            keys: [Rights::across(l, g, k), Rights::along(l, g, k)],
            values: Rights::across(l, g, v),
        }
    }

    /// Gradients of some query heads of a batch entry that share a key/value head: dq `[S, heads * head_dim]`, dk and dv `[T,
    /// head_dim]`, whatever was in them.
    pub(in super::super) fn heads(
        &self,
        g: &Geometry<'_>,
        q: &[f32],
        out: &[f32],
        lse: &[f32],
        dout: &[f32],
        batch: usize,
        heads: &Range<usize>,
        [dq, dk, dv]: [&mut [f32]; 3],
    ) {
        let (l, tiles) = self.way;
        let (d, width) = (g.spec.head_dim, g.spec.head_dim.next_multiple_of(SQUARE));
        let head = batch * g.spec.kv_heads + heads.start / (g.spec.heads / g.spec.kv_heads);
        let keys = g.t.next_multiple_of(SQUARE);
        let mut work = Work {
            g,
            batch,
            rights: [&self.keys[0], &self.keys[1], &self.values].map(|all| all.of(head)),
            lse,
            sums: [(); 2].map(|()| Floats::zeros(width * keys)),
            width,
            keys,
        };
        let block = SQUARE * STRIPS.div_ceil(heads.len());
        tiles.with(|square| {
            for start in (0..g.s).step_by(block) {
                let queries = start..(start + block).min(g.s);
                let strips: Vec<Strip> = heads
                    .clone()
                    .flat_map(|head| queries.clone().step_by(SQUARE).map(move |i| (head, i)))
                    .map(|(head, first)| Strip {
                        head,
                        queries: first..(first + SQUARE).min(queries.end),
                    })
                    .collect();
                let [of_q, of_dout] = [q, dout].map(|x| Lefts::new(l, g, x, batch, &strips));
                let deltas: Vec<f32> = of_dout
                    .rows
                    .chunks(d)
                    .enumerate()
                    .map(|(n, dout)| {
                        let strip = &strips[n / SQUARE];
                        // Rows beyond the last are zero.
                        let i = (strip.queries.start + n % SQUARE).min(g.s - 1);
                        dot(&out[g.place(batch * g.s + i, strip.head)..][..d], dout)
                    })
                    .collect();
                let sums = work.block(l, square, &queries, &strips, [&of_q, &of_dout], &deltas);
                for (rows, strip) in sums.chunks(SQUARE * width).zip(&strips) {
                    for (row, i) in rows.chunks(width).zip(strip.queries.clone()) {
                        let at = (i * heads.len() + strip.head - heads.start) * d;
                        dq[at..at + d].copy_from_slice(&row[..d]);
                    }
                }
            }
        });
        for (sums, out) in work.sums.iter().zip([dk, dv]) {
            l.run(Turn { sums, keys, d, out });
        }
    }
}

/// Sums, transposed: `[width, keys]` to `[T, head_dim]`.
struct Turn<'a> {
    sums: &'a [f32],
    keys: usize,
    d: usize,
    out: &'a mut [f32],
}

impl<L: Lanes> lanes::Work<L> for Turn<'_> {
    #[inline(always)]
    fn on(self, l: L) {
        let Self { keys, d, .. } = self;
        for (n, out) in self.out.chunks_mut(WIDTH * d).enumerate() {
            for at in (0..d).step_by(WIDTH) {
                let mut square = [l.zero(); WIDTH];
                for (i, row) in square.iter_mut().enumerate() {
                    let sums = &self.sums[(at + i) * keys + n * WIDTH..][..WIDTH];
                    *row = l.load(bytemuck::cast_slice(sums));
                }
                transpose(l, &mut square);
                for (key, out) in square.into_iter().zip(out.chunks_mut(d)) {
                    let out = &mut out[at..];
                    match out.len() >= WIDTH {
                        true => l.store(key, bytemuck::cast_slice_mut(out)),
                        false => {
                            let mut whole = [0; WIDTH];
                            l.store(key, &mut whole);
                            out.copy_from_slice(bytemuck::cast_slice(&whole[..out.len()]));
                        }
                    }
                }
            }
        }
    }
}

impl Lefts {
    fn new<L: Lanes>(l: L, g: &Geometry<'_>, x: &[f32], batch: usize, strips: &[Strip]) -> Self {
        let (d, count) = (g.spec.head_dim, strips.len() * SQUARE);
        let mut rows = Floats::dirty(count * d);
        for (rows, strip) in rows.chunks_mut(SQUARE * d).zip(strips) {
            let (there, beyond) = rows.split_at_mut(strip.queries.len() * d);
            for (row, i) in there.chunks_mut(d).zip(strip.queries.clone()) {
                row.copy_from_slice(&x[g.place(batch * g.s + i, strip.head)..][..d]);
            }
            beyond.fill(0.0);
        }
        let mut all = Self {
            by_row: Floats::dirty(left::len(count, d, 1)),
            by_column: Floats::dirty(left::len(d, count, 1)),
            rows,
        };
        let rows = View::rows(&all.rows, d);
        Left::pack(l, rows, count, d, 1, as_units(&mut all.by_row), false);
        let units = as_units(&mut all.by_column);
        Left::pack(l, rows.t(), d, count, 1, units, false);
        all
    }
}

impl Work<'_> {
    /// Adds what some strips give dk and dv; dq of each, `[SQUARE, width]`.
    fn block<L: Lanes>(
        &mut self,
        l: L,
        square: &mut dyn Square,
        queries: &Range<usize>,
        strips: &[Strip],
        lefts: [&Lefts; 2],
        deltas: &[f32],
    ) -> Floats {
        let (g, batch, width) = (self.g, self.batch, self.width);
        let (d, inside) = (g.spec.head_dim, strips.len() * SQUARE);
        let [across, along, values] = &self.rights;
        let by_row = lefts.map(|x| Left::packed(inside, d, 1, bytemuck::cast_slice(&x.by_row)));
        let by_column =
            lefts.map(|x| Left::packed(d, inside, 1, bytemuck::cast_slice(&x.by_column)));
        let mut dq = Floats::zeros(inside * width);
        let [mut tile, mut slopes] = [(); 2].map(|()| Floats::dirty(SQUARE * KEYS));
        let mut packed = Floats::dirty(left::len(SQUARE, KEYS, 1));
        let mut panels = [(); 2].map(|()| Floats::dirty(KEYS * inside / 2));
        let mut line = Vec::new();
        let keys = g.keys(batch, queries, SQUARE);
        for (at, part) in keys.parts(KEYS) {
            let stride = part.stride;
            let side = Side::tiles(stride, inside, false, 1, 1);
            let [tile, slopes] = [&mut tile, &mut slopes].map(|tile| &mut tile[..SQUARE * stride]);
            let [of_weights, of_slopes] = panels
                .each_mut()
                .map(|units| &mut as_units(units)[..side.len()]);
            for (n, strip) in strips.iter().enumerate() {
                scores(square, &by_row[0], n, across, d, &part, tile);
                scores(square, &by_row[1], n, values, d, &part, slopes);
                let both = tile.chunks_mut(stride).zip(slopes.chunks_mut(stride));
                for ((i, (weights, slopes)), delta) in
                    strip.queries.clone().zip(both).zip(&deltas[n * SQUARE..])
                {
                    row_grad(
                        weights,
                        slopes,
                        &g.columns_of(batch, i, &keys, at, &part),
                        part.bias.as_deref(),
                        g.spec.scale,
                        g.spec.softcap,
                        self.lse[(batch * g.spec.heads + strip.head) * g.s + i],
                        *delta,
                    );
                }
                let count = strip.queries.len();
                let rows = View::rows(slopes, stride);
                let left = Left::pack(l, rows, count, stride, 1, as_units(&mut packed), false);
                let dq = &mut dq[n * SQUARE * width..];
                product(square, &left, along, &part, dq, width, at > 0);
                for (tile, units) in [(&*tile, &mut *of_weights), (&*slopes, &mut *of_slopes)] {
                    let rows = (tile, stride, count);
                    let steps = n * TILE..(n + 1) * TILE;
                    columns::dense_pairs(l, &side, rows, steps, units, &mut line);
                }
            }
            let of_keys = (&by_column[0], Panels::new(&side, of_slopes));
            let of_values = (&by_column[1], Panels::new(&side, of_weights));
            for ((left, right), sums) in [of_keys, of_values].iter().zip(&mut self.sums) {
                for (first, len, column) in part.spans() {
                    for strip in 0..len.div_ceil(SQUARE) {
                        for row in 0..width / SQUARE {
                            let sums =
                                &mut sums[row * SQUARE * self.keys + first + strip * SQUARE..];
                            square.load(Spot::of(sums, self.keys));
                            let left = (*left, row, 0..units(inside));
                            add(square, left, (right, column / SQUARE + strip, 0));
                            square.store(Spot::of(sums, self.keys));
                        }
                    }
                }
            }
        }
        dq
    }
}

/// Memory of the pool as units.
fn as_units(values: &mut Floats) -> &mut [u32] {
    bytemuck::cast_slice_mut(values)
}

#[cfg(test)]
mod tests;
