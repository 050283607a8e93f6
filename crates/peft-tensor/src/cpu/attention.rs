//! Multi-head attention by blocks of queries, forward and backward.
//!
//! A block's scores against the keys it can see are one tile of at most [`TILE`] values; keys that causality or
//! the window hide from the whole block are never touched. The backward pass makes the tiles again from the
//! log-sum-exp of each row (as in FlashAttention, Dao et al. 2022), so nothing of size `S * T` is ever kept.

mod rows;

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

pub(super) use self::rows::weights;
use self::rows::{LANES, row_grad};
use super::matmul::{View, gemm_into};
use super::packed::{self, Kernel, Sides};
use super::par;
use super::pool::Floats;
use super::simd::{add_into, dot};
use crate::Precision;
use crate::backend::Attention;

/// Values of a score tile aimed at: 256 KiB of f32, about a second-level cache.
const TILE: usize = 64 * 1024;

/// Everything about a call but its values.
pub(super) struct Geometry<'a> {
    s: usize,
    pub(super) t: usize,
    pub(super) spec: &'a Attention,
    /// Width of a row of q and out.
    q_width: usize,
    /// Width of a row of k and v.
    kv_width: usize,
    /// Queries of a block.
    block: usize,
    /// 0 for keys that may be seen and -infinity for padding, `[B * T]`.
    bias: Option<Vec<f32>>,
    /// First position and end of each position's run of equal segments, `[B * T]`.
    runs: Option<Vec<(usize, usize)>>,
    /// What multiplies in the precision of this call, where it is not f32.
    kernel: Option<Kernel>,
}

/// The keys a block of queries works on: up to two spans of them, side by side in the tile.
pub(super) struct Keys {
    spans: [Range<usize>; 2],
    /// Columns of the tile.
    pub(super) width: usize,
    /// From a row of the tile to the next: whole blocks of [`LANES`].
    pub(super) stride: usize,
    /// `Geometry::bias` of these keys, `stride` long.
    pub(super) bias: Option<Vec<f32>>,
}

impl Keys {
    /// (first key, keys, first column of the tile) of each span.
    pub(super) fn spans(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        let [front, near] = &self.spans;
        [
            (front.start, front.len(), 0),
            (near.start, near.len(), front.len()),
        ]
        .into_iter()
        .filter(|s| s.1 > 0)
    }
}

impl<'a> Geometry<'a> {
    fn new(precision: Precision, b: usize, s: usize, t: usize, spec: &'a Attention) -> Self {
        // Enough blocks for a few threads, small enough tiles.
        let block = (b * s)
            .div_ceil(8)
            .clamp(16, 64)
            .min((TILE / t.max(1)).max(16))
            .min(s.max(1));
        let bias = spec.mask.keys.as_ref().map(|keys| {
            keys.iter()
                .map(|k| if *k { 0.0 } else { f32::NEG_INFINITY })
                .collect()
        });
        Self {
            s,
            t,
            spec,
            q_width: spec.heads * spec.head_dim,
            kv_width: spec.kv_heads * spec.head_dim,
            block,
            bias,
            runs: spec.mask.segments.as_ref().map(|all| runs(all, t)),
            kernel: packed::kernel(precision),
        }
    }

    /// First key and end of the keys that query i of a row of the batch sees, the prefix apart.
    fn seen(&self, batch: usize, i: usize) -> (usize, usize) {
        // The position of query i among the keys.
        let at = i + self.t - self.s;
        let first = self
            .spec
            .window
            .map_or(0, |window| (at + 1).saturating_sub(window));
        let end = if self.spec.causal { at + 1 } else { self.t };
        let (start, stop) = match &self.runs {
            Some(runs) => runs[batch * self.t + at],
            None => (0, self.t),
        };
        (first.max(start), end.min(stop))
    }

