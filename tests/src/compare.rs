//! Comparing values, with messages that say where they differ.

use peft::core::{BaseWeight, Param, RngKey, Tensor};

use crate::subject::told;

/// What went wrong, as a sentence.
pub type Check = Result<(), String>;

/// The bits of a tensor's values, shape in front.
///
/// # Errors
/// Whatever the device says.
pub fn bits(x: &Tensor) -> Result<(Vec<usize>, Vec<u64>), String> {
    let values = x.to_f64().map_err(|e| e.to_string())?;
    Ok((
        x.shape().to_vec(),
        values.into_iter().map(f64::to_bits).collect(),
    ))
}

/// A base weight as it is stored, byte by byte.
///
/// # Errors
/// Whatever the device says.
pub fn stored_bits(weight: &BaseWeight) -> Result<Vec<u8>, String> {
    match (weight.as_frozen(), weight.as_dense()) {
        (Some(frozen), _) => Ok(frozen.bytes().to_vec()),
        (None, Some(dense)) => Ok(bits(dense)?
            .1
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect()),
        (None, None) => Err("a weight of no kind".to_owned()),
    }
}

/// Both tensors have the same shape and the same bits.
///
/// # Errors
/// Says how many values differ, and the largest difference.
pub fn same_bits(what: &str, got: &Tensor, want: &Tensor) -> Check {
    let (got, want) = (bits(got)?, bits(want)?);
    if got.0 != want.0 {
        return Err(format!("{what}: shape {:?}, not {:?}", got.0, want.0));
    }
    let differing = got.1.iter().zip(&want.1).filter(|(a, b)| a != b);
    let gap = differing
        .clone()
        .map(|(a, b)| (f64::from_bits(*a) - f64::from_bits(*b)).abs())
        .fold(0.0, f64::max);
    match differing.count() {
        0 => Ok(()),
        n => Err(format!(
            "{what}: {n} of {} values differ in their bits, by up to {gap:e}",
            want.1.len()
        )),
    }
}

/// The largest difference of two tensors of one shape.
///
/// # Errors
/// If the shapes differ or a value is not finite.
pub fn gap(what: &str, got: &Tensor, want: &Tensor) -> Result<f64, String> {
    if got.shape() != want.shape() {
        return Err(format!(
            "{what}: shape {:?}, not {:?}",
            got.shape(),
            want.shape()
        ));
    }
    let (got, want) = (
        got.to_f64().map_err(|e| e.to_string())?,
        want.to_f64().map_err(|e| e.to_string())?,
    );
    let mut gap = 0f64;
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        if !(g.is_finite() && w.is_finite()) {
            return Err(format!("{what}[{i}]: got {g}, want {w}"));
        }
        gap = gap.max((g - w).abs());
    }
    Ok(gap)
}

/// Largest magnitude in a tensor.
///
/// # Errors
/// Whatever the device says.
pub fn size(x: &Tensor) -> Result<f64, String> {
    Ok(x.to_f64()
        .map_err(|e| e.to_string())?
        .into_iter()
        .map(f64::abs)
        .fold(0.0, f64::max))
}

/// Two tensors agree to `tolerance` times 1 + the largest wanted value.
///
/// # Errors
/// Says by how much they do not.
pub fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Check {
    let (gap, allowed) = (gap(what, got, want)?, tolerance * (1.0 + size(want)?));
    if gap <= allowed {
        Ok(())
    } else {
        Err(format!("{what}: differ by {gap:e}, allowed is {allowed:e}"))
    }
}

/// Two tensors differ by clearly more than rounding.
///
/// # Errors
/// If they do not: the law that wants them different would be vacuous.
pub fn differ(what: &str, a: &Tensor, b: &Tensor) -> Check {
    if a.shape() != b.shape() {
        return Ok(());
    }
    let gap = gap(what, a, b)?;
    if gap > 1e-4 * (1.0 + size(b)?) {
        Ok(())
    } else {
        Err(format!("{what}: differ by only {gap:e}"))
    }
}

/// Compares a parameter's gradient with central differences of a loss on the reference device, whose f64 makes them
/// sharp: at the largest element and at two that `key` draws.
///
/// # Errors
/// Says where the gradient is not the slope.
pub fn slopes(
    param: &Param,
    grad: &Tensor,
    key: RngKey,
    loss: impl Fn() -> Result<Tensor, String>,
) -> Check {
    const STEP: f64 = 1e-5;
    let start = param.tensor();
    let (values, grad) = (
        told("values", start.to_f64())?,
        told("gradient", grad.to_f64())?,
    );
    let set = |values: Vec<f64>| {
        let value = Tensor::from_f64(values, &param.shape(), start.device());
        told("set", value.map_err(Into::into).and_then(|v| param.set(v)))
    };
    let largest = (0..grad.len()).max_by(|&i, &j| grad[i].abs().total_cmp(&grad[j].abs()));
    let drawn = [0, 1].map(|n| key.below(n, grad.len() as u64) as usize);
    for i in largest.into_iter().chain(drawn) {
        let side = |by: f64| {
            let mut moved = values.clone();
            moved[i] += by;
            set(moved)?;
            told("loss", peft::tensor::no_grad(&loss)?.to_f64()).map(|v| v[0])
        };
        let over = |step: f64| Ok::<_, String>((side(step)? - side(-step)?) / (2.0 * step));
        let mut slope = over(STEP)?;
        // About 1e-10 of rounding, and as much of curvature for a loss of this size.
        let off = |slope: f64| (slope - grad[i]).abs() > 1e-7 * (1.0 + slope.abs());
        if off(slope) {
            // A loss that is curved more than that: twice the step has four times the error, which can be taken out.
            slope += (slope - over(2.0 * STEP)?) / 3.0;
        }
        if off(slope) {
            return Err(format!(
                "{}[{i}]: the gradient is {}, the slope {slope}",
                param.key(),
                grad[i]
            ));
        }
    }
    set(values)
}
