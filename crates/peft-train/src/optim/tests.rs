//! AdamW, clipping and groups against PyTorch and by hand.

use peft_core::{Device, GroupRule, Param, ParamGroups};
use peft_tensor::Tensor;
use serde_json::Value;

use super::*;
use crate::config::{LrRule, TrainSection};

/// Ten steps of `torch.optim.AdamW` (2.15.0) on two parameters with decays and rates of their own, after
/// `clip_grad_norm_(.., 1.0)`: start, gradients and the values after each step, printed by `tolist()`.
const TORCH: &str = include_str!("../../testdata/adamw.json");

fn floats(value: &Value) -> Vec<f32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_f64().unwrap() as f32)
        .collect()
}

fn param(key: &str, values: &[f32]) -> Param {
    Param::new(
        key,
        &Tensor::from_vec(values.to_vec(), &[values.len()], &Device::cpu()).unwrap(),
        true,
    )
}

#[test]
fn ten_steps_are_those_of_torch() {
    let data: Value = serde_json::from_str(TORCH).unwrap();
    let number = |v: &Value| v.as_f64().unwrap();
    let betas = [number(&data["betas"][0]), number(&data["betas"][1])];
    let mut adamw = AdamW::new(betas, number(&data["eps"]));
    let groups = data["params"].as_array().unwrap();
    let params: Vec<Param> = groups
        .iter()
        .enumerate()
        .map(|(i, p)| param(&format!("p{i}"), &floats(&p["start"])))
        .collect();
    let mut clipped = 0;
    for (t, step) in data["steps"].as_array().unwrap().iter().enumerate() {
        let grads: Vec<_> = step["grads"]
            .as_array()
            .unwrap()
            .iter()
            .map(|g| Some(floats(g)))
            .collect();
        let norm = total_norm(&norms(&grads));
        assert!(
            (norm - number(&step["norm"])).abs() < 1e-6 * norm,
            "step {t}: {norm}"
        );
        let factor = clip_factor(norm, number(&data["max_norm"]));
        clipped += usize::from(factor < 1.0);
        for ((p, g), group) in params.iter().zip(&grads).zip(groups) {
            let rate = Rate {
                learning_rate: number(&group["lr"]),
                weight_decay: number(&group["weight_decay"]),
            };
            adamw.step(p, g.as_ref().unwrap(), factor, rate).unwrap();
        }
        for (p, want) in params.iter().zip(step["after"].as_array().unwrap()) {
            let got = p.tensor().to_vec().unwrap();
            for (got, want) in got.iter().zip(floats(want)) {
                // One step moves by about 1e-2; the last bit of a value near 1 is 6e-8, and torch fuses some products.
                assert!(
                    (got - want).abs() < 3e-7,
                    "step {t} {}: {got} for {want}",
                    p.key()
                );
            }
        }
    }
    assert!(
        (1..10).contains(&clipped),
        "both sides of the clipping limit are seen: {clipped}"
    );
}

#[test]
fn a_large_parameter_moves_as_its_parts_would() {
    let n = CHUNKS;
    let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
    let grad: Vec<f32> = (0..n).map(|i| (i as f32 * 0.11).cos()).collect();
    let rate = Rate {
        learning_rate: 0.01,
        weight_decay: 0.1,
    };
    let mut adamw = AdamW::new([0.9, 0.99], 1e-8);
    let whole = param("whole", &values);
    let tail = param("tail", &values[n - 5..]);
    for _ in 0..3 {
        adamw.step(&whole, &grad, 0.5, rate).unwrap();
        adamw.step(&tail, &grad[n - 5..], 0.5, rate).unwrap();
    }
    assert_eq!(
        whole.tensor().to_vec().unwrap()[n - 5..],
        tail.tensor().to_vec().unwrap()
    );
    assert!(adamw.step(&tail, &grad, 1.0, rate).is_err());
}

/// More than two of AdamW's chunks, and not a multiple.
const CHUNKS: usize = 2 * (1 << 14) + 7;

#[test]
fn state_survives_its_own_export() {
    let rate = Rate {
        learning_rate: 0.1,
        weight_decay: 0.0,
    };
    let p = param("a/b", &[1.0, -2.0, 3.0]);
    let mut one = AdamW::new([0.9, 0.999], 1e-8);
    one.step(&p, &[0.3, -0.2, 0.1], 1.0, rate).unwrap();
    let (mut tensors, steps) = one.export();
    let mut two = AdamW::new([0.9, 0.999], 1e-8);
    let damaged = two
        .restore(&mut peft_io::NamedTensors::new(), &steps)
        .unwrap_err()
        .to_string();
    assert!(damaged.contains("mean/a/b"), "{damaged}");
    two.restore(&mut tensors, &steps).unwrap();
    assert_eq!(one, two);
    assert!(tensors.is_empty());
}

#[test]
fn clipping_only_shortens() {
    assert_eq!(clip_factor(0.5, 1.0), 1.0);
    assert_eq!(clip_factor(100.0, 0.0), 1.0);
    assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
}

#[test]
fn later_rules_win_and_wrong_patterns_are_named() {
    let params = [
        param("m.layers.0.q.lora_A.weight", &[0.0]),
        param("m.layers.1.q.lora_B.weight", &[0.0]),
    ];
    let methods = ParamGroups {
        rules: vec![GroupRule {
            pattern: "lora_B".into(),
            learning_rate: 16.0,
            weight_decay: Some(0.0),
        }],
    };
    let rule = |pattern: &str| LrRule {
        pattern: pattern.into(),
        ..LrRule::default()
    };
    let mut train = TrainSection {
        learning_rate: 0.01,
        weight_decay: 0.1,
        ..TrainSection::default()
    };
    train.lr_multipliers = vec![
        LrRule {
            multiplier: Some(0.5),
            ..rule(r"layers\.0\.")
        },
        LrRule {
            learning_rate: Some(0.03),
            ..rule(r"layers\.1\.")
        },
    ];
    let mut groups = Groups::new(&train, &methods, &params).unwrap();
    let near = |got: Rate, rate: f64, decay: f64| {
        assert!(
            (got.learning_rate - rate).abs() < 1e-15 && got.weight_decay == decay,
            "{got:?}"
        );
    };
    near(groups.rate(params[0].key(), 0.01), 0.005, 0.1);
    // The user's rate, the method's decay; at half the schedule, half the rate.
    near(groups.rate(params[1].key(), 0.005), 0.015, 0.0);
    train.lr_multipliers = vec![LrRule {
        multiplier: Some(2.0),
        ..rule("lora_C")
    }];
    let error = Groups::new(&train, &methods, &params)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("lora_C") && error.contains("train.lr_multipliers[0]"),
        "{error}"
    );
    train.lr_multipliers = vec![LrRule {
        multiplier: Some(2.0),
        ..rule("(")
    }];
    assert!(Groups::new(&train, &methods, &params).is_err());
}
