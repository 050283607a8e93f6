//! What a method sees of a base model's weight.

use std::sync::Arc;

use crate::error::shape_err;
use crate::kept::{Keeping, Kept};
use crate::late::later;
use crate::ops::check_ids;
use crate::tape::{grad_enabled, record};
use crate::{Buffer, Device, FrozenWeight, LowRank, LowRankBack, Result, Tensor};

/// A weight of the base model, in whatever format it is stored: it can multiply, gather rows, give itself dense and
/// be replaced. A matrix is logically `[out, in]` (an embedding `[rows, dim]`), also where a checkpoint stores its
/// transpose, as GPT-2's `Conv1D` does.
#[derive(Clone)]
pub struct BaseWeight {
    kind: Kind,
    /// Stored `[in, out]`.
    transposed: bool,
    device: Device,
}

#[derive(Clone)]
enum Kind {
    Frozen(Arc<FrozenWeight>),
    Dense(Tensor),
}

impl BaseWeight {
    /// A frozen matrix as a checkpoint stores it; `transposed` if that is `[in, out]`.
    pub fn frozen(weight: FrozenWeight, transposed: bool, device: &Device) -> Self {
        Self {
            kind: Kind::Frozen(Arc::new(weight)),
            transposed,
            device: device.clone(),
        }
    }

    /// A tensor in the stored layout: trainable, or the result of a merge. Also how a vector (bias, norm) is held.
    pub fn dense(weight: Tensor, transposed: bool) -> Self {
        let device = weight.device().clone();
        Self {
            kind: Kind::Dense(weight),
            transposed,
            device,
        }
    }

    /// Logical shape: `[out, in]`, `[rows, dim]`, or `[n]` for a vector.
    pub fn shape(&self) -> Vec<usize> {
        let mut shape = match &self.kind {
            Kind::Frozen(w) => vec![w.rows(), w.cols()],
            Kind::Dense(t) => t.shape().to_vec(),
        };
        if self.transposed {
            shape.reverse();
        }
        shape
    }

    /// Whether the checkpoint stores `[in, out]`.
    pub fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// The stored matrix, if it is frozen.
    pub fn as_frozen(&self) -> Option<&FrozenWeight> {
        match &self.kind {
            Kind::Frozen(w) => Some(w),
            Kind::Dense(_) => None,
        }
    }

    /// The tensor in stored layout, if it is one.
    pub fn as_dense(&self) -> Option<&Tensor> {
        match &self.kind {
            Kind::Frozen(_) => None,
            Kind::Dense(t) => Some(t),
        }
    }

    /// Where products are computed.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes it takes.
    pub fn nbytes(&self) -> usize {
        match &self.kind {
            Kind::Frozen(w) => w.nbytes(),
            Kind::Dense(t) => t.numel() * 4,
        }
    }

    /// `x [.., in] -> x Wᵀ [.., out]`, straight from the stored format. No gradient for a frozen weight is formed.
    ///
    /// # Errors
    /// If `x` is not `in` wide.
    pub fn linear(&self, x: &Tensor) -> Result<Tensor> {
        match &self.kind {
            Kind::Dense(w) if self.transposed => x.matmul(w),
            Kind::Dense(w) => x.matmul_t(w),
            Kind::Frozen(w) => frozen_product(x, w, !self.transposed),
        }
    }

    /// [`linear`](Self::linear) with several weights. Where no gradient is wanted, threads share the work of all of them
    /// together: a few rows with a small weight are too little to share.
    ///
    /// # Errors
    /// As there.
    pub fn linear_all(weights: &[&Self], x: &Tensor) -> Result<Vec<Tensor>> {
        let frozen = |w: &&Self| match &w.kind {
            Kind::Frozen(frozen) if !w.transposed && frozen.cols() == x.last_dim() => {
                Some(frozen.clone())
            }
            _ => None,
        };
        let all: Option<Vec<_>> = weights.iter().map(frozen).collect();
        let recorded = grad_enabled() && x.requires_grad();
        let (Some(all), false, true) = (all, recorded, x.rank() > 0) else {
            return weights.iter().map(|w| w.linear(x)).collect();
        };
        let all: Vec<&FrozenWeight> = all.iter().map(|w| &**w).collect();
        let m = x.numel() / x.last_dim().max(1);
        let products = x.device().backend().frozen_matmul_all(&x.data, m, &all)?;
        let shaped = products.into_iter().zip(all).map(|(data, w)| {
            let mut shape = x.shape().to_vec();
            shape[x.rank() - 1] = w.rows();
            Tensor::from_buffer(data, shape, x.device())
        });
        Ok(shaped.collect())
    }

