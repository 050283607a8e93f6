//! Plain floats: F32, F16, BF16. A block is one value.

use super::{BlockFormat, f16};
use crate::cpu::simd::simd;

/// IEEE single precision, little-endian.
pub(super) struct F32;

impl BlockFormat for F32 {
    const NAME: &'static str = "F32";
    const LEN: usize = 1;
    const BYTES: usize = 4;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in src.as_chunks::<4>().0.iter().zip(out) {
            *y = f32::from_le_bytes(*b);
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        true
    }
}

/// IEEE half precision, little-endian.
pub(super) struct F16;

impl BlockFormat for F16 {
    const NAME: &'static str = "F16";
    const LEN: usize = 1;
    const BYTES: usize = 2;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in src.as_chunks::<2>().0.iter().zip(out) {
            *y = f16(*b);
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        out.extend(
            values
                .iter()
                .flat_map(|v| half::f16::from_f32(*v).to_le_bytes()),
        );
        true
    }
}

/// The sign, exponent and seven high bits of a single, little-endian.
pub(super) struct BF16;

impl BlockFormat for BF16 {
    const NAME: &'static str = "BF16";
    const LEN: usize = 1;
    const BYTES: usize = 2;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in src.as_chunks::<2>().0.iter().zip(out) {
            *y = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.resize(start + 2 * values.len(), 0);
        upper_halves(values, &mut out[start..]);
        true
    }
}

simd! {
    /// Rounded to the nearest, ties to even, NaN staying one: as `half::bf16::from_f32`, in vectors.
    fn upper_halves(values: &[f32], out: &mut [u8]) {
        for (v, out) in values.iter().zip(out.as_chunks_mut::<2>().0) {
            let bits = v.to_bits();
            let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
            let nan = (bits >> 16) | 0x40;
            *out = (if v.is_nan() { nan } else { rounded } as u16).to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_those_of_the_library() {
        // Every upper half with lower halves around a tie, subnormal numbers and what is no number among them.
        let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        for low in lower {
            let values: Vec<f32> = (0..=0xffff_u32)
                .map(|high| f32::from_bits(high << 16 | low))
                .collect();
            let mut got = Vec::new();
            assert!(BF16::encode(&values, &mut got));
            let want: Vec<u8> = values
                .iter()
                .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes())
                .collect();
            assert!(got == want, "lower half {low:x}");
        }
    }
}
