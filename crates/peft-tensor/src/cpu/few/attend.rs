//! Attention of a single query, as generation asks for it: the heads that share keys read them once.

use super::super::attention::{Geometry, softmax_of, weights};
use super::super::matmul::transpose;
use super::super::par;
use super::simd::Level;
use super::{dots, level};

/// One query in each row of the batch: `out [batch, heads, head_dim]`, zeros before, and `lse [batch, heads]`. A task is
/// the heads that use one head of keys and values.
pub(in super::super) fn one_query(
    g: &Geometry<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (kv, d) = (g.spec.kv_heads, g.spec.head_dim);
    let n = g.spec.heads / kv;
    par::rows2(out, n * d, lse, n, 2 * n * g.t * d, |first, out, lse| {
        for (i, (out, lse)) in out.chunks_mut(n * d).zip(lse.chunks_mut(n)).enumerate() {
            group(g, q, k, v, (first + i) / kv, (first + i) % kv * n, out, lse);
        }
    });
}

/// The `lse.len()` query heads from `h` on, which use one head of keys and values: `out [heads, head_dim]`, zeros before.
fn group(
    g: &Geometry<'_>,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    batch: usize,
    h: usize,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (d, heads, level) = (g.spec.head_dim, lse.len(), level());
    let keys = g.keys(batch, &(0..1), 1);
    if keys.width == 0 {
        return lse.fill(f32::NEG_INFINITY);
    }
    let mut scores = vec![0.0; heads * (keys.width + keys.stride)];
    let (by_key, by_head) = scores.split_at_mut(heads * keys.width);
    let q = &q[(batch * g.spec.heads + h) * d..][..heads * d];
    for (first, len, column) in keys.spans() {
        let k = g.kv(k, batch * g.t + first, h);
        let scores = &mut by_key[column * heads..][..len * heads];
        at!(level, tile(q, k.data, d, k.rs, heads, scores));
    }
    transpose(by_key, heads, keys.stride, by_head);
    let columns = g.columns(batch, 0, &keys);
    let all = by_head.chunks_mut(keys.stride).zip(out.chunks_mut(d));
    for ((row, out), lse) in all.zip(lse) {
        let (scale, cap) = (g.spec.scale, g.spec.softcap);
        let (max, sum) = weights(row, &columns, keys.bias.as_deref(), scale, cap);
        let inverse;
        (inverse, *lse) = softmax_of(max, sum);
        for (first, len, column) in keys.spans() {
            let v = g.kv(v, batch * g.t + first, h);
            at!(level, add_rows(&row[column..][..len], v.data, v.rs, out));
        }
        for o in out {
            *o *= inverse;
        }
    }
}
