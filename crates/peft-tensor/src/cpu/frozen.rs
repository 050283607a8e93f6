//! Products with frozen weights, straight from their stored format.
//!
//! Many rows: a slab of the weight is decoded (in parallel) and multiplied, so that decoding costs a few percent
//! and never more than a slab of memory; where the processor multiplies bfloat16 faster, by [`packed`](super::packed). A
//! few rows have kernels of their own, in [`few`](super::few).

use super::matmul::{View, gemm_into, parallel};
use super::pool::Floats;
use super::{few, packed, par};
use crate::{FrozenWeight, Precision};

/// Most elements of a decoded slab: 4 MiB of f32, which stays in the last-level cache.
const SLAB: usize = 1 << 20;

/// Decodes rows `first..` of `w` into `out`, over threads.
fn decode(w: &FrozenWeight, first: usize, out: &mut [f32]) {
    let cols = w.cols();
    par::rows(out, cols, cols, |at, out| {
        w.decode_rows(first + at..first + at + out.len() / cols, out)
    });
}

/// Whether so many rows are multiplied with these weights by [`few`].
fn are_few(precision: Precision, m: usize, weights: &[&FrozenWeight]) -> bool {
    let most = |w: &&FrozenWeight| packed::kernel(precision).map_or(few::FEW, |k| k.few(w));
    let nothing = m == 0 || weights.iter().any(|w| w.rows() * w.cols() == 0);
    !nothing && m <= weights.iter().map(most).min().unwrap_or(0)
}

/// Whether [`matmul`] takes a product of low rank along.
pub(super) fn takes_low_rank(precision: Precision, m: usize, w: &FrozenWeight) -> bool {
    let nothing = m * w.rows() * w.cols() == 0;
    !nothing && packed::kernel(precision).is_some() && !are_few(precision, m, &[w])
}

/// `x Wt` or `x W`, added to `into`; products of many rows with inputs rounded to `precision` where that is faster, and
/// with a product of low rank only where [`takes_low_rank`] says so.
pub(super) fn matmul(
    precision: Precision,
    x: &[f32],
    m: usize,
    w: &FrozenWeight,
    transposed: bool,
    low: packed::Low<'_>,
    into: Option<Floats>,
) -> Floats {
    let (rows, cols) = (w.rows(), w.cols());
    let (inside, width) = if transposed {
        (cols, rows)
    } else {
        (rows, cols)
    };
    if are_few(precision, m, &[w]) {
        let product = if transposed {
            few::frozen(x, m, &[w]).pop().unwrap_or_default()
        } else {
            few::frozen_t(x, m, w)
        };
        return match into {
            Some(mut into) => {
                super::simd::add_into(&product, &mut into);
                into
            }
            None => product,
        };
    }
    let kernel = packed::kernel(precision);
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
    if let (Some(kernel), true) = (kernel, m * rows * cols > 0) {
        kernel.matmul(x, m, w, transposed, low, &mut out, add);
        return out;
    }
    assert!(low.r == 0, "a product of low rank that nobody takes along");
    if m * rows * cols == 0 {
        return out;
    }
    let step = (SLAB / cols).clamp(1, rows);
    let mut slab = Floats::dirty(step * cols);
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let slab = &mut slab[..count * cols];
        decode(w, first, slab);
        let slab = View::rows(slab, cols);
        if transposed {
            let threads = parallel(m, cols, count);
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
            let threads = parallel(m, count, cols);
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
    out
}

/// `x Wt` with each of the weights.
pub(super) fn matmul_all(
    precision: Precision,
    x: &[f32],
    m: usize,
    weights: &[&FrozenWeight],
) -> Vec<Floats> {
    if are_few(precision, m, weights) {
        return few::frozen(x, m, weights);
    }
    let product =
        |w: &&FrozenWeight| matmul(precision, x, m, w, true, packed::Low::default(), None);
    weights.iter().map(product).collect()
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
