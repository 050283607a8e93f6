//! Functions of one and two arguments, gates.

use super::par;
use super::pool::Floats;
use super::simd::{exp, gelu_tanh_inner, phi, sigmoid, simd, tanh};
use super::source::{PIECE, Source};
use crate::backend::{Binary, Glu, Unary};

/// 1 / sqrt(2 pi)
const INV_SQRT_2PI: f32 = 0.398_942_3;

pub(super) fn unary(op: Unary, x: &[f32]) -> Floats {
    let mut out = Floats::dirty(x.len());
    par::elements(&mut out, |at, out| {
        unary_chunk(op, &x[at..at + out.len()], out)
    });
    out
}

pub(super) fn unary_grad(op: Unary, x: &[f32], y: &[f32], dy: &[f32]) -> Floats {
    let mut out = Floats::dirty(x.len());
    par::elements(&mut out, |at, out| {
        let here = at..at + out.len();
        unary_grad_chunk(op, &x[here.clone()], &y[here.clone()], &dy[here], out);
    });
    out
}

/// out = f(x)
#[inline(always)]
fn map(x: &[f32], out: &mut [f32], f: impl Fn(f32) -> f32) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = f(*x);
    }
}

/// out = f(a, b)
#[inline(always)]
fn map2(a: &[f32], b: &[f32], out: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
        *o = f(*a, *b);
    }
}

simd! {
    fn unary_chunk(op: Unary, x: &[f32], out: &mut [f32]) {
        match op {
            Unary::Neg => map(x, out, |x| -x),
            Unary::Exp => map(x, out, exp::<FMA>),
            Unary::Ln => map(x, out, f32::ln),
            Unary::Sqrt => map(x, out, f32::sqrt),
            Unary::Rsqrt => map(x, out, |x| 1.0 / x.sqrt()),
            Unary::Recip => map(x, out, |x| 1.0 / x),
            Unary::Square => map(x, out, |x| x * x),
            Unary::Abs => map(x, out, f32::abs),
            Unary::Tanh => map(x, out, tanh::<FMA>),
            Unary::Sigmoid => map(x, out, sigmoid::<FMA>),
            Unary::Relu => map(x, out, |x| if x < 0.0 { 0.0 } else { x }),
            Unary::Silu => map(x, out, silu::<FMA>),
            Unary::Gelu => map(x, out, gelu::<FMA>),
            Unary::GeluTanh => map(x, out, gelu_tanh::<FMA>),
            Unary::Sin => map(x, out, f32::sin),
            Unary::Cos => map(x, out, f32::cos),
        }
    }
}

simd! {
    fn unary_grad_chunk(op: Unary, x: &[f32], y: &[f32], dy: &[f32], out: &mut [f32]) {
        match op {
            Unary::Neg => map(dy, out, |d| -d),
            Unary::Exp => map2(y, dy, out, |y, d| d * y),
            Unary::Ln => map2(x, dy, out, |x, d| d / x),
            Unary::Sqrt => map2(y, dy, out, |y, d| 0.5 * d / y),
            Unary::Rsqrt => map2(y, dy, out, |y, d| -0.5 * d * y * y * y),
            Unary::Recip => map2(y, dy, out, |y, d| -d * y * y),
            Unary::Square => map2(x, dy, out, |x, d| 2.0 * d * x),
            Unary::Abs => map2(x, dy, out, |x, d| if x > 0.0 { d } else if x < 0.0 { -d } else { 0.0 }),
            Unary::Tanh => map2(y, dy, out, |y, d| d * (1.0 - y * y)),
            Unary::Sigmoid => map2(y, dy, out, |y, d| d * y * (1.0 - y)),
            Unary::Relu => map2(x, dy, out, |x, d| if x > 0.0 { d } else { 0.0 }),
            Unary::Silu => map2(x, dy, out, |x, d| d * silu_slope::<FMA>(x)),
            Unary::Gelu => map2(x, dy, out, |x, d| d * gelu_slope::<FMA>(x)),
            Unary::GeluTanh => map2(x, dy, out, |x, d| d * gelu_tanh_slope::<FMA>(x)),
            Unary::Sin => map2(x, dy, out, |x, d| d * x.cos()),
            Unary::Cos => map2(x, dy, out, |x, d| -d * x.sin()),
        }
    }
}

#[inline(always)]
fn silu<const FMA: bool>(x: f32) -> f32 {
    x * sigmoid::<FMA>(x)
}

