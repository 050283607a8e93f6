//! Base logits of every architecture against `transformers`, from the committed goldens: full rows, rows padded on
//! the right and rows padded on the left.

use std::path::{Path, PathBuf};

use peft_core::Pass;
use peft_core::serde_json::Value;
use peft_io::Checkpoint;
use peft_models::{Batch, LoadOptions, Model};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models")
}

fn batch(input: &Value) -> Batch {
    let rows = |field: &str| input[field].as_array().cloned();
    let ids = rows("input_ids").expect("input_ids");
    let cells = |rows: Vec<Value>| -> Vec<u32> {
        rows.iter()
            .flat_map(|r| r.as_array().unwrap())
            .map(|v| v.as_u64().unwrap() as u32)
            .collect()
    };
    let (batch, seq) = (ids.len(), ids[0].as_array().unwrap().len());
    let mask = rows("attention_mask").map(|m| cells(m).into_iter().map(|v| v == 1).collect());
    Batch {
        ids: cells(ids),
        batch,
        seq,
        mask,
        task_ids: None,
        segments: None,
        shared: 0,
    }
}

/// Largest difference over positions that are not padding.
fn difference(got: &[f32], want: &[f32], batch: &Batch) -> f32 {
    assert_eq!(got.len(), want.len());
    let per_position = got.len().is_multiple_of(batch.ids.len()) && got.len() / batch.ids.len() > 1;
    let width = got.len()
        / if per_position {
            batch.ids.len()
        } else {
            batch.batch
        };
    let counts = |i: usize| !per_position || batch.mask.as_ref().is_none_or(|m| m[i]);
    got.chunks(width)
        .zip(want.chunks(width))
        .enumerate()
        .filter(|(i, _)| counts(*i))
        .flat_map(|(_, (g, w))| {
            g.iter().zip(w).map(|(g, w)| {
                if g.is_nan() {
                    f32::INFINITY
                } else {
                    (g - w).abs()
                }
            })
        })
        .fold(0.0, f32::max)
}

#[test]
fn base_logits_are_those_of_transformers() {
    let mut seen = Vec::new();
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(goldens()).expect("goldens") {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let model =
            Model::load(&folder, &LoadOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        let inputs = peft_io::read_json(&folder.join("inputs.json")).unwrap();
        let expected = Checkpoint::open(&folder.join("expected.safetensors")).unwrap();
        for (case, input) in inputs.as_object().unwrap() {
            let batch = batch(input);
            let key = expected
                .names()
                .find(|n| n.starts_with(&format!("{case}.")))
                .expect("expected values");
            let (shape, want) = expected.f32(key).unwrap();
            let got = model
                .logits(&batch, &Pass::eval())
                .unwrap_or_else(|e| panic!("{name} {case}: {e}"));
            assert_eq!(got.shape(), shape, "{name} {case}");
            let worst = difference(&got.to_vec().unwrap(), &want, &batch);
            if worst > 1e-4 {
                wrong.push(format!("{name} {case}: {worst}"));
            }
        }
        seen.push(name);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen.len() >= 15, "only {seen:?}");
}
