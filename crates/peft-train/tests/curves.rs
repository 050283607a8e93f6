//! Training against Hugging Face PEFT: from the same initial adapter, rows in the same order, the same loss at every
//! step and the same final adapter. The data is made by `cargo xtask goldens`.

use std::path::{Path, PathBuf};

use peft_io::read_adapter;
// Linked for its methods.
use peft_reparam as _;
use peft_train::{Observer, StepReport, TrainConfig, train};
use serde_json::{Value, json};

#[derive(Default)]
struct Curve(Vec<StepReport>);

impl Observer for Curve {
    fn step(&mut self, report: &StepReport) {
        self.0.push(report.clone());
    }
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

fn cases() -> Vec<PathBuf> {
    let folder = std::fs::read_dir(goldens().join("curves")).unwrap();
    let mut cases: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
    cases.sort();
    cases
}

fn config(case: &Path, out: &Path) -> (TrainConfig, Value) {
    let given = peft_io::read_json(&case.join("train.json")).unwrap();
    let mut train = serde_json::Map::new();
    for key in [
        "steps",
        "batch_size",
        "gradient_accumulation",
        "learning_rate",
        "weight_decay",
        "betas",
        "eps",
        "schedule",
        "warmup_steps",
        "max_grad_norm",
    ] {
        train.insert(key.to_owned(), given[key].clone());
    }
    // `get_scheduler("constant", ..)` knows no warm-up (`constant_with_warmup` does); ours has one unless told otherwise.
    if given["schedule"] == "constant" {
        train.insert("warmup_steps".to_owned(), json!(0));
    }
    let model = goldens()
        .join("models")
        .join(given["model"].as_str().unwrap());
    let value = json!({
        "model": {"path": model},
        "adapter": {"init_from": case.join("adapter_init")},
        "data": {"train": case.join("data.jsonl"), "shuffle": false},
        "train": train,
        "output": {"dir": out},
    });
    (TrainConfig::from_value(&value).unwrap(), given)
}

#[test]
fn losses_and_adapters_are_those_of_hf_peft() {
    let cases = cases();
    assert!(cases.len() >= 3, "{cases:?}");
    for case in cases {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let out = tempfile::tempdir().unwrap();
        let (config, given) = config(&case, &out.path().join("out"));
        let mut curve = Curve::default();
        train(&config, false, &mut curve).unwrap_or_else(|e| panic!("{name}: {e}"));
        let want = peft_io::read_json(&case.join("curve.json")).unwrap();
        let want = want.as_array().unwrap();
        assert_eq!(curve.0.len(), want.len(), "{name}");
        let mut worst = 0.0_f64;
        for (got, want) in curve.0.iter().zip(want) {
            let number = |key: &str| want[key].as_f64().unwrap();
            let off = |got: f64, want: f64| (got - want).abs() / want.abs().max(1e-9);
            let at = format!("{name} step {}", got.step);
            worst = worst.max(off(got.loss, number("loss")));
            assert!(
                off(got.loss, number("loss")) < 1e-3,
                "{at}: loss {} for {}",
                got.loss,
                number("loss")
            );
            assert!(
                (got.learning_rate - number("learning_rate")).abs() < 1e-12,
                "{at}: rate {}",
                got.learning_rate
            );
            assert!(
                off(got.grad_norm, number("grad_norm")) < 1e-2,
                "{at}: gradient {} for {}",
                got.grad_norm,
                number("grad_norm")
            );
        }
        let ours = read_adapter(&out.path().join("out")).unwrap();
        let theirs = read_adapter(&case.join("adapter_final")).unwrap();
        let start = read_adapter(&case.join("adapter_init")).unwrap();
        assert_eq!(
            ours.tensors.keys().collect::<Vec<_>>(),
            theirs.tensors.keys().collect::<Vec<_>>(),
            "{name}"
        );
        let (mut farthest, mut moved) = (0.0_f32, 0.0_f32);
        for (key, (shape, values)) in &theirs.tensors {
            assert_eq!(&ours.tensors[key].0, shape, "{name} {key}");
            for (i, want) in values.iter().enumerate() {
                farthest = farthest.max((ours.tensors[key].1[i] - want).abs());
                moved = moved.max((start.tensors[key].1[i] - want).abs());
            }
        }
        println!(
            "{name}: loss within {worst:.1e}, adapter within {farthest:.1e} after moving by {moved:.2}"
        );
        assert!(farthest < 1e-3, "{name}: {farthest}");
        assert!(moved > 0.01, "{name}: training moved by {moved}; {given}");
    }
}

/// With another order of rows the curve is another: the comparison above can fail.
#[test]
fn another_order_is_another_curve() {
    let case = goldens().join("curves/llama-qv");
    let out = tempfile::tempdir().unwrap();
    let (mut config, _) = config(&case, &out.path().join("out"));
    config.data.shuffle = true;
    config.train.steps = Some(3);
    let mut curve = Curve::default();
    train(&config, false, &mut curve).unwrap();
    let want = peft_io::read_json(&case.join("curve.json")).unwrap();
    let differs = |s: &StepReport| {
        (s.loss - want[s.step as usize - 1]["loss"].as_f64().unwrap()).abs() > 1e-3 * s.loss
    };
    assert!(curve.0.iter().any(differs), "{:?}", curve.0);
}
