//! Cross-entropy with its gradient in one pass over the logits.

use rayon::prelude::*;

use super::par;
use super::pool::Floats;
use super::simd::{exp, max_body, simd, sum_body};

pub(super) fn cross_entropy(x: &[f32], targets: &[i64], cols: usize) -> (f32, Floats) {
    let mut dx = Floats::dirty(x.len());
    if x.is_empty() {
        return (0.0, dx);
    }
    let step = par::rows_per_chunk(cols);
    let chunks = dx.par_chunks_mut(step * cols).enumerate();
    let losses: Vec<f64> = chunks
        .map(|(i, dx)| {
            let rows = dx
                .chunks_exact_mut(cols)
                .zip(x[i * step * cols..].chunks_exact(cols))
                .zip(&targets[i * step..]);
            rows.map(|((dx, x), target)| match usize::try_from(*target) {
                Ok(target) => row(x, target, dx),
                Err(_) => {
                    dx.fill(0.0);
                    0.0
                }
            })
            .sum()
        })
        .collect();
    (losses.iter().sum::<f64>() as f32, dx)
}

simd! {
    /// -log softmax(x)[target], and softmax(x) - onehot(target) into `dx`.
    fn row(x: &[f32], target: usize, dx: &mut [f32]) -> f64 {
        let max = max_body(x);
        for (d, x) in dx.iter_mut().zip(x) {
            *d = exp::<FMA>(*x - max);
        }
        // Vocabularies are large: sum blocks in f32 and the blocks in f64.
        let sum: f64 = dx.chunks(4096).map(|block| f64::from(sum_body(block))).sum();
        let inv = (1.0 / sum) as f32;
        for d in dx.iter_mut() {
            *d *= inv;
        }
        dx[target] -= 1.0;
        sum.ln() + f64::from(max) - f64::from(x[target])
    }
}
