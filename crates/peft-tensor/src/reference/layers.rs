//! The fused layers as plain loops.

use crate::backend::{Attention, Rope};

pub(super) fn softmax(x: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * cols];
    for r in 0..rows {
        let row = &x[r * cols..(r + 1) * cols];
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|v| (v - max).exp()).sum();
        for c in 0..cols {
            out[r * cols + c] = (row[c] - max).exp() / sum;
        }
    }
    out
}

pub(super) fn softmax_grad(y: &[f64], dy: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * cols];
    for r in 0..rows {
        let here = r * cols..(r + 1) * cols;
        let mean: f64 = here.clone().map(|i| y[i] * dy[i]).sum();
        for i in here {
            out[i] = y[i] * (dy[i] - mean);
        }
    }
    out
}

/// (mean, 1 / deviation) of a row; an RMS norm has mean 0.
fn moments(row: &[f64], eps: f32, centre: bool) -> (f64, f64) {
    let n = row.len() as f64;
    let mean = if centre {
        row.iter().sum::<f64>() / n
    } else {
        0.0
    };
    let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, 1.0 / (var + f64::from(eps)).sqrt())
}

/// Layer norm (`centre`) or RMS norm.
pub(super) fn norm(
    x: &[f64],
    w: &[f64],
    b: Option<&[f64]>,
    rows: usize,
    cols: usize,
    eps: f32,
    centre: bool,
) -> Vec<f64> {
    let mut out = vec![0.0; rows * cols];
    for r in 0..rows {
        let row = &x[r * cols..(r + 1) * cols];
        let (mean, inv) = moments(row, eps, centre);
        for c in 0..cols {
            out[r * cols + c] = (row[c] - mean) * inv * w[c] + b.map_or(0.0, |b| b[c]);
        }
    }
    out
}

/// (dx, dw, db): through h = (x - mean) inv, whose derivative by x is inv (1 - [centre] / n - h h' / n).
pub(super) fn norm_grad(
    x: &[f64],
    w: &[f64],
    dy: &[f64],
    rows: usize,
    cols: usize,
    eps: f32,
    centre: bool,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dx, mut dw, mut db) = (vec![0.0; rows * cols], vec![0.0; cols], vec![0.0; cols]);
    let n = cols as f64;
    for r in 0..rows {
        let row = &x[r * cols..(r + 1) * cols];
        let dy = &dy[r * cols..(r + 1) * cols];
        let (mean, inv) = moments(row, eps, centre);
        let h: Vec<f64> = row.iter().map(|v| (v - mean) * inv).collect();
        let dh: Vec<f64> = (0..cols).map(|c| dy[c] * w[c]).collect();
        let mean_dh = if centre {
            dh.iter().sum::<f64>() / n
        } else {
            0.0
        };
        let along = (0..cols).map(|c| dh[c] * h[c]).sum::<f64>() / n;
        for c in 0..cols {
            dx[r * cols + c] = inv * (dh[c] - mean_dh - h[c] * along);
            dw[c] += dy[c] * h[c];
            db[c] += dy[c];
        }
    }
    (dx, dw, db)
}

pub(super) fn rope(x: &[f64], spec: &Rope, inverse: bool) -> Vec<f64> {
    let mut out = x.to_vec();
    for (token, position) in spec.positions.iter().enumerate() {
        for head in 0..spec.heads {
            let at = (token * spec.heads + head) * spec.head_dim;
            for j in 0..spec.half {
                let pair = *position as usize * spec.half + j;
                let (cos, mut sin) = (f64::from(spec.cos[pair]), f64::from(spec.sin[pair]));
                if inverse {
                    sin = -sin;
                }
                let (a, b) = (x[at + j], x[at + j + spec.half]);
                out[at + j] = a * cos - b * sin;
                out[at + j + spec.half] = b * cos + a * sin;
            }
        }
    }
    out
}

/// Whether query i of batch entry `batch` sees key j: the rules of [`Attention`], one by one.
fn sees(batch: usize, i: usize, j: usize, s: usize, t: usize, spec: &Attention) -> bool {
    if spec
        .mask
        .keys
        .as_ref()
        .is_some_and(|keys| !keys[batch * t + j])
    {
        return false;
    }
    if j < spec.prefix {
        return true;
    }
    let own = i + t - s;
    if let Some(segments) = &spec.mask.segments
        && j >= spec.prefix + spec.shared
    {
        let between = batch * t + own.min(j)..=batch * t + own.max(j);
        if segments[between]
            .iter()
            .any(|n| *n != segments[batch * t + own])
        {
            return false;
        }
    }
    let at = own as i64;
    let late = spec.causal && j as i64 > at;
    let far = spec
        .window
        .is_some_and(|window| j as i64 <= at - window as i64);
    !late && !far
}