    pub(super) fn keys(&self, batch: usize, queries: &Range<usize>) -> Keys {
        let prefix = self.spec.prefix.min(self.t);
        let first = self.seen(batch, queries.start).0;
        let end = self.seen(batch, queries.end - 1).1.max(prefix);
        let spans = if first <= prefix {
            [0..0, 0..end]
        } else {
            [0..prefix, first..end.max(first)]
        };
        let width = spans[0].len() + spans[1].len();
        let stride = width.next_multiple_of(LANES);
        let bias = self.bias.as_ref().map(|bias| {
            let bias = &bias[batch * self.t..(batch + 1) * self.t];
            let mut bias = [&bias[spans[0].clone()], &bias[spans[1].clone()]].concat();
            bias.resize(stride, 0.0);
            bias
        });
        Keys {
            spans,
            width,
            stride,
            bias,
        }
    }

    /// The columns of the tile that query i sees.
    pub(super) fn columns(&self, batch: usize, i: usize, keys: &Keys) -> [Range<usize>; 2] {
        let prefix = self.spec.prefix.min(self.t);
        let (first, end) = self.seen(batch, i);
        let first = first.max(prefix);
        let end = end.max(first);
        let [front, near] = &keys.spans;
        let shift = near.start - front.len();
        [0..prefix, first - shift..end - shift]
    }

    /// Head `h` of rows from `row` of q, out or their gradients.
    fn q<'v>(&self, x: &'v [f32], row: usize, h: usize) -> View<'v> {
        let first = row * self.q_width + h * self.spec.head_dim;
        View::rows(&x[first..], self.q_width)
    }

    /// The head of k or v that query head `h` uses, rows from `row`.
    pub(super) fn kv<'v>(&self, x: &'v [f32], row: usize, h: usize) -> View<'v> {
        let group = self.spec.heads / self.spec.kv_heads;
        let first = row * self.kv_width + h / group * self.spec.head_dim;
        View::rows(&x[first..], self.kv_width)
    }

    /// `out = a b`, added to it if `add`; a `[m, k]`, b `[k, n]`, rows of `out` `width` apart.
    fn multiply(
        &self,
        sides: &mut Sides,
        (m, k, n): (usize, usize, usize),
        a: View<'_>,
        b: View<'_>,
        out: &mut [f32],
        width: usize,
        add: bool,
    ) {
        match self.kernel {
            Some(kernel) => kernel.dense(sides, (m, k, n), a, b, out, width, add),
            None => gemm_into(m, k, n, a, b, out, width, add, 1.0, Parallelism::None),
        }
    }

    /// `tile = rows keys^T` for the queries' rows and the keys' heads.
    fn scores(
        &self,
        sides: &mut Sides,
        rows: View<'_>,
        count: usize,
        x: &[f32],
        batch: usize,
        h: usize,
        keys: &Keys,
        tile: &mut [f32],
    ) {
        for (first, len, column) in keys.spans() {
            let keys_t = self.kv(x, batch * self.t + first, h).t();
            let shape = (count, self.spec.head_dim, len);
            let tile = &mut tile[column..];
            self.multiply(sides, shape, rows, keys_t, tile, keys.stride, false);
        }
    }

    /// `out = tile x` for k or v; rows of `out` are `width` apart.
    fn product(
        &self,
        sides: &mut Sides,
        tile: &[f32],
        count: usize,
        x: &[f32],
        batch: usize,
        h: usize,
        keys: &Keys,
        out: &mut [f32],
        width: usize,
    ) {
        let mut add = false;
        for (first, len, column) in keys.spans() {
            let tile = View::rows(&tile[column..], keys.stride);
            let values = self.kv(x, batch * self.t + first, h);
            let shape = (count, len, self.spec.head_dim);
            self.multiply(sides, shape, tile, values, out, width, add);
            add = true;
        }
    }
}

/// For each position of rows of `t`, where its run of equal numbers begins and ends.
fn runs(segments: &[u32], t: usize) -> Vec<(usize, usize)> {
    let mut all = Vec::with_capacity(segments.len());
    for row in segments.chunks(t.max(1)) {
        let mut start = 0;
        for run in row.chunk_by(|a, b| a == b) {
            all.resize(all.len() + run.len(), (start, start + run.len()));
            start += run.len();
        }
    }
    all
}

