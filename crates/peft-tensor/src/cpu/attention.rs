//! Multi-head attention by blocks of queries, forward and backward.
//!
//! A block's scores against the keys it can see are one tile of at most [`TILE`] values; keys that causality or
//! the window hide from the whole block are never touched. The backward pass makes the tiles again from the
//! log-sum-exp of each row (as in FlashAttention, Dao et al. 2022), so nothing of size `S * T` is ever kept.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::matmul::{View, gemm_into};
use super::par;
use super::pool::Floats;
use super::simd::{add_into, dot, exp, simd, tanh};
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
}

/// The keys a block of queries works on: up to two spans of them, side by side in the tile.
pub(super) struct Keys {
    spans: [Range<usize>; 2],
    /// Width of the tile.
    pub(super) width: usize,
    /// `Geometry::bias` of these keys.
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
    fn new(b: usize, s: usize, t: usize, spec: &'a Attention) -> Self {
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
        let bias = self.bias.as_ref().map(|bias| {
            let bias = &bias[batch * self.t..(batch + 1) * self.t];
            [&bias[spans[0].clone()], &bias[spans[1].clone()]].concat()
        });
        Keys {
            width: spans[0].len() + spans[1].len(),
            spans,
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

    /// `tile = rows keys^T` for the queries' rows and the keys' heads.
    fn scores(
        &self,
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
            gemm_into(
                count,
                self.spec.head_dim,
                len,
                rows,
                keys_t,
                &mut tile[column..],
                keys.width,
                false,
                1.0,
                Parallelism::None,
            );
        }
    }

    /// `out = tile x` for k or v; rows of `out` are `width` apart.
    fn product(
        &self,
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
            let tile = View::rows(&tile[column..], keys.width);
            let values = self.kv(x, batch * self.t + first, h);
            gemm_into(
                count,
                len,
                self.spec.head_dim,
                tile,
                values,
                out,
                width,
                add,
                1.0,
                Parallelism::None,
            );
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
    q: &[f32],
    k: &[f32],
    v: &[f32],
    b: usize,
    s: usize,
    t: usize,
    spec: &Attention,
) -> (Floats, Vec<f32>) {
    let geometry = Geometry::new(b, s, t, spec);
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
    let mut tile = vec![0.0; count * keys.width];
    let mut inverse = vec![0.0; count];
    for (slot, h) in heads.enumerate() {
        g.scores(
            g.q(q, batch * g.s + queries.start, h),
            count,
            k,
            batch,
            h,
            &keys,
            &mut tile,
        );
        for (r, row) in tile.chunks_mut(keys.width).enumerate() {
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
        g.product(&tile, count, v, batch, h, &keys, out, width);
        for (r, inverse) in inverse.iter().enumerate() {
            for o in &mut out[r * width..r * width + d] {
                *o *= inverse;
            }
        }
    }
}

/// Scales, caps and masks scores in place.
#[inline(always)]
fn finish<const FMA: bool>(
    row: &mut [f32],
    bias: Option<&[f32]>,
    scale: f32,
    softcap: Option<f32>,
) {
    match softcap {
        None => row.iter_mut().for_each(|s| *s *= scale),
        Some(cap) => {
            let inner = scale / cap;
            row.iter_mut()
                .for_each(|s| *s = cap * tanh::<FMA>(*s * inner));
        }
    }
    if let Some(bias) = bias {
        for (s, b) in row.iter_mut().zip(bias) {
            *s += b;
        }
    }
}

/// Zeroes what lies outside of two ascending ranges.
#[inline(always)]
fn clear_outside(row: &mut [f32], columns: &[Range<usize>; 2]) {
    row[columns[0].end..columns[1].start].fill(0.0);
    row[columns[1].end..].fill(0.0);
}

simd! {
    /// Raw products of a row to e^(score - max), zero where nothing is to be seen: (1 / their sum, log-sum-exp).
    pub(super) fn weights(row: &mut [f32], columns: &[Range<usize>; 2], bias: Option<&[f32]>, scale: f32, softcap: Option<f32>) -> (f32, f32) {
        clear_outside(row, columns);
        let mut max = f32::NEG_INFINITY;
        for range in columns {
            let part = &mut row[range.clone()];
            finish::<FMA>(part, bias.map(|b| &b[range.clone()]), scale, softcap);
            let part_max = super::simd::max_body(part);
            max = if part_max > max { part_max } else { max };
        }
        let mut sum = 0.0;
        for range in columns {
            let part = &mut row[range.clone()];
            if max == f32::NEG_INFINITY && part.iter().all(|s| !s.is_nan()) {
                part.fill(0.0);
                continue;
            }
            for s in part.iter_mut() {
                *s = exp::<FMA>(*s - max);
            }
            sum += super::simd::sum_body(part);
        }
        if sum == 0.0 { (0.0, f32::NEG_INFINITY) } else { (1.0 / sum, max + sum.ln()) }
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
    let geometry = Geometry::new(b, s, t, spec);
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
    for start in (0..s).step_by(g.block) {
        let queries = start..(start + g.block).min(s);
        let count = queries.len();
        let keys = g.keys(batch, &queries);
        if keys.width == 0 {
            continue;
        }
        tile.resize(count * keys.width, 0.0);
        slopes.resize(count * keys.width, 0.0);
        for (slot, h) in heads.clone().enumerate() {
            let row = batch * s + start;
            let (q_rows, dout_rows, out_rows) =
                (g.q(q, row, h), g.q(dout, row, h), g.q(out, row, h));
            g.scores(q_rows, count, k, batch, h, &keys, &mut tile);
            g.scores(dout_rows, count, v, batch, h, &keys, &mut slopes);
            let rows = tile
                .chunks_mut(keys.width)
                .zip(slopes.chunks_mut(keys.width));
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
                let weights_t = View::rows(&tile[column..], keys.width).t();
                let slopes_t = View::rows(&slopes[column..], keys.width).t();
                gemm_into(
                    len,
                    count,
                    d,
                    weights_t,
                    dout_rows,
                    &mut part.dv[first * d..],
                    d,
                    true,
                    1.0,
                    Parallelism::None,
                );
                gemm_into(
                    len,
                    count,
                    d,
                    slopes_t,
                    q_rows,
                    &mut part.dk[first * d..],
                    d,
                    true,
                    1.0,
                    Parallelism::None,
                );
            }
        }
    }
    part
}

simd! {
    /// Raw products of a row to softmax weights, and `slopes` from d weights to d raw products.
    fn row_grad(row: &mut [f32], slopes: &mut [f32], columns: &[Range<usize>; 2], bias: Option<&[f32]>, scale: f32, softcap: Option<f32>, lse: f32, delta: f32) {
        if lse == f32::NEG_INFINITY {
            row.fill(0.0);
            slopes.fill(0.0);
            return;
        }
        clear_outside(row, columns);
        clear_outside(slopes, columns);
        for range in columns {
            let (row, slopes) = (&mut row[range.clone()], &mut slopes[range.clone()]);
            finish::<FMA>(row, None, scale, softcap);
            let inv_cap = softcap.map_or(0.0, |cap| 1.0 / cap);
            for (s, d) in row.iter().zip(slopes.iter_mut()) {
                // The slope of the cap; without one the factor is 1.
                let capped = s * inv_cap;
                *d = (*d - delta) * scale * (1.0 - capped * capped);
            }
            if let Some(bias) = bias {
                add_bias(row, &bias[range.clone()]);
            }
            for (s, d) in row.iter_mut().zip(slopes.iter_mut()) {
                *s = exp::<FMA>(*s - lse);
                *d *= *s;
            }
        }
    }
}

#[inline(always)]
fn add_bias(row: &mut [f32], bias: &[f32]) {
    for (s, b) in row.iter_mut().zip(bias) {
        *s += b;
    }
}
