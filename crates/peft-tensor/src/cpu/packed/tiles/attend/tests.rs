//! Attention by tiles, in memory, against that of single precision.

use std::sync::Arc;

use super::*;
use crate::backend::{Attention, Mask};
use crate::cpu::attention::{attention, attention_grad};
use crate::cpu::packed::lanes;
use crate::cpu::packed::tiles::square;
use crate::{Precision, RngKey};

/// Values that bfloat16 has: what is left to round are weights and slopes.
fn normal(seed: u64, n: usize) -> Vec<f32> {
    let mut values = vec![0.0; n];
    RngKey::new(seed).fill_normal(0.0, 1.0, &mut values);
    values
        .iter()
        .map(|v| half::bf16::from_f32(*v).to_f32())
        .collect()
}

fn near(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(0f32, |m, w| m.max(w.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= 8e-3 * size + 1e-6,
            "{what}, {i}: {got} for {want}"
        );
    }
}

/// Against the products in single precision.
fn check((b, s, t): (usize, usize, usize), spec: &Attention) {
    let what = format!("{b} {s} {t} {spec:?}");
    let (queries, keys) = (b * s * spec.heads, b * t * spec.kv_heads);
    let q = normal(1, queries * spec.head_dim);
    let [k, v] = [2, 3].map(|seed| normal(seed, keys * spec.head_dim));
    let dout = normal(4, q.len());
    let (want, want_lse) = attention(Precision::F32, &q, &k, &v, b, s, t, spec);
    let way = (lanes::Plain, square::Plain);
    let g = Geometry::new(Precision::F32, b, s, t, spec);
    let forward = Forward::new(way, &g, &k, &v);
    let (mut out, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; b * spec.heads * s]);
    for batch in 0..b {
        // Blocks that end inside of a strip.
        for first in (0..s).step_by(50) {
            let queries = first..(first + 50).min(s);
            let width = spec.heads * spec.head_dim;
            let rows = &mut out[(batch * s + first) * width..][..queries.len() * width];
            let mut part = vec![0.0; spec.heads * queries.len()];
            forward.block(&g, &q, batch, &queries, rows, &mut part);
            for (h, part) in part.chunks(queries.len()).enumerate() {
                lse[(batch * spec.heads + h) * s + first..][..part.len()].copy_from_slice(part);
            }
        }
    }
    near(&out, &want, &what);
    for (got, want) in lse.iter().zip(&want_lse) {
        assert!(
            got == want || (got - want).abs() < 1e-4 * want.abs().max(1.0),
            "{what}"
        );
    }
    let wants = attention_grad(
        Precision::F32,
        &q,
        &k,
        &v,
        &want,
        &want_lse,
        &dout,
        b,
        s,
        t,
        spec,
    );
    let backward = Backward::new(way, &g, &k, &v);
    let [mut dq, mut dk, mut dv] = [&q, &k, &v].map(|x| vec![0.0; x.len()]);
    let (d, group) = (spec.head_dim, spec.heads / spec.kv_heads);
    for batch in 0..b {
        for head in 0..spec.kv_heads {
            let heads = head * group..(head + 1) * group;
            let mut of_q = vec![f32::NAN; s * group * d];
            let [mut of_k, mut of_v] = [(); 2].map(|()| vec![f32::NAN; t * d]);
            let grads = [&mut of_q[..], &mut of_k, &mut of_v];
            backward.heads(&g, &q, &want, &want_lse, &dout, batch, &heads, grads);
            for (i, row) in of_q.chunks(group * d).enumerate() {
                let at = ((batch * s + i) * spec.heads + heads.start) * d;
                dq[at..at + row.len()].copy_from_slice(row);
            }
            for (sum, part) in [(&mut dk, of_k), (&mut dv, of_v)] {
                for (i, row) in part.chunks(d).enumerate() {
                    let at = ((batch * t + i) * spec.kv_heads + head) * d;
                    sum[at..at + d].copy_from_slice(row);
                }
            }
        }
    }
    near(&dq, &wants.0, &format!("dq of {what}"));
    near(&dk, &wants.1, &format!("dk of {what}"));
    near(&dv, &wants.2, &format!("dv of {what}"));
}

#[test]
fn every_rule_is_that_of_single_precision() {
    let plain = Attention {
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        scale: 0.25,
        causal: true,
        window: None,
        prefix: 0,
        shared: 0,
        softcap: None,
        mask: Mask::default(),
    };
    check((2, 70, 70), &plain);
    // Several parts of keys, more of them than queries, and heads that are no whole tiles.
    check(
        (1, 130, 600),
        &Attention {
            head_dim: 40,
            ..plain.clone()
        },
    );
    check(
        (1, 33, 33),
        &Attention {
            causal: false,
            softcap: Some(2.0),
            ..plain.clone()
        },
    );
    check(
        (1, 150, 150),
        &Attention {
            window: Some(20),
            prefix: 5,
            ..plain.clone()
        },
    );
    let mask = |keys: Option<Vec<bool>>, segments: Option<Vec<u32>>| Mask {
        keys: keys.map(Arc::new),
        segments: segments.map(Arc::new),
    };
    // Padding at the front hides all keys from some rows.
    let keys = (0..2 * 90).map(|i| i % 90 > 3 && i % 7 != 0).collect();
    check(
        (2, 90, 90),
        &Attention {
            mask: mask(Some(keys), None),
            ..plain.clone()
        },
    );
    let runs = (0..140).map(|i| i / 45).collect();
    check(
        (1, 140, 140),
        &Attention {
            mask: mask(None, Some(runs)),
            shared: 7,
            ..plain
        },
    );
}
