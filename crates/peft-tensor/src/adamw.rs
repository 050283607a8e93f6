//! AdamW where the values are: a device that moves parameters itself keeps their moments and hands nothing back.
//!
//! The arithmetic is that of `torch.optim.AdamW` after `clip_grad_norm_`, in f32, with g the gradient times the clipping
//! factor:
//!
//! ```text
//! m <- m + (g - m) towards        v <- v keep + add g g        w <- w decay - size m / (sqrt(v) / root + eps)
//! ```

use crate::{Buffer, Device, Result, Tensor};

/// What all parameters of a run have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWRule {
    /// 1 - b1
    pub towards: f32,
    /// b2
    pub keep: f32,
    /// 1 - b2
    pub add: f32,
    /// Added to the root.
    pub eps: f32,
    /// All gradients together are shortened to this norm; 0 = as they are.
    pub max_norm: f32,
}

/// What happens to one parameter in one step.
#[derive(Clone, Copy, Debug)]
pub struct AdamWMove<T> {
    /// Its place in the list of sizes that the state was made for.
    pub slot: usize,
    /// Its value.
    pub value: T,
    /// Its gradient; without one nothing happens to it.
    pub grad: Option<T>,
    /// 1 - rate * weight decay
    pub decay: f32,
    /// rate / (1 - b1^t)
    pub size: f32,
    /// sqrt(1 - b2^t)
    pub root: f32,
}

/// What a step gave.
#[derive(Clone, Debug)]
pub struct AdamWMoved<T> {
    /// For each move, the new value; None where it is as it was.
    pub values: Vec<Option<T>>,
    /// For each move with a gradient, that gradient after clipping; empty if it was not asked for.
    pub used: Vec<Option<T>>,
    /// Three numbers: the norm of all gradients, the clipping factor, and 1 + the slot of the first gradient that is not
    /// finite, 0 if all are, -1 if only their norm is not. Where something is not, the step has moved nothing.
    pub facts: T,
}

/// The moments of parameters, on a device.
pub trait AdamWState: Send {
    /// Moves parameters; `want_used` asks for the gradients after clipping.
    ///
    /// # Errors
    /// Whatever the device says.
    fn step(
        &mut self,
        moves: &[AdamWMove<&Buffer>],
        rule: &AdamWRule,
        want_used: bool,
    ) -> Result<AdamWMoved<Buffer>>;

    /// The mean of the gradient and of its square of every slot.
    ///
    /// # Errors
    /// Whatever the device says.
    fn moments(&self) -> Result<Vec<[Vec<f32>; 2]>>;

    /// Puts both in place of those of a slot.
    ///
    /// # Errors
    /// Whatever the device says.
    fn load(&mut self, slot: usize, moments: [&[f32]; 2]) -> Result<()>;
}

/// [`AdamWState`] for tensors.
pub struct DeviceAdamW {
    device: Device,
    state: Box<dyn AdamWState>,
}

impl DeviceAdamW {
    /// Moments of 0 for parameters of these numbers of values; None if the device leaves the update to the processor.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn new(device: &Device, sizes: &[usize]) -> Result<Option<Self>> {
        let state = device.backend().adamw(sizes)?;
        Ok(state.map(|state| Self {
            device: device.clone(),
            state,
        }))
    }

    /// As [`AdamWState::step`].
    ///
    /// # Errors
    /// As there, and for a gradient of another shape than its value.
    pub fn step(
        &mut self,
        moves: &[AdamWMove<&Tensor>],
        rule: &AdamWRule,
        want_used: bool,
    ) -> Result<AdamWMoved<Tensor>> {
        let mut buffers = Vec::with_capacity(moves.len());
        for m in moves {
            if let Some(grad) = m.grad
                && grad.shape() != m.value.shape()
            {
                let detail = format!("a gradient {:?} for {:?}", grad.shape(), m.value.shape());
                return crate::error::shape_err("adamw", detail);
            }
            buffers.push(AdamWMove {
                slot: m.slot,
                value: &m.value.data,
                grad: m.grad.map(|g| &g.data),
                decay: m.decay,
                size: m.size,
                root: m.root,
            });
        }
        let moved = self.state.step(&buffers, rule, want_used)?;
        let tensors = |all: Vec<Option<Buffer>>| {
            let pairs = all.into_iter().zip(moves);
            pairs
                .map(|(buffer, m)| {
                    let shape = m.value.shape.clone();
                    buffer.map(|b| Tensor::from_buffer(b, shape, &self.device))
                })
                .collect()
        };
        Ok(AdamWMoved {
            values: tensors(moved.values),
            used: tensors(moved.used),
            facts: Tensor::from_buffer(moved.facts, vec![3], &self.device),
        })
    }

    /// As [`AdamWState::moments`].
    ///
    /// # Errors
    /// As there.
    pub fn moments(&self) -> Result<Vec<[Vec<f32>; 2]>> {
        self.state.moments()
    }

    /// As [`AdamWState::load`].
    ///
    /// # Errors
    /// As there.
    pub fn load(&mut self, slot: usize, moments: [&[f32]; 2]) -> Result<()> {
        self.state.load(slot, moments)
    }
}

impl std::fmt::Debug for DeviceAdamW {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceAdamW@{:?}", self.device)
    }
}
