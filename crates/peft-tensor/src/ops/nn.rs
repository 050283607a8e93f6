//! The layers of a network that are worth one operation each, and the door for a method's own.

use std::sync::Arc;

use crate::error::shape_err;
use crate::kept::{Kept, Recipe};
use crate::tape::{record, record_again, rerun};
use crate::{Result, Rope, Tensor, TensorError};

/// The label of a position that has none (PyTorch's `ignore_index`).
pub const IGNORE: i64 = -100;

impl Tensor {
    fn rows_cols(&self) -> (usize, usize) {
        let cols = self.last_dim();
        (self.numel() / cols.max(1), cols)
    }

    /// Softmax along the last axis.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn softmax(&self) -> Result<Tensor> {
        let (rows, cols) = self.rows_cols();
        let device = self.device();
        let y = device.backend().softmax(&self.data, rows, cols)?;
        let kept = y.clone();
        Ok(record(y, self.shape().to_vec(), device, &[self], || {
            let x = self.target.clone();
            Box::new(move |dy, sink| {
                let dx = dy
                    .device()
                    .backend()
                    .softmax_grad(&kept, &dy.data, rows, cols)?;
                sink.add(&x, Tensor::from_buffer(dx, dy.shape.clone(), dy.device()))
            })
        }))
    }

    /// Largest value along the last axis, which stays with size 1. No gradient.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn max_rows(&self) -> Result<Tensor> {
        let (rows, cols) = self.rows_cols();
        let data = self.device().backend().max_rows(&self.data, rows, cols)?;
        let mut shape = self.shape().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = 1;
        }
        Ok(Tensor::from_buffer(data, shape, self.device()))
    }

    /// `x / sqrt(mean(x²) + eps) * weight` along the last axis (RMSNorm, arXiv 1910.07467).
    ///
    /// # Errors
    /// If `weight` is not as wide as the last axis.
    pub fn rms_norm(&self, weight: &Tensor, eps: f32) -> Result<Tensor> {
        let (rows, cols) = self.rows_cols();
        check_width("rms_norm", self, weight)?;
        let device = self.device();
        let data = device
            .backend()
            .rms_norm(&self.data, &weight.data, rows, cols, eps)?;
        let again = || -> Recipe {
            let (x, w) = (Kept::new(self), Kept::new(weight));
            Arc::new(move || {
                let backend = x.device().backend();
                backend.rms_norm(&x.data()?, &w.data()?, rows, cols, eps)
            })
        };
        let shape = self.shape().to_vec();
        Ok(record_again(
            data,
            shape,
            device,
            &[self, weight],
            again,
            || {
                let (x, w) = (Kept::new(self), Kept::new(weight));
                Box::new(move |dy, sink| {
                    let want = w.target.wanted();
                    let (dx, dw) = x.device().backend().rms_norm_grad(
                        &x.data()?,
                        &w.data()?,
                        &dy.data,
                        rows,
                        cols,
                        eps,
                        want,
                    )?;
                    sink.add(&x.target, x.wrap(dx))?;
                    match dw {
                        Some(dw) => sink.add(&w.target, w.wrap(dw)),
                        None => Ok(()),
                    }
                })
            },
        ))
    }

    /// `(x - mean) / sqrt(var + eps) * weight + bias` along the last axis (LayerNorm, arXiv 1607.06450).
    ///
    /// # Errors
    /// If `weight` or `bias` is not as wide as the last axis.
    pub fn layer_norm(&self, weight: &Tensor, bias: Option<&Tensor>, eps: f32) -> Result<Tensor> {
        let (rows, cols) = self.rows_cols();
        check_width("layer_norm", self, weight)?;
        if let Some(bias) = bias {
            check_width("layer_norm", self, bias)?;
        }
        let device = self.device();
        let b = bias.map(|b| &b.data);
        let data = device
            .backend()
            .layer_norm(&self.data, &weight.data, b, rows, cols, eps)?;
        let mut parents = vec![self, weight];
        parents.extend(bias);
        let keep = || (Kept::new(self), Kept::new(weight), bias.map(Kept::new));
        let again = || -> Recipe {
            let (x, w, b) = keep();
            Arc::new(move || {
                let b = b.as_ref().map(Kept::data).transpose()?;
                let backend = x.device().backend();
                backend.layer_norm(&x.data()?, &w.data()?, b.as_ref(), rows, cols, eps)
            })
        };
        let shape = self.shape().to_vec();
        Ok(record_again(data, shape, device, &parents, again, || {
            let (x, w, b) = keep();
            let b = b.filter(|b| b.target.wanted());
            let want = w.target.wanted() || b.is_some();
            Box::new(move |dy, sink| {
                let (dx, dwb) = x.device().backend().layer_norm_grad(
                    &x.data()?,
                    &w.data()?,
                    &dy.data,
                    rows,
                    cols,
                    eps,
                    want,
                )?;
                sink.add(&x.target, x.wrap(dx))?;
                if let Some((dw, db)) = dwb {
                    sink.add(&w.target, w.wrap(dw))?;
                    if let Some(b) = &b {
                        sink.add(&b.target, b.wrap(db))?;
                    }
                }
                Ok(())
            })
        }))
    }

    /// Rotary position embedding (RoFormer, arXiv 2104.09864) of `[.., heads * head_dim]`, one position per row.
    ///
    /// # Errors
    /// If the width, the number of positions or the tables do not fit.
    pub fn rope(&self, rope: &Arc<Rope>) -> Result<Tensor> {
        let (rows, cols) = self.rows_cols();
        let table = rope.cos.len().min(rope.sin.len()) / rope.half.max(1);
        if cols != rope.heads * rope.head_dim
            || 2 * rope.half > rope.head_dim
            || rows != rope.positions.len()
        {
            let detail = format!(
                "{:?} with {} heads of {}, {} positions",
                self.shape(),
                rope.heads,
                rope.head_dim,
                rope.positions.len()
            );
            return shape_err("rope", detail);
        }
        if let Some(&p) = rope.positions.iter().find(|&&p| p as usize >= table) {
            return Err(TensorError::Index {
                op: "rope",
                index: i64::from(p),
                len: table,
            });
        }
        self.turned(rope, false)
    }

    fn turned(&self, rope: &Arc<Rope>, inverse: bool) -> Result<Tensor> {
        let device = self.device();
        let data = device.backend().rope(&self.data, rope, inverse)?;
        Ok(record(data, self.shape().to_vec(), device, &[self], || {
            let (x, rope) = (self.target.clone(), rope.clone());
            Box::new(move |dy, sink| sink.add(&x, dy.turned(&rope, !inverse)?))
        }))
    }

    /// Sum over rows of `-log softmax(x)[target]`; rows whose target is negative ([`IGNORE`]) do not count. Shape `[]`.
    ///
    /// # Errors
    /// If there are not as many targets as rows, or one is beyond the classes.
    pub fn cross_entropy(&self, targets: &[i64]) -> Result<Tensor> {
        self.clone().into_cross_entropy(targets)
    }

    /// [`Tensor::cross_entropy`] of logits that nobody else needs: their gradient is written over them.
    ///
    /// # Errors
    /// As [`Tensor::cross_entropy`].
    pub fn into_cross_entropy(self, targets: &[i64]) -> Result<Tensor> {
        let (rows, cols) = self.rows_cols();
        if targets.len() != rows {
            return shape_err(
                "cross_entropy",
                format!("{} targets for {:?}", targets.len(), self.shape()),
            );
        }
        if let Some(&bad) = targets.iter().find(|&&t| t >= cols as i64) {
            return Err(TensorError::Index {
                op: "cross_entropy",
                index: bad,
                len: cols,
            });
        }
        let (place, device) = (self.detach_place(), self.device().clone());
        let Self { data, keeping, .. } = self;
        // A recipe for the logits may hold what they were made of.
        drop(keeping);
        let backend = device.backend();
        let (loss, dx) = backend.cross_entropy_owned(data, targets, rows, cols)?;
        Ok(record(loss, vec![], &device, &[&place], || {
            let x = place.target.clone();
            let dx = Tensor::from_buffer(dx, place.shape.clone(), &device);
            Box::new(move |dy, sink| match dy.item()? {
                // A piece of a loss that is differentiated at once has it, and its gradient is as large as the logits.
                1.0 => sink.add(&x, dx.clone()),
                factor => sink.add(&x, dx.scale(factor)?),
            })
        }))
    }
}

