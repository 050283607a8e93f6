//! Rotary position embedding.

use super::par;
use super::pool::Floats;
use super::simd::{madd, simd};

/// Pairs that are turned at a time.
const LANES: usize = 16;
use crate::backend::Rope;

pub(super) fn rope(x: &[f32], spec: &Rope, inverse: bool) -> Floats {
    let width = spec.heads * spec.head_dim;
    let mut out = Floats::dirty(x.len());
    par::rows(&mut out, width, width, |first, out| {
        for (i, out) in out.chunks_mut(width).enumerate() {
            let token = first + i;
            let at = spec.positions[token] as usize * spec.half;
            let (cos, sin) = (&spec.cos[at..at + spec.half], &spec.sin[at..at + spec.half]);
            turn(
                &x[token * width..(token + 1) * width],
                cos,
                sin,
                spec.head_dim,
                inverse,
                out,
            );
        }
    });
    out
}

simd! {
    /// One token: in each head, element j with element j + half by the angle of pair j.
    fn turn(x: &[f32], cos: &[f32], sin: &[f32], head_dim: usize, inverse: bool, out: &mut [f32]) {
        let half = cos.len();
        let sign = if inverse { -1.0 } else { 1.0 };
        let (cos_blocks, cos_tail) = cos.as_chunks::<LANES>();
        let (sin_blocks, sin_tail) = sin.as_chunks::<LANES>();
        for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
            let (x1, rest) = x.split_at(half);
            let (x2, pass) = rest.split_at(half);
            let (o1, rest) = out.split_at_mut(half);
            let (o2, out_pass) = rest.split_at_mut(half);
            let (x1, x1_tail) = x1.as_chunks::<LANES>();
            let (x2, x2_tail) = x2.as_chunks::<LANES>();
            let (o1, o1_tail) = o1.as_chunks_mut::<LANES>();
            let (o2, o2_tail) = o2.as_chunks_mut::<LANES>();
            // Whole blocks: a half is often shorter than what the compiler would take at a time.
            let x = x1.iter().zip(x2);
            let out = o1.iter_mut().zip(o2);
            for (((x1, x2), (o1, o2)), (cos, sin)) in x.zip(out).zip(cos_blocks.iter().zip(sin_blocks)) {
                let (mut a, mut b) = ([0.0; LANES], [0.0; LANES]);
                for j in 0..LANES {
                    let s = sign * sin[j];
                    a[j] = madd::<FMA>(x1[j], cos[j], -x2[j] * s);
                    b[j] = madd::<FMA>(x2[j], cos[j], x1[j] * s);
                }
                (*o1, *o2) = (a, b);
            }
            for j in 0..cos_tail.len() {
                let s = sign * sin_tail[j];
                o1_tail[j] = madd::<FMA>(x1_tail[j], cos_tail[j], -x2_tail[j] * s);
                o2_tail[j] = madd::<FMA>(x2_tail[j], cos_tail[j], x1_tail[j] * s);
            }
            if !pass.is_empty() {
                out_pass.copy_from_slice(pass);
            }
        }
    }
}
