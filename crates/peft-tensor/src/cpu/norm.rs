//! Softmax and the two norms, a row at a time.

use super::par;
use super::pool::Floats;
use super::simd::{add_into, dot_body, exp, madd, max_body, simd, sum_body};

pub(super) fn softmax(x: &[f32], cols: usize) -> Floats {
    let mut out = Floats::dirty(x.len());
    par::rows(&mut out, cols, cols, |first, out| {
        softmax_chunk(&x[first * cols..][..out.len()], cols, out)
    });
    out
}

simd! {
    fn softmax_chunk(x: &[f32], cols: usize, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            let max = max_body(x);
            for (o, x) in out.iter_mut().zip(x) {
                *o = exp::<FMA>(*x - max);
            }
            let inv = 1.0 / sum_body(out);
            for o in out {
                *o *= inv;
            }
        }
    }
}

pub(super) fn softmax_grad(y: &[f32], dy: &[f32], cols: usize) -> Floats {
    let mut out = Floats::dirty(y.len());
    par::rows(&mut out, cols, cols, |first, out| {
        let here = first * cols..first * cols + out.len();
        softmax_grad_chunk(&y[here.clone()], &dy[here], cols, out);
    });
    out
}

simd! {
    fn softmax_grad_chunk(y: &[f32], dy: &[f32], cols: usize, out: &mut [f32]) {
        let rows = y.chunks_exact(cols).zip(dy.chunks_exact(cols));
        for ((y, dy), out) in rows.zip(out.chunks_exact_mut(cols)) {
            let mean = dot_body::<FMA>(y, dy);
            for ((o, y), d) in out.iter_mut().zip(y).zip(dy) {
                *o = y * (d - mean);
            }
        }
    }
}

pub(super) fn rms_norm(x: &[f32], w: &[f32], cols: usize, eps: f32) -> Floats {
    let mut out = Floats::dirty(x.len());
    par::rows(&mut out, cols, cols, |first, out| {
        rms_norm_chunk(&x[first * cols..][..out.len()], w, eps, out)
    });
    out
}

simd! {
    fn rms_norm_chunk(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        let cols = w.len();
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            let r = 1.0 / (dot_body::<FMA>(x, x) / cols as f32 + eps).sqrt();
            for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
                *o = x * r * w;
            }
        }
    }
}

pub(super) fn rms_norm_grad(
    x: &[f32],
    w: &[f32],
    dy: &[f32],
    cols: usize,
    eps: f32,
    want_w: bool,
) -> (Floats, Option<Vec<f32>>) {
    let mut dx = Floats::dirty(x.len());
    let dw = with_partials(
        &mut dx,
        cols,
        if want_w { cols } else { 0 },
        |first, dx, dw| {
            let here = first * cols..first * cols + dx.len();
            rms_norm_grad_chunk(&x[here.clone()], w, &dy[here], eps, dx, dw);
        },
    );
    (dx, want_w.then_some(dw))
}

simd! {
    /// dx = r (w dy - x r^2 mean(w dy x)), dw += dy x r, where r = 1 / rms.
    fn rms_norm_grad_chunk(x: &[f32], w: &[f32], dy: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32]) {
        let cols = w.len();
        let rows = x.chunks_exact(cols).zip(dy.chunks_exact(cols));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(cols)) {
            let r = 1.0 / (dot_body::<FMA>(x, x) / cols as f32 + eps).sqrt();
            for ((o, w), d) in dx.iter_mut().zip(w).zip(dy) {
                *o = w * d;
            }
            let pull = dot_body::<FMA>(dx, x) * r * r / cols as f32;
            for (o, x) in dx.iter_mut().zip(x) {
                *o = r * (*o - x * pull);
            }
            for ((o, x), d) in dw.iter_mut().zip(x).zip(dy) {
                *o = madd::<FMA>(d * x, r, *o);
            }
        }
    }
}

pub(super) fn layer_norm(x: &[f32], w: &[f32], b: Option<&[f32]>, cols: usize, eps: f32) -> Floats {
    let mut out = Floats::dirty(x.len());
    par::rows(&mut out, cols, cols, |first, out| {
        layer_norm_chunk(&x[first * cols..][..out.len()], w, b, eps, out)
    });
    out
}