#[inline(always)]
fn silu_slope<const FMA: bool>(x: f32) -> f32 {
    let s = sigmoid::<FMA>(x);
    s * (1.0 + x * (1.0 - s))
}

#[inline(always)]
fn gelu<const FMA: bool>(x: f32) -> f32 {
    x * phi::<FMA>(x)
}

#[inline(always)]
fn gelu_slope<const FMA: bool>(x: f32) -> f32 {
    phi::<FMA>(x) + x * INV_SQRT_2PI * exp::<FMA>(-0.5 * x * x)
}

#[inline(always)]
fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    0.5 * x * (1.0 + gelu_tanh_inner::<FMA>(x))
}

#[inline(always)]
fn gelu_tanh_slope<const FMA: bool>(x: f32) -> f32 {
    let t = gelu_tanh_inner::<FMA>(x);
    let inner = 0.797_884_6 * (1.0 + 3.0 * 0.044_715 * x * x);
    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
}

/// An argument of [`binary`] along the innermost axis of the output.
#[derive(Clone, Copy)]
enum Run<'a> {
    /// One value for every element.
    One(f32),
    /// A value an element.
    Each(&'a [f32]),
}

pub(super) fn binary(
    op: Binary,
    a: &[f32],
    a_shape: &[usize],
    b: &[f32],
    b_shape: &[usize],
    out_shape: &[usize],
) -> Floats {
    let mut out = Floats::dirty(out_shape.iter().product());
    let axes = super::shape::merge(out_shape, &[a_shape, b_shape]);
    // (size, stride of a, stride of b), outermost first; the innermost strides are 0 or 1.
    let (inner, outer) = axes
        .split_last()
        .map_or((super::shape::Axis::unit(2), &[][..]), |(i, o)| {
            (i.clone(), o)
        });
    par::elements(&mut out, |at, out| {
        let mut done = 0;
        while done < out.len() {
            let (mut row, col) = ((at + done) / inner.size, (at + done) % inner.size);
            let take = (inner.size - col).min(out.len() - done);
            let (mut ia, mut ib) = (col * inner.strides[0], col * inner.strides[1]);
            for axis in outer.iter().rev() {
                let index = row % axis.size;
                row /= axis.size;
                ia += index * axis.strides[0];
                ib += index * axis.strides[1];
            }
            let run = |x, i: usize, stride| -> Run<'_> {
                let x: &[f32] = x;
                if stride == 0 {
                    Run::One(x[i])
                } else {
                    Run::Each(&x[i..i + take])
                }
            };
            binary_run(
                op,
                run(a, ia, inner.strides[0]),
                run(b, ib, inner.strides[1]),
                &mut out[done..done + take],
            );
            done += take;
        }
    });
    out
}

simd! {
    fn binary_run(op: Binary, a: Run<'_>, b: Run<'_>, out: &mut [f32]) {
        match op {
            Binary::Add => run(a, b, out, |a, b| a + b),
            Binary::Sub => run(a, b, out, |a, b| a - b),
            Binary::Mul => run(a, b, out, |a, b| a * b),
            Binary::Div => run(a, b, out, |a, b| a / b),
        }
    }
}

#[inline(always)]
fn run(a: Run<'_>, b: Run<'_>, out: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    match (a, b) {
        (Run::Each(a), Run::Each(b)) => map2(a, b, out, f),
        (Run::Each(a), Run::One(b)) => map(a, out, |a| f(a, b)),
        (Run::One(a), Run::Each(b)) => map(b, out, |b| f(a, b)),
        (Run::One(a), Run::One(b)) => out.fill(f(a, b)),
    }
}

pub(super) fn affine(x: &[f32], mul: f32, add: f32) -> Floats {
    let mut out = Floats::dirty(x.len());
    par::elements(&mut out, |at, out| {
        affine_chunk(&x[at..at + out.len()], mul, add, out)
    });
    out
}

simd! {
    fn affine_chunk(x: &[f32], mul: f32, add: f32, out: &mut [f32]) {
        map(x, out, |x| mul * x + add);
    }
}

/// a += b
pub(super) fn accumulate(a: &mut [f32], b: &[f32]) {
    par::elements(a, |at, a| super::simd::add_into(&b[at..at + a.len()], a));
}

pub(super) fn glu(kind: Glu, gate: Source<'_>, up: Source<'_>) -> Floats {
    let mut out = Floats::dirty(gate.len());
    par::elements(&mut out, |at, out| {
        let (mut g, mut u) = ([0.0; PIECE], [0.0; PIECE]);
        for (i, out) in out.chunks_mut(PIECE).enumerate() {
            let here = at + i * PIECE..at + i * PIECE + out.len();
            glu_chunk(
                kind,
                gate.read(here.clone(), &mut g),
                up.read(here, &mut u),
                out,
            );
        }
    });
    out
}

