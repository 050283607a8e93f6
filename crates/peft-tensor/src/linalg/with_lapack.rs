//! The decompositions by LAPACK, through `ndarray-linalg` and a system OpenBLAS.
//!
//! Input is finite, in the standard layout, of moderate magnitude and not empty. OpenBLAS chooses its own threads:
//! last digits may depend on their number.

use ndarray::{Array1, Array2, ShapeBuilder};
use ndarray_linalg::{Eigh, JobSvd, QR, SVDDC, UPLO};

type Outcome<T> = Result<T, String>;

pub(super) fn svd(a: &Array2<f32>) -> Outcome<(Array2<f32>, Array1<f32>, Array2<f32>)> {
    let (u, s, vt) = columns(a).svddc(JobSvd::Some).map_err(|e| e.to_string())?;
    Ok((
        standard(&u.ok_or("no left vectors")?),
        s,
        standard(&vt.ok_or("no right vectors")?),
    ))
}

pub(super) fn qr(a: &Array2<f32>) -> Outcome<(Array2<f32>, Array2<f32>)> {
    let (q, r) = columns(a).qr().map_err(|e| e.to_string())?;
    Ok((standard(&q), standard(&r)))
}

pub(super) fn eigh(a: &Array2<f32>) -> Outcome<(Array1<f32>, Array2<f32>)> {
    let (values, vectors) = columns(a).eigh(UPLO::Lower).map_err(|e| e.to_string())?;
    Ok((values, standard(&vectors)))
}

/// LAPACK's own layout, which spares it a transposition of every factor.
fn columns(a: &Array2<f32>) -> Array2<f32> {
    let mut out = Array2::zeros(a.raw_dim().f());
    out.assign(a);
    out
}

fn standard(a: &Array2<f32>) -> Array2<f32> {
    a.as_standard_layout().into_owned()
}
