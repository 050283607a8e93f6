//! Matrices with orthonormal rows, differentiably.

use peft_core::peft_tensor::{Result as Made, concat, no_grad};
use peft_core::{Param, Result, Tensor, TrainCx, TrainHooks};

/// The rows of `p [r, d]` made orthonormal one after the other (Gram and Schmidt).
pub(crate) fn orthonormal(p: &Tensor) -> Made<Tensor> {
    let rows = p.shape().first().copied().unwrap_or(0);
    let mut done: Option<Tensor> = None;
    for i in 0..rows {
        let mut row = p.narrow(0, i, 1)?;
        if let Some(done) = &done {
            row = row.sub(&row.matmul_t(done)?.matmul(done)?)?;
        }
        let length = row.square()?.sum_axis(1)?.affine(1.0, 1e-20)?;
        row = row.mul(&length.rsqrt()?)?;
        done = Some(match done {
            Some(done) => concat(&[&done, &row], 0)?,
            None => row,
        });
    }
    Ok(done.unwrap_or_else(|| p.clone()))
}

/// R of P; P itself, bit for bit, where that is orthonormal already.
pub(crate) fn settled(p: &Tensor) -> Result<Tensor> {
    no_grad(|| {
        let p = p.detach();
        let r = p.shape().first().copied().unwrap_or(0);
        let products = p.matmul_t(&p)?.to_f64()?;
        let off = products.iter().enumerate().map(|(i, v)| {
            let wanted = if i / r == i % r { 1.0 } else { 0.0 };
            (v - wanted).abs()
        });
        if off.fold(0.0, f64::max) < 1e-5 {
            return Ok(p);
        }
        // The second time takes away what rounding left of the first.
        Ok(orthonormal(&orthonormal(&p)?)?)
    })
}

/// Makes parameters orthonormal after each step, so that what is trained is what is saved: those whose key holds the first
/// text and ends with the second.
pub(crate) struct Retract(pub(crate) &'static str, pub(crate) &'static str);

impl TrainHooks for Retract {
    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let own = |p: &&Param| p.key().contains(self.0) && p.key().ends_with(self.1);
        let mut params = cx.params.iter().filter(own);
        params.try_for_each(|p| p.set(settled(&p.tensor())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::{Device, RngKey};

    /// After training, rows are orthonormal to rounding, and settling them again changes no bit.
    #[test]
    fn rows_stay_orthonormal() {
        let p =
            Tensor::normal(RngKey::new(5), 0.0, 1.0, &[6, 9], &Device::cpu()).expect("a tensor");
        let r = settled(&p).expect("settles");
        let products = r.matmul_t(&r).and_then(|t| t.to_f64()).expect("products");
        for (i, v) in products.iter().enumerate() {
            let wanted = if i / 6 == i % 6 { 1.0 } else { 0.0 };
            assert!((v - wanted).abs() < 1e-6, "{i}: {v}");
        }
        let again = settled(&r).expect("settles");
        assert_eq!(again.to_vec().expect("values"), r.to_vec().expect("values"));
    }
}
