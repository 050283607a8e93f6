//! ggml's first quantised formats, blocks of 32 values: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//!
//! `_0` means `scale * (q - zero)`, `_1` means `scale * q + minimum`. Low nibbles are the first sixteen
//! values, high nibbles the last; the fifth bits of Q5 are a 32-bit word with value `i` at bit `i`. Layouts and
//! quantisers: ggml, `ggml-common.h` and `quantize_row_*_ref` in `ggml-quants.c`.

use super::{BlockFormat, f16};

/// Values in a block of every format here.
const QK: usize = 32;

/// f16 scale, 16 bytes of nibbles: `d * (q - 8)`.
pub(super) struct Q4_0;

impl BlockFormat for Q4_0 {
    const NAME: &'static str = "Q4_0";
    const LEN: usize = QK;
    const BYTES: usize = 18;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for ([d0, d1, q @ ..], y) in blocks::<18>(src, out) {
            let q: &[u8; 16] = q;
            let d = scale([*d0, *d1]);
            let q = nibbles(q);
            for i in 0..QK {
                y[i] = d * (i32::from(q[i]) - 8) as f32;
            }
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        for x in values.as_chunks::<QK>().0 {
            let (d, q) = symmetric(x, 8);
            push_f16(out, d);
            push_nibbles(out, &q);
        }
        true
    }
}

/// f16 scale and minimum, 16 bytes of nibbles: `d * q + m`.
pub(super) struct Q4_1;

impl BlockFormat for Q4_1 {
    const NAME: &'static str = "Q4_1";
    const LEN: usize = QK;
    const BYTES: usize = 20;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for ([d0, d1, m0, m1, q @ ..], y) in blocks::<20>(src, out) {
            let q: &[u8; 16] = q;
            let (d, m) = (scale([*d0, *d1]), f16([*m0, *m1]));
            let q = nibbles(q);
            for i in 0..QK {
                y[i] = d * i32::from(q[i]) as f32 + m;
            }
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        for x in values.as_chunks::<QK>().0 {
            let (d, m, q) = affine(x, 15);
            push_f16(out, d);
            push_f16(out, m);
            push_nibbles(out, &q);
        }
        true
    }
}

/// f16 scale, 32 fifth bits, 16 bytes of nibbles: `d * (q - 16)`.
pub(super) struct Q5_0;

impl BlockFormat for Q5_0 {
    const NAME: &'static str = "Q5_0";
    const LEN: usize = QK;
    const BYTES: usize = 22;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for ([d0, d1, h0, h1, h2, h3, q @ ..], y) in blocks::<22>(src, out) {
            let q: &[u8; 16] = q;
            let (d, high) = (scale([*d0, *d1]), u32::from_le_bytes([*h0, *h1, *h2, *h3]));
            let q = nibbles(q);
            for i in 0..QK {
                y[i] = d * (fifth(q[i], high, i) - 16) as f32;
            }
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        for x in values.as_chunks::<QK>().0 {
            let (d, q) = symmetric(x, 16);
            push_f16(out, d);
            push_fifths(out, &q);
            push_nibbles(out, &q);
        }
        true
    }
}

/// f16 scale and minimum, 32 fifth bits, 16 bytes of nibbles: `d * q + m`.
pub(super) struct Q5_1;

impl BlockFormat for Q5_1 {
    const NAME: &'static str = "Q5_1";
    const LEN: usize = QK;
    const BYTES: usize = 24;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for ([d0, d1, m0, m1, h0, h1, h2, h3, q @ ..], y) in blocks::<24>(src, out) {
            let q: &[u8; 16] = q;
            let (d, m) = (scale([*d0, *d1]), f16([*m0, *m1]));
            let high = u32::from_le_bytes([*h0, *h1, *h2, *h3]);
            let q = nibbles(q);
            for i in 0..QK {
                y[i] = d * fifth(q[i], high, i) as f32 + m;
            }
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        for x in values.as_chunks::<QK>().0 {
            let (d, m, q) = affine(x, 31);
            push_f16(out, d);
            push_f16(out, m);
            push_fifths(out, &q);
            push_nibbles(out, &q);
        }
        true
    }
}

