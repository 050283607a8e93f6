//! The real part of a two-dimensional inverse Fourier transform, as matrix products that a gradient passes through.

use std::collections::HashMap;
use std::f64::consts::TAU;

use peft_core::peft_tensor::torch_rng::TorchRng;
use peft_core::{Device, Result, Tensor};

use crate::kron::split;

/// Sizes with a prime factor beyond this would need tables larger than the weights themselves.
const LARGEST: usize = 2048;

/// Tables of cosines and sines for matrices of one shape.
///
/// An axis of `n = n1 n2` entries is transformed in two steps (Cooley and Tukey): index `n2 i1 + i2` to `k1 + n1 k2`, first
/// over i1 with the twist that belongs to i2, then over i2. Complex numbers are pairs of planes, real before imaginary.
pub(crate) struct Plan {
    rows: usize,
    columns: usize,
    /// Along columns: `[n2, n1, 2 n1]`, from real numbers.
    first: Tensor,
    /// `[2 n2, 2 n2]`
    second: Tensor,
    /// Along rows: `[m2, 2 m1, 2 m1]`
    third: Tensor,
    /// `[2 m2, m2]`, to real numbers.
    fourth: Tensor,
}

/// Whether tables for an axis are of a reasonable size.
pub(crate) fn fits(size: usize) -> bool {
    split(size, None).1 <= LARGEST
}

/// `e^(i angle)` as a product with planes: from plane p to plane q, 0 being the real one.
fn entry(angle: f64, p: usize, q: usize) -> f64 {
    match (p, q) {
        (0, 0) | (1, 1) => angle.cos(),
        (0, _) => angle.sin(),
        _ => -angle.sin(),
    }
}

/// `of / size` of a turn; reduced first, so that large products lose nothing.
fn turn(of: usize, size: usize) -> f64 {
    TAU * (of % size.max(1)) as f64 / size.max(1) as f64
}

impl Plan {
    pub(crate) fn new(rows: usize, columns: usize, device: &Device) -> Result<Self> {
        let table = |shape: &[usize], value: &dyn Fn(&[usize]) -> f64| -> Result<Tensor> {
            let total: usize = shape.iter().product();
            let mut index = vec![0; shape.len()];
            let mut values = Vec::with_capacity(total);
            for at in 0..total {
                let mut rest = at;
                for (place, &size) in index.iter_mut().zip(shape).rev() {
                    *place = rest % size;
                    rest /= size;
                }
                values.push(value(&index));
            }
            Ok(Tensor::from_f64(values, shape, device)?)
        };
        let twisted = |size: usize, planes: usize| -> Result<Tensor> {
            let (one, two) = split(size, None);
            table(&[two, planes * one, 2 * one], &|at| match *at {
                [i2, from, to] => {
                    let (i1, k1) = (from % one, to % one);
                    let angle = turn(i1 * k1, one) + turn(i2 * k1, size);
                    entry(angle, from / one, to / one)
                }
                _ => 0.0,
            })
        };
        let plain = |size: usize, planes: usize| -> Result<Tensor> {
            let (_, two) = split(size, None);
            table(&[2 * two, planes * two], &|at| match *at {
                [from, to] => entry(turn((from % two) * (to % two), two), from / two, to / two),
                _ => 0.0,
            })
        };
        Ok(Self {
            rows,
            columns,
            first: twisted(columns, 1)?,
            second: plain(columns, 2)?,
            third: twisted(rows, 2)?,
            fourth: plain(rows, 1)?,
        })
    }

