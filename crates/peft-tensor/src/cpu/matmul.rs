//! Products of dense matrices: `gemm` for large ones, kernels of their own for a few rows.

use std::ops::Range;

use super::pool::Floats;
use super::simd::axpy;
use super::{few, par};
use gemm::Parallelism;

/// A matrix inside a slice, by strides.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    /// Values from the first element on.
    pub(super) data: &'a [f32],
    /// Step from a row to the next.
    pub(super) rs: usize,
    /// Step from a column to the next.
    pub(super) cs: usize,
}

impl<'a> View<'a> {
    /// Rows of `width` values, `cols <= width` of them used.
    pub(super) fn rows(data: &'a [f32], width: usize) -> Self {
        Self {
            data,
            rs: width,
            cs: 1,
        }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self {
            data: self.data,
            rs: self.cs,
            cs: self.rs,
        }
    }
}

/// Most rows whose product with columns of a matrix is a sum of its rows.
const FEW: usize = 4;

/// Least inner size for which a product of few columns is made of dot products.
const THIN: usize = 64;

/// Multiply-adds from which on a product is worth several threads.
const PARALLEL: usize = 128 * 1024;

/// Least multiply-adds of a piece.
const LEAST: usize = 512 * 1024;

/// How rows and columns of a product are cut for `threads`. Not the `gemm` crate's halves of equal size: threads are not
/// equally fast where another process runs, or where some cores are slow by design.
///
/// No cut changes a sum: as pieces have more than 64 columns or rows where the product has, `gemm` cuts the inner
/// dimension as it would for the whole.
fn cuts(m: usize, k: usize, n: usize, threads: usize) -> [usize; 2] {
    let most = m * k * n / LEAST;
    if threads < 2 || most < 2 {
        return [1, 1];
    }
    // What is packed for a piece has at most so many rows where these are long: it is there once for each thread.
    let least = m.div_ceil(512).min(most);
    let high = least..=(m / 128).max(least);
    let wide = 1..=(n / 96).max(1);
    // Packing both sides costs as much as so many columns and rows more; measured with AVX2.
    let time = |&[high, wide]: &[usize; 2]| {
        let piece = (m as f64 / high as f64 + 9.0) * (n as f64 / wide as f64 + 1.2);
        // At the end of a product somebody waits for a part of a piece.
        piece * ((high * wide).div_ceil(threads) as f64 + 0.15)
    };
    high.flat_map(|high| wide.clone().map(move |wide| [high, wide]))
        .filter(|[high, wide]| high * wide <= most)
        .min_by(|a, b| time(a).total_cmp(&time(b)))
        .unwrap_or([1, 1])
}

/// Columns or rows of part `i`, in whole registers.
fn part(n: usize, parts: usize, i: usize) -> Range<usize> {
    const REGISTER: usize = 16;
    let part = par::part(n.div_ceil(REGISTER), parts, i);
    part.start * REGISTER..(part.end * REGISTER).min(n)
}

/// Where pieces of a product are written.
struct Output(*mut f32);

#[allow(
    unsafe_code,
    reason = "threads write to parts of one slice that are no slices"
)]
// SAFETY: `gemm_into`, the only one to use it, gives each thread other elements.
unsafe impl Sync for Output {}

impl Output {
    fn at(&self, i: usize) -> *mut f32 {
        self.0.wrapping_add(i)
    }
}

