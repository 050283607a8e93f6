//! Activations in bfloat16 between the forward and the backward pass.

use super::pool::Floats;
use super::simd::simd;

/// Values per task.
const CHUNK: usize = super::par::GRAIN;

/// The upper halves of f32 values, two in the place of one.
pub(super) struct Halves {
    /// Bit patterns, the element with the lower index in the low half.
    pairs: Floats,
    len: usize,
}

impl Halves {
    /// Rounded to the nearest, ties to even.
    pub(super) fn pack(x: &[f32]) -> Self {
        let mut pairs = Floats::dirty(x.len().div_ceil(2));
        super::par::rows(&mut pairs, CHUNK / 2, CHUNK, |first, out| {
            pack_chunk(&x[first * CHUNK..], out)
        });
        Self {
            pairs,
            len: x.len(),
        }
    }

    pub(super) fn unpack(&self) -> Floats {
        let mut out = Floats::dirty(self.len);
        super::par::rows(&mut out, CHUNK, CHUNK, |first, out| {
            unpack_chunk(&self.pairs[first * CHUNK / 2..], out)
        });
        out
    }
}

/// The bfloat16 nearest to a value, NaN staying one.
#[inline(always)]
fn round(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    if x.is_nan() { nan } else { rounded }
}

simd! {
    fn pack_chunk(x: &[f32], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(x.chunks(2)) {
            let high = x.get(1).map_or(0, |x| round(*x));
            *o = f32::from_bits(round(x[0]) | high << 16);
        }
    }
}

simd! {
    fn unpack_chunk(pairs: &[f32], out: &mut [f32]) {
        for (out, pair) in out.chunks_mut(2).zip(pairs) {
            let bits = pair.to_bits();
            out[0] = f32::from_bits(bits << 16);
            if let Some(out) = out.get_mut(1) {
                *out = f32::from_bits(bits & 0xffff_0000);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_as_the_nearest_bfloat16() {
        // Long enough for several tasks, of odd length, with what rounds up, ties, overflows, and is no number.
        let mut x: Vec<f32> = (0..2 * CHUNK + 77)
            .map(|i| (i as f32 * 0.37 - 9000.0) * 1.7e-3f32.powi(i as i32 % 7))
            .collect();
        x[5] = f32::MAX;
        x[6] = f32::from_bits(0x3f80_8000);
        x[7] = f32::from_bits(0x3f81_8000);
        x[CHUNK + 1] = f32::NAN;
        x[CHUNK + 2] = f32::NEG_INFINITY;
        let got = Halves::pack(&x).unpack();
        assert_eq!(got.len(), x.len());
        for (i, (got, x)) in got.iter().zip(&x).enumerate() {
            let want = ::half::bf16::from_f32(*x).to_f32();
            assert!(
                got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan()),
                "{i}: {x} became {got}, not {want}"
            );
        }
    }
}
