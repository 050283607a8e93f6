//! Kronecker products and products with them, which never build the large matrix.

use peft_core::{Param, Result, Tensor};

/// A factor of a Kronecker product.
pub(crate) enum Factor {
    /// A matrix.
    Full(Param),
    /// The product of two thin ones, `[rows, r]` and `[r, columns]`.
    Thin(Param, Param),
}

impl Factor {
    fn columns(&self) -> usize {
        match self {
            Self::Full(w) | Self::Thin(_, w) => w.tensor().last_dim(),
        }
    }

    /// The matrix.
    pub(crate) fn dense(&self) -> Result<Tensor> {
        Ok(match self {
            Self::Full(w) => w.tensor(),
            Self::Thin(a, b) => a.tensor().matmul(&b.tensor())?,
        })
    }

    /// `x Wᵀ` along the last axis.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Full(w) => x.matmul_t(&w.tensor())?,
            Self::Thin(a, b) => x.matmul_t(&b.tensor())?.matmul_t(&a.tensor())?,
        })
    }
}

/// `first ⊗ second`, of `[l, m]` and `[k, n]`: `[l k, m n]`.
pub(crate) fn kron(first: &Tensor, second: &Tensor) -> Result<Tensor> {
    let ((l, m), (k, n)) = (first.dims2()?, second.dims2()?);
    let blocks = first
        .reshape(&[l, 1, m, 1])?
        .mul(&second.reshape(&[1, k, 1, n])?)?;
    Ok(blocks.reshape(&[l * k, m * n])?)
}

/// `x (first ⊗ second)ᵀ`, by way of `x` as a matrix `[m, n]` for each row: `first X secondᵀ`.
pub(crate) fn times_kron(x: &Tensor, first: &Factor, second: &Factor) -> Result<Tensor> {
    let (m, n) = (first.columns(), second.columns());
    let rows = x.numel() / (m * n).max(1);
    let inner = second.apply(&x.reshape(&[rows, m, n])?)?;
    let outer = first.apply(&inner.permute(&[0, 2, 1])?)?;
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = inner.last_dim() * outer.last_dim();
    }
    Ok(outer.permute(&[0, 2, 1])?.reshape(&shape)?)
}

/// Two factors of `size`: `wanted` and its partner where it divides; otherwise the pair nearest to a square, the smaller
/// first and at most `wanted` (None: no limit). These are the sizes LyCORIS and HF choose.
pub(crate) fn split(size: usize, wanted: Option<usize>) -> (usize, usize) {
    if let Some(f) = wanted.filter(|&f| f > 0 && size.is_multiple_of(f)) {
        return (f, size / f);
    }
    let limit = wanted.unwrap_or(size);
    // The search climbs over the divisors until the pair turns over; the last may be past the square root.
    let (mut small, mut large) = (1, size);
    for divisor in (2..=size.min(limit)).filter(|d| size.is_multiple_of(*d)) {
        if small >= large {
            break;
        }
        (small, large) = (divisor, size / divisor);
    }
    (small.min(large), small.max(large))
}

#[cfg(test)]
mod tests {
    use super::split;

    /// Values of HF's own function.
    #[test]
    fn sizes_are_those_of_hf() {
        for (size, factor, pair) in [
            (256, None, (16, 16)),
            (128, None, (8, 16)),
            (127, None, (1, 127)),
            (12, None, (3, 4)),
            (128, Some(4), (4, 32)),
            (12, Some(8), (3, 4)),
            (360, Some(16), (15, 24)),
            (8, Some(32), (2, 4)),
            (12, Some(6), (6, 2)),
            (30, Some(4), (3, 10)),
            (1, None, (1, 1)),
        ] {
            assert_eq!(split(size, factor), pair, "{size} by {factor:?}");
        }
    }
}