fn check_width(op: &'static str, x: &Tensor, w: &Tensor) -> Result<()> {
    x.same_device(w, op)?;
    if w.numel() == x.last_dim() {
        return Ok(());
    }
    shape_err(
        op,
        format!("a parameter of shape {:?} for {:?}", w.shape(), x.shape()),
    )
}

/// An operation a method brings along. Its composed form, made of other operations, is what defines it, gives its
/// gradient and runs on every device; a backend may know a faster forward by its name.
pub trait CustomOp: Send + Sync + 'static {
    /// The name backends know it by, `method.operation`.
    fn name(&self) -> &'static str;

    /// The operation, made of others.
    ///
    /// # Errors
    /// Whatever its parts return.
    fn composed(&self, inputs: &[Tensor]) -> Result<Tensor>;
}

/// Runs a custom operation: the backend's kernel where it has one, with the gradient from the composed form.
///
/// # Errors
/// Whatever the operation returns.
pub fn custom(op: &Arc<dyn CustomOp>, inputs: &[&Tensor]) -> Result<Tensor> {
    let owned: Vec<Tensor> = inputs.iter().map(|&t| t.clone()).collect();
    let Some(first) = owned.first() else {
        return op.composed(&[]);
    };
    let buffers: Vec<_> = inputs.iter().map(|t| (&t.data, t.shape())).collect();
    let device = first.device().clone();
    let Some(result) = device.backend().custom(op.name(), &buffers) else {
        return op.composed(&owned);
    };
    let (data, shape) = result?;
    let op = op.clone();
    Ok(record(data, shape, &device, inputs, || {
        rerun(owned, move |x| op.composed(x))
    }))
}
