//! Choosing entries, rows and phases.

use peft_core::{Error, Result};

/// Rows `0..rows` of the training data, at most `wanted` of them, evenly spread, in batches of `batch`.
pub(crate) fn spread(rows: usize, wanted: Option<usize>, batch: usize) -> Vec<Vec<usize>> {
    let count = wanted.unwrap_or(rows).min(rows);
    let picked: Vec<usize> = (0..count).map(|i| i * rows / count.max(1)).collect();
    picked.chunks(batch.max(1)).map(<[usize]>::to_vec).collect()
}

/// The step at which the second phase begins, where the first has that share of them.
pub(crate) fn phase_end(field: &str, share: f64, total: u64) -> Result<u64> {
    if !(share > 0.0 && share < 1.0) {
        let detail = format!("has to be between 0 and 1, both excluded; it is {share}");
        return Err(Error::config(field, detail));
    }
    if total < 2 {
        let detail = format!("divides the run in two, which needs at least 2 steps, not {total}");
        return Err(Error::config(field, detail));
    }
    Ok(((share * total as f64).round() as u64).clamp(1, total - 1))
}

/// Exactly the `count` entries with the largest or smallest scores of all modules, in order of their place; of equal ones
/// the earlier. Scores are not negative; they are asked for three times, one module at a time, so that nothing as
/// large as the model is held.
pub(crate) fn select(
    modules: usize,
    count: usize,
    largest: bool,
    mut scores: impl FnMut(usize) -> Result<Vec<f32>>,
) -> Result<Vec<Vec<u32>>> {
    // Bits of numbers that are not negative are ordered as the numbers are.
    let rank = |score: f32| {
        let bits = score.abs().to_bits();
        if largest { bits } else { !bits }
    };
    let mut high = vec![0usize; 1 << 16];
    for module in 0..modules {
        for score in scores(module)? {
            high[(rank(score) >> 16) as usize] += 1;
        }
    }
    let (bucket, above) = threshold(&high, count);
    let mut low = vec![0usize; 1 << 16];
    for module in 0..modules {
        for score in scores(module)? {
            let rank = rank(score);
            if (rank >> 16) as usize == bucket {
                low[(rank & 0xffff) as usize] += 1;
            }
        }
    }
    let (within, more) = threshold(&low, count.saturating_sub(above));
    let last = (bucket << 16 | within) as u32;
    let mut equal = count.saturating_sub(above + more);
    let mut chosen = Vec::with_capacity(modules);
    for module in 0..modules {
        let mut flat = Vec::new();
        for (score, at) in scores(module)?.into_iter().zip(0u32..) {
            let rank = rank(score);
            let tie = rank == last && equal > 0;
            equal -= usize::from(tie);
            if rank > last || tie {
                flat.push(at);
            }
        }
        chosen.push(flat);
    }
    Ok(chosen)
}

/// The bucket that the `count`-th largest number is in, and how many numbers are in larger ones.
fn threshold(counts: &[usize], count: usize) -> (usize, usize) {
    let mut above = 0;
    for (bucket, n) in counts.iter().enumerate().rev() {
        if above + n >= count {
            return (bucket, above);
        }
        above += n;
    }
    (0, above)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picked(scores: &[Vec<f32>], count: usize, largest: bool) -> Vec<Vec<u32>> {
        select(scores.len(), count, largest, |i| Ok(scores[i].clone())).expect("scores")
    }

    #[test]
    fn the_largest_of_all_modules_and_of_equal_ones_the_first() {
        let scores = [vec![1.0, 0.5, 3.0], vec![0.5, 2.0], vec![0.5]];
        assert_eq!(picked(&scores, 3, true), [vec![0, 2], vec![1], vec![]]);
        assert_eq!(picked(&scores, 4, true), [vec![0, 1, 2], vec![1], vec![]]);
        assert_eq!(
            picked(&scores, 5, true),
            [vec![0, 1, 2], vec![0, 1], vec![]]
        );
        assert_eq!(picked(&scores, 2, false), [vec![1], vec![0], vec![]]);
        assert_eq!(picked(&scores, 9, true)[2], [0]);
    }

    /// Neighbours in f32, which a histogram of the high bits alone cannot tell apart.
    #[test]
    fn close_scores_are_told_apart() {
        let mut scores = vec![1.0f32; 40];
        scores[7] = 1.0f32.next_up();
        scores[31] = 1.0f32.next_up();
        assert_eq!(picked(&[scores.clone()], 2, true), [vec![7, 31]]);
        scores[3] = 1.0f32.next_down();
        assert_eq!(picked(&[scores], 1, false), [vec![3]]);
    }

    #[test]
    fn phases_and_rows() {
        assert_eq!(phase_end("f", 0.5, 10).expect("a step"), 5);
        assert_eq!(phase_end("f", 0.01, 10).expect("a step"), 1);
        assert_eq!(phase_end("f", 0.99, 3).expect("a step"), 2);
        assert!(phase_end("f", 1.0, 10).is_err() && phase_end("f", 0.5, 1).is_err());
        assert_eq!(spread(10, Some(4), 3), [vec![0, 2, 5], vec![7]]);
        assert_eq!(spread(2, Some(5), 1), [vec![0], vec![1]]);
    }
}
