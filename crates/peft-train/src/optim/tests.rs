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
    let mut adamw = AdamW::new(betas, number(&data["eps"]), false);
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
    let mut adamw = AdamW::new([0.9, 0.99], 1e-8, false);
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

/// The middle of a parameter's run, saved and gone on with, is as if nothing had happened; in memory and in a file, from
/// each to each, for moments of both forms.
#[test]
fn state_survives_a_checkpoint_wherever_it_is() {
    let rate = Rate {
        learning_rate: 0.1,
        weight_decay: 0.01,
    };
    let n = CHUNKS;
    let gradient = |t: usize| -> Vec<f32> {
        (0..n)
            .map(|i| ((i * (t + 3)) as f32 * 0.11).cos())
            .collect()
    };
    for eight_bit in [false, true] {
        let open = |paged: bool| {
            let mut adamw = AdamW::new([0.9, 0.999], 1e-8, eight_bit);
            let folder = tempfile::tempdir().unwrap();
            if paged {
                adamw.page_to(peft_io::Scratch::create(folder.path()).unwrap());
            }
            adamw
        };
        let start: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        let mut ends = Vec::new();
        for (first, second) in [(false, false), (false, true), (true, false), (true, true)] {
            let (big, small) = (param("a/b", &start), param("c", &start[..5]));
            let mut adamw = open(first);
            let both = |adamw: &mut AdamW, t: usize| {
                let g = gradient(t);
                adamw.step(&big, &g, 1.0, rate).unwrap();
                adamw.step(&small, &g[..5], 1.0, rate).unwrap();
            };
            both(&mut adamw, 0);
            both(&mut adamw, 1);
            let folder = tempfile::tempdir().unwrap();
            let plan = adamw.plan();
            let mut writer = peft_io::StateWriter::create(folder.path(), "s", &plan).unwrap();
            for entry in &plan {
                adamw
                    .write(&entry.name, &mut |bytes| {
                        writer.write(bytes).map_err(crate::io)
                    })
                    .unwrap();
            }
            writer.finish(&Value::Null).unwrap();
            let (saved, _) = peft_io::open_state(folder.path(), "s").unwrap();
            let numel = |key: &str| match key {
                "a/b" => Some(n),
                "c" => Some(5),
                _ => None,
            };
            let mut again = open(second);
            again.restore(&saved, &adamw.steps(), numel).unwrap();
            assert_eq!(again.plan(), plan);
            both(&mut again, 2);
            ends.push((
                big.tensor().to_vec().unwrap(),
                small.tensor().to_vec().unwrap(),
            ));
            let wrong = again
                .restore(&saved, &adamw.steps(), |_| Some(7))
                .unwrap_err();
            assert!(wrong.to_string().contains("a/b"), "{wrong}");
            let unknown = again.restore(&saved, &adamw.steps(), |_| None).unwrap_err();
            assert!(unknown.to_string().contains("a/b"), "{unknown}");
        }
        let mut whole = open(false);
        let (big, small) = (param("a/b", &start), param("c", &start[..5]));
        for t in 0..3 {
            let g = gradient(t);
            whole.step(&big, &g, 1.0, rate).unwrap();
            whole.step(&small, &g[..5], 1.0, rate).unwrap();
        }
        let want = (
            big.tensor().to_vec().unwrap(),
            small.tensor().to_vec().unwrap(),
        );
        assert!(ends.iter().all(|end| *end == want), "8 bits: {eight_bit}");
    }
}

/// Five steps of `bitsandbytes.optim.AdamW8bit` (0.50.2, CPU, with its reference quantiser `_quantize_blockwise_pytorch`:
/// the native one of the CPU does not go to the nearest entry near 0) on 4196 values: sin(0.37 i) at the start, gradients
/// sin(0.11 i + 1.7 t) 10^(i mod 7 - 3), lr 0.01, betas (0.9, 0.99), eps 1e-8, decay 0.1. Every 131st value and code, the
/// scales of the last block, and every 15th entry of both code tables.
const BITSANDBYTES: &str = include_str!("../../testdata/adamw_8bit.json");

#[test]
fn eight_bits_are_those_of_bitsandbytes() {
    let data: Value = serde_json::from_str(BITSANDBYTES).unwrap();
    for (name, table) in [("signed", &blocks::SIGNED), ("unsigned", &blocks::UNSIGNED)] {
        for (i, want) in floats(&data[name]).into_iter().enumerate() {
            let got = table.value(15 * i as u8);
            // The tables are made in f32 there and in f64 here.
            assert!(
                (got - want).abs() <= 3e-7 * want.abs(),
                "{name} {i}: {got} for {want}"
            );
        }
    }
    const N: usize = 4196;
    let start: Vec<f32> = (0..N).map(|i| (0.37 * i as f64).sin() as f32).collect();
    let p = param("p", &start);
    let mut adamw = AdamW::new([0.9, 0.99], 1e-8, true);
    let rate = Rate {
        learning_rate: 0.01,
        weight_decay: 0.1,
    };
    for (t, step) in data["steps"].as_array().unwrap().iter().enumerate() {
        let grad: Vec<f32> = (0..N)
            .map(|i| {
                let wave = (0.11 * i as f64 + 1.7 * t as f64).sin();
                (wave * 10f64.powi(i as i32 % 7 - 3)) as f32
            })
            .collect();
        adamw.step(&p, &grad, 1.0, rate).unwrap();
        let got = p.tensor().to_vec().unwrap();
        for (i, want) in floats(&step["after"]).into_iter().enumerate() {
            // Values near 1 have a last bit of 6e-8, and five steps are up to five of them apart.
            assert!(
                (got[131 * i] - want).abs() < 5e-7,
                "step {t} value {}: {} for {want}",
                131 * i,
                got[131 * i]
            );
        }
        let piece = |name: &str| {
            let mut all = Vec::new();
            let mut sink = |bytes: &[u8]| {
                all.extend_from_slice(bytes);
                Ok(())
            };
            adamw.write(&format!("{name}/p"), &mut sink).unwrap();
            all
        };
        for name in ["mean", "square"] {
            let codes = piece(&format!("{name}.codes"));
            let want = step[name].as_array().unwrap();
            let got: Vec<u64> = codes.iter().step_by(131).map(|&c| u64::from(c)).collect();
            let want: Vec<u64> = want.iter().map(|v| v.as_u64().unwrap()).collect();
            assert_eq!(got, want, "step {t} {name}");
            let scales = piece(&format!("{name}.scales"));
            let last = f32::from_le_bytes(*scales.last_chunk().unwrap());
            let want = step[format!("{name}_scale")].as_f64().unwrap() as f32;
            assert!(
                (last - want).abs() < 1e-6 * want,
                "step {t} {name}: {last} for {want}"
            );
        }
    }
}

#[test]
fn eight_bits_are_for_large_parameters() {
    assert_eq!(AdamW::bytes(4095, true), 8 * 4095);
    // Two bytes a value and two f32 for each of 17 blocks.
    assert_eq!(AdamW::bytes(4097, true), 2 * 4097 + 17 * 8);
    assert_eq!(AdamW::bytes(4097, false), 8 * 4097);
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