pub(super) fn attention(
    precision: Precision,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    b: usize,
    s: usize,
    t: usize,
    spec: &Attention,
) -> (Floats, Vec<f32>) {
    let geometry = Geometry::new(precision, b, s, t, spec);
    let (heads, width) = (spec.heads, geometry.q_width);
    let mut out = Floats::zeros(q.len());
    let mut lse = vec![f32::NEG_INFINITY; b * heads * s];
    if out.is_empty() || t == 0 {
        return (out, lse);
    }
    if s == 1 {
        super::few::one_query(&geometry, q, k, v, &mut out, &mut lse);
        return (out, lse);
    }
    // A task a block of queries, all heads; out comes in whole rows, lse is put in its order afterwards.
    let per_batch = s.div_ceil(geometry.block);
    let mut tasks = Vec::with_capacity(b * per_batch);
    for (batch, rows) in out.chunks_mut(s * width).enumerate() {
        for (i, rows) in rows.chunks_mut(geometry.block * width).enumerate() {
            tasks.push((batch, i * geometry.block, rows));
        }
    }
    let run = |(batch, first, rows): (usize, usize, &mut [f32])| {
        let count = rows.len() / width;
        let mut lse = vec![0.0; heads * count];
        block(
            &geometry,
            q,
            k,
            v,
            batch,
            &(first..first + count),
            0..heads,
            rows,
            width,
            &mut lse,
        );
        (batch, first, count, lse)
    };
    let parts: Vec<_> = tasks.into_par_iter().map(run).collect();
    for (batch, first, count, part) in parts {
        for (h, part) in part.chunks(count).enumerate() {
            lse[(batch * heads + h) * s + first..][..count].copy_from_slice(part);
        }
    }
    (out, lse)
}

/// A block of queries for some heads: `out [queries, heads]` with rows `width` apart, `lse [heads, queries]`.
fn block(
    g: &Geometry<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    batch: usize,
    queries: &Range<usize>,
    heads: Range<usize>,
    out: &mut [f32],
    width: usize,
    lse: &mut [f32],
) {
    let (count, d) = (queries.len(), g.spec.head_dim);
    let keys = g.keys(batch, queries);
    if keys.width == 0 {
        return lse.fill(f32::NEG_INFINITY);
    }
    let mut tile = vec![0.0; count * keys.stride];
    let mut inverse = vec![0.0; count];
    let mut sides = Sides::default();
    for (slot, h) in heads.enumerate() {
        g.scores(
            &mut sides,
            g.q(q, batch * g.s + queries.start, h),
            count,
            k,
            batch,
            h,
            &keys,
            &mut tile,
        );
        for (r, row) in tile.chunks_mut(keys.stride).enumerate() {
            let columns = g.columns(batch, queries.start + r, &keys);
            (inverse[r], lse[slot * count + r]) = weights(
                row,
                &columns,
                keys.bias.as_deref(),
                g.spec.scale,
                g.spec.softcap,
            );
        }
        let out = &mut out[slot * d..];
        g.product(&mut sides, &tile, count, v, batch, h, &keys, out, width);
        for (r, inverse) in inverse.iter().enumerate() {
            for o in &mut out[r * width..r * width + d] {
                *o *= inverse;
            }
        }
    }
}

/// What one task of the backward pass makes: a run of query heads that share a key/value head.
struct Part {
    /// `[S, heads of the task * head_dim]`
    dq: Vec<f32>,
    /// `[T, head_dim]`
    dk: Vec<f32>,
    /// `[T, head_dim]`
    dv: Vec<f32>,
}

