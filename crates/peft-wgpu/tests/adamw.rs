//! AdamW on the device against the same steps in double precision, over segments of every kind; and what it must not do:
//! wait, write over values that somebody holds, or move anything along a gradient that is not finite.

mod common;

use common::{open, random};
use peft_tensor::{AdamWMove, AdamWRule, Device, DeviceAdamW, RngKey, Tensor};
use peft_wgpu::Options;

const BETAS: [f64; 2] = [0.9, 0.99];
const EPS: f64 = 1e-6;

fn rule(max_norm: f32) -> AdamWRule {
    AdamWRule {
        towards: (1.0 - BETAS[0]) as f32,
        keep: BETAS[1] as f32,
        add: (1.0 - BETAS[1]) as f32,
        eps: EPS as f32,
        max_norm,
    }
}

/// A parameter in double precision.
struct Want {
    value: Vec<f64>,
    mean: Vec<f64>,
    square: Vec<f64>,
    steps: i32,
    rate: f64,
    decay: f64,
}

impl Want {
    fn step(&mut self, grad: &[f32], factor: f64) {
        self.steps += 1;
        let [b1, b2] = BETAS;
        let root = (1.0 - b2.powi(self.steps)).sqrt();
        let size = self.rate / (1.0 - b1.powi(self.steps));
        for (i, &g) in grad.iter().enumerate() {
            let g = f64::from(g) * factor;
            self.mean[i] = b1 * self.mean[i] + (1.0 - b1) * g;
            self.square[i] = b2 * self.square[i] + (1.0 - b2) * g * g;
            self.value[i] *= 1.0 - self.rate * self.decay;
            self.value[i] -= size * self.mean[i] / (self.square[i].sqrt() / root + EPS);
        }
    }

    fn next(&self) -> [f32; 3] {
        let [b1, b2] = BETAS;
        let t = self.steps + 1;
        [
            (1.0 - self.rate * self.decay) as f32,
            (self.rate / (1.0 - b1.powi(t))) as f32,
            (1.0 - b2.powi(t)).sqrt() as f32,
        ]
    }
}

fn gradient(seed: u64, step: usize, n: usize) -> Vec<f32> {
    let mut values = vec![0.0; n];
    let size = [1e-4, 1.0, 0.05][step % 3];
    RngKey::new(seed)
        .fork_n(step as u64)
        .fill_uniform(-size, size, &mut values);
    values
}

/// Twelve steps over parameters of these sizes; some of them have no gradient in some steps.
fn follows(device: &Device, sizes: &[usize]) {
    let mut state = DeviceAdamW::new(device, sizes).unwrap().unwrap();
    let mut values: Vec<Tensor> = (0..sizes.len())
        .map(|i| random(i as u64, &[sizes[i]], device))
        .collect();
    let mut want: Vec<Want> = values
        .iter()
        .enumerate()
        .map(|(i, v)| Want {
            value: v.to_f64().unwrap(),
            mean: vec![0.0; sizes[i]],
            square: vec![0.0; sizes[i]],
            steps: 0,
            rate: [0.01, 0.002, 0.03][i % 3],
            decay: [0.1, 0.0][i % 2],
        })
        .collect();
    let first = values.clone();
    let before: Vec<Vec<f32>> = first.iter().map(|v| v.to_vec().unwrap()).collect();
    let (mut clipped, mut free) = (0, 0);
    for step in 0..12 {
        let grads: Vec<Option<Vec<f32>>> = sizes
            .iter()
            .enumerate()
            .map(|(i, &n)| (step == 0 || (i + step) % 4 != 0).then(|| gradient(i as u64, step, n)))
            .collect();
        let all = grads.iter().flatten().flatten();
        let norm = all.map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let factor = (0.5 / (norm + 1e-6)).min(1.0);
        if factor < 1.0 {
            clipped += 1;
        } else {
            free += 1;
        }
        // A method may put another value in place of a parameter's.
        if step == 5 {
            values[0] = values[0].affine(0.5, 0.25).unwrap();
            want[0].value.iter_mut().for_each(|v| *v = *v * 0.5 + 0.25);
        }
        let tensors: Vec<Option<Tensor>> = grads
            .iter()
            .map(|g| {
                g.as_ref()
                    .map(|g| Tensor::from_vec(g.clone(), &[g.len()], device).unwrap())
            })
            .collect();
        let moves: Vec<AdamWMove<&Tensor>> = (0..sizes.len())
            // A parameter that is frozen for a while is not in the step at all.
            .filter(|&i| !(step == 7 && i == 1))
            .map(|i| {
                let [decay, size, root] = want[i].next();
                AdamWMove {
                    slot: i,
                    value: &values[i],
                    grad: tensors[i].as_ref(),
                    decay,
                    size,
                    root,
                }
            })
            .collect();
        let there: Vec<usize> = moves.iter().map(|m| m.slot).collect();
        let waits = device.backend().waits().unwrap();
        let moved = state.step(&moves, &rule(0.5), true).unwrap();
        device.backend().hand_over().unwrap();
        assert_eq!(
            device.backend().waits().unwrap(),
            waits,
            "a step waits for nothing"
        );
        let facts = moved.facts.to_vec().unwrap();
        let skipped: f64 = match there.contains(&1) {
            true => 0.0,
            false => grads[1]
                .iter()
                .flatten()
                .map(|&g| f64::from(g).powi(2))
                .sum(),
        };
        let norm = (norm * norm - skipped).sqrt();
        let factor = if skipped > 0.0 {
            (0.5 / (norm + 1e-6)).min(1.0)
        } else {
            factor
        };
        assert!(
            (f64::from(facts[0]) - norm).abs() < 1e-5 * norm,
            "{facts:?} for {norm}"
        );
        assert!(
            (f64::from(facts[1]) - factor).abs() < 1e-5,
            "{facts:?} for {factor}"
        );
        assert_eq!(facts[2], 0.0);
        for (at, &i) in there.iter().enumerate() {
            if let Some(grad) = &grads[i] {
                want[i].step(grad, factor);
                let used = moved.used[at].as_ref().unwrap().to_vec().unwrap();
                for (u, g) in used.iter().zip(grad) {
                    assert!((f64::from(*u) - f64::from(*g) * factor).abs() < 1e-6);
                }
            } else {
                assert!(moved.used[at].is_none());
            }
            if let Some(value) = &moved.values[at] {
                values[i] = value.clone();
            }
        }
    }
    assert!(
        clipped > 2 && free > 2,
        "both sides of the limit: {clipped} {free}"
    );
    for (i, want) in want.iter().enumerate() {
        let got = values[i].to_vec().unwrap();
        for (at, (g, w)) in got.iter().zip(&want.value).enumerate() {
            // Steps of up to 0.03 in f32, a dozen of them.
            assert!(
                (f64::from(*g) - w).abs() < 3e-6,
                "parameter {i}[{at}]: {g} for {w}"
            );
        }
    }
    for (i, [mean, square]) in state.moments().unwrap().iter().enumerate() {
        for (got, want) in [(mean, &want[i].mean), (square, &want[i].square)] {
            for (g, w) in got.iter().zip(want) {
                assert!(
                    (f64::from(*g) - w).abs() < 1e-6,
                    "moment of {i}: {g} for {w}"
                );
            }
        }
    }
    for (held, before) in first.iter().zip(&before) {
        assert_eq!(
            &held.to_vec().unwrap(),
            before,
            "values that somebody holds"
        );
    }
}

