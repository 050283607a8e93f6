//! How the learning rate goes over a run: the lambdas of `transformers.get_scheduler`.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after a linear warm-up from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// In a straight line to 0 at the last step.
    #[default]
    Linear,
    /// Half a cosine wave to 0 at the last step.
    Cosine,
    /// Stays: `constant_with_warmup` in transformers, whose `constant` takes no notice of a warm-up.
    #[serde(alias = "constant_with_warmup")]
    Constant,
}

impl Schedule {
    /// The factor on the learning rate at optimiser step `step`, from 0, of `total`.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let left = total.saturating_sub(warmup).max(1) as f64;
        match self {
            Self::Linear => total.saturating_sub(step) as f64 / left,
            Self::Cosine => {
                let progress = (step - warmup) as f64 / left;
                (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0)
            }
            Self::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Factors of `transformers.get_scheduler(name, optimizer, warmup, total)` (5.23.0) at a base rate of 1,
    /// printed with 17 digits by `scheduler.get_last_lr()` before each optimiser step.
    const LINEAR_3_OF_10: [f64; 10] = [
        0.0,
        0.3333333333333333,
        0.6666666666666666,
        1.0,
        0.8571428571428571,
        0.7142857142857143,
        0.5714285714285714,
        0.42857142857142855,
        0.2857142857142857,
        0.14285714285714285,
    ];
    const COSINE_3_OF_10: [f64; 10] = [
        0.0,
        0.3333333333333333,
        0.6666666666666666,
        1.0,
        0.9504844339512095,
        0.8117449009293668,
        0.6112604669781572,
        0.38873953302184283,
        0.18825509907063326,
        0.04951556604879048,
    ];
    const CONSTANT_3_OF_10: [f64; 10] = [
        0.0,
        0.3333333333333333,
        0.6666666666666666,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
        1.0,
    ];
    const COSINE_0_OF_7: [f64; 7] = [
        1.0,
        0.9504844339512095,
        0.8117449009293668,
        0.6112604669781572,
        0.38873953302184283,
        0.18825509907063326,
        0.04951556604879048,
    ];
    const LINEAR_5_OF_5: [f64; 5] = [0.0, 0.2, 0.4, 0.6, 0.8];

    #[test]
    fn the_rates_are_those_of_transformers() {
        let cases: [(Schedule, u64, &[f64]); 5] = [
            (Schedule::Linear, 3, &LINEAR_3_OF_10),
            (Schedule::Cosine, 3, &COSINE_3_OF_10),
            (Schedule::Constant, 3, &CONSTANT_3_OF_10),
            (Schedule::Cosine, 0, &COSINE_0_OF_7),
            (Schedule::Linear, 5, &LINEAR_5_OF_5),
        ];
        for (schedule, warmup, table) in cases {
            for (step, &want) in table.iter().enumerate() {
                let got = schedule.factor(step as u64, warmup, table.len() as u64);
                assert!(
                    (got - want).abs() < 1e-15,
                    "{schedule:?} {warmup} at {step}: {got} for {want}"
                );
            }
        }
    }

    #[test]
    fn a_run_longer_than_planned_stays_at_its_end() {
        assert_eq!(Schedule::Linear.factor(12, 3, 10), 0.0);
        assert_eq!(Schedule::Linear.factor(0, 0, 0), 0.0);
    }
}