simd! {
    fn glu_chunk(kind: Glu, gate: &[f32], up: &[f32], out: &mut [f32]) {
        match kind {
            Glu::Silu => map2(gate, up, out, |g, u| silu::<FMA>(g) * u),
            Glu::Gelu => map2(gate, up, out, |g, u| gelu::<FMA>(g) * u),
            Glu::GeluTanh => map2(gate, up, out, |g, u| gelu_tanh::<FMA>(g) * u),
        }
    }
}

pub(super) fn glu_grad(
    kind: Glu,
    gate: Source<'_>,
    up: Source<'_>,
    dy: &[f32],
) -> (Floats, Floats) {
    let mut dgate = Floats::dirty(gate.len());
    let mut dup = Floats::dirty(gate.len());
    par::rows2(&mut dgate, 1, &mut dup, 1, 1, |at, dgate, dup| {
        let (mut g, mut u) = ([0.0; PIECE], [0.0; PIECE]);
        let outs = dgate.chunks_mut(PIECE).zip(dup.chunks_mut(PIECE));
        for (i, (dgate, dup)) in outs.enumerate() {
            let here = at + i * PIECE..at + i * PIECE + dgate.len();
            let gate = gate.read(here.clone(), &mut g);
            let up = up.read(here.clone(), &mut u);
            glu_grad_chunk(kind, gate, up, &dy[here], dgate, dup);
        }
    });
    (dgate, dup)
}

simd! {
    fn glu_grad_chunk(kind: Glu, gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        match kind {
            Glu::Silu => gate_map(gate, up, dy, dgate, dup, |x| {
                let s = sigmoid::<FMA>(x);
                (x * s, s * (1.0 + x * (1.0 - s)))
            }),
            Glu::Gelu => gate_map(gate, up, dy, dgate, dup, |x| {
                let p = phi::<FMA>(x);
                (x * p, p + x * INV_SQRT_2PI * exp::<FMA>(-0.5 * x * x))
            }),
            Glu::GeluTanh => gate_map(gate, up, dy, dgate, dup, |x| (gelu_tanh::<FMA>(x), gelu_tanh_slope::<FMA>(x))),
        }
    }
}

/// Both gradients from (value, slope) of the gate.
#[inline(always)]
fn gate_map(
    gate: &[f32],
    up: &[f32],
    dy: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
    f: impl Fn(f32) -> (f32, f32),
) {
    let inputs = gate.iter().zip(up).zip(dy);
    for (((g, u), d), (dg, du)) in inputs.zip(dgate.iter_mut().zip(dup.iter_mut())) {
        let (value, slope) = f(*g);
        *dg = d * u * slope;
        *du = d * value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::codes::Codes;
    use crate::cpu::half::Halves;

    #[test]
    fn packed_gates_give_what_unpacked_ones_do() {
        let values = |n: usize, step: f32| -> Vec<f32> {
            (0..n).map(|i| (i as f32 * step).sin() * 3.0).collect()
        };
        // Several tasks, the last piece of each not full.
        let n = 2 * par::GRAIN + 3 * PIECE + 77;
        let (gate, up, dy) = (values(n, 0.37), values(n, 0.11), values(n, 0.73));
        let halves = [Halves::pack(&gate), Halves::pack(&up)];
        let codes = [Codes::pack(&gate), Codes::pack(&up)];
        let all = [
            (
                halves.each_ref().map(Source::Halves),
                halves.each_ref().map(Halves::unpack),
            ),
            (
                codes.each_ref().map(Source::Codes),
                codes.each_ref().map(Codes::unpack),
            ),
        ];
        for ([gate, up], whole) in all {
            let [whole_gate, whole_up] = whole.each_ref().map(|x| Source::Whole(x));
            for kind in [Glu::Silu, Glu::Gelu, Glu::GeluTanh] {
                let want = glu(kind, whole_gate, whole_up);
                assert_eq!(glu(kind, gate, up)[..], want[..]);
                // One of both may be whole.
                assert_eq!(glu(kind, whole_gate, up)[..], want[..]);
                let got = glu_grad(kind, gate, up, &dy);
                let want = glu_grad(kind, whole_gate, whole_up, &dy);
                assert_eq!((&got.0[..], &got.1[..]), (&want.0[..], &want.1[..]));
            }
        }
    }
}
