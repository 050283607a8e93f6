//! Matrix decompositions on `ndarray` matrices: SVD, QR, symmetric eigenvalues, randomised SVD.
//!
//! Two providers stand behind the same functions and pass the same tests: `faer` (the default, Rust alone)
//! and, with the feature `lapack`, LAPACK through `ndarray-linalg` and a system OpenBLAS. Everything is
//! computed in f32, faer's QR alone in f64 (its file says why): the callers (initial values of adapters,
//! truncations) keep what a decomposition leaves over exactly, so its last digits do not matter. `faer` runs on the calling
//! thread alone, so that results do not depend on the number of threads; decompose several matrices in
//! parallel instead.
//!
//! Singular and eigenvectors are unique up to sign (and up to rotation where values repeat), `qr`'s columns
//! up to sign: do not compare them between providers.

#[cfg(not(feature = "lapack"))]
#[path = "with_faer.rs"]
mod provider;
#[cfg(feature = "lapack")]
#[path = "with_lapack.rs"]
mod provider;

use std::borrow::Cow;

use ndarray::{Array1, Array2, s};

use crate::RngKey;
use crate::error::{Result, TensorError};

/// A thin singular value decomposition `a = u diag(s) vt` of `a [m, n]`, with `k = min(m, n)` or the rank asked for.
#[derive(Clone, Debug)]
pub struct Svd {
    /// Left singular vectors in columns, `[m, k]`, orthonormal.
    pub u: Array2<f32>,
    /// Singular values, `[k]`, not negative, in descending order.
    pub s: Array1<f32>,
    /// Right singular vectors in rows, `[k, n]`, orthonormal.
    pub vt: Array2<f32>,
}

impl Svd {
    /// The first `rank` singular values and vectors; all of them where there are fewer.
    pub fn truncate(&self, rank: usize) -> Svd {
        let rank = rank.min(self.s.len());
        Svd {
            u: self.u.slice(s![.., ..rank]).to_owned(),
            s: self.s.slice(s![..rank]).to_owned(),
            vt: self.vt.slice(s![..rank, ..]).to_owned(),
        }
    }
}

/// The thin singular value decomposition of `a [m, n]`.
///
/// # Errors
/// Where `a` has a value that is not finite, a singular value exceeds f32, or the iteration does not converge.
pub fn svd(a: &Array2<f32>) -> Result<Svd> {
    let (a, scale) = prepare("svd", a)?;
    let (m, n) = a.dim();
    if m == 0 || n == 0 {
        return Ok(Svd {
            u: Array2::zeros((m, 0)),
            s: Array1::zeros(0),
            vt: Array2::zeros((0, n)),
        });
    }
    let (u, mut s, vt) = provider::svd(&a).map_err(|e| failed("svd", a.dim(), &e))?;
    // Rounding may leave a zero of the wrong sign.
    s.mapv_inplace(|x| rescale(x.max(0.0), scale));
    finite("svd", a.dim(), s.iter().chain(&u).chain(&vt))?;
    Ok(Svd { u, s, vt })
}

/// The thin QR decomposition `a = q r` of `a [m, n]`: `q [m, k]` with orthonormal columns, also where `a` is
/// rank deficient, and `r [k, n]` upper trapezoidal, `k = min(m, n)`. The diagonal of `r` may have either sign.
///
/// # Errors
/// Where `a` has a value that is not finite, or `r` exceeds f32.
pub fn qr(a: &Array2<f32>) -> Result<(Array2<f32>, Array2<f32>)> {
    let (a, scale) = prepare("qr", a)?;
    let (m, n) = a.dim();
    if m == 0 || n == 0 {
        return Ok((Array2::zeros((m, 0)), Array2::zeros((0, n))));
    }
    let (q, mut r) = provider::qr(&a).map_err(|e| failed("qr", a.dim(), &e))?;
    r.mapv_inplace(|x| rescale(x, scale));
    finite("qr", a.dim(), q.iter().chain(&r))?;
    Ok((q, r))
}

