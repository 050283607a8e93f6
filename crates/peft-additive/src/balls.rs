//! Rows kept within balls around zero: projected, differentiably.

use peft_core::{Device, Result, Tensor};

/// A column `[n, 1]`.
fn column(values: Vec<f32>, device: &Device) -> Result<Tensor> {
    let rows = values.len();
    Ok(Tensor::from_vec(values, &[rows, 1], device)?)
}

/// 1 where a token may move.
pub(crate) fn movable(radii: &[f32], device: &Device) -> Result<Tensor> {
    column(radii.iter().map(|&r| f32::from(r > 0.0)).collect(), device)
}

/// The nearest point within each row's ball; differentiable.
pub(crate) fn projected(delta: &Tensor, radii: &[f32]) -> Result<Tensor> {
    let device = delta.device();
    let squares = delta.square()?.sum_axis(1)?.reshape(&[radii.len(), 1])?;
    let outside: Vec<f32> = squares
        .to_vec()?
        .iter()
        .zip(radii)
        .map(|(&square, &radius)| f32::from(radius > 0.0 && square > radius * radius))
        .collect();
    let outside = column(outside, device)?;
    let inside = outside.affine(-1.0, 1.0)?;
    let radii_column = column(radii.to_vec(), device)?;
    // Rows inside are divided by 1, so that a row of zeros has a slope.
    let shrink = squares.mul(&outside)?.add(&inside)?.rsqrt()?;
    let factor = shrink.mul(&radii_column)?.mul(&outside)?.add(&inside)?;
    Ok(delta.mul(&factor)?.mul(&movable(radii, device)?)?)
}
