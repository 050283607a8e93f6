//! Rotary position embedding.

use super::par;
use super::pool::Floats;
use super::simd::{madd, simd};
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
        for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
            let (x1, rest) = x.split_at(half);
            let (x2, pass) = rest.split_at(half);
            let (o1, rest) = out.split_at_mut(half);
            let (o2, out_pass) = rest.split_at_mut(half);
            for j in 0..half {
                let s = sign * sin[j];
                o1[j] = madd::<FMA>(x1[j], cos[j], -x2[j] * s);
                o2[j] = madd::<FMA>(x2[j], cos[j], x1[j] * s);
            }
            out_pass.copy_from_slice(pass);
        }
    }
}
