//! The gradient of attention.

use std::ops::Range;

use super::rows::row_grad;
use super::{Geometry, step};
use crate::Precision;
use crate::backend::Attention;
use crate::cpu::matmul::View;
use crate::cpu::packed::Sides;
use crate::cpu::par;
use crate::cpu::pool::Floats;
use crate::cpu::simd::{add_into, dot};

/// What one task of the backward pass makes: a run of query heads that share a key/value head.
struct Part {
    /// `[S, heads of the task * head_dim]`
    dq: Floats,
    /// `[T, head_dim]`
    dk: Floats,
    /// `[T, head_dim]`
    dv: Floats,
}

pub(in crate::cpu) fn attention_grad(
    precision: Precision,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    b: usize,
    s: usize,
    t: usize,
    spec: &Attention,
) -> (Floats, Floats, Floats) {
    let geometry = Geometry::new(precision, b, s, t, spec);
    if q.is_empty() || k.is_empty() {
        let [dq, dk, dv] = [q, k, v].map(|x| Floats::zeros(x.len()));
        return (dq, dk, dv);
    }
    let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| Floats::dirty(x.len()));
    let group = spec.heads / spec.kv_heads;
    // The heads of a task add to the same dk and dv; with few tasks each head gets its own, summed below.
    let share = if b * spec.kv_heads >= 8 { group } else { 1 };
    let per_batch = spec.heads / share;
    let by_tiles = geometry
        .kernel
        .and_then(|kernel| kernel.attention_grad(&geometry, [q, k, v], (out, lse, dout)));
    let run = |i: usize| {
        let heads = i % per_batch * share..(i % per_batch + 1) * share;
        if let Some(by_tiles) = &by_tiles {
            let mut part = Part {
                dq: Floats::dirty(s * share * spec.head_dim),
                dk: Floats::dirty(t * spec.head_dim),
                dv: Floats::dirty(t * spec.head_dim),
            };
            by_tiles(
                i / per_batch,
                &heads,
                [&mut part.dq, &mut part.dk, &mut part.dv],
            );
            return part;
        }
        backward(&geometry, q, k, v, out, lse, dout, i / per_batch, heads)
    };
    let parts: Vec<Part> = par::collect(b * per_batch, run);

    let (q_width, kv_width, d) = (geometry.q_width, geometry.kv_width, spec.head_dim);
    par::rows(&mut dq, q_width, q_width, |first, rows| {
        for (i, row) in rows.chunks_mut(q_width).enumerate() {
            let (batch, query) = ((first + i) / s, (first + i) % s);
            for (p, row) in row.chunks_mut(share * d).enumerate() {
                row.copy_from_slice(
                    &parts[batch * per_batch + p].dq[query * share * d..][..share * d],
                );
            }
        }
    });
    let shared = group / share;
    let of = |batch: usize, h: usize| {
        let (first, others) = parts[batch * per_batch + h * shared..][..shared].split_at(1);
        (&first[0], others)
    };
    par::rows2(
        &mut dk,
        kv_width,
        &mut dv,
        kv_width,
        2 * kv_width * shared,
        |first, dk, dv| {
            for (i, (dk, dv)) in dk
                .chunks_mut(kv_width)
                .zip(dv.chunks_mut(kv_width))
                .enumerate()
            {
                let (batch, key) = ((first + i) / t, (first + i) % t);
                for (h, (dk, dv)) in dk.chunks_mut(d).zip(dv.chunks_mut(d)).enumerate() {
                    let (first, others) = of(batch, h);
                    dk.copy_from_slice(&first.dk[key * d..(key + 1) * d]);
                    dv.copy_from_slice(&first.dv[key * d..(key + 1) * d]);
                    for part in others {
                        add_into(&part.dk[key * d..(key + 1) * d], dk);
                        add_into(&part.dv[key * d..(key + 1) * d], dv);
                    }
                }
            }
        },
    );
    (dq, dk, dv)
}

/// Gradients of some query heads of a batch entry that share a key/value head.
fn backward(
    g: &Geometry<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &[f32],
    lse: &[f32],
    dout: &[f32],
    batch: usize,
    heads: Range<usize>,
) -> Part {
    let (s, t, d, width) = (g.s, g.t, g.spec.head_dim, heads.len() * g.spec.head_dim);
    let mut part = Part {
        dq: Floats::zeros(s * width),
        dk: Floats::zeros(t * d),
        dv: Floats::zeros(t * d),
    };
    let (mut tile, mut slopes) = (Vec::new(), Vec::new());
    let (mut q_rows, mut dout_rows, mut dq_rows) = (Vec::new(), Vec::new(), Vec::new());
    let mut deltas = Vec::new();
    let mut sides = Sides::default();
    let h = heads.start;
    for start in (0..s).step_by(g.block) {
        let queries = start..(start + g.block).min(s);
        let count = queries.len();
        let keys = g.keys(batch, &queries, 1);
        if keys.width == 0 {
            continue;
        }
        let rows = heads.len() * count;
        g.gather(q, batch, &queries, &heads, &mut q_rows);
        g.gather(dout, batch, &queries, &heads, &mut dout_rows);
        dq_rows.resize(rows * d, 0.0);
        deltas.clear();
        for (r, dout) in dout_rows.chunks(d).enumerate() {
            let out = &out[g.place(batch * s + start + r % count, h + r / count)..][..d];
            deltas.push(dot(out, dout));
        }
        for (at, part_keys) in keys.parts(step(rows)) {
            let stride = part_keys.stride;
            tile.resize(rows * stride, 0.0);
            slopes.resize(rows * stride, 0.0);
            g.scores(&mut sides, &q_rows, k, batch, h, &part_keys, &mut tile);
            g.scores(&mut sides, &dout_rows, v, batch, h, &part_keys, &mut slopes);
            let both = tile.chunks_mut(stride).zip(slopes.chunks_mut(stride));
            for (r, (weights, slopes)) in both.enumerate() {
                let (h, i) = (h + r / count, start + r % count);
                let columns = g.columns_of(batch, i, &keys, at, &part_keys);
                row_grad(
                    weights,
                    slopes,
                    &columns,
                    part_keys.bias.as_deref(),
                    g.spec.scale,
                    g.spec.softcap,
                    lse[(batch * g.spec.heads + h) * s + i],
                    deltas[r],
                );
            }
            g.product(
                &mut sides,
                &slopes,
                k,
                batch,
                h,
                &part_keys,
                &mut dq_rows,
                at > 0,
            );
            for (first, len, column) in part_keys.spans() {
                let shape = (len, rows, d);
                let weights_t = View::rows(&tile[column..], stride).t();
                let slopes_t = View::rows(&slopes[column..], stride).t();
                let (q_rows, dout_rows) = (View::rows(&q_rows, d), View::rows(&dout_rows, d));
                let dv = &mut part.dv[first * d..];
                g.multiply(&mut sides, shape, weights_t, dout_rows, dv, d, true);
                let dk = &mut part.dk[first * d..];
                g.multiply(&mut sides, shape, slopes_t, q_rows, dk, d, true);
            }
        }
        for (r, row) in dq_rows.chunks(d).enumerate() {
            let at = (start + r % count) * width + r / count * d;
            part.dq[at..at + d].copy_from_slice(row);
        }
    }
    part
}