/// f16 scale, 32 signed bytes: `d * q`.
pub(super) struct Q8_0;

impl BlockFormat for Q8_0 {
    const NAME: &'static str = "Q8_0";
    const LEN: usize = QK;
    const BYTES: usize = 34;

    #[inline(always)]
    fn decode(src: &[u8], out: &mut [f32]) {
        for ([d0, d1, q @ ..], y) in blocks::<34>(src, out) {
            let q: &[u8; 32] = q;
            let d = scale([*d0, *d1]);
            for i in 0..QK {
                y[i] = d * f32::from(q[i] as i8);
            }
        }
    }

    fn encode(values: &[f32], out: &mut Vec<u8>) -> bool {
        for x in values.as_chunks::<QK>().0 {
            let d = x.iter().fold(0f32, |a, v| a.max(v.abs())) / 127.0;
            let inverse = reciprocal(d);
            push_f16(out, d);
            out.extend(x.iter().map(|v| (v * inverse).round() as i8 as u8));
        }
        true
    }
}

/// Blocks of `BYTES` bytes, each with the 32 values it decodes to.
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

/// A block's f16 scale. The compiler may not look through it: it would otherwise decode eight blocks side by side,
/// gathering single bytes, at a third of the speed of one block after another.
#[inline(always)]
fn scale(bytes: [u8; 2]) -> f32 {
    std::hint::black_box(f16(bytes))
}

/// The values of 16 bytes in their order. Unpacking bytes first and converting them after is what lets both steps
/// become vector code.
#[inline(always)]
fn nibbles(packed: &[u8; 16]) -> [u8; QK] {
    let mut q = [0; QK];
    for i in 0..16 {
        q[i] = packed[i] & 15;
    }
    for i in 0..16 {
        q[i + 16] = packed[i] >> 4;
    }
    q
}

#[inline(always)]
fn fifth(nibble: u8, high: u32, i: usize) -> i32 {
    i32::from(nibble) | ((high >> i & 1) << 4) as i32
}

/// Scale and values of a block whose zero is `zero`: the value largest in magnitude becomes 0 or, in the
/// unused sign, one below the largest.
fn symmetric(x: &[f32; QK], zero: u8) -> (f32, [u8; QK]) {
    let extreme = x
        .iter()
        .fold(0f32, |a, &v| if v.abs() > a.abs() { v } else { a });
    let d = extreme / -f32::from(zero);
    let inverse = reciprocal(d);
    (
        d,
        x.map(|v| ((v * inverse + (f32::from(zero) + 0.5)) as u8).min(2 * zero - 1)),
    )
}

/// Scale, minimum and values of a block that spans `0..=top`.
fn affine(x: &[f32; QK], top: u8) -> (f32, f32, [u8; QK]) {
    let min = x.iter().fold(f32::INFINITY, |a, &v| a.min(v));
    let max = x.iter().fold(f32::NEG_INFINITY, |a, &v| a.max(v));
    let d = (max - min) / f32::from(top);
    let inverse = reciprocal(d);
    (
        d,
        min,
        x.map(|v| (((v - min) * inverse + 0.5) as u8).min(top)),
    )
}

fn reciprocal(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

fn push_f16(out: &mut Vec<u8>, v: f32) {
    out.extend(half::f16::from_f32(v).to_le_bytes());
}

fn push_nibbles(out: &mut Vec<u8>, q: &[u8; QK]) {
    out.extend((0..16).map(|i| q[i] & 15 | (q[i + 16] & 15) << 4));
}

fn push_fifths(out: &mut Vec<u8>, q: &[u8; QK]) {
    let bits = q
        .iter()
        .enumerate()
        .fold(0u32, |a, (i, q)| a | u32::from(q >> 4) << i);
    out.extend(bits.to_le_bytes());
}
