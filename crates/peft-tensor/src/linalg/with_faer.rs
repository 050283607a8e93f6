//! The decompositions by `faer`, on the calling thread.
//!
//! Input is finite, in the standard layout, of moderate magnitude and not empty.
//!
//! faer 0.24's QR reveals the rank: it drops what is left of a column once that is below `16 m eps` of the column,
//! which for f32 and 4096 rows is 0.8 %, and its SVD starts with that QR where a matrix is tall or wide. So QR is
//! computed in f64 here, and SVD told to go without.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::{evd, householder, qr as qr_of, svd as svd_of};
use faer::{Conj, Mat, MatRef, Par, Spec};
use ndarray::{Array1, Array2};

type Outcome<T> = Result<T, String>;

/// One thread gives the same bits on every machine size; faer's parallel loops split their sums by threads.
const PAR: Par = Par::Seq;

pub(super) fn svd(a: &Array2<f32>) -> Outcome<(Array2<f32>, Array1<f32>, Array2<f32>)> {
    let a = view(a)?;
    let (m, n) = a.shape();
    let k = m.min(n);
    let (mut u, mut v, mut s) = (Mat::zeros(m, k), Mat::zeros(n, k), Diag::zeros(k));
    let thin = svd_of::ComputeSvdVectors::Thin;
    let mut params: Spec<svd_of::SvdParams, f32> = Default::default();
    params.qr_ratio_threshold = f64::INFINITY;
    let scratch = svd_of::svd_scratch::<f32>(m, n, thin, thin, PAR, params);
    svd_of::svd(
        a,
        s.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        PAR,
        MemStack::new(&mut MemBuffer::new(scratch)),
        params,
    )
    .map_err(|_| NO_CONVERGENCE)?;
    Ok((array(u.as_ref()), values(&s), array(v.transpose())))
}

pub(super) fn qr(a: &Array2<f32>) -> Outcome<(Array2<f32>, Array2<f32>)> {
    let (m, n) = a.dim();
    let mut packed = Mat::from_fn(m, n, |i, j| f64::from(a[(i, j)]));
    let k = m.min(n);
    let block = qr_of::no_pivoting::factor::recommended_block_size::<f64>(m, n);
    let mut coeff = Mat::zeros(block, k);
    let scratch = qr_of::no_pivoting::factor::qr_in_place_scratch::<f64>(
        m,
        n,
        block,
        PAR,
        Default::default(),
    );
    qr_of::no_pivoting::factor::qr_in_place(
        packed.as_mut(),
        coeff.as_mut(),
        PAR,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    );
    // R lies in the upper triangle, the reflections below it; Q is the reflections applied to the identity.
    let r = Array2::from_shape_fn(
        (k, n),
        |(i, j)| if i <= j { packed[(i, j)] as f32 } else { 0.0 },
    );
    let mut q = Mat::<f64>::identity(m, k);
    let scratch = householder::apply_block_householder_sequence_on_the_left_in_place_scratch::<f64>(
        m, block, k,
    );
    householder::apply_block_householder_sequence_on_the_left_in_place_with_conj(
        packed.as_ref().subcols(0, k),
        coeff.as_ref(),
        Conj::No,
        q.as_mut(),
        PAR,
        MemStack::new(&mut MemBuffer::new(scratch)),
    );
    Ok((Array2::from_shape_fn((m, k), |(i, j)| q[(i, j)] as f32), r))
}

pub(super) fn eigh(a: &Array2<f32>) -> Outcome<(Array1<f32>, Array2<f32>)> {
    let a = view(a)?;
    let n = a.nrows();
    let (mut u, mut s) = (Mat::zeros(n, n), Diag::zeros(n));
    let vectors = evd::ComputeEigenvectors::Yes;
    let scratch = evd::self_adjoint_evd_scratch::<f32>(n, vectors, PAR, Default::default());
    evd::self_adjoint_evd(
        a,
        s.as_mut(),
        Some(u.as_mut()),
        PAR,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|_| NO_CONVERGENCE)?;
    Ok((values(&s), array(u.as_ref())))
}

const NO_CONVERGENCE: &str = "the iteration did not converge";

fn view(a: &Array2<f32>) -> Outcome<MatRef<'_, f32>> {
    let (m, n) = a.dim();
    let slice = a
        .as_slice()
        .ok_or("the matrix is not in the standard layout")?;
    Ok(MatRef::from_row_major_slice(slice, m, n))
}

fn array(a: MatRef<'_, f32>) -> Array2<f32> {
    Array2::from_shape_fn(a.shape(), |(i, j)| a[(i, j)])
}

fn values(s: &Diag<f32>) -> Array1<f32> {
    s.column_vector().iter().copied().collect()
}
