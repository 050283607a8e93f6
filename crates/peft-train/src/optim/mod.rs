//! Optimisers: AdamW, parameter groups, clipping.

mod adamw;
mod blocks;
mod groups;
mod moments;
mod optimizer;

pub use adamw::{AdamW, Move, Rate};
pub use groups::Groups;
pub use optimizer::{Norm, Optimizer};

use peft_core::{Grads, Param, Tensor};
use rayon::prelude::*;

/// Takes the gradients of `params` out of `grads`, in the order of `params`; None for a parameter nothing depended on.
pub fn take_gradients(params: &[Param], grads: &mut Grads) -> Vec<Option<Tensor>> {
    params.iter().map(|p| grads.take(&p.tensor())).collect()
}

/// The norm of each gradient (0 where there is none), in double precision; the sum of squares goes in one order, so it
/// does not depend on the number of threads.
pub fn norms<G: AsRef<[f32]> + Sync>(grads: &[Option<G>]) -> Vec<f64> {
    // Eight sums: one would wait for each addition.
    let square = |g: &G| {
        let (whole, rest) = g.as_ref().as_chunks::<8>();
        let mut sums = [0.0; 8];
        for values in whole {
            for (sum, &x) in sums.iter_mut().zip(values) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        let rest: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        sums.iter().sum::<f64>() + rest
    };
    grads
        .par_iter()
        .map(|g| g.as_ref().map_or(0.0, square).sqrt())
        .collect()
}

/// The norm of all gradients together.
pub fn total_norm(norms: &[f64]) -> f64 {
    norms.iter().map(|n| n * n).sum::<f64>().sqrt()
}

/// What gradients are multiplied by so that their norm is at most `max_norm`: that of
/// `torch.nn.utils.clip_grad_norm_`. A `max_norm` of 0 is no limit.
pub fn clip_factor(total_norm: f64, max_norm: f64) -> f32 {
    if max_norm > 0.0 {
        (max_norm / (total_norm + 1e-6)).min(1.0) as f32
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests;
