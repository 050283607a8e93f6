//! Splitting work over threads so that a result never depends on how many there are: chunk sizes come from the
//! shapes alone, and what is reduced across chunks is reduced in their order.

use rayon::prelude::*;

/// Elements of work below which a thread is not worth waking.
pub(super) const GRAIN: usize = 32 * 1024;

/// Rows of a chunk when one row costs `cost` elements of work.
pub(super) fn rows_per_chunk(cost: usize) -> usize {
    (GRAIN / cost.max(1)).max(1)
}

/// Calls `f(first row, chunk)` on chunks of whole rows of `out`; a row costs about `cost` elements of work.
pub(super) fn rows(out: &mut [f32], row: usize, cost: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    if out.is_empty() {
        return;
    }
    let step = rows_per_chunk(cost);
    if out.len() <= step * row {
        return f(0, out);
    }
    out.par_chunks_mut(step * row)
        .enumerate()
        .for_each(|(i, chunk)| f(i * step, chunk));
}

/// As [`rows`] over two outputs with rows of their own widths.
pub(super) fn rows2(
    a: &mut [f32],
    row_a: usize,
    b: &mut [f32],
    row_b: usize,
    cost: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    if a.is_empty() || b.is_empty() {
        return;
    }
    let step = rows_per_chunk(cost);
    if a.len() <= step * row_a {
        return f(0, a, b);
    }
    let chunks = a
        .par_chunks_mut(step * row_a)
        .zip(b.par_chunks_mut(step * row_b));
    chunks.enumerate().for_each(|(i, (a, b))| f(i * step, a, b));
}

/// Calls `f(first element, chunk)` on chunks of `out`, each element about one unit of work.
pub(super) fn elements(out: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    rows(out, 1, 1, f);
}
