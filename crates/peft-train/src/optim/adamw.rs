//! AdamW: "Decoupled Weight Decay Regularization" (arXiv 1711.05101), with `torch.optim.AdamW`'s arithmetic. Its moments
//! are kept in f32 or in blocks of 8 bits, in memory or in a file beside it.

use std::collections::BTreeMap;

use peft_core::{Error, Param, Result};
use peft_io::{Checkpoint, PlanEntry, Scratch};
use peft_tensor::{AdamWRule, Tensor};
use rayon::prelude::*;

use super::moments::{Form, Moments};
use crate::io;

/// Step size and decay of one parameter at one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// A parameter, its gradient and how far it goes.
#[derive(Clone, Copy, Debug)]
pub struct Move<'a> {
    /// What is moved.
    pub param: &'a Param,
    /// As many values.
    pub grad: &'a [f32],
    /// This step's.
    pub rate: Rate,
}

/// Values of parameters that are moved together: their new values are made beside the old ones.
const TOGETHER: usize = 1 << 18;

/// The optimiser with its state, by parameter key.
#[derive(Debug)]
pub struct AdamW {
    betas: [f64; 2],
    eps: f64,
    eight_bit: bool,
    /// Where moments are that are not to be in memory.
    file: Option<Scratch>,
    state: BTreeMap<String, Moments>,
}

impl AdamW {
    /// Without history. With `eight_bit`, moments of parameters of 4096 values and more are kept in blocks of 8 bits.
    pub fn new(betas: [f64; 2], eps: f64, eight_bit: bool) -> Self {
        Self {
            betas,
            eps,
            eight_bit,
            file: None,
            state: BTreeMap::new(),
        }
    }

    /// Keeps moments in `file` from now on, and forgets those there are. Results are the same bit for bit.
    pub fn page_to(&mut self, file: Scratch) {
        self.state.clear();
        self.file = Some(file);
    }

    /// Bytes of the moments of a parameter of `numel` values.
    pub fn bytes(numel: usize, eight_bit: bool) -> usize {
        Form::of(numel, eight_bit).bytes(numel)
    }

    /// [`AdamW::step_all`] of one parameter.
    ///
    /// # Errors
    /// As there.
    pub fn step(&mut self, param: &Param, grad: &[f32], factor: f32, rate: Rate) -> Result<()> {
        self.step_all(&[Move { param, grad, rate }], factor)
    }

    /// Moves parameters, each once, along their gradients times `factor` (what clipping came to). In f32, with g = factor * grad:
    ///
    /// ```text
    /// w <- w (1 - lr decay)          m <- m + (g - m)(1 - b1)        v <- v b2 + (1 - b2) g g
    /// w <- w - lr/(1 - b1^t) m / (sqrt(v)/sqrt(1 - b2^t) + eps)
    /// ```
    ///
    /// # Errors
    /// If a gradient has another length than its parameter, the device refuses, or the moments' file cannot be used.
    pub fn step_all(&mut self, moves: &[Move<'_>], factor: f32) -> Result<()> {
        let mut rest = moves;
        while !rest.is_empty() {
            let mut values = 0;
            let fits = |m: &&Move<'_>| {
                let room = values < TOGETHER;
                values += m.grad.len();
                room
            };
            let (some, others) = rest.split_at(rest.iter().take_while(fits).count());
            self.step_some(some, factor)?;
            rest = others;
        }
        Ok(())
    }

    fn step_some(&mut self, moves: &[Move<'_>], factor: f32) -> Result<()> {
        for Move { param, grad, .. } in moves {
            let n = param.numel();
            if grad.len() != n {
                return Err(Error::other(format!(
                    "{}: {} gradients for {n} values",
                    param.key(),
                    grad.len()
                )));
            }
            if self.state.get(param.key()).is_none_or(|m| m.numel != n) {
                let form = Form::of(n, self.eight_bit);
                let zeros = Moments::zeros(n, form, self.file.as_mut())?;
                self.state.insert(param.key().to_owned(), zeros);
            }
        }
        // Taken out for the time being, so that threads can have them.
        let mut jobs: Vec<_> = moves
            .iter()
            .filter_map(|m| {
                // Memory of this thread: the allocator keeps places for each that asks.
                let weight = Vec::with_capacity(m.grad.len());
                Some((m, self.state.remove_entry(m.param.key())?, weight))
            })
            .collect();
        let AdamWRule {
            towards,
            keep,
            add,
            eps,
            ..
        } = self.rule(0.0);
        let done = jobs
            .par_iter_mut()
            .try_for_each(|(m, (_, moments), weight)| {
                moments.steps += 1;
                let [decay, size, root] = self.factors(m.rate, moments.steps);
                weight.extend_from_slice(&m.param.tensor().values()?);
                moments.update(self.file.as_ref(), weight, m.grad, |w, m, v, g| {
                    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
                        let g = g * factor;
                        *m += (g - *m) * towards;
                        *v = *v * keep + add * g * g;
                        *w = *w * decay - size * (*m / (v.sqrt() / root + eps));
                    }
                })
            });
        let mut moved = Vec::with_capacity(jobs.len());
        for (m, (key, moments), weight) in jobs {
            self.state.insert(key, moments);
            moved.push((m.param, weight));
        }
        done?;
        for (param, weight) in moved {
            let before = param.tensor();
            param.set(Tensor::from_vec(weight, before.shape(), before.device())?)?;
        }
        Ok(())
    }

