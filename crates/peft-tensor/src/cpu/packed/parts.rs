//! Values as sums of bfloat16: three have all 24 bits of an f32, so that products of bfloat16 are exact products of f32.
//!
//! Each part is what is left of the value, rounded (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
//! intelligence datatype for higher-precision computations", 2019).

#[cfg(test)]
use crate::cpu::half::bf16;

/// Parts that an f32 has.
pub(super) const ALL: usize = 3;

/// The parts of a value, as bfloat16: what those of lanes are tested against.
#[cfg(test)]
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
