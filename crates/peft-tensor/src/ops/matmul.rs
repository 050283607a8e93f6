//! Matrix products.

use crate::error::shape_err;
use crate::tape::record;
use crate::{Result, Tensor};

impl Tensor {
    /// `self [.., m, k] x rhs [k, n]` or `[.., m, k] x [.., k, n]` with equal leading axes.
    ///
    /// # Errors
    /// If the inner sizes or the leading axes differ.
    pub fn matmul(&self, rhs: &Tensor) -> Result<Tensor> {
        self.product(rhs, false, false)
    }

    /// `self [.., m, k] x rhsᵀ`, rhs stored `[n, k]` (a linear layer's weight) or `[.., n, k]`.
    ///
    /// # Errors
    /// If the inner sizes or the leading axes differ.
    pub fn matmul_t(&self, rhs: &Tensor) -> Result<Tensor> {
        self.product(rhs, false, true)
    }

    /// `selfᵀ x rhs`, self stored `[k, m]` or `[.., k, m]`.
    ///
    /// # Errors
    /// If the inner sizes or the leading axes differ.
    pub fn t_matmul(&self, rhs: &Tensor) -> Result<Tensor> {
        self.product(rhs, true, false)
    }

    /// The product with either side transposed. A matrix beside a batch of matrices is used for each of them;
    /// where only the right side is a matrix, the left side's leading axes fold into its rows.
    fn product(&self, rhs: &Tensor, ta: bool, tb: bool) -> Result<Tensor> {
        self.same_device(rhs, "matmul")?;
        let wrong = || {
            let (ta, tb) = (if ta { "ᵀ" } else { "" }, if tb { "ᵀ" } else { "" });
            shape_err(
                "matmul",
                format!("{:?}{ta} x {:?}{tb}", self.shape(), rhs.shape()),
            )
        };
        if self.rank() < 2 || rhs.rank() < 2 {
            return wrong();
        }
        if rhs.rank() == 2 && self.rank() > 2 && !ta {
            let flat = self.flatten_rows()?.product(rhs, false, tb)?;
            let mut shape = self.shape().to_vec();
            if let Some(last) = shape.last_mut() {
                *last = flat.last_dim();
            }
            return flat.reshape(&shape);
        }
        let (al, a) = self.shape().split_at(self.rank() - 2);
        let (bl, b) = rhs.shape().split_at(rhs.rank() - 2);
        let (m, k) = if ta { (a[1], a[0]) } else { (a[0], a[1]) };
        let (kb, n) = if tb { (b[1], b[0]) } else { (b[0], b[1]) };
        if k != kb || !(al == bl || al.is_empty() || bl.is_empty()) {
            return wrong();
        }
        let lead = if al.is_empty() { bl } else { al };
        let batch = lead.iter().product();
        let device = self.device();
        let (a_batched, b_batched) = (!al.is_empty(), !bl.is_empty());
        let data = device.backend().matmul(
            &self.data, &rhs.data, batch, m, k, n, a_batched, b_batched, ta, tb,
        )?;
        let mut shape = lead.to_vec();
        shape.extend([m, n]);
        Ok(record(data, shape, device, &[self, rhs], || {
            // Each side's values are only needed for the other side's gradient.
            let (a, b) = (self.target.clone(), rhs.target.clone());
            let (a_shape, b_shape) = (self.shape.clone(), rhs.shape.clone());
            let a_values = b.wanted().then(|| self.detach());
            let b_values = a.wanted().then(|| rhs.detach());
            Box::new(move |dy, sink| {
                // C = op(A) op(B): dA = dC op(B)ᵀ, dB = op(A)ᵀ dC, each transposed back where it was stored so.
                if let Some(b) = &b_values {
                    let da = if ta {
                        b.product(dy, tb, true)?
                    } else {
                        dy.product(b, false, !tb)?
                    };
                    sink.add(&a, da.sum_to(&a_shape)?)?;
                }
                if let Some(a) = &a_values {
                    let db = if tb {
                        dy.product(a, true, ta)?
                    } else {
                        a.product(dy, !ta, false)?
                    };
                    sink.add(&b, db.sum_to(&b_shape)?)?;
                }
                Ok(())
            })
        }))
    }
}
