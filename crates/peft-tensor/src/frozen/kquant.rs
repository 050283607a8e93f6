//! ggml's K-quants, super-blocks of 256 values in groups of 16 or 32 with quantised scales: Q2_K to Q6_K.
//!
//! Every decoder unpacks the integers to bytes first and scales them after: both steps become vector code that way.
//! Layouts: ggml, `ggml-common.h` and `dequantize_row_q*_K` in `ggml-quants.c`. Decoders only: nobody quantises a
//! base to these here.

use super::{BlockFormat, f16};

/// Values in a super-block.
const QK: usize = 256;

/// 16 bytes of scale and minimum nibbles, 64 bytes of 2-bit values, f16 scales of the scales and the minima:
/// `d * sc * q - dmin * m` in groups of 16.
pub(super) struct Q2K;

impl BlockFormat for Q2K {
    const NAME: &'static str = "Q2_K";
    const LEN: usize = QK;
    const BYTES: usize = 84;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in blocks::<84>(src, out) {
            let packed: &[u8; 16] = part(b, 0);
            let (d, dmin) = (f16([b[80], b[81]]), f16([b[82], b[83]]));
            let scale = packed.map(|s| d * f32::from(s & 15));
            let min = packed.map(|s| dmin * f32::from(s >> 4));
            affine::<16>(&pairs(part(b, 16)), &scale, &min, y);
        }
    }
}

/// 32 bytes of third bits (bit `r` of byte `i` belongs to value `i` of the run of 32 values `r`), 64 bytes of low
/// pairs, 12 bytes of 6-bit scales around 32, f16 scale: `d * (sc - 32) * (q - 4)` in groups of 16.
pub(super) struct Q3K;

impl BlockFormat for Q3K {
    const NAME: &'static str = "Q3_K";
    const LEN: usize = QK;
    const BYTES: usize = 110;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in blocks::<110>(src, out) {
            let (high, packed): (&[u8; 32], &[u8; 12]) = (part(b, 0), part(b, 96));
            let d = f16([b[108], b[109]]);
            let mut q = pairs(part(b, 32));
            for run in 0..8 {
                for i in 0..32 {
                    q[run * 32 + i] |= (high[i] >> run & 1) << 2;
                }
            }
            let scale: [f32; 16] = std::array::from_fn(|g| {
                // Eight bytes of low nibbles (first half low, second half high), four of high pairs.
                let low = packed[g % 8] >> (4 * (g / 8)) & 15;
                let pair = packed[8 + g % 4] >> (2 * (g / 4)) & 3;
                d * (i32::from(low | pair << 4) - 32) as f32
            });
            centred(&q, 4, &scale, y);
        }
    }
}

/// f16 scales of the scales and the minima, 12 bytes of both in 6 bits, 128 bytes of nibbles:
/// `d * sc * q - dmin * m` in groups of 32.
pub(super) struct Q4K;

impl BlockFormat for Q4K {
    const NAME: &'static str = "Q4_K";
    const LEN: usize = QK;
    const BYTES: usize = 144;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in blocks::<144>(src, out) {
            let (scale, min) = scales_and_mins(part(b, 0));
            affine::<32>(&nibbles::<32>(part(b, 16)), &scale, &min, y);
        }
    }
}

/// As Q4_K with 32 bytes of fifth bits before the nibbles: bit `g` of byte `i` belongs to value `i` of group `g`.
pub(super) struct Q5K;

impl BlockFormat for Q5K {
    const NAME: &'static str = "Q5_K";
    const LEN: usize = QK;
    const BYTES: usize = 176;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in blocks::<176>(src, out) {
            let (scale, min) = scales_and_mins(part(b, 0));
            let high: &[u8; 32] = part(b, 16);
            let mut q = nibbles::<32>(part(b, 48));
            for group in 0..8 {
                for i in 0..32 {
                    q[group * 32 + i] |= (high[i] >> group & 1) << 4;
                }
            }
            affine::<32>(&q, &scale, &min, y);
        }
    }
}

/// 128 bytes of low nibbles (64 bytes at a time: their low nibbles, then their high ones), 64 bytes of high pairs, 16
/// signed scales, f16 scale: `d * sc * (q - 32)` in groups of 16.
pub(super) struct Q6K;

