//! Elementwise operations, with numpy's broadcasting, and sums.

use std::sync::Arc;

use super::shape::{broadcast_shape, padded};
use crate::error::shape_err;
use crate::kept::{Kept, Recipe};
use crate::late::later;
use crate::tape::{record, record_again};
use crate::{Binary, Glu, Result, RngKey, Tensor, Unary};

/// Named methods for the unary functions.
macro_rules! unary_methods {
    ($($(#[$doc:meta])* $name:ident => $op:ident;)*) => {
        impl Tensor {
            $($(#[$doc])*
            ///
            /// # Errors
            /// Whatever the device says.
            pub fn $name(&self) -> Result<Tensor> { self.unary(Unary::$op) })*
        }
    };
}

unary_methods! {
    /// -x
    neg => Neg;
    /// e^x
    exp => Exp;
    /// ln x
    ln => Ln;
    /// sqrt x
    sqrt => Sqrt;
    /// 1 / sqrt x
    rsqrt => Rsqrt;
    /// 1 / x
    recip => Recip;
    /// x^2
    square => Square;
    /// |x|
    abs => Abs;
    /// hyperbolic tangent
    tanh => Tanh;
    /// 1 / (1 + e^-x)
    sigmoid => Sigmoid;
    /// max(x, 0)
    relu => Relu;
    /// x sigmoid(x)
    silu => Silu;
    /// x Phi(x), with the error function
    gelu => Gelu;
    /// the tanh approximation of gelu
    gelu_tanh => GeluTanh;
    /// sin x
    sin => Sin;
    /// cos x
    cos => Cos;
}

impl Tensor {
    /// f(x), elementwise.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn unary(&self, op: Unary) -> Result<Tensor> {
        let device = self.device();
        let y = device.backend().unary(op, &self.data)?;
        let shape = self.shape().to_vec();
        if op.slope_needs_output() {
            let kept = y.clone();
            return Ok(record(y, shape, device, &[self], || {
                let x = self.clone();
                Box::new(move |dy, sink| {
                    let backend = x.device().backend();
                    let dx = backend.unary_grad(op, &x.data, &kept, &dy.data)?;
                    sink.add(
                        &x.target,
                        Tensor::from_buffer(dx, x.shape.clone(), x.device()),
                    )
                })
            }));
        }
        let again = || -> Recipe {
            let x = Kept::new(self);
            Arc::new(move || x.device().backend().unary(op, &x.data()?))
        };
        Ok(record_again(y, shape, device, &[self], again, || {
            let x = Kept::new(self);
            Box::new(move |dy, sink| {
                let data = x.data()?;
                let dx = x
                    .device()
                    .backend()
                    .unary_grad(op, &data, &data, &dy.data)?;
                sink.add(&x.target, x.wrap(dx))
            })
        }))
    }

    fn binary(&self, rhs: &Tensor, op: Binary) -> Result<Tensor> {
        self.same_device(rhs, "binary")?;
        let device = self.device();
        let out = broadcast_shape(self.shape(), rhs.shape())?;
        let (a_shape, b_shape) = (
            padded(self.shape(), out.len()),
            padded(rhs.shape(), out.len()),
        );
        let data = if op == Binary::Add && (self.data.is_late() || rhs.data.is_late()) {
            // A sum of what nobody has read may be read by nobody.
            let (on, a, b, to) = (
                device.clone(),
                self.data.clone(),
                rhs.data.clone(),
                out.clone(),
            );
            later(device, move || {
                on.backend().binary(op, &a, &a_shape, &b, &b_shape, &to)
            })?
        } else {
            let (a, b) = (&self.data, &rhs.data);
            device
                .backend()
                .binary(op, a, &a_shape, b, &b_shape, &out)?
        };
        Ok(record(data, out, device, &[self, rhs], || {
            let (a, b) = (self.target.clone(), rhs.target.clone());
            let (a_shape, b_shape) = (self.shape.clone(), rhs.shape.clone());
            // Sums need nothing but shapes; only products and quotients keep their operands.
            let operands =
                matches!(op, Binary::Mul | Binary::Div).then(|| (Kept::new(self), Kept::new(rhs)));
            Box::new(move |dy, sink| {
                if a.wanted() {
                    let da = match (op, &operands) {
                        (Binary::Mul, Some((_, b))) => dy.mul(&b.tensor()?)?,
                        (Binary::Div, Some((_, b))) => dy.div(&b.tensor()?)?,
                        _ => dy.clone(),
                    };
                    sink.add(&a, da.sum_to(&a_shape)?)?;
                }
                if b.wanted() {
                    let db = match (op, &operands) {
                        (Binary::Mul, Some((a, _))) => dy.mul(&a.tensor()?)?,
                        (Binary::Div, Some((a, b))) => {
                            dy.mul(&a.tensor()?)?.div(&b.tensor()?.square()?)?.neg()?
                        }
                        (Binary::Sub, _) => dy.neg()?,
                        _ => dy.clone(),
                    };
                    sink.add(&b, db.sum_to(&b_shape)?)?;
                }
                Ok(())
            })
        }))
    }

    /// self + rhs, broadcasting.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    pub fn add(&self, rhs: &Tensor) -> Result<Tensor> {
        self.binary(rhs, Binary::Add)
    }

    /// self + rhs, both of one shape, in the memory of self where nobody else holds it.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn plus(self, rhs: &Tensor) -> Result<Tensor> {
        self.same_device(rhs, "plus")?;
        if self.shape() != rhs.shape() {
            return shape_err("plus", format!("{:?} + {:?}", self.shape(), rhs.shape()));
        }
        let (place, device) = (self.detach_place(), self.device().clone());
        let data = device.backend().accumulate(self.data, &rhs.data)?;
        let shape = rhs.shape().to_vec();
        Ok(record(data, shape, &device, &[&place, rhs], || {
            let (a, b) = (place.target.clone(), rhs.target.clone());
            Box::new(move |dy, sink| {
                sink.add(&a, dy.clone())?;
                sink.add(&b, dy.clone())
            })
        }))
    }

    /// self - rhs, broadcasting.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    pub fn sub(&self, rhs: &Tensor) -> Result<Tensor> {
        self.binary(rhs, Binary::Sub)
    }

    /// self * rhs elementwise, broadcasting.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    pub fn mul(&self, rhs: &Tensor) -> Result<Tensor> {
        self.binary(rhs, Binary::Mul)
    }

    /// self / rhs elementwise, broadcasting.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    pub fn div(&self, rhs: &Tensor) -> Result<Tensor> {
        self.binary(rhs, Binary::Div)
    }

    /// mul * x + add
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn affine(&self, mul: f32, add: f32) -> Result<Tensor> {
        let device = self.device();
        let data = device.backend().affine(&self.data, mul, add)?;
        Ok(record(data, self.shape().to_vec(), device, &[self], || {
            let x = self.target.clone();
            Box::new(move |dy, sink| sink.add(&x, dy.affine(mul, 0.0)?))
        }))
    }

    /// factor * x
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn scale(&self, factor: f32) -> Result<Tensor> {
        self.affine(factor, 0.0)
    }

    /// `act(self) * up`, the gated linear unit in one pass.
    ///
    /// # Errors
    /// If the shapes differ.
    pub fn glu(&self, kind: Glu, up: &Tensor) -> Result<Tensor> {
        if self.shape() != up.shape() {
            return shape_err(
                "glu",
                format!("gate {:?} and up {:?} differ", self.shape(), up.shape()),
            );
        }
        self.same_device(up, "glu")?;
        let device = self.device();
        let data = device.backend().glu(kind, &self.data, &up.data)?;
        let again = || -> Recipe {
            let (gate, up) = (Kept::new(self), Kept::new(up));
            Arc::new(move || {
                let backend = gate.device().backend();
                backend.glu_packed(kind, gate.packed()?, up.packed()?)
            })
        };
        let shape = self.shape().to_vec();
        Ok(record_again(
            data,
            shape,
            device,
            &[self, up],
            again,
            || {
                let (gate, up) = (Kept::new(self), Kept::new(up));
                Box::new(move |dy, sink| {
                    let backend = gate.device().backend();
                    let (gate_data, up_data) = (gate.packed()?, up.packed()?);
                    let (dg, du) = backend.glu_grad_packed(kind, gate_data, up_data, &dy.data)?;
                    sink.add(&gate.target, gate.wrap(dg))?;
                    sink.add(&up.target, up.wrap(du))
                })
            },
        ))
    }

    /// Each element kept with probability `1 - p` and scaled by `1 / (1 - p)`; the key decides which.
    ///
    /// # Errors
    /// If `p` is not in `[0, 1)`.
    pub fn dropout(&self, p: f32, key: RngKey) -> Result<Tensor> {
        if !(0.0..1.0).contains(&p) {
            return shape_err("dropout", format!("probability {p} is not in [0, 1)"));
        }
        if p == 0.0 {
            return Ok(self.clone());
        }
        let device = self.device();
        let data = device.backend().dropout(&self.data, p, key)?;
        let again = || -> Recipe {
            let x = Kept::new(self);
            Arc::new(move || x.device().backend().dropout(&x.data()?, p, key))
        };
        let shape = self.shape().to_vec();
        Ok(record_again(data, shape, device, &[self], again, || {
            let x = self.target.clone();
            Box::new(move |dy, sink| sink.add(&x, dy.dropout(p, key)?))
        }))
    }

    /// Sum of all elements, shape `[]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn sum_all(&self) -> Result<Tensor> {
        self.sum_to(&vec![1; self.rank()])?.reshape(&[])
    }

    /// Mean of all elements, shape `[]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn mean_all(&self) -> Result<Tensor> {
        self.sum_all()?.scale(1.0 / self.numel().max(1) as f32)
    }

    /// Sum along one axis, which stays with size 1.
    ///
    /// # Errors
    /// If there is no such axis.
    pub fn sum_axis(&self, axis: usize) -> Result<Tensor> {
        let mut to = self.shape().to_vec();
        match to.get_mut(axis) {
            Some(size) => *size = 1,
            None => {
                return shape_err(
                    "sum_axis",
                    format!("no axis {axis} in shape {:?}", self.shape()),
                );
            }
        }
        self.sum_to(&to)
    }
}
