//! Attention under every combination of its rules.

use std::sync::Arc;

use peft_tensor::{Attention, Device, Mask, Precision, RngKey, Tensor};
use proptest::prelude::*;

use crate::check::{Tolerance, assert_all_close, check, input};

/// Sums over keys of products of rounded softmax weights.
const TOLERANCE: Tolerance = Tolerance {
    forward: 5e-6,
    backward: 4e-5,
};

#[derive(Clone, Debug)]
struct Case {
    b: usize,
    s: usize,
    t: usize,
    spec: Attention,
    seed: u64,
}

/// Cases with up to `queries` queries.
fn cases(queries: usize) -> impl Strategy<Value = Case> {
    let sizes = (
        1..4usize,
        1..=queries,
        0..20usize,
        1..4usize,
        1..4usize,
        1..10usize,
    );
    let rules = (
        any::<bool>(),
        prop::option::of(1..30usize),
        0..6usize,
        prop::option::of(1.0f32..20.0),
        prop::option::of(0..4u64),
        prop::option::of(1..9usize),
        0..12usize,
    );
    (sizes, rules, 0..1000u64).prop_map(
        |(
            (b, s, more, kv_heads, group, head_dim),
            (causal, window, prefix, softcap, holes, run, shared),
            seed,
        )| {
            let t = s + more;
            let prefix = prefix.min(t);
            // Half of them: not where a window is set.
            let shared = if window.is_some() {
                0
            } else {
                shared.min(t - prefix)
            };
            // 0 holes in four is a mask that hides nothing, 3 in four leaves some rows with no key at all.
            let keys = holes.map(|holes| {
                Arc::new(
                    (0..b * t)
                        .map(|i| RngKey::new(seed).below(i as u64, 4) >= holes)
                        .collect(),
                )
            });
            // Runs of one to twice `run` positions, other ones in each row; the number of one may come again.
            let segments = run.map(|run| {
                let number = |i: usize| ((i + i / t * 3) / run % 3) as u32;
                Arc::new((0..b * t).map(number).collect())
            });
            let spec = Attention {
                heads: kv_heads * group,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                causal,
                window,
                prefix,
                shared,
                softcap,
                mask: Mask { keys, segments },
            };
            Case {
                b,
                s,
                t,
                spec,
                seed,
            }
        },
    )
}