impl BlockFormat for Q6K {
    const NAME: &'static str = "Q6_K";
    const LEN: usize = QK;
    const BYTES: usize = 210;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for (b, y) in blocks::<210>(src, out) {
            let scales: &[u8; 16] = part(b, 192);
            let d = f16([b[208], b[209]]);
            let mut q = nibbles::<64>(part(b, 0));
            for (q, high) in q.iter_mut().zip(pairs(part(b, 128))) {
                *q |= high << 4;
            }
            centred(&q, 32, &scales.map(|s| d * f32::from(s as i8)), y);
        }
    }
}

/// The 2-bit values of 64 bytes: 32 bytes at a time, their lowest pairs first.
#[inline(always)]
fn pairs(packed: &[u8; 64]) -> [u8; QK] {
    let mut q = [0; QK];
    for half in 0..2 {
        for run in 0..4 {
            for i in 0..32 {
                q[half * 128 + run * 32 + i] = packed[half * 32 + i] >> (2 * run) & 3;
            }
        }
    }
    q
}

/// The 4-bit values of 128 bytes: `RUN` bytes at a time, their low nibbles first.
#[inline(always)]
fn nibbles<const RUN: usize>(packed: &[u8; 128]) -> [u8; QK] {
    let mut q = [0; QK];
    for (q, packed) in q.chunks_exact_mut(2 * RUN).zip(packed.chunks_exact(RUN)) {
        let (low, high) = q.split_at_mut(RUN);
        for i in 0..RUN {
            low[i] = packed[i] & 15;
        }
        for i in 0..RUN {
            high[i] = packed[i] >> 4;
        }
    }
    q
}

/// `scale * q - min` in groups of `GROUP` values.
#[inline(always)]
fn affine<const GROUP: usize>(q: &[u8; QK], scale: &[f32], min: &[f32], y: &mut [f32; QK]) {
    let groups = q
        .as_chunks::<GROUP>()
        .0
        .iter()
        .zip(y.as_chunks_mut::<GROUP>().0);
    for ((q, y), (scale, min)) in groups.zip(scale.iter().zip(min)) {
        for i in 0..GROUP {
            y[i] = scale * i32::from(q[i]) as f32 - min;
        }
    }
}

/// `scale * (q - zero)` in groups of 16 values.
#[inline(always)]
fn centred(q: &[u8; QK], zero: i32, scale: &[f32; 16], y: &mut [f32; QK]) {
    for ((q, y), scale) in q
        .as_chunks::<16>()
        .0
        .iter()
        .zip(y.as_chunks_mut::<16>().0)
        .zip(scale)
    {
        for i in 0..16 {
            y[i] = scale * (i32::from(q[i]) - zero) as f32;
        }
    }
}

/// The eight scales and minima of Q4_K and Q5_K, from the f16 pair and the 12 packed bytes after it: bytes 0..4 hold
/// four scales in their low six bits, 4..8 four minima, 8..12 the low nibbles of the other four of both, whose
/// high pairs are the top bits of the first eight bytes.
#[inline(always)]
fn scales_and_mins(head: &[u8; 16]) -> ([f32; 8], [f32; 8]) {
    let (d, dmin) = (f16([head[0], head[1]]), f16([head[2], head[3]]));
    let packed: &[u8; 12] = part(head, 4);
    let (mut scale, mut min) = ([0.0; 8], [0.0; 8]);
    for i in 0..4 {
        let (s, m, rest) = (packed[i], packed[i + 4], packed[i + 8]);
        scale[i] = d * f32::from(s & 63);
        min[i] = dmin * f32::from(m & 63);
        scale[i + 4] = d * f32::from(rest & 15 | (s >> 6) << 4);
        min[i + 4] = dmin * f32::from(rest >> 4 | (m >> 6) << 4);
    }
    (scale, min)
}

/// `N` bytes of a block from byte `at`.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    match block[at..].first_chunk() {
        Some(bytes) => bytes,
        None => unreachable!("the layouts above end inside their blocks"),
    }
}

/// Blocks of `BYTES` bytes, each with the 256 values it decodes to.
#[inline(always)]
fn blocks<'a, const BYTES: usize>(
    src: &'a [u8],
    out: &'a mut [f32],
) -> impl Iterator<Item = (&'a [u8; BYTES], &'a mut [f32; QK])> {
    src.as_chunks::<BYTES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<QK>().0)
}
