//! Matrix products.

use std::sync::Arc;

use crate::error::shape_err;
use crate::kept::Kept;
use crate::tape::{Target, record};
use crate::{Buffer, Grads, Result, Tensor};

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

    /// `self + scale * x wᵀ`, x `[.., r]` and w `[n, r]`, in the memory of `self` where nobody else holds it: what a low
    /// rank change adds to a layer's output.
    ///
    /// # Errors
    /// If the sizes do not fit.
    pub fn plus_matmul_t(self, x: &Tensor, w: &Tensor, scale: f32) -> Result<Tensor> {
        self.same_device(x, "plus_matmul_t")?;
        self.same_device(w, "plus_matmul_t")?;
        let (n, r) = w.dims2()?;
        let lead = |t: &Tensor| t.shape().split_last().map(|(_, lead)| lead.to_vec());
        if lead(&self) != lead(x) || self.last_dim() != n || x.last_dim() != r || x.rank() == 0 {
            return shape_err(
                "plus_matmul_t",
                format!("{:?} + {:?} x {:?}ᵀ", self.shape(), x.shape(), w.shape()),
            );
        }
        let m = x.numel() / r.max(1);
        let (target, shape, device) = (
            self.detach_place(),
            self.shape.clone(),
            self.device().clone(),
        );
        let data = device.backend().matmul(
            &x.data,
            &w.data,
            1,
            m,
            r,
            n,
            false,
            false,
            false,
            true,
            scale,
            Some(self.data),
        )?;
        Ok(record(
            data,
            shape.to_vec(),
            &device,
            &[&target, x, w],
            || {
                let (target, x, w) = (target.target.clone(), Kept::new(x), Kept::new(w));
                Box::new(move |dy, sink| {
                    let backend = dy.device().backend();
                    if x.target.wanted() {
                        let w = w.data()?;
                        sink.add_with(&x.target, |sum| {
                            let sum = sum.map(|sum| sum.data);
                            Ok(x.wrap(backend.matmul(
                                &dy.data, &w, 1, m, n, r, false, false, false, false, scale, sum,
                            )?))
                        })?;
                    }
                    if w.target.wanted() {
                        let x = x.data()?;
                        sink.add_with(&w.target, |sum| {
                            let sum = sum.map(|sum| sum.data);
                            Ok(w.wrap(backend.matmul(
                                &dy.data, &x, 1, n, m, r, false, false, true, false, scale, sum,
                            )?))
                        })?;
                    }
                    sink.add(&target, dy.clone())
                })
            },
        ))
    }

    /// What a gradient recorded later needs to know of this tensor: all but its values.
    pub(super) fn detach_place(&self) -> Tensor {
        let nothing = Buffer::new(());
        let mut place = Tensor::from_buffer(nothing, self.shape.clone(), self.device());
        place.target = self.target.clone();
        place
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
            &self.data, &rhs.data, batch, m, k, n, a_batched, b_batched, ta, tb, 1.0, None,
        )?;
        let mut shape = lead.to_vec();
        shape.extend([m, n]);
        Ok(record(data, shape, device, &[self, rhs], || {
            // Each side's values are only needed for the other side's gradient.
            let (a, b) = (self.target.clone(), rhs.target.clone());
            let (a_shape, b_shape) = (self.shape.clone(), rhs.shape.clone());
            let a_values = b.wanted().then(|| Kept::new(self));
            let b_values = a.wanted().then(|| Kept::new(rhs));
            Box::new(move |dy, sink| {
                // C = op(A) op(B): dA = dC op(B)ᵀ, dB = op(A)ᵀ dC, each transposed back where it was stored so.
                if let Some(b) = &b_values {
                    let b = b.tensor()?;
                    let (left, right, tl, tr) = if ta {
                        (&b, dy, tb, true)
                    } else {
                        (dy, &b, false, !tb)
                    };
                    left.product_grad(right, tl, tr, &a, &a_shape, sink)?;
                }
                if let Some(a) = &a_values {
                    let a = a.tensor()?;
                    let (left, right, tl, tr) = if tb {
                        (dy, &a, true, ta)
                    } else {
                        (&a, dy, !ta, false)
                    };
                    left.product_grad(right, tl, tr, &b, &b_shape, sink)?;
                }
                Ok(())
            })
        }))
    }

    /// Adds a product to the gradient of `target`: where it stands if it is of one matrix, or by itself.
    fn product_grad(
        &self,
        rhs: &Tensor,
        ta: bool,
        tb: bool,
        target: &Target,
        shape: &Arc<[usize]>,
        sink: &mut Grads,
    ) -> Result<()> {
        if self.rank() != 2 || rhs.rank() != 2 {
            return sink.add(target, self.product(rhs, ta, tb)?.sum_to(shape)?);
        }
        let (m, k) = if ta {
            (self.shape[1], self.shape[0])
        } else {
            (self.shape[0], self.shape[1])
        };
        let n = if tb { rhs.shape[0] } else { rhs.shape[1] };
        let device = self.device();
        sink.add_with(target, |sum| {
            let data = device.backend().matmul(
                &self.data,
                &rhs.data,
                1,
                m,
                k,
                n,
                false,
                false,
                ta,
                tb,
                1.0,
                sum.map(|sum| sum.data),
            )?;
            Ok(Tensor::from_buffer(data, shape.clone(), device))
        })
    }
}