/// (mean, 1 / sqrt(var + eps)) of a row, in two passes, with `centred` left holding x - mean.
#[inline(always)]
fn moments<const FMA: bool>(x: &[f32], eps: f32, centred: &mut [f32]) -> f32 {
    let n = x.len() as f32;
    let mean = sum_body(x) / n;
    for (o, x) in centred.iter_mut().zip(x) {
        *o = x - mean;
    }
    1.0 / (dot_body::<FMA>(centred, centred) / n + eps).sqrt()
}

simd! {
    fn layer_norm_chunk(x: &[f32], w: &[f32], b: Option<&[f32]>, eps: f32, out: &mut [f32]) {
        let cols = w.len();
        for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
            let r = moments::<FMA>(x, eps, out);
            match b {
                Some(b) => for ((o, w), b) in out.iter_mut().zip(w).zip(b) {
                    *o = madd::<FMA>(*o * r, *w, *b);
                },
                None => for (o, w) in out.iter_mut().zip(w) {
                    *o = *o * r * w;
                },
            }
        }
    }
}

/// dx, and (dw, db) where wanted.
type LayerNormGrad = (Floats, Option<(Vec<f32>, Vec<f32>)>);

pub(super) fn layer_norm_grad(
    x: &[f32],
    w: &[f32],
    dy: &[f32],
    cols: usize,
    eps: f32,
    want_wb: bool,
) -> LayerNormGrad {
    let mut dx = Floats::dirty(x.len());
    let mut sums = with_partials(
        &mut dx,
        cols,
        if want_wb { 2 * cols } else { 0 },
        |first, dx, sums| {
            let here = first * cols..first * cols + dx.len();
            let (dw, db) = sums.split_at_mut(sums.len() / 2);
            layer_norm_grad_chunk(&x[here.clone()], w, &dy[here], eps, dx, dw, db);
        },
    );
    let db = sums.split_off(sums.len() / 2);
    (dx, want_wb.then_some((sums, db)))
}

simd! {
    /// With h = (x - mean) r and g = w dy: dx = r (g - mean(g) - h mean(g h)), dw += dy h, db += dy.
    fn layer_norm_grad_chunk(x: &[f32], w: &[f32], dy: &[f32], eps: f32, dx: &mut [f32], dw: &mut [f32], db: &mut [f32]) {
        let cols = w.len();
        let mut h = vec![0.0; cols];
        let rows = x.chunks_exact(cols).zip(dy.chunks_exact(cols));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(cols)) {
            let r = moments::<FMA>(x, eps, &mut h);
            for h in &mut h {
                *h *= r;
            }
            for ((o, w), d) in dx.iter_mut().zip(w).zip(dy) {
                *o = w * d;
            }
            let mean = sum_body(dx) / cols as f32;
            let pull = dot_body::<FMA>(dx, &h) / cols as f32;
            for (o, h) in dx.iter_mut().zip(&h) {
                *o = r * (*o - mean - h * pull);
            }
            for ((o, h), d) in dw.iter_mut().zip(&h).zip(dy) {
                *o = madd::<FMA>(*d, *h, *o);
            }
            if !db.is_empty() {
                for (o, d) in db.iter_mut().zip(dy) {
                    *o += *d;
                }
            }
        }
    }
}

/// Runs `f(first row, rows of out, partial)` over chunks of rows, each with zeroed partial sums of `width`, and
/// returns their sum in the order of the chunks.
fn with_partials(
    out: &mut [f32],
    cols: usize,
    width: usize,
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) -> Vec<f32> {
    let mut total = vec![0.0; width];
    if out.is_empty() {
        return total;
    }
    let step = par::rows_per_chunk(cols).max(16);
    let chunks = out.chunks_mut(step * cols).enumerate();
    let mut partials = vec![vec![0.0; width]; chunks.len()];
    let all = chunks.zip(&mut partials).collect();
    par::share(all, |((i, out), partial)| f(i * step, out, partial));
    for partial in &partials {
        add_into(partial, &mut total);
    }
    total
}
