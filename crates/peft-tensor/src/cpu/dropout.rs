//! Dropout, with the generator of [`RngKey`] written over lanes so that it vectorises.

use super::par;
use super::pool::Floats;
use super::simd::simd;
use crate::RngKey;

/// Blocks of four random words computed side by side.
const LANES: usize = 16;

pub(super) fn dropout(x: &[f32], p: f32, key: RngKey) -> Floats {
    let scale = 1.0 / (1.0 - p);
    let mut out = Floats::dirty(x.len());
    // Chunks start at multiples of par::GRAIN and so at whole blocks.
    par::elements(&mut out, |at, out| {
        dropout_chunk(&x[at..at + out.len()], (at / 4) as u64, p, scale, key, out)
    });
    out
}

simd! {
    fn dropout_chunk(x: &[f32], first: u64, p: f32, scale: f32, key: RngKey, out: &mut [f32]) {
        let mut uniform = [0.0f32; 4 * LANES];
        for (i, (x, out)) in x.chunks(4 * LANES).zip(out.chunks_mut(4 * LANES)).enumerate() {
            uniforms(key, first + (i * LANES) as u64, &mut uniform);
            for ((o, x), u) in out.iter_mut().zip(x).zip(&uniform) {
                *o = if *u >= p { x * scale } else { 0.0 };
            }
        }
    }
}

/// `RngKey::uniform_at` of the elements of blocks `first..first + LANES` (Philox4x32-10).
#[inline(always)]
fn uniforms(key: RngKey, first: u64, out: &mut [f32; 4 * LANES]) {
    let mut c = [[0u32; LANES]; 4];
    for l in 0..LANES {
        let counter = first + l as u64;
        (c[0][l], c[1][l]) = (counter as u32, (counter >> 32) as u32);
    }
    let (mut k0, mut k1) = (key.0 as u32, (key.0 >> 32) as u32);
    for _ in 0..10 {
        let mut next = [[0u32; LANES]; 4];
        for l in 0..LANES {
            let a = u64::from(c[0][l]) * 0xd251_1f53;
            let b = u64::from(c[2][l]) * 0xcd9e_8d57;
            next[0][l] = (b >> 32) as u32 ^ c[1][l] ^ k0;
            next[1][l] = b as u32;
            next[2][l] = (a >> 32) as u32 ^ c[3][l] ^ k1;
            next[3][l] = a as u32;
        }
        c = next;
        (k0, k1) = (k0.wrapping_add(0x9e37_79b9), k1.wrapping_add(0xbb67_ae85));
    }
    for l in 0..LANES {
        for (word, lanes) in c.iter().enumerate() {
            // At most 24 bits, so that the signed conversion, which vector units have, is exact.
            out[4 * l + word] = (lanes[l] >> 8) as i32 as f32 * (1.0 / 16_777_216.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_give_the_streams_numbers() {
        for (key, first) in [
            (RngKey(0), 0),
            (RngKey(0xdead_beef_1234_5678), (1 << 32) - 7),
        ] {
            let mut got = [0.0; 4 * LANES];
            uniforms(key, first, &mut got);
            for (i, u) in got.iter().enumerate() {
                assert_eq!(*u, key.uniform_at(4 * first + i as u64), "{key:?} {i}");
            }
        }
    }
}
