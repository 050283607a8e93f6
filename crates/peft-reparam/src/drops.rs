//! The two dropouts of LyCORIS: outputs of a change, and whole changes. Both act only while training.

use peft_core::{Call, Result, Tensor};

use crate::fields::probability;

/// How much is dropped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Drops {
    /// Probability of an output of the change to be zero.
    pub(crate) rank: f32,
    /// Probability of the whole change to be zero.
    pub(crate) module: f32,
    /// Whether the outputs that stay make up for the others.
    pub(crate) rescale: bool,
}

impl Drops {
    /// Checks both probabilities.
    pub(crate) fn check(&self) -> Result<()> {
        probability("rank_dropout", self.rank)?;
        probability("module_dropout", self.module)
    }

    /// What `change` makes of the call's input, `out` wide, with something dropped.
    pub(crate) fn apply(
        &self,
        call: &Call<'_>,
        path: &str,
        out: usize,
        change: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let (x, pass) = (call.x()?, call.pass());
        if !pass.train {
            return change(x);
        }
        let key = pass.key.fork(path);
        if self.module > 0.0 && key.fork("module_dropout").uniform_at(0) < self.module {
            let mut shape = x.shape().to_vec();
            if let Some(last) = shape.last_mut() {
                *last = out;
            }
            return Ok(Tensor::zeros(&shape, x.device())?);
        }
        let y = change(x)?;
        if self.rank == 0.0 {
            return Ok(y);
        }
        let key = key.fork("rank_dropout");
        let keep = |i: usize| key.uniform_at(i as u64) >= self.rank;
        let kept = (0..out).filter(|&i| keep(i)).count();
        let factor = if self.rescale && kept > 0 {
            out as f32 / kept as f32
        } else {
            1.0
        };
        let mask = (0..out)
            .map(|i| if keep(i) { factor } else { 0.0 })
            .collect();
        Ok(y.mul(&Tensor::from_vec(mask, &[out], y.device())?)?)
    }
}
