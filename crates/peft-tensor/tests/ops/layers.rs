//! Softmax, norms, rope, cross-entropy.

use std::sync::Arc;

use peft_tensor::{Device, IGNORE, RngKey, Rope, Tensor};
use proptest::prelude::*;

use crate::check::{Input, TIGHT, Tolerance, assert_all_close, check, input};

/// Rows and columns: small ones of every size, and some that take several chunks.
fn sizes() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![4 => (1..9usize, 1..100usize), 1 => (60..90usize, 500..1500usize)]
}

fn rope_tables(heads: usize, head_dim: usize, half: usize, positions: Vec<u32>) -> Arc<Rope> {
    let rows = positions.iter().max().map_or(0, |p| *p as usize + 1);
    let angle = |i: usize| {
        ((i / half.max(1)) as f32)
            * 10_000f32.powf(-((i % half.max(1)) as f32) / half.max(1) as f32)
    };
    let table =
        |f: fn(f32) -> f32| Arc::new((0..rows * half).map(|i| f(angle(i))).collect::<Vec<_>>());
    Arc::new(Rope {
        heads,
        head_dim,
        half,
        cos: table(f32::cos),
        sin: table(f32::sin),
        positions: Arc::new(positions),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn softmax((rows, cols) in sizes(), seed in 0..1000u64, spread in 0.5f32..30.0) {
        check(&[input(seed, -spread, spread, &[rows, cols])], TIGHT, |x| x[0].softmax());
    }

    #[test]
    fn rms_norm((rows, cols) in sizes(), seed in 0..1000u64, size in 0.01f32..20.0) {
        let inputs = [input(seed, -size, size, &[rows, cols]), input(seed + 1, -2.0, 2.0, &[cols])];
        // Gradients grow with 1 / size, and with the number of rows for the weight.
        let backward = 2e-6 * (1.0 / f64::from(size)).max(1.0) * (rows as f64).sqrt().max(5.0);
        check(&inputs, Tolerance { forward: 3e-6, backward }, |x| x[0].rms_norm(&x[1], 1e-3));
    }

    #[test]
    fn layer_norm((rows, cols) in sizes(), seed in 0..1000u64, size in 0.1f32..10.0, shift in -3.0f32..3.0, bias in any::<bool>()) {
        let x = input(seed, shift - size, shift + size, &[rows, cols]);
        let inputs = [x, input(seed + 1, -2.0, 2.0, &[cols]), input(seed + 2, -2.0, 2.0, &[cols])];
        // x - mean loses what the shift has over the size.
        let lost = (1.0 + f64::from(shift.abs() / size)) * (1.0 / f64::from(size)).max(1.0);
        let tolerance = Tolerance { forward: 4e-6 * lost, backward: 4e-6 * lost * (rows as f64).sqrt().max(5.0) };
        check(&inputs[..2 + usize::from(bias)], tolerance, |x| x[0].layer_norm(&x[1], x.get(2), 1e-2));
    }

    #[test]
    fn rope(b in 1..3usize, s in 1..9usize, heads in 1..4usize, half in 1..6usize, extra in 0..4usize, seed in 0..1000u64) {
        let positions = (0..b * s).map(|i| RngKey::new(seed).below(i as u64, 40) as u32).collect();
        let head_dim = 2 * half + extra;
        let tables = rope_tables(heads, head_dim, half, positions);
        check(&[input(seed, -2.0, 2.0, &[b, s, heads * head_dim])], TIGHT, |x| x[0].rope(&tables));
    }

    #[test]
    fn cross_entropy((rows, cols) in sizes(), seed in 0..1000u64, spread in 0.5f32..20.0) {
        let target = |i: usize| match RngKey::new(seed).below(i as u64, 4) {
            0 => IGNORE,
            _ => RngKey::new(seed + 1).below(i as u64, cols as u64) as i64,
        };
        let targets: Vec<i64> = (0..rows).map(target).collect();
        check(&[input(seed, -spread, spread, &[rows, cols])], TIGHT, |x| x[0].cross_entropy(&targets));
    }
}

#[test]
fn cross_entropy_of_extremes() {
    let x = Tensor::from_vec(
        vec![1e4, -1e4, 0.0, -1e4, -1e4, 1e4],
        &[2, 3],
        &Device::cpu(),
    )
    .unwrap()
    .leaf();
    let loss = x.cross_entropy(&[0, 0]).unwrap();
    assert_eq!(loss.item().unwrap(), 2e4);
    let grads = loss.backward().unwrap();
    assert_eq!(
        grads.get(&x).unwrap().to_vec().unwrap(),
        [0.0, 0.0, 0.0, -1.0, 0.0, 1.0]
    );
    assert_eq!(x.cross_entropy(&[IGNORE, -1]).unwrap().item().unwrap(), 0.0);
}

#[test]
fn layer_norm_of_a_far_away_row() {
    // One-pass variance would be all cancellation here.
    let values: Vec<f64> = (0..256).map(|i| 4096.0 + f64::from(i % 7)).collect();
    let x = Input {
        values,
        shape: vec![1, 256],
    };
    let run = |device: &Device| {
        let x = Tensor::from_f64(x.values.clone(), &x.shape, device).unwrap();
        let w = Tensor::full(1.0, &[256], device).unwrap();
        x.layer_norm(&w, None, 1e-5).unwrap().to_f64().unwrap()
    };
    assert_all_close(
        "layer_norm",
        &run(&Device::cpu()),
        &run(&Device::reference()),
        1e-3,
    );
}

#[test]
fn rope_turns_back() {
    let tables = rope_tables(3, 10, 4, (0..50).collect());
    let x = Tensor::normal(RngKey::new(1), 0.0, 1.0, &[50, 30], &Device::cpu())
        .unwrap()
        .leaf();
    let y = x.rope(&tables).unwrap();
    // The gradient of half the squared length is y turned back, which is x.
    let grads = y
        .square()
        .unwrap()
        .sum_all()
        .unwrap()
        .scale(0.5)
        .unwrap()
        .backward()
        .unwrap();
    assert_all_close(
        "turned back",
        &grads.get(&x).unwrap().to_f64().unwrap(),
        &x.to_f64().unwrap(),
        1e-6,
    );
    assert_ne!(y.to_vec().unwrap(), x.to_vec().unwrap());
}