    /// `x [.., in] -> x Wᵀ + scale * x Aᵀ Bᵀ [.., out]`, a `[r, in]`, b `[out, r]`: a linear layer and what a low rank changes
    /// about it (LoRA, Hu et al. 2021, section 4.1), forward and backward in one pass over the output where the device has
    /// that.
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub fn linear_low_rank(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        scale: f32,
    ) -> Result<Tensor> {
        match &self.kind {
            Kind::Frozen(w) if !self.transposed => frozen_low_rank(x, w, a, b, scale),
            _ => self.linear(x)?.plus_matmul_t(&x.matmul_t(a)?, b, scale),
        }
    }

    /// `x [.., out] -> x W [.., in]`: the transpose of [`BaseWeight::linear`].
    ///
    /// # Errors
    /// If `x` is not `out` wide.
    pub fn linear_t(&self, x: &Tensor) -> Result<Tensor> {
        match &self.kind {
            Kind::Dense(w) if self.transposed => x.matmul_t(w),
            Kind::Dense(w) => x.matmul(w),
            Kind::Frozen(w) => frozen_product(x, w, self.transposed),
        }
    }

    /// Rows `ids` of an embedding `[rows, dim]`.
    ///
    /// # Errors
    /// If an id is out of range, or the matrix is stored transposed.
    pub fn gather(&self, ids: &[u32]) -> Result<Tensor> {
        if self.transposed {
            return shape_err("gather", "an embedding is never stored transposed");
        }
        match &self.kind {
            Kind::Dense(w) => w.gather_rows(ids),
            Kind::Frozen(w) => {
                check_ids("gather", ids, w.rows())?;
                let data = self.device.backend().frozen_gather(w, ids)?;
                Ok(Tensor::from_buffer(
                    data,
                    vec![ids.len(), w.cols()],
                    &self.device,
                ))
            }
        }
    }

    /// The weight as a tensor of its logical shape. A copy where it is frozen: for initial values, merges and tests,
    /// not for a forward pass that can avoid it.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn to_dense(&self) -> Result<Tensor> {
        let stored = match &self.kind {
            Kind::Dense(t) => t.clone(),
            Kind::Frozen(w) => {
                let data = self.device.backend().frozen_dense(w)?;
                Tensor::from_buffer(data, vec![w.rows(), w.cols()], &self.device)
            }
        };
        if self.transposed {
            stored.t()
        } else {
            Ok(stored)
        }
    }

    /// A weight of the same layout with other values, given in the logical shape.
    ///
    /// # Errors
    /// If the shape differs.
    pub fn replaced(&self, values: &Tensor) -> Result<Self> {
        if values.shape() != self.shape() {
            return shape_err(
                "replace",
                format!("a weight {:?} by {:?}", self.shape(), values.shape()),
            );
        }
        let stored = if self.transposed {
            values.t()?
        } else {
            values.clone()
        };
        Ok(Self::dense(stored, self.transposed))
    }
}

/// `x Wᵀ` or `x W` with a frozen W, whose gradient is the other product of dy.
fn frozen_product(x: &Tensor, w: &Arc<FrozenWeight>, transpose: bool) -> Result<Tensor> {
    check_width(x, w, transpose)?;
    let (of_x, of_w) = (x.detach(), w.clone());
    let data = later(x.device(), move || {
        product_into(&of_x, &of_w, transpose, None)
    })?;
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = if transpose { w.rows() } else { w.cols() };
    }
    let device = x.device();
    Ok(record(data, shape, device, &[x], || {
        let (x, from, w) = (x.target.clone(), x.shape.clone(), w.clone());
        Box::new(move |dy, sink| {
            sink.add_with(&x, |sum| {
                let data = product_into(dy, &w, !transpose, sum.map(|sum| sum.data))?;
                Ok(Tensor::from_buffer(data, from.clone(), dy.device()))
            })
        })
    }))
}

