//! A run on the graphics card against the same run on the processor.
#![cfg(feature = "wgpu")]

use peft::train::{Observer, StepReport, TrainConfig, train};
use serde_json::json;

/// Keeps the losses.
#[derive(Default)]
struct Losses(Vec<f64>);

impl Observer for Losses {
    fn step(&mut self, report: &StepReport) {
        self.0.push(report.loss);
    }
}

fn present() -> bool {
    match peft::tensor::Device::by_name("wgpu") {
        Ok(_) => true,
        Err(why) => {
            let required = std::env::var("PEFT_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(
                !required,
                "PEFT_REQUIRE_GPU=1, and wgpu does not open: {why}"
            );
            eprintln!("NOTHING IS TESTED ON wgpu: {why}");
            false
        }
    }
}

fn run(
    device: &str,
    precision: &str,
    steps: u64,
    folder: &std::path::Path,
) -> (Vec<f64>, f64, Vec<f32>) {
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/quickstart");
    let config = json!({
        "device": device,
        "precision": precision,
        "model": {"path": format!("{base}/base")},
        "adapter": {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"},
        "data": {"train": format!("{base}/train.jsonl"), "max_length": 64, "eval_split": 16},
        "train": {"steps": steps, "batch_size": 4, "learning_rate": 2e-3, "seed": 1},
        "output": {"dir": folder.join(device).join(precision)},
    });
    let config = TrainConfig::from_value(&config).unwrap();
    let mut losses = Losses::default();
    let summary = train(&config, false, &mut losses).unwrap();
    let eval = summary
        .eval_after
        .as_ref()
        .map_or(f64::NAN, |report| report.loss);
    let adapter = peft::io::read_adapter(&folder.join(device).join(precision)).unwrap();
    let values = adapter.tensors.into_values().flat_map(|(_, values)| values);
    (losses.0, eval, values.collect())
}

/// The largest relative difference.
fn apart(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let each = a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs());
    each.fold(0.0, f64::max)
}

#[test]
fn twenty_steps_are_those_of_the_processor() {
    if !present() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (want, want_eval, want_adapter) = run("cpu", "f32", 20, folder.path());
    let (got, got_eval, got_adapter) = run("wgpu", "f32", 20, folder.path());
    assert_eq!(want.len(), 20);
    assert!(want[19] < want[0], "nothing was learned: {want:?}");
    // Orders of sums differ; twenty steps of AdamW, which divides by the size of gradients, make the most of it.
    let loss = apart(&got, &want);
    assert!(
        loss < 1e-3,
        "losses differ by {loss:e}: {got:?} and {want:?}"
    );
    assert!((got_eval - want_eval).abs() < 1e-3 * want_eval);
    assert_eq!(got_adapter.len(), want_adapter.len());
    let (mut gap, mut size) = (0f64, 0f64);
    for (g, w) in got_adapter.iter().zip(&want_adapter) {
        gap += f64::from(g - w).powi(2);
        size += f64::from(*w).powi(2);
    }
    let adapter = (gap / size).sqrt();
    assert!(
        adapter < 1e-2,
        "the adapters differ by {adapter:e} of their size"
    );
    eprintln!("losses within {loss:.1e}, adapters within {adapter:.1e}");
}

#[test]
fn activations_in_bfloat16_learn_the_same() {
    if !present() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (want, ..) = run("cpu", "bf16", 6, folder.path());
    let (got, ..) = run("wgpu", "bf16", 6, folder.path());
    // Base and kept activations have 8 bits: one rounding the other way is 2e-3 of a value.
    let loss = apart(&got, &want);
    assert!(
        loss < 1e-2,
        "losses differ by {loss:e}: {got:?} and {want:?}"
    );
}