#[test]
fn many_small_parameters_and_a_large_one() {
    let Some(device) = open(&Options::default()) else {
        return;
    };
    // One is a segment of its own, between two segments of several.
    follows(
        &device,
        &[5, 64, 1, 130, 63, 4097, 20, 1_050_000, 9, 700, 65, 3, 2, 8],
    );
}

#[test]
fn segments_follow_the_binding_limit() {
    let options = Options {
        max_binding: Some(2048),
        ..Options::default()
    };
    let Some(device) = open(&options) else { return };
    follows(&device, &[5, 64, 300, 130, 63, 1000, 20, 1500, 9, 40]);
}

#[test]
fn a_gradient_that_is_not_finite_is_found_and_moves_nothing() {
    let Some(device) = open(&Options::default()) else {
        return;
    };
    let sizes = [70, 10, 200];
    for (bad, value) in [(1, f32::NAN), (2, f32::INFINITY), (0, f32::NEG_INFINITY)] {
        let mut state = DeviceAdamW::new(&device, &sizes).unwrap().unwrap();
        let values: Vec<Tensor> = sizes
            .iter()
            .map(|&n| random(n as u64, &[n], &device))
            .collect();
        let grads: Vec<Tensor> = (0..3)
            .map(|i| {
                let mut grad = gradient(i, 1, sizes[i as usize]);
                if i == bad {
                    grad[7] = value;
                }
                Tensor::from_vec(grad, &[sizes[i as usize]], &device).unwrap()
            })
            .collect();
        let moves: Vec<AdamWMove<&Tensor>> = (0..3)
            .map(|i| AdamWMove {
                slot: i,
                value: &values[i],
                grad: Some(&grads[i]),
                decay: 0.9,
                size: 0.1,
                root: 0.1,
            })
            .collect();
        let moved = state.step(&moves, &rule(1.0), false).unwrap();
        assert!(moved.used.is_empty());
        assert_eq!(moved.facts.to_vec().unwrap()[2], bad as f32 + 1.0);
        for (new, old) in moved.values.iter().zip(&values) {
            assert_eq!(
                new.as_ref().unwrap().to_vec().unwrap(),
                old.to_vec().unwrap()
            );
        }
        let moments = state.moments().unwrap();
        assert!(moments.iter().flatten().flatten().all(|&m| m == 0.0));
    }
}

#[test]
fn moments_go_in_and_come_out() {
    let Some(device) = open(&Options::default()) else {
        return;
    };
    let mut state = DeviceAdamW::new(&device, &[3, 100]).unwrap().unwrap();
    let (mean, square) = (gradient(1, 1, 100), gradient(2, 1, 100));
    state.load(1, [&mean, &square]).unwrap();
    let moments = state.moments().unwrap();
    assert_eq!(moments[1], [mean.clone(), square]);
    assert_eq!(moments[0], [vec![0.0; 3], vec![0.0; 3]]);
    assert!(state.load(0, [&mean, &mean]).is_err() && state.load(2, [&mean, &mean]).is_err());
    assert!(DeviceAdamW::new(&Device::cpu(), &[3]).unwrap().is_none());
    // Both say so when asked.
    assert!(device.backend().has_adamw() && !Device::cpu().backend().has_adamw());
}