/// The eigenvalues of the symmetric `a [n, n]` in ascending order, and its orthonormal eigenvectors in the columns
/// of an `[n, n]` matrix. Only the lower triangle of `a` counts.
///
/// # Errors
/// Where `a` is not square, has a value that is not finite, an eigenvalue exceeds f32, or the iteration does not
/// converge.
pub fn eigh(a: &Array2<f32>) -> Result<(Array1<f32>, Array2<f32>)> {
    let (m, n) = a.dim();
    if m != n {
        return Err(TensorError::Linalg(format!(
            "eigh takes a square matrix, this one is {m} x {n}"
        )));
    }
    let (a, scale) = prepare("eigh", a)?;
    if n == 0 {
        return Ok((Array1::zeros(0), Array2::zeros((0, 0))));
    }
    let (mut values, vectors) = provider::eigh(&a).map_err(|e| failed("eigh", a.dim(), &e))?;
    values.mapv_inplace(|x| rescale(x, scale));
    finite("eigh", a.dim(), values.iter().chain(&vectors))?;
    Ok((values, vectors))
}

/// The first `rank` singular values and vectors of `a [m, n]`, approximately.
///
/// Halko, Martinsson and Tropp, "Finding structure with randomness" (SIAM Review 2011), algorithms 4.4 and 5.1: a
/// Gaussian sketch of `rank + oversample` columns drawn from `key`, `iterations` rounds of subspace iteration with
/// a QR between all products, then an exact SVD of the small matrix. Exact (to rounding) where `a` has no greater
/// rank than the sketch; otherwise the better, the faster the singular values fall.
///
/// # Errors
/// Where `rank` is not in `1..=min(m, n)`, and as [`svd`].
pub fn randomized_svd(
    a: &Array2<f32>,
    rank: usize,
    oversample: usize,
    iterations: usize,
    key: RngKey,
) -> Result<Svd> {
    let (a, scale) = prepare("randomized_svd", a)?;
    let (m, n) = a.dim();
    let k = m.min(n);
    if rank == 0 || rank > k {
        return Err(TensorError::Linalg(format!(
            "randomized_svd: rank {rank} of a {m} x {n} matrix; it can be 1 to {k}"
        )));
    }
    let width = rank.saturating_add(oversample).min(k);
    let mut sketch = Array2::zeros((n, width));
    if let Some(values) = sketch.as_slice_mut() {
        key.fill_normal(0.0, 1.0, values);
    }
    let (mut range, _) = qr(&a.dot(&sketch))?;
    for _ in 0..iterations {
        let (other, _) = qr(&a.t().dot(&range))?;
        range = qr(&a.dot(&other))?.0;
    }
    let small = svd(&range.t().dot(&*a))?;
    let mut out = Svd {
        u: range.dot(&small.u),
        ..small
    }
    .truncate(rank);
    out.s.mapv_inplace(|x| rescale(x, scale));
    finite("randomized_svd", (m, n), &out.s)?;
    Ok(out)
}

/// `a` in the standard layout and divided by `2^scale`, where its magnitude would otherwise leave f32 when squared.
fn prepare<'a>(op: &str, a: &'a Array2<f32>) -> Result<(Cow<'a, Array2<f32>>, i32)> {
    let mut largest = 0f32;
    for ((row, col), v) in a.indexed_iter() {
        if !v.is_finite() {
            let (m, n) = a.dim();
            return Err(TensorError::Linalg(format!(
                "{op}: the {m} x {n} matrix has {v} in row {row}, column {col}"
            )));
        }
        largest = largest.max(v.abs());
    }
    let exponent = if largest == 0.0 {
        0
    } else {
        libm::ilogb(f64::from(largest))
    };
    let scale = if exponent.abs() > 30 { exponent } else { 0 };
    Ok(match (scale, a.is_standard_layout()) {
        (0, true) => (Cow::Borrowed(a), 0),
        (0, false) => (Cow::Owned(a.as_standard_layout().into_owned()), 0),
        _ => {
            let mut scaled = a.as_standard_layout().into_owned();
            scaled.mapv_inplace(|x| rescale(x, -scale));
            (Cow::Owned(scaled), scale)
        }
    })
}

/// `x * 2^scale`, rounded once.
fn rescale(x: f32, scale: i32) -> f32 {
    if scale == 0 {
        x
    } else {
        libm::ldexp(f64::from(x), scale) as f32
    }
}

fn finite<'a>(
    op: &str,
    (m, n): (usize, usize),
    values: impl IntoIterator<Item = &'a f32>,
) -> Result<()> {
    if values.into_iter().all(|v| v.is_finite()) {
        Ok(())
    } else {
        Err(TensorError::Linalg(format!(
            "{op} of the {m} x {n} matrix does not fit f32"
        )))
    }
}

fn failed(op: &str, (m, n): (usize, usize), reason: &str) -> TensorError {
    TensorError::Linalg(format!("{op} of the {m} x {n} matrix failed: {reason}"))
}
