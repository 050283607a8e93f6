//! AdamW: "Decoupled Weight Decay Regularization" (arXiv 1711.05101), with `torch.optim.AdamW`'s arithmetic.

use std::collections::BTreeMap;

use peft_core::{Error, Param, Result};
use peft_io::NamedTensors;
use peft_tensor::Tensor;
use rayon::prelude::*;

/// Elements of one task.
const CHUNK: usize = 1 << 14;

/// Step size and decay of one parameter at one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// What is remembered about one parameter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Running mean of the gradient.
    pub mean: Vec<f32>,
    /// Running mean of its square.
    pub square: Vec<f32>,
    /// Steps it has had a gradient in.
    pub steps: u64,
}

/// The optimiser with its state, by parameter key.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    state: BTreeMap<String, Moments>,
}

impl AdamW {
    /// Without history.
    pub fn new(betas: [f64; 2], eps: f64) -> Self {
        Self {
            betas,
            eps,
            state: BTreeMap::new(),
        }
    }

    /// Moves one parameter along its gradient times `factor` (what clipping came to). In f32, with g = factor * grad:
    ///
    /// ```text
    /// w <- w (1 - lr decay)          m <- m + (g - m)(1 - b1)        v <- v b2 + (1 - b2) g g
    /// w <- w - lr/(1 - b1^t) m / (sqrt(v)/sqrt(1 - b2^t) + eps)
    /// ```
    ///
    /// # Errors
    /// If the gradient has another length than the parameter, or the device refuses.
    pub fn step(&mut self, param: &Param, grad: &[f32], factor: f32, rate: Rate) -> Result<()> {
        let before = param.tensor();
        let mut weight = before.to_vec()?;
        let n = weight.len();
        if grad.len() != n {
            return Err(Error::other(format!(
                "{}: {} gradients for {n} values",
                param.key(),
                grad.len()
            )));
        }
        let moments = self.state.entry(param.key().to_owned()).or_default();
        if moments.mean.len() != n {
            *moments = Moments {
                mean: vec![0.0; n],
                square: vec![0.0; n],
                steps: 0,
            };
        }
        moments.steps += 1;
        let t = moments.steps as f64;
        let [b1, b2] = self.betas;
        let decay = (1.0 - rate.learning_rate * rate.weight_decay) as f32;
        let size = (rate.learning_rate / (1.0 - b1.powf(t))) as f32;
        let root = (1.0 - b2.powf(t)).sqrt() as f32;
        let (towards, keep, add, eps) = (
            (1.0 - b1) as f32,
            b2 as f32,
            (1.0 - b2) as f32,
            self.eps as f32,
        );
        let update = |w: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]| {
            for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                let g = g * factor;
                *m += (g - *m) * towards;
                *v = *v * keep + add * g * g;
                *w = *w * decay - size * (*m / (v.sqrt() / root + eps));
            }
        };
        let Moments { mean, square, .. } = moments;
        if n <= CHUNK {
            update(&mut weight, mean, square, grad);
        } else {
            let values = weight.par_chunks_mut(CHUNK).zip(mean.par_chunks_mut(CHUNK));
            values
                .zip(square.par_chunks_mut(CHUNK))
                .zip(grad.par_chunks(CHUNK))
                .for_each(|(((w, m), v), g)| update(w, m, v, g));
        }
        param.set(Tensor::from_vec(weight, before.shape(), before.device())?)
    }

    /// Forgets everything: the next step is a first one.
    pub fn reset(&mut self) {
        self.state.clear();
    }

    /// The moments as tensors, `mean/KEY` and `square/KEY`, and the steps by key.
    pub fn export(&self) -> (NamedTensors, BTreeMap<String, u64>) {
        let mut tensors = NamedTensors::new();
        let mut steps = BTreeMap::new();
        for (key, moments) in &self.state {
            for (what, values) in [("mean", &moments.mean), ("square", &moments.square)] {
                tensors.insert(
                    format!("{what}/{key}"),
                    (vec![values.len()], values.clone()),
                );
            }
            steps.insert(key.clone(), moments.steps);
        }
        (tensors, steps)
    }

    /// The inverse of [`AdamW::export`]; takes its tensors out of `tensors`.
    ///
    /// # Errors
    /// If a moment is missing.
    pub fn restore(
        &mut self,
        tensors: &mut NamedTensors,
        steps: &BTreeMap<String, u64>,
    ) -> Result<()> {
        self.state.clear();
        for (key, &steps) in steps {
            let mut take = |what: &str| {
                let name = format!("{what}/{key}");
                let missing = || Error::other(format!("the checkpoint has no tensor `{name}`"));
                tensors
                    .remove(&name)
                    .map(|(_, values)| values)
                    .ok_or_else(missing)
            };
            let (mean, square) = (take("mean")?, take("square")?);
            self.state.insert(
                key.clone(),
                Moments {
                    mean,
                    square,
                    steps,
                },
            );
        }
        Ok(())
    }
}
