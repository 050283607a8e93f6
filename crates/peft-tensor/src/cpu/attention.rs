//! Multi-head attention by blocks of queries, forward and backward.
//!
//! A block's scores against the keys it can see are one tile of at most [`TILE`] values; keys that causality or
//! the window hide from the whole block are never touched, and many keys come part after part. The backward pass makes the
//! tiles again from the log-sum-exp of each row (as in FlashAttention, Dao et al. 2022), so nothing of size `S * T` is
//! ever kept. Heads that use the same keys are rows of one tile.

mod grad;
mod rows;

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

pub(super) use self::grad::attention_grad;
use self::rows::LANES;
pub(super) use self::rows::{row_grad, weights};
use super::matmul::{View, gemm_into};
use super::packed::{self, Kernel, Sides};
use super::par;
use super::pool::Floats;
use super::simd::larger;
use crate::Precision;
use crate::backend::Attention;

/// Most values of a score tile: 256 KiB of f32, half of a second-level cache, as the backward pass has two.
const TILE: usize = 64 * 1024;

/// Columns of a tile of so many rows, whole blocks.
fn step(rows: usize) -> usize {
    const COLUMNS: usize = 4 * LANES;
    (TILE / rows.max(1) / COLUMNS).max(1) * COLUMNS
}

/// Everything about a call but its values.
pub(super) struct Geometry<'a> {
    pub(super) b: usize,
    pub(super) s: usize,
    pub(super) t: usize,
    pub(super) spec: &'a Attention,
    /// Width of a row of q and out.
    pub(super) q_width: usize,
    /// Width of a row of k and v.
    pub(super) kv_width: usize,
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
    /// Columns of which a stride is a multiple.
    whole: usize,
}

impl Keys {
    /// In parts of `step` columns, the last perhaps fewer, and where each begins in the whole.
    pub(super) fn parts(&self, step: usize) -> Vec<(usize, Self)> {
        let part = |at: usize| {
            let width = step.min(self.width - at);
            let mut spans = [0..0, 0..0];
            for ((first, len, column), span) in self.spans().zip(&mut spans) {
                let cut = |c: usize| c.clamp(at, at + width).clamp(column, column + len) - column;
                *span = first + cut(at)..first + cut(at + width);
            }
            let stride = width.next_multiple_of(self.whole);
            let bias = self
                .bias
                .as_ref()
                .map(|bias| bias[at..at + stride].to_vec());
            (
                at,
                Self {
                    spans,
                    width,
                    stride,
                    bias,
                    whole: self.whole,
                },
            )
        };
        (0..self.width).step_by(step).map(part).collect()
    }

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
    pub(super) fn new(
        precision: Precision,
        b: usize,
        s: usize,
        t: usize,
        spec: &'a Attention,
    ) -> Self {
        // Enough blocks for a few threads.
        let block = (b * s).div_ceil(8).clamp(16, 64).min(s.max(1));
        let bias = spec.mask.keys.as_ref().map(|keys| {
            keys.iter()
                .map(|k| if *k { 0.0 } else { f32::NEG_INFINITY })
                .collect()
        });
        Self {
            b,
            s,
            t,
            spec,
            q_width: spec.heads * spec.head_dim,
            kv_width: spec.kv_heads * spec.head_dim,
            block,
            bias,
            runs: spec.mask.segments.as_ref().map(|all| runs(all, t)),
            kernel: packed::kernel(precision).filter(|_| precision == Precision::Bf16),
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

    /// End of the keys at the front that query i sees, whatever its segment.
    fn front(&self, i: usize) -> usize {
        let Attention {
            prefix,
            shared,
            causal,
            ..
        } = *self.spec;
        let end = match causal {
            true => i + self.t - self.s + 1,
            false => self.t,
        };
        (prefix + shared).min(end).max(prefix).min(self.t)
    }

    /// The keys that some queries see, in spans that begin at multiples of `whole`, of as many keys but for the last.
    pub(super) fn keys(&self, batch: usize, queries: &Range<usize>, whole: usize) -> Keys {
        let front = self.front(queries.end - 1);
        let end = self.seen(batch, queries.end - 1).1.max(front);
        let front = front.next_multiple_of(whole).min(end);
        let first = self.seen(batch, queries.start).0 / whole * whole;
        let spans = if first <= front {
            [0..0, 0..end]
        } else {
            [0..front, first..end.max(first)]
        };
        let width = spans[0].len() + spans[1].len();
        let stride = width.next_multiple_of(whole.max(LANES));
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
            whole: whole.max(LANES),
        }
    }

    /// [`columns`](Self::columns) of a part of the keys that begins at a column of the whole.
    pub(super) fn columns_of(
        &self,
        batch: usize,
        i: usize,
        keys: &Keys,
        at: usize,
        part: &Keys,
    ) -> [Range<usize>; 2] {
        let cut = |c: usize| c.clamp(at, at + part.width) - at;
        self.columns(batch, i, keys)
            .map(|range| cut(range.start)..cut(range.end))
    }

    /// The columns of the tile that query i sees.
    pub(super) fn columns(&self, batch: usize, i: usize, keys: &Keys) -> [Range<usize>; 2] {
        let seen_by_all = self.front(i);
        let (first, end) = self.seen(batch, i);
        let first = first.max(seen_by_all);
        let end = end.max(first);
        let [front, near] = &keys.spans;
        let shift = near.start - front.len();
        [0..seen_by_all, first - shift..end - shift]
    }

    /// Where heads from `h` on begin in a row of q, out or their gradients.
    pub(super) fn place(&self, row: usize, h: usize) -> usize {
        row * self.q_width + h * self.spec.head_dim
    }

    /// Some heads of some rows of q or a gradient, head after head: `[heads * queries, head_dim]`.
    fn gather(
        &self,
        x: &[f32],
        batch: usize,
        queries: &Range<usize>,
        heads: &Range<usize>,
        out: &mut Vec<f32>,
    ) {
        let d = self.spec.head_dim;
        out.clear();
        for h in heads.clone() {
            for i in queries.clone() {
                out.extend_from_slice(&x[self.place(batch * self.s + i, h)..][..d]);
            }
        }
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
            None => gemm_into(m, k, n, a, b, out, width, add, 1.0, false),
        }
    }