    /// `Re(ifft2(spectrum))` of a real `[rows, columns]`, with numpy's and torch's `1 / (rows columns)`.
    pub(crate) fn inverse(&self, spectrum: &Tensor) -> Result<Tensor> {
        let (rows, columns) = (self.rows, self.columns);
        let ((n1, n2), (m1, m2)) = (split(columns, None), split(rows, None));
        let x = spectrum.reshape(&[rows, n1, n2])?.permute(&[2, 0, 1])?;
        let x = x.matmul(&self.first)?.reshape(&[n2, rows, 2, n1])?;
        let x = x.permute(&[1, 3, 2, 0])?.reshape(&[rows * n1, 2 * n2])?;
        // [rows, k1, plane, k2], rows as [m1, m2]; then [m2, (k2, k1), (plane, m1)].
        let x = x.matmul(&self.second)?.reshape(&[m1, m2, n1, 2, n2])?;
        let x = x
            .permute(&[1, 4, 2, 3, 0])?
            .reshape(&[m2, columns, 2 * m1])?;
        let x = x.matmul(&self.third)?.reshape(&[m2, columns, 2, m1])?;
        let x = x.permute(&[1, 3, 2, 0])?.reshape(&[columns * m1, 2 * m2])?;
        let x = x.matmul(&self.fourth)?.reshape(&[columns, m1, m2])?;
        let x = x.permute(&[2, 1, 0])?.reshape(&[rows, columns])?;
        Ok(x.scale(1.0 / (rows * columns) as f32)?)
    }
}

/// From this many places on PyTorch draws its permutations in another way.
pub(crate) const MOST_PLACES: usize = (u32::MAX / 20) as usize;

/// The first `count` of `torch.randperm(n)` after `manual_seed(seed)`, without the other numbers, for n below
/// [`MOST_PLACES`].
pub(crate) fn first_of_permutation(n: usize, count: usize, seed: i64) -> Vec<usize> {
    let mut rng = TorchRng::new(seed as u64);
    // Only places that were swapped hold another number than their own.
    let mut moved: HashMap<usize, usize> = HashMap::new();
    let mut first = Vec::with_capacity(count.min(n));
    for i in 0..count.min(n) {
        // PyTorch draws nothing for the last place.
        let left = n - i;
        let drawn = if left > 1 { rng.next_u32() } else { 0 };
        let other = i + drawn as usize % left;
        let here = moved.get(&i).copied().unwrap_or(i);
        first.push(moved.get(&other).copied().unwrap_or(other));
        moved.insert(other, here);
    }
    first
}

#[cfg(test)]
mod tests {
    use std::f64::consts::TAU;

    use peft_core::peft_tensor::torch_rng::TorchRng;
    use peft_core::{Device, RngKey, Tensor};

    use super::{MOST_PLACES, Plan, first_of_permutation};

    #[test]
    fn is_the_sum_of_waves() {
        let device = Device::cpu();
        for (rows, columns) in [(6, 12), (7, 4), (1, 9), (8, 5)] {
            let shape = [rows, columns];
            let x = Tensor::normal(RngKey::new(1), 0.0, 1.0, &shape, &device).expect("a tensor");
            let plan = Plan::new(rows, columns, &device).expect("a plan");
            let y = plan
                .inverse(&x)
                .expect("transforms")
                .to_f64()
                .expect("values");
            let x = x.to_f64().expect("values");
            for (at, got) in y.iter().enumerate() {
                let wave = |(place, value): (usize, &f64)| {
                    let turns = (place / columns * (at / columns)) as f64 / rows as f64
                        + (place % columns * (at % columns)) as f64 / columns as f64;
                    value * (TAU * turns).cos()
                };
                let want = x.iter().enumerate().map(wave).sum::<f64>() / (rows * columns) as f64;
                assert!((got - want).abs() < 1e-6, "{shape:?} {at}: {got} {want}");
            }
        }
    }

    #[test]
    fn the_start_of_torchs_permutation() {
        assert_eq!(
            first_of_permutation(384 * 384, 5, 777),
            [96359, 50365, 131849, 102443, 146067]
        );
        for n in [1, 2, 31] {
            let all = TorchRng::new(5).permutation(n);
            assert_eq!(first_of_permutation(n, n, 5), all);
        }
        let most = first_of_permutation(MOST_PLACES - 1, 3, 5);
        assert_eq!(most, [94459959, 22248453, 89044632]);
    }
}
