//! Values as sums of bfloat16: three have all 24 bits of an f32, so that products of bfloat16 are exact products of f32.
//!
//! Each part is what is left of the value, rounded (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
//! intelligence datatype for higher-precision computations", 2019).

use super::lanes::{Lanes, Work};
use crate::cpu::half::bf16;

/// Parts that an f32 has.
pub(super) const ALL: usize = 3;

/// The parts of a value, as bfloat16.
#[inline(always)]
pub(super) fn split(value: f32) -> [u32; ALL] {
    let wide = |bits: u32| f32::from_bits(bits << 16);
    let first = bf16(value);
    // Infinity is its first part, and so is what is not a number.
    let left = match wide(first).is_finite() {
        true => value - wide(first),
        false => 0.0,
    };
    let second = bf16(left);
    [first, second, bf16(left - wide(second))]
}

/// Lanes whose units are part `P` of values.
#[derive(Clone, Copy)]
pub(super) struct Part<L, const P: usize>(pub(super) L);

/// Work with the lanes inside of the function that has their instructions.
struct Inside<L, W, const P: usize>(Part<L, P>, W);

impl<L: Lanes, W: Work<Part<L, P>>, const P: usize> Work<L> for Inside<L, W, P> {
    #[inline(always)]
    fn on(self, _l: L) {
        self.1.on(self.0);
    }
}

impl<L: Lanes, const P: usize> Lanes for Part<L, P> {
    type V = L::V;

    #[inline(always)]
    fn zero(self) -> L::V {
        self.0.zero()
    }

    #[inline(always)]
    fn load(self, units: &[u32]) -> L::V {
        self.0.load(units)
    }

    #[inline(always)]
    fn store(self, v: L::V, out: &mut [u32]) {
        self.0.store(v, out);
    }

    #[inline(always)]
    fn splat(self, unit: u32) -> L::V {
        self.0.splat(unit)
    }

    #[inline(always)]
    fn dot(self, sum: L::V, a: L::V, b: L::V) -> L::V {
        self.0.dot(sum, a, b)
    }

    #[inline(always)]
    fn add(self, a: L::V, b: L::V) -> L::V {
        self.0.add(a, b)
    }

    #[inline(always)]
    fn unit(self, low: f32, high: f32) -> u32 {
        split(low)[P] | split(high)[P] << 16
    }

    #[inline(always)]
    fn units(self, values: &[f32]) -> L::V {
        self.0.parts(values)[P]
    }

    #[inline(always)]
    fn parts(self, values: &[f32]) -> [L::V; ALL] {
        self.0.parts(values)
    }

    #[inline(always)]
    fn zip(self, a: L::V, b: L::V) -> (L::V, L::V) {
        self.0.zip(a, b)
    }

    #[inline(always)]
    fn prefetch<T>(self, at: *const T) {
        self.0.prefetch(at);
    }

    #[inline(always)]
    fn run<W: Work<Self>>(self, work: W) {
        self.0.run(Inside(self, work));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(value: f32) -> [f32; ALL] {
        split(value).map(|bits| f32::from_bits(bits << 16))
    }

    #[test]
    fn parts_sum_to_the_value_and_get_small() {
        let key = crate::RngKey(3);
        let random = (0..10_000).map(|i| {
            let halves = [i, i + 20_000].map(|i| (key.uniform_at(i) * 65536.0) as u32);
            f32::from_bits(halves[0] | halves[1] << 16)
        });
        // Below, the third part is less than the least normal number; above, the first is not finite.
        let fits = |v: &f32| v.is_finite() && (1e-30..3.38e38).contains(&v.abs());
        let special = [1.0, -1.0, 1.0 + f32::EPSILON, 16_777_215.0];
        for value in random.filter(fits).chain(special) {
            let [a, b, c] = parts(value);
            assert_eq!(a + (b + c), value);
            assert!(
                b.abs() <= a.abs() / 256.0 && c.abs() <= a.abs() / 65536.0,
                "{value:e}"
            );
        }
        for value in [f32::INFINITY, f32::NEG_INFINITY, 0.0] {
            assert_eq!(parts(value), [value, 0.0, 0.0]);
        }
        assert!(parts(f32::NAN)[0].is_nan());
    }
}
