//! NF4 and FP4: tables, and choosing codes.

use super::decode::blocks;
use super::{BLOCK, BYTES};
use crate::WeightFormat;
use crate::frozen::{BlockFormat, Layout};

/// bitsandbytes' table, the quantiles of a normal distribution between -1 and 1 with a zero.
pub(super) static NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// One sign bit, two of the exponent, one of the mantissa, in the order of the codes, divided by 12.
pub(super) static FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    0.5,
    2.0 / 12.0,
    0.25,
    -0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -0.5,
    -2.0 / 12.0,
    -0.25,
];

/// Smallest scale that bitsandbytes divides by.
const TINY: f32 = 1e-38;

/// Two codes of a zero.
pub(super) fn zero_byte(format: WeightFormat) -> u8 {
    if format == WeightFormat::NF4 { 0x77 } else { 0 }
}

/// f32 scale, 32 bytes of codes, the first in the high half.
pub(in crate::frozen) struct Nf4;

impl BlockFormat for Nf4 {
    const NAME: &'static str = "NF4";
    const LEN: usize = BLOCK;
    const BYTES: usize = BYTES;
    const LAYOUT: Layout = Layout::Flat;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        blocks(&NF4, src, out);
    }

    fn decode_by_hand(src: &[u8], out: &mut [f32]) -> bool {
        super::decode::vectors(&NF4, src, out)
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        // A value goes to the code whose neighbours' middles it lies between, a middle itself to the lower one.
        let mut middles = [0.0; 15];
        for i in 0..15 {
            middles[i] = (NF4[i] + NF4[i + 1]) / 2.0;
        }
        let (whole, tail) = values.as_chunks::<BLOCK>();
        for x in whole {
            let scale = largest(x);
            let inverse = 1.0 / scale.max(TINY);
            push(out, scale, &middles, &x.map(|v| v * inverse));
        }
        if !tail.is_empty() {
            // bitsandbytes divides here, and keeps the smallest scale.
            let scale = largest(tail).max(TINY);
            let mut x = [0.0; BLOCK];
            for (x, v) in x.iter_mut().zip(tail) {
                *x = v / scale;
            }
            push(out, scale, &middles, &x);
        }
        true
    }
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |a: f32, v| a.max(v.abs()))
}

fn push(out: &mut Vec<u8>, scale: f32, middles: &[f32; 15], x: &[f32; BLOCK]) {
    let mut codes = [0u8; BLOCK];
    for middle in middles {
        for (code, x) in codes.iter_mut().zip(x) {
            *code += u8::from(*middle < *x);
        }
    }
    out.extend(scale.to_le_bytes());
    out.extend(codes.as_chunks::<2>().0.iter().map(|[a, b]| a << 4 | b));
}

/// As [`Nf4`], with another table; read only.
pub(in crate::frozen) struct Fp4;

impl BlockFormat for Fp4 {
    const NAME: &'static str = "FP4";
    const LEN: usize = BLOCK;
    const BYTES: usize = BYTES;
    const LAYOUT: Layout = Layout::Flat;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        blocks(&FP4, src, out);
    }

    fn decode_by_hand(src: &[u8], out: &mut [f32]) -> bool {
        super::decode::vectors(&FP4, src, out)
    }
}