/// For one query row of one head: (weight, slope of the score by the raw product) of each key, and log-sum-exp.
fn weights(
    q: &[f64],
    k: &[f64],
    batch: usize,
    i: usize,
    h: usize,
    s: usize,
    t: usize,
    spec: &Attention,
) -> (Vec<f64>, Vec<f64>, f64) {
    let (d, kvh) = (spec.head_dim, h / (spec.heads / spec.kv_heads));
    let (mut scores, mut slopes) = (vec![f64::NEG_INFINITY; t], vec![0.0; t]);
    for j in 0..t {
        if !sees(batch, i, j, s, t, spec) {
            continue;
        }
        let q = &q[((batch * s + i) * spec.heads + h) * d..][..d];
        let k = &k[((batch * t + j) * spec.kv_heads + kvh) * d..][..d];
        let product: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
        let score = f64::from(spec.scale) * product;
        (scores[j], slopes[j]) = match spec.softcap.map(f64::from) {
            None => (score, f64::from(spec.scale)),
            Some(cap) => (
                cap * (score / cap).tanh(),
                f64::from(spec.scale) * (1.0 - (score / cap).tanh().powi(2)),
            ),
        };
    }
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; t], slopes, max);
    }
    let sum: f64 = scores.iter().map(|x| (x - max).exp()).sum();
    (
        scores.iter().map(|x| (x - max).exp() / sum).collect(),
        slopes,
        max + sum.ln(),
    )
}

pub(super) fn attention(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    b: usize,
    s: usize,
    t: usize,
    spec: &Attention,
) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut all_lse) = (vec![0.0; q.len()], vec![0.0; b * spec.heads * s]);
    let (d, group) = (spec.head_dim, spec.heads / spec.kv_heads);
    for batch in 0..b {
        for h in 0..spec.heads {
            for i in 0..s {
                let (p, _, lse) = weights(q, k, batch, i, h, s, t, spec);
                all_lse[(batch * spec.heads + h) * s + i] = lse;
                for j in 0..t {
                    for c in 0..d {
                        let v = v[((batch * t + j) * spec.kv_heads + h / group) * d + c];
                        out[((batch * s + i) * spec.heads + h) * d + c] += p[j] * v;
                    }
                }
            }
        }
    }
    (out, all_lse)
}

pub(super) fn attention_grad(
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dout: &[f64],
    b: usize,
    s: usize,
    t: usize,
    spec: &Attention,
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let (d, group) = (spec.head_dim, spec.heads / spec.kv_heads);
    for batch in 0..b {
        for h in 0..spec.heads {
            for i in 0..s {
                let (p, slopes, _) = weights(q, k, batch, i, h, s, t, spec);
                let q_at = ((batch * s + i) * spec.heads + h) * d;
                let kv_at = |j: usize| ((batch * t + j) * spec.kv_heads + h / group) * d;
                let dp: Vec<f64> = (0..t)
                    .map(|j| (0..d).map(|c| dout[q_at + c] * v[kv_at(j) + c]).sum())
                    .collect();
                let mean: f64 = (0..t).map(|j| p[j] * dp[j]).sum();
                for j in 0..t {
                    let ds = p[j] * (dp[j] - mean) * slopes[j];
                    for c in 0..d {
                        dq[q_at + c] += ds * k[kv_at(j) + c];
                        dk[kv_at(j) + c] += ds * q[q_at + c];
                        dv[kv_at(j) + c] += p[j] * dout[q_at + c];
                    }
                }
            }
        }
    }
    (dq, dk, dv)
}

pub(super) fn cross_entropy(
    x: &[f64],
    targets: &[i64],
    rows: usize,
    cols: usize,
) -> (f64, Vec<f64>) {
    let mut dx = softmax(x, rows, cols);
    let mut loss = 0.0;
    for r in 0..rows {
        let row = &mut dx[r * cols..(r + 1) * cols];
        match usize::try_from(targets[r]) {
            Ok(target) => {
                let x = &x[r * cols..(r + 1) * cols];
                let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                loss += x.iter().map(|v| (v - max).exp()).sum::<f64>().ln() + max - x[target];
                row[target] -= 1.0;
            }
            Err(_) => row.fill(0.0),
        }
    }
    (loss, dx)
}
