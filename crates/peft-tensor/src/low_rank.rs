//! Products of low rank beside frozen ones, and their way back.

use crate::{Backend, Buffer, FrozenWeight, Result};

/// The inner side of a product of low rank, and the matrix it is multiplied with.
pub struct LowRank<'a> {
    /// `[m, r]`
    pub low: &'a Buffer,
    /// `[rows, r]` beside a transposed weight, `[r, cols]` beside one that is not.
    pub other: &'a Buffer,
    /// Rank.
    pub r: usize,
}

impl LowRank<'_> {
    /// `sum` and the product of low rank.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn add_to<B: Backend + ?Sized>(
        &self,
        backend: &B,
        m: usize,
        w: &FrozenWeight,
        transpose: bool,
        sum: Buffer,
    ) -> Result<Buffer> {
        let n = if transpose { w.rows() } else { w.cols() };
        let Self { low, other, r } = *self;
        backend.matmul(
            low,
            other,
            1,
            m,
            r,
            n,
            false,
            false,
            false,
            transpose,
            1.0,
            Some(sum),
        )
    }
}

/// A product of low rank beside a frozen one, `y = x Wt + low Bt` with `low = scale * x At`, on its way back.
pub struct LowRankBack<'a> {
    /// The gradient of y, `[m, out]`.
    pub dy: &'a Buffer,
    /// B, `[out, r]`.
    pub b: &'a Buffer,
    /// x `[m, inside]`, as [`Backend::pack`] packed it or whole, if the gradient of A is wanted.
    pub x: Option<Buffer>,
    /// `[m, r]`, if the gradient of B is wanted.
    pub low: Option<Buffer>,
    /// Rows of dy.
    pub m: usize,
    /// Columns of x.
    pub inside: usize,
    /// Columns of dy.
    pub out: usize,
    /// Rank.
    pub r: usize,
    /// What multiplies `x At`.
    pub scale: f32,
}

impl LowRankBack<'_> {
    /// The gradients, one product after the other.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn by_products<B: Backend + ?Sized>(self, backend: &B) -> Result<LowRankGrad> {
        let Self { dy, m, out, r, .. } = self;
        let product = |left: &Buffer, right: &Buffer, (m, k, n), ta, scale| {
            backend.matmul(
                left, right, 1, m, k, n, false, false, ta, false, scale, None,
            )
        };
        let low = product(dy, self.b, (m, out, r), false, self.scale)?;
        let of_b = |low: Buffer| product(dy, &low, (out, m, r), true, 1.0);
        let of_a = |x: Buffer| product(&low, &backend.unpack(&x)?, (r, m, self.inside), true, 1.0);
        Ok(LowRankGrad {
            b: self.low.map(of_b).transpose()?,
            a: self.x.map(of_a).transpose()?,
            low,
        })
    }
}

/// What [`Backend::low_rank_grad`] makes.
pub struct LowRankGrad {
    /// Of `x At`, scaled: `scale * dy B`, `[m, r]`.
    pub low: Buffer,
    /// Of A, `[r, inside]`.
    pub a: Option<Buffer>,
    /// Of B, `[out, r]`.
    pub b: Option<Buffer>,
}
