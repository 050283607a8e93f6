//! Cross-entropy with its gradient, written over the logits.

use super::par;
use super::simd::{exp, max_body, simd, sum_body};

/// The loss of logits `x`, which their gradient takes the place of.
pub(super) fn cross_entropy(x: &mut [f32], targets: &[i64], cols: usize) -> f32 {
    if x.is_empty() {
        return 0.0;
    }
    let step = par::rows_per_chunk(cols);
    let chunks = x.chunks_mut(step * cols).enumerate();
    let mut losses = vec![0.0; chunks.len()];
    par::share(chunks.zip(&mut losses).collect(), |((i, x), loss)| {
        let rows = x.chunks_exact_mut(cols).zip(&targets[i * step..]);
        let losses = rows.map(|(x, target)| match usize::try_from(*target) {
            Ok(target) => row(x, target),
            Err(_) => {
                x.fill(0.0);
                0.0
            }
        });
        *loss = losses.sum::<f64>();
    });
    losses.iter().sum::<f64>() as f32
}

simd! {
    /// -log softmax(x)[target]; `x` becomes softmax(x) - onehot(target).
    fn row(x: &mut [f32], target: usize) -> f64 {
        let max = max_body(x);
        let asked = f64::from(x[target]);
        for x in x.iter_mut() {
            *x = exp::<FMA>(*x - max);
        }
        // Vocabularies are large: sum blocks in f32 and the blocks in f64.
        let sum: f64 = x.chunks(4096).map(|block| f64::from(sum_body(block))).sum();
        let inv = (1.0 / sum) as f32;
        for x in x.iter_mut() {
            *x *= inv;
        }
        x[target] -= 1.0;
        sum.ln() + f64::from(max) - asked
    }
}