pub(super) fn attention_grad(
    precision: Precision,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    b: usize,
    s: usize,
    t: usize,
    spec: &Attention,
) -> (Floats, Floats, Floats) {
    let geometry = Geometry::new(precision, b, s, t, spec);
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| Floats::zeros(x.len()));
    if q.is_empty() || k.is_empty() {
        return (dq, dk, dv);
    }
    let group = spec.heads / spec.kv_heads;
    // The heads of a task add to the same dk and dv; with few tasks each head gets its own, summed below.
    let share = if b * spec.kv_heads >= 16 { group } else { 1 };
    let per_batch = spec.heads / share;
    let run = |i: usize| {
        backward(
            &geometry,
            q,
            k,
            v,
            out,
            lse,
            dout,
            i / per_batch,
            i % per_batch * share..(i % per_batch + 1) * share,
        )
    };
    let parts: Vec<Part> = (0..b * per_batch).into_par_iter().map(run).collect();

    let (q_width, kv_width, d) = (geometry.q_width, geometry.kv_width, spec.head_dim);
    par::rows(&mut dq, q_width, q_width, |first, rows| {
        for (i, row) in rows.chunks_mut(q_width).enumerate() {
            let (batch, query) = ((first + i) / s, (first + i) % s);
            for (p, row) in row.chunks_mut(share * d).enumerate() {
                row.copy_from_slice(
                    &parts[batch * per_batch + p].dq[query * share * d..][..share * d],
                );
            }
        }
    });
    let shared = group / share;
    par::rows2(
        &mut dk,
        kv_width,
        &mut dv,
        kv_width,
        2 * kv_width * shared,
        |first, dk, dv| {
            for (i, (dk, dv)) in dk
                .chunks_mut(kv_width)
                .zip(dv.chunks_mut(kv_width))
                .enumerate()
            {
                let (batch, key) = ((first + i) / t, (first + i) % t);
                for (h, (dk, dv)) in dk.chunks_mut(d).zip(dv.chunks_mut(d)).enumerate() {
                    for part in &parts[batch * per_batch + h * shared..][..shared] {
                        add_into(&part.dk[key * d..(key + 1) * d], dk);
                        add_into(&part.dv[key * d..(key + 1) * d], dv);
                    }
                }
            }
        },
    );
    (dq, dk, dv)
}

/// Gradients of some query heads of a batch entry that share a key/value head.
fn backward(
    g: &Geometry<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    batch: usize,
    heads: Range<usize>,
) -> Part {
    let (s, t, d, width) = (g.s, g.t, g.spec.head_dim, heads.len() * g.spec.head_dim);
    let mut part = Part {
        dq: vec![0.0; s * width],
        dk: vec![0.0; t * d],
        dv: vec![0.0; t * d],
    };
    let (mut tile, mut slopes) = (Vec::new(), Vec::new());
    let mut sides = Sides::default();
    for start in (0..s).step_by(g.block) {
        let queries = start..(start + g.block).min(s);
        let count = queries.len();
        let keys = g.keys(batch, &queries);
        if keys.width == 0 {
            continue;
        }
        tile.resize(count * keys.stride, 0.0);
        slopes.resize(count * keys.stride, 0.0);
        for (slot, h) in heads.clone().enumerate() {
            let row = batch * s + start;
            let (q_rows, dout_rows, out_rows) =
                (g.q(q, row, h), g.q(dout, row, h), g.q(out, row, h));
            g.scores(&mut sides, q_rows, count, k, batch, h, &keys, &mut tile);
            g.scores(
                &mut sides,
                dout_rows,
                count,
                v,
                batch,
                h,
                &keys,
                &mut slopes,
            );
            let rows = tile
                .chunks_mut(keys.stride)
                .zip(slopes.chunks_mut(keys.stride));
            for (r, (weights, slopes)) in rows.enumerate() {
                let at = r * g.q_width;
                let delta = dot(&out_rows.data[at..at + d], &dout_rows.data[at..at + d]);
                let lse = lse[(batch * g.spec.heads + h) * s + start + r];
                let columns = g.columns(batch, start + r, &keys);
                row_grad(
                    weights,
                    slopes,
                    &columns,
                    keys.bias.as_deref(),
                    g.spec.scale,
                    g.spec.softcap,
                    lse,
                    delta,
                );
            }
            g.product(
                &mut sides,
                &slopes,
                count,
                k,
                batch,
                h,
                &keys,
                &mut part.dq[start * width + slot * d..],
                width,
            );
            for (first, len, column) in keys.spans() {
                let weights_t = View::rows(&tile[column..], keys.stride).t();
                let slopes_t = View::rows(&slopes[column..], keys.stride).t();
                let shape = (len, count, d);
                let dv = &mut part.dv[first * d..];
                g.multiply(&mut sides, shape, weights_t, dout_rows, dv, d, true);
                let dk = &mut part.dk[first * d..];
                g.multiply(&mut sides, shape, slopes_t, q_rows, dk, d, true);
            }
        }
    }
    part
}
