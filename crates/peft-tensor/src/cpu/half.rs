//! Activations in bfloat16 between the forward and the backward pass.

use super::pool::Floats;
use super::simd::simd;

/// Words of a block: word `i` has value `i` in its low half and value `WORDS + i` in the other, so that both directions
/// are whole vectors.
const WORDS: usize = 16;
/// Values of a block.
const BLOCK: usize = 2 * WORDS;
/// Blocks per task.
const TASK: usize = super::par::GRAIN / BLOCK;

/// The upper halves of f32 values, two in the place of one.
pub(super) struct Halves {
    /// Bit patterns, block after block; what the last one has no value for is anything.
    words: Floats,
    len: usize,
}

impl Halves {
    /// Places of an f32 that so many values take.
    pub(super) fn places(values: usize) -> usize {
        values.div_ceil(BLOCK) * WORDS
    }

    /// Rounded to the nearest, ties to even.
    pub(super) fn pack(x: &[f32]) -> Self {
        let mut words = Floats::dirty(Self::places(x.len()));
        super::par::rows(&mut words, WORDS, BLOCK, |first, out| {
            pack_blocks(&x[first * BLOCK..], out)
        });
        Self {
            words,
            len: x.len(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Values from one on that a block begins with.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        unpack_blocks(&self.words[first / BLOCK * WORDS..], out);
    }

    pub(super) fn unpack(&self) -> Floats {
        let mut out = Floats::dirty(self.len);
        super::par::rows(&mut out, TASK * BLOCK, TASK * BLOCK, |first, out| {
            unpack_blocks(&self.words[first * TASK * WORDS..], out)
        });
        out
    }
}

/// The bfloat16 nearest to a value, in the low half, NaN staying one.
#[inline(always)]
pub(super) fn bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    if x.is_nan() { nan } else { rounded }
}

#[inline(always)]
fn pack_block(x: &[f32; BLOCK], out: &mut [f32; WORDS]) {
    for i in 0..WORDS {
        out[i] = f32::from_bits(bf16(x[i]) | bf16(x[WORDS + i]) << 16);
    }
}

#[inline(always)]
fn unpack_block(words: &[f32; WORDS], out: &mut [f32; BLOCK]) {
    for i in 0..WORDS {
        let bits = words[i].to_bits();
        out[i] = f32::from_bits(bits << 16);
        out[WORDS + i] = f32::from_bits(bits & 0xffff_0000);
    }
}

simd! {
    fn pack_blocks(x: &[f32], out: &mut [f32]) {
        let (blocks, rest) = x.as_chunks::<BLOCK>();
        let (words, _) = out.as_chunks_mut::<WORDS>();
        for (x, out) in blocks.iter().zip(words.iter_mut()) {
            pack_block(x, out);
        }
        if let Some(out) = words.get_mut(blocks.len()) {
            let mut last = [0.0; BLOCK];
            last[..rest.len()].copy_from_slice(rest);
            pack_block(&last, out);
        }
    }
}

simd! {
    fn unpack_blocks(words: &[f32], out: &mut [f32]) {
        let (words, _) = words.as_chunks::<WORDS>();
        let (blocks, rest) = out.as_chunks_mut::<BLOCK>();
        for (out, words) in blocks.iter_mut().zip(words) {
            unpack_block(words, out);
        }
        if let Some(words) = words.get(blocks.len()) {
            let mut last = [0.0; BLOCK];
            unpack_block(words, &mut last);
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK_VALUES: usize = TASK * BLOCK;

    #[test]
    fn values_come_back_as_the_nearest_bfloat16() {
        // Long enough for several tasks, of odd length, with what rounds up, ties, overflows, and is no number.
        let mut x: Vec<f32> = (0..2 * TASK_VALUES + 77)
            .map(|i| (i as f32 * 0.37 - 9000.0) * 1.7e-3f32.powi(i as i32 % 7))
            .collect();
        x[5] = f32::MAX;
        x[6] = f32::from_bits(0x3f80_8000);
        x[7] = f32::from_bits(0x3f81_8000);
        x[TASK_VALUES + 1] = f32::NAN;
        x[TASK_VALUES + 2] = f32::NEG_INFINITY;
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