/// [`BaseWeight::linear_low_rank`] with a frozen W.
fn frozen_low_rank(
    x: &Tensor,
    w: &Arc<FrozenWeight>,
    a: &Tensor,
    b: &Tensor,
    scale: f32,
) -> Result<Tensor> {
    x.same_device(a, "linear_low_rank")?;
    x.same_device(b, "linear_low_rank")?;
    let (inside, out) = (w.cols(), w.rows());
    let r = a.shape().first().copied().unwrap_or(0);
    if x.rank() == 0 || x.last_dim() != inside || a.shape() != [r, inside] || b.shape() != [out, r]
    {
        return shape_err(
            "linear_low_rank",
            format!(
                "input {:?} for a weight [{out}, {inside}] and factors {:?}, {:?}",
                x.shape(),
                a.shape(),
                b.shape()
            ),
        );
    }
    let m = x.numel() / inside.max(1);
    let device = x.device();
    let backend = device.backend();
    // The scale is in `low` and in its gradient, which are narrow.
    let low = backend.matmul(
        &x.data, &a.data, 1, m, inside, r, false, false, false, true, scale, None,
    )?;
    let low = Tensor::from_buffer(low, vec![m, r], device);
    let (of_x, of_low, of_b) = (x.data.clone(), low.data.clone(), b.data.clone());
    let (on, of_w) = (device.clone(), w.clone());
    let data = later(device, move || {
        let side = LowRank {
            low: &of_low,
            other: &of_b,
            r,
        };
        let backend = on.backend();
        backend.frozen_matmul_low_rank(&of_x, m, &of_w, true, &side, None)
    })?;
    let mut shape = x.shape().to_vec();
    shape[x.rank() - 1] = out;
    Ok(record(data, shape, device, &[x, a, b], || {
        let low = Kept::result(&low.data, &Keeping::default(), &low);
        // The values of x are for the gradient of A.
        let values = a.target.wanted().then(|| Kept::new(x));
        let (x, from) = (x.target.clone(), x.shape.clone());
        let (a, b, w) = (Kept::new(a), Kept::new(b), w.clone());
        Box::new(move |dy, sink| {
            let device = dy.device();
            let backend = device.backend();
            let dy = &dy.data;
            let low = b.target.wanted().then(|| low.data()).transpose()?;
            let grad = backend.low_rank_grad(LowRankBack {
                dy,
                b: &b.data()?,
                x: values.as_ref().map(Kept::packed).transpose()?,
                low,
                m,
                inside,
                out,
                r,
                scale,
            })?;
            for (factor, grad) in [(&a, grad.a), (&b, grad.b)] {
                if let Some(grad) = grad {
                    sink.add(&factor.target, factor.wrap(grad))?;
                }
            }
            let a_data = a.data()?;
            let side = LowRank {
                low: &grad.low,
                other: &a_data,
                r,
            };
            sink.add_with(&x, |sum| {
                let sum = sum.map(|sum| sum.data);
                let data = backend.frozen_matmul_low_rank(dy, m, &w, false, &side, sum)?;
                Ok(Tensor::from_buffer(data, from.clone(), device))
            })
        })
    }))
}

/// The width of what a weight takes, if `x` has it.
fn check_width(x: &Tensor, w: &FrozenWeight, transpose: bool) -> Result<usize> {
    let inside = if transpose { w.cols() } else { w.rows() };
    if x.last_dim() != inside || x.rank() == 0 {
        return shape_err(
            "linear",
            format!("input {:?} for a weight that takes {inside}", x.shape()),
        );
    }
    Ok(inside)
}

/// The product alone, added to `into`.
fn product_into(
    x: &Tensor,
    w: &FrozenWeight,
    transpose: bool,
    into: Option<Buffer>,
) -> Result<Buffer> {
    let inside = check_width(x, w, transpose)?;
    let m = x.numel() / inside.max(1);
    x.device()
        .backend()
        .frozen_matmul(&x.data, m, w, transpose, into)
}

impl std::fmt::Debug for BaseWeight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let format = self.as_frozen().map_or("dense", |w| w.format().name());
        write!(f, "BaseWeight{:?} {format}", self.shape())
    }
}