    /// What a parameter's step `t`, from 1, has of its own: 1 - lr decay, lr/(1 - b1^t), sqrt(1 - b2^t).
    pub(super) fn factors(&self, rate: Rate, t: u64) -> [f32; 3] {
        let ([b1, b2], t) = (self.betas, t as f64);
        [
            (1.0 - rate.learning_rate * rate.weight_decay) as f32,
            (rate.learning_rate / (1.0 - b1.powf(t))) as f32,
            (1.0 - b2.powf(t)).sqrt() as f32,
        ]
    }

    /// What all steps have in common.
    pub(super) fn rule(&self, max_norm: f64) -> AdamWRule {
        let [b1, b2] = self.betas;
        AdamWRule {
            towards: (1.0 - b1) as f32,
            keep: b2 as f32,
            add: (1.0 - b2) as f32,
            eps: self.eps as f32,
            max_norm: max_norm as f32,
        }
    }

    /// The same settings, in memory, without moments.
    pub(super) fn without_history(&self) -> Self {
        Self::new(self.betas, self.eps, self.eight_bit)
    }

    /// The moments of a parameter.
    pub(super) fn put(&mut self, key: String, moments: Moments) {
        self.state.insert(key, moments);
    }

    /// All moments by parameter.
    pub(super) fn moments(&self) -> impl Iterator<Item = (&String, &Moments)> {
        self.state.iter()
    }

    /// Forgets everything: the next step is a first one.
    ///
    /// # Errors
    /// If the moments' file cannot be emptied.
    pub fn reset(&mut self) -> Result<()> {
        self.state.clear();
        match &mut self.file {
            Some(file) => file.clear().map_err(io),
            None => Ok(()),
        }
    }

    /// The tensors a checkpoint holds of the moments.
    pub fn plan(&self) -> Vec<PlanEntry> {
        let all = self.state.iter();
        all.flat_map(|(key, moments)| moments.plan(key)).collect()
    }

    /// Hands the bytes of one tensor of the plan to `sink`, in parts.
    ///
    /// # Errors
    /// Those of the sink, and of the moments' file.
    pub fn write(&self, name: &str, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let found = name
            .split_once('/')
            .and_then(|(piece, key)| Some((piece, self.state.get(key)?)));
        match found {
            Some((piece, moments)) => moments.write(piece, self.file.as_ref(), sink),
            None => Ok(()),
        }
    }

    /// Steps of each parameter.
    pub fn steps(&self) -> BTreeMap<String, u64> {
        let all = self.state.iter();
        all.map(|(key, moments)| (key.clone(), moments.steps))
            .collect()
    }

    /// Goes on from a checkpoint's moments. `numel` tells how many values a parameter has.
    ///
    /// # Errors
    /// If a moment is missing or has another size.
    pub fn restore(
        &mut self,
        from: &Checkpoint,
        steps: &BTreeMap<String, u64>,
        numel: impl Fn(&str) -> Option<usize>,
    ) -> Result<()> {
        self.reset()?;
        for (key, &steps) in steps {
            let unknown = || Error::other(format!("`{key}` has moments, but is no parameter"));
            let n = numel(key).ok_or_else(unknown)?;
            let mut moments = Moments::zeros(n, Form::of(n, self.eight_bit), self.file.as_mut())?;
            moments.read(key, from, self.file.as_ref())?;
            moments.steps = steps;
            self.state.insert(key.clone(), moments);
        }
        Ok(())
    }
}
