//! Plain floats: F32, F16, BF16. A block is one value.

use super::{BlockFormat, f16};

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
        out.extend(
            values
                .iter()
                .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()),
        );
        true
    }
}
