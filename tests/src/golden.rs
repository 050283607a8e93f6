//! The goldens on disk: models, adapters and outputs that Hugging Face's libraries wrote (`xtask/python/goldens.py`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use peft::core::{Device, Pass, Tensor, entry_for};
use peft::io::{NamedTensors, read_json, read_tensors};
use peft::models::{Batch, LoadOptions, Model};
use peft::ops::{LogitsInput, OpenedAdapter, open};

use crate::compare::Check;
use crate::subject::told;

/// The folder they are in.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

/// Runs a check on every folder of a kind (`models`, `cases`, `curves`); `GOLDEN=part-of-a-name` picks some.
///
/// # Panics
/// If one fails, with all that failed; if one is of a method that is not registered; if there are none.
pub fn every(kind: &str, check: impl Fn(&str, &Path) -> Check) {
    let picked = std::env::var("GOLDEN").unwrap_or_default();
    let folder = root().join(kind);
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| n.contains(&picked))
        .collect();
    names.sort();
    assert!(!names.is_empty(), "no {kind} with {picked:?} in the name");
    let (known, unknown): (Vec<&String>, Vec<_>) = names
        .iter()
        .partition(|name| peft_type(&folder.join(name)).is_none_or(|t| registered(&t)));
    let failed: Vec<String> = known
        .iter()
        .filter_map(|name| {
            check(name, &folder.join(name))
                .err()
                .map(|e| format!("{name}: {e}"))
        })
        .collect();
    let missing: BTreeSet<String> = unknown
        .iter()
        .filter_map(|name| peft_type(&folder.join(name)))
        .collect();
    assert!(
        failed.is_empty() && missing.is_empty(),
        "{} of {} {kind}; goldens of methods that are not registered: {missing:?}\n{}",
        failed.len(),
        names.len(),
        failed.join("\n")
    );
}

/// The `peft_type` a golden is about; None where it is about none.
fn peft_type(folder: &Path) -> Option<String> {
    let config = |file: &str| read_json(&folder.join(file)).ok();
    let found = config("adapter/adapter_config.json")
        .or_else(|| config("adapter_init/adapter_config.json"))
        .or_else(|| config("train.json").map(|c| c["adapter_fields"].clone()))
        .or_else(|| config("case.json").map(|c| c["config"].clone()))?;
    Some(found["peft_type"].as_str()?.to_owned())
}

fn registered(peft_type: &str) -> bool {
    entry_for(&serde_json::json!({"peft_type": peft_type})).is_ok()
}

/// A JSON file.
///
/// # Errors
/// If it cannot be read.
pub fn json(path: &Path) -> Result<Value, String> {
    told("JSON", read_json(path))
}

/// A safetensors file.
///
/// # Errors
/// If it cannot be read.
pub fn tensors(path: &Path) -> Result<NamedTensors, String> {
    told("tensors", read_tensors(path))
}

/// One adapter case: what Hugging Face made of an adapter on a model.
pub struct Case {
    /// The model's folder.
    pub model: PathBuf,
    /// The adapter's folder.
    pub adapter: PathBuf,
    /// `case.json`
    pub facts: Value,
    /// Outputs as `base_logits`, `adapted_logits`, `merged_logits`, or the same of `last_hidden_state`.
    pub expected: NamedTensors,
    /// The input.
    pub batch: Batch,
}

impl Case {
    /// Reads a case's folder.
    ///
    /// # Errors
    /// If something of it is missing.
    pub fn read(folder: &Path) -> Result<Self, String> {
        let facts = json(&folder.join("case.json"))?;
        let name = facts["model"].as_str().ok_or("case.json names no model")?;
        Ok(Self {
            model: root().join("models").join(name),
            adapter: folder.join("adapter"),
            expected: tensors(&folder.join("expected.safetensors"))?,
            batch: batch(&facts)?,
            facts,
        })
    }