fn compare(case: &Case, size: f32) {
    let spec = &case.spec;
    let q = input(
        case.seed,
        -size,
        size,
        &[case.b, case.s, spec.heads * spec.head_dim],
    );
    let k = input(
        case.seed + 1,
        -size,
        size,
        &[case.b, case.t, spec.kv_heads * spec.head_dim],
    );
    let v = input(
        case.seed + 2,
        -size,
        size,
        &[case.b, case.t, spec.kv_heads * spec.head_dim],
    );
    check(&[q, k, v], TOLERANCE, |x| {
        x[0].attention(&x[1], &x[2], spec)
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn small(case in cases(9)) {
        compare(&case, 2.0);
    }

    #[test]
    fn one_query(case in cases(1)) {
        compare(&case, 2.0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn several_blocks(case in cases(150)) {
        compare(&case, 1.0);
    }
}

fn plain(heads: usize, kv_heads: usize, head_dim: usize) -> Attention {
    Attention {
        heads,
        kv_heads,
        head_dim,
        scale: 0.125,
        causal: true,
        window: None,
        prefix: 0,
        shared: 0,
        softcap: None,
        mask: Mask::default(),
    }
}

#[test]
fn many_tasks_share_a_key_head() {
    // 18 pairs of (batch entry, key head): the path where the heads of a group add to one gradient.
    let case = Case {
        b: 6,
        s: 37,
        t: 41,
        spec: plain(6, 3, 16),
        seed: 8,
    };
    compare(&case, 1.0);
}

#[test]
fn window_behind_a_prefix_skips_keys_in_between() {
    let mut spec = plain(2, 1, 8);
    (spec.window, spec.prefix) = (Some(5), 3);
    compare(
        &Case {
            b: 2,
            s: 120,
            t: 130,
            spec,
            seed: 3,
        },
        1.0,
    );
}

#[test]
fn large_scores_do_not_overflow() {
    let mut spec = plain(2, 2, 8);
    spec.scale = 20.0;
    let make = |seed, device: &Device| {
        Tensor::normal(RngKey::new(seed), 0.0, 4.0, &[1, 33, 16], device).unwrap()
    };
    let run = |device: &Device| {
        make(1, device)
            .attention(&make(2, device), &make(3, device), &spec)
            .unwrap()
            .to_f64()
            .unwrap()
    };
    assert_all_close(
        "output",
        &run(&Device::cpu()),
        &run(&Device::reference()),
        2e-3,
    );
}

#[test]
fn a_cached_step_equals_the_last_row() {
    // What generation relies on: one query against all keys is the last row of the full product.
    let spec = plain(4, 2, 16);
    let make = |seed, width| {
        Tensor::normal(RngKey::new(seed), 0.0, 1.0, &[2, 50, width], &Device::cpu()).unwrap()
    };
    let (q, k, v) = (make(1, 64), make(2, 32), make(3, 32));
    let full = q
        .attention(&k, &v, &spec)
        .unwrap()
        .narrow(1, 49, 1)
        .unwrap();
    let step = q
        .narrow(1, 49, 1)
        .unwrap()
        .attention(&k, &v, &spec)
        .unwrap();
    assert_all_close(
        "step",
        &step.to_f64().unwrap(),
        &full.to_f64().unwrap(),
        2e-6,
    );
}

#[test]
fn products_in_bfloat16_are_near() {
    // Where the processor has them; elsewhere bfloat16 is computed in f32 and both are the same.
    let mut spec = plain(6, 2, 32);
    let segments = |t: usize| Arc::new((0..2 * t).map(|i| (i % t / 60) as u32).collect());
    for (s, t, window) in [(70, 70, None), (150, 150, Some(40)), (5, 90, None)] {
        spec.window = window;
        spec.mask.segments = (s == t).then(|| segments(t));
        let run = |precision| {
            let device = Device::cpu_in(precision);
            let make = |seed, rows, width| {
                Tensor::normal(RngKey::new(seed), 0.0, 1.0, &[2, rows, width], &device).unwrap()
            };
            let leaves = [make(1, s, 192), make(2, t, 64), make(3, t, 64)].map(|x| x.leaf());
            let [q, k, v] = &leaves;
            let out = q.attention(k, v, &spec).unwrap();
            let loss = out.mul(&make(4, s, 192)).unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            let mut all = vec![out.to_vec().unwrap()];
            all.extend(
                leaves
                    .iter()
                    .map(|x| grads.get(x).unwrap().to_vec().unwrap()),
            );
            all
        };
        let size =
            |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        let (exact, near) = (run(Precision::F32), run(Precision::Bf16));
        for ((name, exact), near) in ["out", "dq", "dk", "dv"].iter().zip(&exact).zip(&near) {
            let gap = size(&mut exact.iter().zip(near).map(|(a, b)| a - b));
            let gap = gap / size(&mut exact.iter().copied());
            // Half a step of 2^-8 relative for each value of both products, at random.
            assert!(gap < 1e-2, "{name} of {s} queries: {gap}");
        }
    }
}

#[test]
fn several_parts_of_keys() {
    // 64 queries of three heads that share keys are 192 rows: 320 keys at a time.
    let (s, t) = (520, 540);
    for (window, prefix, softcap, holes) in [
        (None, 0, None, 0),
        (Some(200), 7, None, 0),
        (Some(90), 330, Some(2.0), 1),
        (None, 0, None, 3),
    ] {
        let mut spec = plain(3, 1, 4);
        (spec.window, spec.prefix, spec.softcap) = (window, prefix, softcap);
        if holes > 0 {
            let key = RngKey::new(5);
            spec.mask.keys = Some(Arc::new(
                (0..t as u64).map(|i| key.below(i, 4) >= holes).collect(),
            ));
        }
        if window.is_none() {
            spec.mask.segments = Some(Arc::new((0..t).map(|i| (i / 400) as u32).collect()));
        }
        compare(
            &Case {
                b: 1,
                s,
                t,
                spec,
                seed: 11,
            },
            2.0,
        );
    }
}
