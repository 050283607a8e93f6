//! Activations in 8 bits between the forward and the backward pass.
//!
//! Blocks of 64 values are whole numbers of -127 to 127 times a scale, the largest value over 127, rounded to the nearest
//! (activation-compressed training: ActNN, arXiv 2104.14129; GACT, arXiv 2206.11357).

use super::pool::Floats;
use super::simd::simd;

/// Values of a block.
const BLOCK: usize = 64;
/// Places of an f32 that a block takes: its scale, then four codes in each.
const WORDS: usize = 1 + BLOCK / 4;
/// Blocks per task.
const TASK: usize = super::par::GRAIN / BLOCK;
/// Added to a number below 2^22 it leaves that, rounded to the nearest, in the low bits.
const ROUND: f32 = (3 << 22) as f32;
/// A block whose largest value is below this is zeros: its scale would have no inverse.
const TINY: f32 = 1e-30;

/// Values in blocks of codes.
pub(super) struct Codes {
    blocks: Floats,
    len: usize,
}

impl Codes {
    /// Places of an f32 that so many values take.
    pub(super) fn places(values: usize) -> usize {
        values.div_ceil(BLOCK) * WORDS
    }

    pub(super) fn pack(x: &[f32]) -> Self {
        let mut blocks = Floats::dirty(Self::places(x.len()));
        super::par::rows(&mut blocks, WORDS, BLOCK, |first, out| {
            pack_blocks(&x[first * BLOCK..], out)
        });
        Self {
            blocks,
            len: x.len(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Values from one on that a block begins with.
    pub(super) fn read(&self, first: usize, out: &mut [f32]) {
        unpack_blocks(&self.blocks[first / BLOCK * WORDS..], out);
    }

    pub(super) fn unpack(&self) -> Floats {
        let mut out = Floats::dirty(self.len);
        super::par::rows(&mut out, TASK * BLOCK, TASK * BLOCK, |first, out| {
            unpack_blocks(&self.blocks[first * TASK * WORDS..], out)
        });
        out
    }
}

simd! {
    fn pack_blocks(x: &[f32], out: &mut [f32]) {
        for (out, x) in out.chunks_exact_mut(WORDS).zip(x.chunks(BLOCK)) {
            let mut whole = [0.0; BLOCK];
            whole[..x.len()].copy_from_slice(x);
            pack_block(&whole, out);
        }
    }
}

#[inline(always)]
fn pack_block(x: &[f32; BLOCK], out: &mut [f32]) {
    // Patterns of positive floats are in the order of their values, with what is no number above all.
    let largest = x
        .iter()
        .map(|x| x.to_bits() & 0x7fff_ffff)
        .fold(0, u32::max);
    let largest = f32::from_bits(largest);
    let (scale, inverse) = if largest >= TINY {
        (largest / 127.0, 127.0 / largest)
    } else {
        (0.0, 0.0)
    };
    let mut codes = [0u8; BLOCK];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (x * inverse + ROUND).to_bits() as u8;
    }
    // What is no number makes its whole block none, so that it shows.
    out[0] = if largest.is_finite() { scale } else { f32::NAN };
    bytemuck::cast_slice_mut(&mut out[1..]).copy_from_slice(&codes);
}

simd! {
    fn unpack_blocks(blocks: &[f32], out: &mut [f32]) {
        for (out, block) in out.chunks_mut(BLOCK).zip(blocks.chunks_exact(WORDS)) {
            let scale = block[0];
            let codes: &[i8] = bytemuck::cast_slice(&block[1..]);
            for (out, code) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(*code);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block of one largest value, and what its codes have to be.
    #[test]
    fn a_block_by_hand() {
        // 127 is the largest, so codes are the values rounded: ties to even, both signs.
        let mut x = vec![127.0, -127.0, 0.5, 1.5, -2.5, 2.49, -0.51, 63.6];
        x.resize(BLOCK, 0.0);
        let want = [127.0, -127.0, 0.0, 2.0, -2.0, 2.0, -1.0, 64.0];
        assert_eq!(Codes::pack(&x).unpack()[..8], want);
        x.iter_mut().for_each(|x| *x *= 0.25);
        let got = Codes::pack(&x).unpack();
        assert!(got.iter().zip(want).all(|(got, want)| *got == want * 0.25));
    }

    #[test]
    fn values_come_back_within_half_a_step_of_their_block() {
        // Several tasks, the last block not full, blocks of very different sizes, and one of zeros.
        let mut x: Vec<f32> = (0..2 * TASK * BLOCK + 77)
            .map(|i| (i as f32 * 0.37).sin() * 10f32.powi((i / BLOCK) as i32 % 9 - 4))
            .collect();
        x[3 * BLOCK..4 * BLOCK].fill(0.0);
        x[5 * BLOCK..6 * BLOCK].fill(1e-38);
        let codes = Codes::pack(&x);
        assert_eq!(codes.blocks.len(), x.len().div_ceil(BLOCK) * WORDS);
        let got = codes.unpack();
        assert_eq!(got.len(), x.len());
        for (block, (x, got)) in x.chunks(BLOCK).zip(got.chunks(BLOCK)).enumerate() {
            let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
            // Half a step, and the rounding of the scale and of its inverse.
            let bound = (largest / 254.0 * 1.0001).max(1e-30);
            for (i, (x, got)) in x.iter().zip(got).enumerate() {
                assert!((x - got).abs() <= bound, "{block}, {i}: {x} became {got}");
            }
        }
    }

    #[test]
    fn what_is_no_number_shows() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 3 * BLOCK];
            x[BLOCK + 7] = bad;
            let got = Codes::pack(&x).unpack();
            assert!(got[BLOCK..2 * BLOCK].iter().all(|x| x.is_nan()));
            assert!(
                got[..BLOCK]
                    .iter()
                    .chain(&got[2 * BLOCK..])
                    .all(|x| *x == 1.0)
            );
        }
    }
}