    /// The model with the adapter on it, as the command opens it.
    ///
    /// # Errors
    /// If it does not load.
    pub fn open(&self) -> Result<(Model, OpenedAdapter), String> {
        let adapter = self.adapter.display().to_string();
        let (model, mut opened) = told(
            "open",
            open(
                &self.model.display().to_string(),
                &[adapter],
                &LoadOptions::default(),
            ),
        )?;
        Ok((model, opened.pop().ok_or("no adapter was opened")?))
    }

    /// What Hugging Face's model gave: `base`, `adapted` or `merged`.
    ///
    /// # Errors
    /// If there is no such output.
    pub fn expected(&self, which: &str) -> Result<Tensor, String> {
        expected(&self.expected, &self.name(which))
    }

    /// Whether Hugging Face's model gave that output.
    pub fn has(&self, which: &str) -> bool {
        self.expected.contains_key(&self.name(which))
    }

    fn name(&self, which: &str) -> String {
        format!(
            "{which}_{}",
            self.facts["output"].as_str().unwrap_or("logits")
        )
    }

    /// Whether both agree to `tolerance` where the case says to compare.
    ///
    /// # Errors
    /// Says by how much they do not.
    pub fn close(&self, what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Check {
        close(what, &self.batch, got, want, tolerance)
    }
}

/// A tensor by name.
///
/// # Errors
/// If there is none.
pub fn expected(all: &NamedTensors, name: &str) -> Result<Tensor, String> {
    let (shape, values) = all
        .get(name)
        .ok_or_else(|| format!("no {name} among the expected tensors"))?;
    told(
        name,
        Tensor::from_vec(values.clone(), shape, &Device::cpu()),
    )
}

/// `input_ids`, `attention_mask` and `task_ids` of a JSON object, its other keys left alone.
///
/// # Errors
/// If they are no batch.
pub fn batch(facts: &Value) -> Result<Batch, String> {
    let mut input = serde_json::Map::new();
    for key in ["input_ids", "attention_mask", "task_ids"] {
        if let Some(value) = facts.get(key) {
            input.insert(key.to_owned(), value.clone());
        }
    }
    told("input", LogitsInput::parse(&Value::Object(input))).map(|i| i.batch)
}

/// A model's output.
///
/// # Errors
/// Whatever the model says.
pub fn logits(model: &Model, batch: &Batch) -> Result<Tensor, String> {
    told(
        "logits",
        peft::tensor::no_grad(|| model.logits(batch, &Pass::eval())),
    )
}

/// Largest absolute difference at virtual tokens and unpadded positions (`[batch, positions, width]`), or of all values
/// of a classifier (`[batch, labels]`), against `tolerance`.
///
/// # Errors
/// Says by how much they differ, and where.
pub fn close(what: &str, batch: &Batch, got: &Tensor, want: &Tensor, tolerance: f64) -> Check {
    if got.shape() != want.shape() {
        return Err(format!(
            "{what}: shape {:?}, not {:?}",
            got.shape(),
            want.shape()
        ));
    }
    let (got_values, want_values) = (told(what, got.to_vec())?, told(what, want.to_vec())?);
    let width = got.last_dim();
    let positions = if got.rank() == 3 { got.shape()[1] } else { 1 };
    let ahead = positions.saturating_sub(batch.seq);
    let counts = |cell: usize| {
        let (row, position) = (cell / positions, cell % positions);
        match &batch.mask {
            Some(mask) if got.rank() == 3 && position >= ahead => {
                mask[row * batch.seq + position - ahead]
            }
            _ => true,
        }
    };
    let mut worst = (0f64, 0);
    for (i, (g, w)) in got_values.iter().zip(&want_values).enumerate() {
        if !counts(i / width) {
            continue;
        }
        if !g.is_finite() {
            return Err(format!(
                "{what}: {g} at row {}, position {}",
                i / width / positions,
                i / width % positions
            ));
        }
        let gap = f64::from((g - w).abs());
        if gap > worst.0 {
            worst = (gap, i);
        }
    }
    let (gap, i) = worst;
    if gap <= tolerance {
        return Ok(());
    }
    let (row, position) = (i / width / positions, i / width % positions);
    Err(format!(
        "{what}: off by {gap:e} at row {row}, position {position}; allowed is {tolerance:e}"
    ))
}
