//! Optimisers: AdamW, parameter groups, clipping.

mod adamw;
mod blocks;
mod groups;
mod moments;

pub use adamw::{AdamW, Rate};
pub use groups::Groups;

use peft_core::{Grads, Param, Result, Tensor};
use rayon::prelude::*;

/// Takes the gradients of `params` out of `grads`, in the order of `params`; None for a parameter nothing depended on. The
/// memory they leave behind goes back to the system: what is taken is held elsewhere.
///
/// # Errors
/// Whatever the device says.
pub fn take_gradients(params: &[Param], grads: &mut Grads) -> Result<Vec<Option<Vec<f32>>>> {
    let taken: Vec<_> = params.iter().map(|p| grads.take(&p.tensor())).collect();
    let there: Vec<bool> = taken.iter().map(Option::is_some).collect();
    let mut values = Tensor::into_vecs(taken.into_iter().flatten().collect())?.into_iter();
    Ok(there
        .into_iter()
        .map(|there| if there { values.next() } else { None })
        .collect())
}

/// The norm of each gradient (0 where there is none), in double precision; the sum of squares goes in one order, so it
/// does not depend on the number of threads.
pub fn norms(grads: &[Option<Vec<f32>>]) -> Vec<f64> {
    let square = |g: &Vec<f32>| g.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
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
