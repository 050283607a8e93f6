//! Products with frozen weights, straight from their stored format.
//!
//! Many rows: a slab of the weight is decoded (in parallel) and multiplied, so that decoding costs a few percent
//! and never more than a slab of memory; in bfloat16, where the processor multiplies it, by [`packed`]. One to four rows: each weight row is decoded into the first-level cache
//! and its dot product taken there, so that generation reads the stored bytes once and nothing else.

use std::sync::Mutex;

use super::matmul::{View, dot_rows, gemm_into, parallelism, transpose};
use super::pool::Floats;
use super::{packed, par};
use crate::{FrozenWeight, Precision};

/// Most elements of a decoded slab: 4 MiB of f32, which stays in the last-level cache.
const SLAB: usize = 1 << 20;

/// Rows of the input up to which decoding a row for its dot products beats decoding a slab for a product.
const FEW: usize = 4;

/// Decoding buffers that were used before, so that a slab is not mapped anew for each product.
#[derive(Default)]
pub(super) struct Scratch(Mutex<Vec<Vec<f32>>>);

impl Scratch {
    /// Calls `f` with a buffer of `len` values of any content.
    pub(super) fn with<R>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let lock = || {
            self.0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        };
        let mut buffer = lock().pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        let result = f(&mut buffer[..len]);
        lock().push(buffer);
        result
    }
}

/// Decodes rows `first..` of `w` into `out`, over threads.
fn decode(w: &FrozenWeight, first: usize, out: &mut [f32]) {
    let cols = w.cols();
    par::rows(out, cols, cols, |at, out| {
        w.decode_rows(first + at..first + at + out.len() / cols, out)
    });
}

/// `x Wt` or `x W`, added to `into`; products of many rows with inputs rounded to `precision` where that is faster.
pub(super) fn matmul(
    scratch: &Scratch,
    precision: Precision,
    x: &[f32],
    m: usize,
    w: &FrozenWeight,
    transposed: bool,
    into: Option<Floats>,
) -> Floats {
    let (rows, cols) = (w.rows(), w.cols());
    let (inside, width) = if transposed {
        (cols, rows)
    } else {
        (rows, cols)
    };
    let kernel = match m > FEW {
        true => packed::kernel(precision),
        false => None,
    };
    if let (Some(dense), None) = (w.as_f32(), kernel) {
        return super::matmul::matmul(
            x, dense, 1, m, inside, width, false, false, false, transposed, 1.0, into,
        );
    }
    let add = into.is_some();
    let mut out = match into {
        Some(into) => into,
        None if inside == 0 => Floats::zeros(m * width),
        None => Floats::dirty(m * width),
    };
    if m * rows * cols == 0 {
        return out;
    }
    if let Some(kernel) = kernel {
        kernel.matmul(scratch, x, m, w, transposed, &mut out, add);
        return out;
    }
    if transposed && m <= FEW {
        if !add {
            few_rows(x, m, w, &mut out);
            return out;
        }
        let mut product = Floats::dirty(m * width);
        few_rows(x, m, w, &mut product);
        super::simd::add_into(&product, &mut out);
        return out;
    }
    let step = (SLAB / cols).clamp(1, rows);
    scratch.with(step * cols, |slab| {
        for first in (0..rows).step_by(step) {
            let count = step.min(rows - first);
            let slab = &mut slab[..count * cols];
            decode(w, first, slab);
            let slab = View::rows(slab, cols);
            if transposed {
                let threads = parallelism(m, cols, count);
                gemm_into(
                    m,
                    cols,
                    count,
                    View::rows(x, cols),
                    slab.t(),
                    &mut out[first..],
                    rows,
                    add,
                    1.0,
                    threads,
                );
            } else {
                let threads = parallelism(m, count, cols);
                gemm_into(
                    m,
                    count,
                    cols,
                    View::rows(&x[first..], rows),
                    slab,
                    &mut out,
                    cols,
                    add || first > 0,
                    1.0,
                    threads,
                );
            }
        }
    });
    out
}

/// `x [m, cols] Wt` for few rows m.
fn few_rows(x: &[f32], m: usize, w: &FrozenWeight, out: &mut [f32]) {
    let (rows, cols) = (w.rows(), w.cols());
    // A few rows at a time: still in the first-level cache, and fewer calls.
    let block = (4096 / cols).max(1);
    let dots = |first: usize, out: &mut [f32]| {
        let mut decoded = vec![0.0; block * cols];
        for (i, out) in out.chunks_mut(block * m).enumerate() {
            let (at, count) = (first + i * block, out.len() / m);
            let decoded = &mut decoded[..count * cols];
            w.decode_rows(at..at + count, decoded);
            dot_rows(x, decoded, cols, out);
        }
    };
    // Decoding is several times the work of a multiply-add.
    let cost = cols * (m + 4);
    if m == 1 {
        return par::rows(out, 1, cost, dots);
    }
    let mut columns = vec![0.0; rows * m];
    par::rows(&mut columns, m, cost, dots);
    transpose(&columns, m, rows, out);
}

pub(super) fn gather(w: &FrozenWeight, ids: &[u32]) -> Floats {
    let cols = w.cols();
    let mut out = Floats::dirty(ids.len() * cols);
    par::rows(&mut out, cols, cols, |first, out| {
        for (i, out) in out.chunks_mut(cols).enumerate() {
            let id = ids[first + i] as usize;
            w.decode_rows(id..id + 1, out);
        }
    });
    out
}

pub(super) fn dense(w: &FrozenWeight) -> Floats {
    let mut out = Floats::dirty(w.rows() * w.cols());
    if !out.is_empty() {
        decode(w, 0, &mut out);
    }
    out
}