/// `out = scale * a b` or, with `add`, `out += scale * a b`, where a is `[m, k]`, b `[k, n]` and `out` has rows of `width >= n`
/// values; in pieces, on several threads if `threads`.
pub(super) fn gemm_into(
    m: usize,
    k: usize,
    n: usize,
    a: View<'_>,
    b: View<'_>,
    out: &mut [f32],
    width: usize,
    add: bool,
    scale: f32,
    threads: bool,
) {
    if m == 0 || n == 0 {
        return;
    }
    let last = |rows: usize, cols: usize, rs: usize, cs: usize| (rows - 1) * rs + (cols - 1) * cs;
    assert!(
        width >= n && last(m, n, width, 1) < out.len(),
        "gemm writes beyond its output"
    );
    if k > 0 {
        assert!(
            last(m, k, a.rs, a.cs) < a.data.len(),
            "gemm reads beyond its left side"
        );
        assert!(
            last(k, n, b.rs, b.cs) < b.data.len(),
            "gemm reads beyond its right side"
        );
    }
    let threads = if threads {
        rayon::current_num_threads()
    } else {
        1
    };
    let [high, wide] = cuts(m, k, n, threads);
    let out = Output(out.as_mut_ptr());
    par::pieces(high * wide, |i| {
        let (rows, cols) = (part(m, high, i / wide), part(n, wide, i % wide));
        #[allow(unsafe_code, reason = "the gemm crate takes raw pointers")]
        // SAFETY: the asserts above bound every element that is read or written (rows and columns index up to their
        // last, k == 0 reads nothing), the strides are slice offsets and so fit an isize, and `out` is exclusively
        // borrowed, so it overlaps neither input. Pieces are of different rows or columns, and `width >= n` keeps
        // columns of different rows apart.
        unsafe {
            gemm::gemm(
                rows.len(),
                cols.len(),
                k,
                out.at(rows.start * width + cols.start),
                1,
                width as isize,
                add,
                a.data.as_ptr().wrapping_add(rows.start * a.rs),
                a.cs as isize,
                a.rs as isize,
                b.data.as_ptr().wrapping_add(cols.start * b.cs),
                b.cs as isize,
                b.rs as isize,
                1.0,
                scale,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    });
}

/// `out = scale * a b`, or with the transpose of b, of few columns `n`.
fn thin(
    a: &[f32],
    b: &[f32],
    k: usize,
    n: usize,
    tb: bool,
    scale: f32,
    out: &mut [f32],
    threads: bool,
) {
    if tb && scale == 1.0 {
        return few::thin(a, &b[..n * k], k, n, out, threads);
    }
    let at = |i: usize| match tb {
        true => b[i],
        false => b[i % k * n + i / k],
    };
    let rows: Vec<f32> = (0..n * k).map(|i| scale * at(i)).collect();
    few::thin(a, &rows, k, n, out, threads);
}

/// Whether a product of that size gets several threads.
pub(super) fn parallel(m: usize, k: usize, n: usize) -> bool {
    m * k * n >= PARALLEL
}

/// `batch` products, times `scale`, added to `into`.
pub(super) fn matmul(
    a: &[f32],
    b: &[f32],
    mut batch: usize,
    mut m: usize,
    k: usize,
    n: usize,
    a_batched: bool,
    b_batched: bool,
    ta: bool,
    tb: bool,
    scale: f32,
    into: Option<Floats>,
) -> Floats {
    let add = into.is_some();
    let len = batch * m * n;
    let mut out = match into {
        Some(into) => into,
        None if k == 0 => Floats::zeros(len),
        None => Floats::dirty(len),
    };
    if len == 0 || k == 0 {
        return out;
    }
    if a_batched && !b_batched && !ta {
        // One tall product instead of many.
        (batch, m) = (1, batch * m);
    }
    let a_step = if a_batched && batch > 1 { m * k } else { 0 };
    let b_step = if b_batched && batch > 1 { k * n } else { 0 };
    let one = |i: usize, out: &mut [f32], threads: bool| {
        let (a, b) = (&a[i * a_step..], &b[i * b_step..]);
        if !ta && m <= if tb { few::FEW } else { FEW } {
            if !add && scale == 1.0 {
                return few_rows(&a[..m * k], b, m, k, n, tb, out, threads);
            }
            let mut product = Floats::dirty(m * n);
            few_rows(&a[..m * k], b, m, k, n, tb, &mut product, threads);
            for (out, p) in out.iter_mut().zip(product.iter()) {
                *out = if add { *out } else { 0.0 } + scale * p;
            }
            return;
        }
        if !ta && !add && n <= few::FEW && k >= THIN {
            return thin(&a[..m * k], b, k, n, tb, scale, out, threads);
        }
        let a = if ta {
            View::rows(a, m).t()
        } else {
            View::rows(a, k)
        };
        let b = if tb {
            View::rows(b, k).t()
        } else {
            View::rows(b, n)
        };
        gemm_into(m, k, n, a, b, out, n, add, scale, threads);
    };
    if batch >= 8 || (batch > 1 && m * k * n < PARALLEL) {
        let step = (PARALLEL / (m * k * n)).max(1);
        par::chunks(&mut out, step * m * n, |chunk, outs| {
            for (i, out) in outs.chunks_mut(m * n).enumerate() {
                one(chunk * step + i, out, false);
            }
        });
    } else {
        for (i, out) in out.chunks_mut(m * n).enumerate() {
            one(i, out, parallel(m, k, n));
        }
    }
    out
}

/// A few rows against a whole matrix: bound by reading it, so every stored row is read once.
fn few_rows(
    a: &[f32],
    b: &[f32],
    m: usize,
    k: usize,
    n: usize,
    tb: bool,
    out: &mut [f32],
    threads: bool,
) {
    if tb {
        return few::dense(a, &b[..n * k], m, k, out, threads);
    }
    // Stripes of columns, so that threads read disjoint parts of each row of b.
    let stripe = if threads { 512 } else { n };
    for (a, out) in a.chunks_exact(k).zip(out.chunks_exact_mut(n)) {
        let columns = |i: usize, out: &mut [f32]| {
            out.fill(0.0);
            for (a, b) in a.iter().zip(b.chunks_exact(n)) {
                axpy(*a, &b[i * stripe..i * stripe + out.len()], out);
            }
        };
        if threads {
            par::chunks(out, stripe, columns);
        } else {
            columns(0, out);
        }
    }
}

/// `[n, m]` -> `[m, n]`, in rows of `width >= n` values.
pub(super) fn transpose(columns: &[f32], m: usize, width: usize, out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(width).enumerate() {
        for (o, column) in out.iter_mut().zip(columns.chunks_exact(m)) {
            *o = column[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_product_once_and_change_no_sum() {
        let sizes = [1, 8, 60, 65, 127, 130, 576, 1020, 1536, 1820, 4096];
        let shapes = sizes.iter().flat_map(|&m| sizes.map(|n| (m, n)));
        for ((m, n), threads) in shapes.flat_map(|shape| [1, 2, 5, 16].map(|t| (shape, t))) {
            let [high, wide] = cuts(m, 700, n, threads);
            let parts = |n, parts| (0..parts).map(move |i| part(n, parts, i));
            for (n, count) in [(m, high), (n, wide)] {
                assert!(parts(n, count).flatten().eq(0..n));
                // What decides how `gemm` cuts the inner dimension.
                assert!(parts(n, count).all(|part| (part.len() > 64) == (n > 64)));
            }
            if threads > 1 && m * n > 1 << 18 {
                assert!(high * wide >= threads && parts(m, high).all(|rows| rows.len() <= 512));
            }
        }
    }
}
