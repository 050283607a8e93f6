//! Fastfood: a random projection of a few numbers to many in little time and memory.
//!
//! `M = H G Π H B` (Le, Sarlós, Smola: Fastfood, ICML 2013): signs B, Hadamard's matrix H, a permutation Π, normal
//! factors G, and H again. Nothing of it is kept but the key it is drawn from. H is not normalised, and symmetric: the
//! gradient of `H x` is `H` of the gradient.

use std::sync::Arc;

use peft_core::peft_tensor::{CustomOp, Result as TensorResult, checkpoint, concat, custom};
use peft_core::{Device, Result, RngKey, Tensor};

/// Bits of an index that one product with a small Hadamard matrix transforms.
const BITS: u32 = 6;

/// Hadamard's matrix times a vector of 2^n numbers.
struct Hadamard;

impl CustomOp for Hadamard {
    fn name(&self) -> &'static str {
        "fastfood.hadamard"
    }

    /// By blocks of the index's bits: the lowest are transformed, then moved to the front; after all of them have had
    /// their turn every bit is where it was.
    fn composed(&self, inputs: &[Tensor]) -> TensorResult<Tensor> {
        let [x] = inputs else {
            return concat(&[], 0);
        };
        let (n, mut y) = (x.numel(), x.clone());
        let mut left = n.trailing_zeros();
        while left > 0 {
            let bits = left.min(BITS);
            let side = 1 << bits;
            let rows = y.reshape(&[n / side, side])?;
            y = rows.matmul(&small(side, x.device())?)?.t()?;
            left -= bits;
        }
        y.reshape(&[n])
    }
}

/// Hadamard's matrix itself: -1 where the indices have an odd number of bits in common.
fn small(side: usize, device: &Device) -> TensorResult<Tensor> {
    let sign = |i: usize| {
        let common = (i / side) & (i % side);
        if common.count_ones() % 2 == 1 {
            -1.0
        } else {
            1.0
        }
    };
    Tensor::from_vec((0..side * side).map(sign).collect(), &[side, side], device)
}

fn hadamard(x: &Tensor) -> TensorResult<Tensor> {
    let op: Arc<dyn CustomOp> = Arc::new(Hadamard);
    custom(&op, &[x])
}

/// A projection of `from` numbers to `to` that keeps their length on average.
#[derive(Clone)]
pub(crate) struct Fastfood {
    to: usize,
    /// Width of the first transform, a power of two.
    narrow: usize,
    /// Width of the second, a power of two, at least the first's.
    wide: usize,
    key: RngKey,
    /// `[narrow]`
    signs: Tensor,
    scale: f32,
}