    /// `tile = rows keys^T` for rows of heads that use the same keys, `h` the first of them.
    fn scores(
        &self,
        sides: &mut Sides,
        rows: &[f32],
        x: &[f32],
        batch: usize,
        h: usize,
        keys: &Keys,
        tile: &mut [f32],
    ) {
        let count = rows.len() / self.spec.head_dim;
        let rows = View::rows(rows, self.spec.head_dim);
        for (first, len, column) in keys.spans() {
            let keys_t = self.kv(x, batch * self.t + first, h).t();
            let shape = (count, self.spec.head_dim, len);
            let tile = &mut tile[column..];
            self.multiply(sides, shape, rows, keys_t, tile, keys.stride, false);
        }
    }

    /// `out = tile x` for k or v, `[rows of the tile, head_dim]`, added to it if `add`.
    fn product(
        &self,
        sides: &mut Sides,
        tile: &[f32],
        x: &[f32],
        batch: usize,
        h: usize,
        keys: &Keys,
        out: &mut [f32],
        add: bool,
    ) {
        let d = self.spec.head_dim;
        for (i, (first, len, column)) in keys.spans().enumerate() {
            let tile = View::rows(&tile[column..], keys.stride);
            let values = self.kv(x, batch * self.t + first, h);
            let (shape, add) = ((out.len() / d, len, d), add || i > 0);
            self.multiply(sides, shape, tile, values, out, d, add);
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
    let mut lse = vec![f32::NEG_INFINITY; b * heads * s];
    if q.is_empty() || t == 0 {
        return (Floats::zeros(q.len()), lse);
    }
    if s == 1 {
        let mut out = Floats::zeros(q.len());
        super::few::one_query(&geometry, q, k, v, &mut out, &mut lse);
        return (out, lse);
    }
    let mut out = Floats::dirty(q.len());
    // A task a block of queries, all heads; out comes in whole rows, lse is put in its order afterwards.
    let per_batch = s.div_ceil(geometry.block);
    let mut tasks = Vec::with_capacity(b * per_batch);
    for (batch, rows) in out.chunks_mut(s * width).enumerate() {
        for (i, rows) in rows.chunks_mut(geometry.block * width).enumerate() {
            tasks.push((batch, i * geometry.block, rows));
        }
    }
    let by_tiles = geometry
        .kernel
        .and_then(|kernel| kernel.attention(&geometry, [q, k, v]));
    let parts = Mutex::new(Vec::with_capacity(tasks.len()));
    par::share(tasks, |(batch, first, rows): (usize, usize, &mut [f32])| {
        let count = rows.len() / width;
        let mut lse = vec![0.0; heads * count];
        let queries = first..first + count;
        match &by_tiles {
            Some(block) => block(batch, &queries, rows, &mut lse),
            None => block(&geometry, q, k, v, batch, &queries, rows, &mut lse),
        }
        let mut parts = parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.push((batch, first, count, lse));
    });
    let parts = parts.into_inner().unwrap_or_else(PoisonError::into_inner);
    for (batch, first, count, part) in parts {
        for (h, part) in part.chunks(count).enumerate() {
            lse[(batch * heads + h) * s + first..][..count].copy_from_slice(part);
        }
    }
    (out, lse)
}

/// A block of queries: `out [queries, heads]`, `lse [heads, queries]`. The heads that use the same keys are rows of one tile.
fn block(
    g: &Geometry<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    batch: usize,
    queries: &Range<usize>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (count, d) = (queries.len(), g.spec.head_dim);
    let group = g.spec.heads / g.spec.kv_heads;
    let keys = g.keys(batch, queries, 1);
    if keys.width == 0 {
        out.fill(0.0);
        return lse.fill(f32::NEG_INFINITY);
    }
    let all = group * count;
    let parts = keys.parts(step(all));
    let widest = parts.iter().map(|(_, part)| part.stride).max().unwrap_or(0);
    let (mut rows, mut sum) = (Vec::with_capacity(all * d), vec![0.0; all * d]);
    let mut more = vec![0.0; if parts.len() > 1 { all * d } else { 0 }];
    let mut tile = vec![0.0; all * widest];
    let mut seen = vec![Seen::default(); all];
    let mut sides = Sides::default();
    for (h, lse) in (0..g.spec.heads).step_by(group).zip(lse.chunks_mut(all)) {
        g.gather(q, batch, queries, &(h..h + group), &mut rows);
        seen.fill(Seen::default());
        for (n, (at, part)) in parts.iter().enumerate() {
            let tile = &mut tile[..all * part.stride];
            g.scores(&mut sides, &rows, k, batch, h, part, tile);
            for (r, row) in tile.chunks_mut(part.stride).enumerate() {
                let columns = g.columns_of(batch, queries.start + r % count, &keys, *at, part);
                let bias = part.bias.as_deref();
                let (max, sum) = weights(row, &columns, bias, g.spec.scale, g.spec.softcap);
                seen[r].add(max, sum);
            }
            if n == 0 {
                g.product(&mut sides, tile, v, batch, h, part, &mut sum, false);
                continue;
            }
            g.product(&mut sides, tile, v, batch, h, part, &mut more, false);
            for ((sum, more), seen) in sum.chunks_mut(d).zip(more.chunks(d)).zip(&seen) {
                for (sum, more) in sum.iter_mut().zip(more) {
                    *sum = *sum * seen.before + more * seen.last;
                }
            }
        }
        for (r, (row, seen)) in sum.chunks(d).zip(&seen).enumerate() {
            let inverse;
            (inverse, lse[r]) = softmax_of(seen.max, seen.sum);
            let out = &mut out[g.place(r % count, h + r / count)..][..d];
            for (o, v) in out.iter_mut().zip(row) {
                *o = v * inverse;
            }
        }
    }
}

/// What a row has seen of its keys, part after part (Milakov and Gimelshein, "Online normalizer calculation for softmax",
/// 2018).
#[derive(Clone, Copy)]
pub(super) struct Seen {
    pub(super) max: f32,
    /// Of e^(score - max).
    pub(super) sum: f32,
    /// What the sums of the parts before, and of the last, are multiplied by, so that they belong to `max`.
    pub(super) before: f32,
    pub(super) last: f32,
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            before: 1.0,
            last: 1.0,
        }
    }
}

impl Seen {
    pub(super) fn add(&mut self, max: f32, sum: f32) {
        let both = larger(self.max, max);
        // Where nothing was seen so far, the sums are 0.
        if both > f32::NEG_INFINITY {
            (self.before, self.last) = ((self.max - both).exp(), (max - both).exp());
        }
        self.sum = self.sum * self.before + sum * self.last;
        self.max = both;
    }
}

/// (1 / sum, log-sum-exp) of a row.
pub(super) fn softmax_of(max: f32, sum: f32) -> (f32, f32) {
    if sum == 0.0 {
        (0.0, f32::NEG_INFINITY)
    } else {
        (1.0 / sum, max + sum.ln())
    }
}
