//! A budget of parts that falls during training, and the parts that are worth keeping.

use std::collections::BTreeMap;

use peft_core::{Device, Param, Result, Tensor, Tensors};

/// When the budget falls.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// Steps before it falls.
    pub(crate) start: u64,
    /// The step from which it stays.
    pub(crate) end: u64,
    /// Steps from one choice to the next.
    pub(crate) every: u64,
}

impl Schedule {
    /// The budget at a step between `first` and `last` parts, along a cubic, and whether parts are chosen then.
    pub(crate) fn at(&self, step: u64, first: usize, last: usize) -> (usize, bool) {
        if step <= self.start {
            return (first, false);
        }
        if step >= self.end {
            return (last, step == self.end);
        }
        let left = 1.0 - (step - self.start) as f64 / (self.end - self.start) as f64;
        let budget = first.saturating_sub(last) as f64 * left.powi(3) + last as f64;
        (budget as usize, step.is_multiple_of(self.every))
    }
}

/// Running means of each element's sensitivity `|value * gradient|` and of its distance from that mean.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sensitivity(BTreeMap<String, [Vec<f32>; 2]>);

impl Sensitivity {
    /// Takes one step's gradient in.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn observe(
        &mut self,
        param: &Param,
        grad: &Tensor,
        (beta1, beta2): (f32, f32),
    ) -> Result<()> {
        let (values, grads) = (param.tensor().to_vec()?, grad.to_vec()?);
        let new = || [vec![0.0; values.len()], vec![0.0; values.len()]];
        let [means, spreads] = self.0.entry(param.key().to_owned()).or_insert_with(new);
        let before = means.iter_mut().zip(spreads);
        for ((mean, spread), (w, g)) in before.zip(values.iter().zip(&grads)) {
            let sensitivity = (w * g).abs();
            *mean = beta1 * *mean + (1.0 - beta1) * sensitivity;
            *spread = beta2 * *spread + (1.0 - beta2) * (sensitivity - *mean).abs();
        }
        Ok(())
    }

    /// The mean score, sensitivity times distance, of elements of a parameter; 0 for one never observed.
    pub(crate) fn score(&self, param: &Param, elements: impl Iterator<Item = usize>) -> f64 {
        let Some([means, spreads]) = self.0.get(param.key()) else {
            return 0.0;
        };
        let (mut sum, mut count) = (0.0, 0usize);
        for i in elements {
            if let (Some(mean), Some(spread)) = (means.get(i), spreads.get(i)) {
                sum += f64::from(*mean) * f64::from(*spread);
                count += 1;
            }
        }
        sum / count.max(1) as f64
    }

    /// For a checkpoint.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn state(&self) -> Result<Tensors> {
        let mut all = Tensors::new();
        for (key, [means, spreads]) in &self.0 {
            let mut both = means.clone();
            both.extend(spreads);
            let both = Tensor::from_vec(both, &[2, means.len()], &Device::cpu())?;
            all.insert(key.clone(), both);
        }
        Ok(all)
    }

    /// The inverse of [`Sensitivity::state`] for one parameter.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn restore(&mut self, key: &str, value: &Tensor) -> Result<()> {
        let both = value.to_vec()?;
        let (means, spreads) = both.split_at(both.len() / 2);
        self.0
            .insert(key.to_owned(), [means.to_vec(), spreads.to_vec()]);
        Ok(())
    }
}

/// Which parts stay if the `budget` best do; of parts with equal scores the later ones.
pub(crate) fn keep_best(scores: &[Vec<f64>], budget: usize) -> Vec<Vec<bool>> {
    let mut kept: Vec<Vec<bool>> = scores.iter().map(|s| vec![true; s.len()]).collect();
    let places = scores.iter().enumerate();
    let mut all: Vec<(f64, usize, usize)> = places
        .flat_map(|(m, s)| s.iter().enumerate().map(move |(i, &score)| (score, m, i)))
        .collect();
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    let dropped = all.len().saturating_sub(budget);
    for (_, m, i) in all.into_iter().take(dropped) {
        if let Some(place) = kept.get_mut(m).and_then(|k| k.get_mut(i)) {
            *place = false;
        }
    }
    kept
}

/// How many of these amounts, largest first, have a share of `threshold` of their sum together; all if they are all zero.
pub(crate) fn leading_share(amounts: &[f32], threshold: f64) -> usize {
    let total: f64 = amounts.iter().map(|&a| f64::from(a)).sum();
    let mut before = 0.0;
    let short = amounts.iter().take_while(|&&amount| {
        let short = total == 0.0 || before < threshold * total;
        before += f64::from(amount);
        short
    });
    short.count()
}

/// 1 where something is kept, 0 elsewhere.
///
/// # Errors
/// Whatever the device says.
pub(crate) fn mask(kept: &[bool], shape: &[usize], device: &Device) -> Result<Tensor> {
    let values = kept.iter().map(|&k| f32::from(u8::from(k))).collect();
    Ok(Tensor::from_vec(values, shape, device)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Start 2, end 6: at 4 half of the way is left, so an eighth of the difference.
    #[test]
    fn the_budget_falls_along_a_cubic() {
        let schedule = Schedule {
            start: 2,
            end: 6,
            every: 2,
        };
        let at = |step| schedule.at(step, 24, 8);
        assert_eq!(at(2), (24, false));
        assert_eq!(at(3), (14, false), "8 + 16 * 27 / 64");
        assert_eq!(at(4), (10, true));
        assert_eq!(at(6), (8, true));
        assert_eq!(at(7), (8, false));
    }

    #[test]
    fn shares_of_a_sum() {
        assert_eq!(leading_share(&[16.0, 9.0, 1.0, 1.0], 0.9), 2);
        assert_eq!(leading_share(&[16.0, 9.0, 1.0, 1.0], 1.0), 4);
        assert_eq!(leading_share(&[16.0, 9.0, 1.0, 1.0], 0.1), 1);
        assert_eq!(leading_share(&[0.0, 0.0], 0.5), 2);
    }

    #[test]
    fn the_best_stay_across_modules() {
        let kept = keep_best(&[vec![3.0, 1.0], vec![2.0, 2.0]], 2);
        assert_eq!(kept, [vec![true, false], vec![false, true]]);
        assert_eq!(keep_best(&[vec![1.0]], 5), [vec![true]]);
    }
}