impl Fastfood {
    /// The projection of a key.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn new(from: usize, to: usize, key: RngKey, device: &Device) -> Result<Self> {
        let narrow = from.max(1).next_power_of_two();
        let wide = to.max(1).next_power_of_two().max(narrow);
        let signs = key.fork("signs");
        let sign = |i: u64| if signs.uniform_at(i) < 0.5 { -1.0 } else { 1.0 };
        let signs = (0..narrow as u64).map(sign).collect();
        let mut projection = Self {
            to,
            narrow,
            wide,
            key,
            signs: Tensor::from_vec(signs, &[narrow], device)?,
            scale: 1.0,
        };
        // The wide transform of G times a vector of length 1 has elements of variance sum(G²) / wide * |H x|² / narrow.
        let squares: f64 = projection
            .normal(device)?
            .to_vec()?
            .into_iter()
            .map(|g| f64::from(g).powi(2))
            .sum();
        projection.scale = (1.0 / (to as f64 * squares).sqrt()) as f32;
        Ok(projection)
    }

    /// G.
    fn normal(&self, device: &Device) -> TensorResult<Tensor> {
        let key = self.key.fork("normal");
        Tensor::normal(key, 0.0, 1.0, &[self.wide], device)
    }

    /// Π, as the elements of the narrow transform that the wide one takes: a vector that is zero beyond `narrow` has a
    /// transform that repeats, so that the first one has not to be wide.
    fn order(&self) -> Vec<u32> {
        let mask = self.wide as u64 - 1;
        let half = self.wide.trailing_zeros().div_ceil(2);
        let rounds = self.key.fork("order");
        let rounds = [0, 1].map(|i| rounds.u32x4(i).map(u64::from));
        let place = |i: u64| {
            // Odd factors, additions and shifts can be undone: every place is taken once.
            let mut x = i;
            for [a, b, c, d] in rounds {
                x = (x.wrapping_mul(a << 1 | 1).wrapping_add(b)) & mask;
                x ^= x >> half.max(1);
                x = (x.wrapping_mul(c << 1 | 1).wrapping_add(d)) & mask;
                x ^= x >> (half / 2).max(1);
            }
            (x % self.narrow as u64) as u32
        };
        (0..self.wide as u64).map(place).collect()
    }

    fn project(&self, x: &Tensor) -> TensorResult<Tensor> {
        let rest = self.narrow - x.numel();
        let padded = if rest == 0 {
            x.clone()
        } else {
            concat(&[x, &Tensor::zeros(&[rest], x.device())?], 0)?
        };
        let first = hadamard(&padded.mul(&self.signs)?)?;
        let mixed = first
            .reshape(&[self.narrow, 1])?
            .gather_rows(&self.order())?
            .reshape(&[self.wide])?
            .mul(&self.normal(x.device())?)?;
        hadamard(&mixed)?.narrow(0, 0, self.to)?.scale(self.scale)
    }

    /// The projection of `x [from]`: `[to]`. What it computes on the way is computed again in the backward pass.
    ///
    /// # Errors
    /// If `x` has another length.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let own = self.clone();
        let project = move |x: &[Tensor]| match x {
            [x] => own.project(x),
            _ => concat(&[], 0),
        };
        Ok(checkpoint(&[x], project)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_vec(values.to_vec(), &[values.len()], &Device::cpu()).expect("a tensor")
    }

    /// H of (1, 2, 3, 4) is (10, -2, -4, 0); H H = n, also where it takes several products.
    #[test]
    fn hadamard_by_hand() {
        let y = hadamard(&tensor(&[1.0, 2.0, 3.0, 4.0])).expect("runs");
        assert_eq!(y.to_vec().expect("values"), [10.0, -2.0, -4.0, 0.0]);
        let x: Vec<f32> = (0..2048).map(|i| (i * 37 % 11) as f32).collect();
        let twice = hadamard(&tensor(&x)).and_then(|y| hadamard(&y));
        let twice = twice.expect("runs").to_vec().expect("values");
        assert!(x.iter().zip(twice).all(|(x, y)| 2048.0 * x == y));
        // Element 1365 = 0b10101010101 of a unit vector at 1024 + 1: two bits in common.
        let mut unit = vec![0.0; 2048];
        unit[1025] = 1.0;
        let y = hadamard(&tensor(&unit)).expect("runs").to_vec();
        let y = y.expect("values");
        assert_eq!((y[1365], y[1], y[1024], y[2]), (1.0, -1.0, -1.0, 1.0));
    }

    /// Backward of y = H x is H g: for the loss 2 y[1], the gradient is 2 (1, -1, 1, -1).
    #[test]
    fn the_gradient_is_not_normalised() {
        let x = tensor(&[0.5, 1.0, -1.0, 2.0]).leaf();
        let y = hadamard(&x).and_then(|y| y.narrow(0, 1, 1)?.scale(2.0)?.sum_all());
        let grads = y.and_then(Tensor::backward).expect("a gradient");
        let grad = grads.get(&x).expect("of x").to_vec().expect("values");
        assert_eq!(grad, [2.0, -2.0, 2.0, -2.0]);
    }

    #[test]
    fn every_place_is_taken_once() {
        for (narrow, wide) in [(1, 1), (2, 2), (8, 8), (128, 128), (4096, 4096)] {
            let projection = Fastfood::new(narrow, wide, RngKey::new(3), &Device::cpu());
            let mut order = projection.expect("made").order();
            assert!(
                wide < 8 || order.windows(2).any(|w| w[0] > w[1]),
                "in order"
            );
            order.sort_unstable();
            assert!(order.into_iter().eq(0..wide as u32), "{wide}");
        }
    }

    /// Over 200 keys the mean of |P x|² / |x|² is 1 within a few standard errors, for odd sizes.
    #[test]
    fn lengths_are_kept_on_average() {
        for (from, to) in [(5, 100), (40, 33), (200, 1000)] {
            let x: Vec<f32> = (0..from).map(|i| (i as f32 * 0.7).sin()).collect();
            let length: f32 = x.iter().map(|v| v * v).sum();
            let x = tensor(&x);
            let ratio = |seed| {
                let projection = Fastfood::new(from, to, RngKey::new(seed), &Device::cpu());
                let y = projection.and_then(|p| p.apply(&x)).expect("runs");
                let y = y.to_vec().expect("values");
                y.iter().map(|v| v * v).sum::<f32>() / length
            };
            let mean = (0..200).map(ratio).sum::<f32>() / 200.0;
            assert!((mean - 1.0).abs() < 0.1, "{from} to {to}: {mean}");
        }
    }
}
