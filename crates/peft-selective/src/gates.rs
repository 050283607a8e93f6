//! Hard-concrete gates: random numbers between 0 and 1 that are often exactly one of them, and that a gradient passes.
//! "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312.

use peft_core::{Result, RngKey, Tensor};

/// The distribution's constants.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HardConcrete {
    /// Where a closed gate's logit tends to before it is cut off at 0.
    pub(crate) l: f32,
    /// Where an open one's tends to before it is cut off at 1.
    pub(crate) r: f32,
    /// Temperature.
    pub(crate) beta: f32,
}

impl HardConcrete {
    /// Gates for these logits: a sample with a key, else the middle of the distribution.
    pub(crate) fn sample(self, alpha: &Tensor, key: Option<RngKey>) -> Result<Tensor> {
        let logits = match key {
            None => alpha.clone(),
            Some(key) => {
                let mut noise = vec![0.0; alpha.numel()];
                // Away from the ends, where the logarithm has no value.
                key.fill_uniform(1e-4, 1.0 - 1e-4, &mut noise);
                noise.iter_mut().for_each(|u| *u = u.ln() - (1.0 - *u).ln());
                let noise = Tensor::from_vec(noise, alpha.shape(), alpha.device())?;
                alpha.add(&noise)?.scale(1.0 / self.beta)?
            }
        };
        let stretched = logits.sigmoid()?.affine(self.r - self.l, self.l)?;
        let above = stretched.affine(1.0, -1.0)?.relu()?;
        Ok(stretched.relu()?.sub(&above)?)
    }

    /// Probability that a gate is not closed.
    pub(crate) fn open(self, alpha: &Tensor) -> Result<Tensor> {
        let c = self.beta * (-self.l / self.r).ln();
        Ok(alpha.affine(1.0, -c)?.sigmoid()?)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::Device;

    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_vec(values.to_vec(), &[values.len()], &Device::cpu()).expect("a tensor")
    }

    fn close(got: Result<Tensor>, want: &[f32]) {
        let got = got.expect("gates").to_vec().expect("values");
        let near = got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near, "{got:?}");
    }

    const EVEN: HardConcrete = HardConcrete {
        l: -1.5,
        r: 1.5,
        beta: 1.0,
    };

    /// sigmoid(0) = 1/2 is the middle of the stretch, sigmoid(ln 3) = 3/4 at 0.75, sigmoid(ln 9) = 0.9 beyond its end.
    #[test]
    fn the_middle_by_hand() {
        let alpha = tensor(&[0.0, 3f32.ln(), 9f32.ln(), -9.0]);
        close(EVEN.sample(&alpha, None), &[0.0, 0.75, 1.0, 0.0]);
    }

    /// c = 0.5 ln(1/4) = -ln 2 where the stretch is uneven: sigmoid(ln 2) = 2/3, sigmoid(ln 6) = 6/7.
    #[test]
    fn probabilities_by_hand() {
        let uneven = HardConcrete {
            l: -0.5,
            r: 2.0,
            beta: 0.5,
        };
        close(
            uneven.open(&tensor(&[0.0, 3f32.ln()])),
            &[2.0 / 3.0, 6.0 / 7.0],
        );
    }

    /// As many samples are open as the penalty counts on, and a gradient comes back from those in between alone.
    #[test]
    fn samples_keep_to_the_probability() {
        let alpha = tensor(&[0.7; 4000]).leaf();
        let gates = EVEN.sample(&alpha, Some(RngKey::new(3))).expect("gates");
        let values = gates.to_vec().expect("values");
        let open = values.iter().filter(|z| **z > 0.0).count() as f32 / 4000.0;
        let expected = EVEN.open(&tensor(&[0.7])).and_then(|p| Ok(p.item()?));
        assert!((open - expected.expect("a number")).abs() < 0.03, "{open}");
        let grads = gates
            .sum_all()
            .and_then(Tensor::backward)
            .expect("backward");
        let slopes = grads
            .get(&alpha)
            .expect("a gradient")
            .to_vec()
            .expect("values");
        for (slope, z) in slopes.iter().zip(&values) {
            assert_eq!(*slope != 0.0, *z > 0.0 && *z < 1.0, "{slope} at {z}");
        }
    }
}
