//! Against AdapterHub's `adapters`: its folders read, computed with, written and read again, from files alone
//! (`xtask/python/adapterhub.py` made them, and reads what is written here with `--check`).

use std::path::{Path, PathBuf};

use peft::models::{LoadOptions, Model};
use peft::ops::{self, Compose};
use peft_tests::compare::same_bits;
use peft_tests::golden::{self, batch, close, every, expected, logits, root, tensors};
use peft_tests::subject::told;
use serde_json::{Value, json};

/// What f32 leaves between two programs that sum in different orders, at logits of this size.
const LOGITS: f64 = 1e-4;

/// One case: adapters on a model, a fusion of them perhaps.
struct Case {
    facts: Value,
    model: PathBuf,
}

impl Case {
    fn read(folder: &Path) -> Result<Self, String> {
        let facts = golden::json(&folder.join("case.json"))?;
        let name = facts["model"].as_str().ok_or("case.json names no model")?;
        Ok(Self {
            model: root().join("models").join(name),
            facts,
        })
    }

    fn names(&self) -> Vec<&str> {
        let names = self.facts["adapters"].as_array();
        names
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect()
    }

    /// The folders of its adapters and of its fusion, below `at`.
    fn specs(&self, at: &Path) -> Vec<String> {
        let mut names = self.names();
        if self.facts.get("fusion").is_some() {
            names.push("fusion");
        }
        names
            .iter()
            .map(|n| at.join(n).display().to_string())
            .collect()
    }

    fn open(&self, specs: &[String]) -> Result<Model, String> {
        let model = self.model.display().to_string();
        let opened = ops::open_composed(&model, specs, Compose::Stack, &LoadOptions::default());
        told("open", opened).map(|(model, _)| model)
    }
}

#[test]
fn outputs() {
    every("adapterhub", |_, folder| {
        let case = Case::read(folder)?;
        let model = case.open(&case.specs(folder))?;
        let batch = batch(&case.facts)?;
        let all = tensors(&folder.join("expected.safetensors"))?;
        close(
            "adapted",
            &batch,
            &logits(&model, &batch)?,
            &expected(&all, "logits")?,
            LOGITS,
        )
    });
}

/// What is written in AdapterHub's layout comes back the same, bit for bit where nothing is evaluated on the way. With
/// `PEFT_HUB_OUT`, the folders stay there for the check in Python.
#[test]
fn written_folders() {
    let kept = std::env::var_os("PEFT_HUB_OUT").map(PathBuf::from);
    let scratch = tempfile::tempdir().expect("a folder");
    let out = kept.as_deref().unwrap_or(scratch.path());
    every("adapterhub", |name, folder| {
        let case = Case::read(folder)?;
        let batch = batch(&case.facts)?;
        let first = case.open(&case.specs(folder))?;
        let before = logits(&first, &batch)?;
        let target = out.join(name);
        told("folder", peft::io::create_folder(&target))?;
        let mut facts = case.facts.clone();
        let write = |specs: &[String], as_name: &str| {
            // Ours first, so that what is exported is an adapter like any other.
            let ours = target.join("ours").join(as_name);
            let model = case.open(specs)?;
            let adapter = model.network().adapters()[0].to_owned();
            let base = case.model.display().to_string();
            told(
                "write",
                ops::write_adapter(model.network(), &adapter, &base, &ours, true),
            )?;
            let ours = ours.display().to_string();
            told(
                "export",
                ops::export_adapterhub(&base, &ours, as_name, &target.join(as_name), true),
            )
        };
        if case.facts.get("fusion").is_some() {
            let folders = write(&case.specs(folder), "x")?;
            let names: Vec<&str> = folders
                .iter()
                .filter_map(|f| f.file_name()?.to_str())
                .filter(|n| *n != "fusion")
                .collect();
            facts["adapters"] = names.clone().into();
            facts["fusion"] = names.join(",").into();
            // Beside each other, as the case has them.
            for from in &folders {
                let to = target.join(from.file_name().ok_or("no name")?);
                told("move", std::fs::rename(from, to))?;
            }
        } else {
            for one in case.names() {
                write(&[folder.join(one).display().to_string()], one)?;
            }
        }
        let again = Case {
            facts: facts.clone(),
            ..Case::read(folder)?
        };
        let after = logits(&again.open(&again.specs(&target))?, &batch)?;
        if name.contains("reft") || name.contains("unipelt") {
            close("read again", &batch, &after, &before, 1e-5)?;
        } else {
            same_bits("read again", &after, &before)?;
        }
        let shape = before.shape().to_vec();
        let values = told("values", before.to_vec())?;
        let file = [("logits".to_owned(), (shape, values))]
            .into_iter()
            .collect();
        told(
            "logits",
            peft::io::write_tensors(&target.join("ours.safetensors"), &file, &Default::default()),
        )?;
        told(
            "case",
            peft::io::write_json(&target.join("case.json"), &facts),
        )
    });
}

/// Pickles are refused, and the message says what to do.
#[test]
fn pickles_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    for (file, says) in [
        ("pytorch_adapter.bin", "use_safetensors=True"),
        ("pytorch_model_adapter_fusion.bin", "save_adapter_fusion"),
    ] {
        let place = folder.path().join(file.replace('.', "_"));
        peft::io::create_folder(&place).expect("made");
        peft::io::atomic_write(&place.join(file), b"\x80\x02}").expect("written");
        let error = peft::io::read_adapter(&place)
            .expect_err("refused")
            .to_string();
        assert!(error.contains(says) && error.contains(file), "{error}");
    }
}

/// A fusion needs its members, and says which.
#[test]
fn a_fusion_names_what_is_missing() {
    let folder = root().join("adapterhub/bert-fusion-1");
    let case = Case::read(&folder).expect("a case");
    let error = match case.open(&[
        folder.join("fusion").display().to_string(),
        folder.join("a").display().to_string(),
    ]) {
        Ok(_) => panic!("opened without a member"),
        Err(e) => e,
    };
    assert!(error.contains("\"b\""), "{error}");
    let specs = case.specs(&folder);
    let without = ops::open_composed(
        &case.model.display().to_string(),
        &specs[..2],
        Compose::Fuse,
        &LoadOptions::default(),
    );
    let error = without.map(|_| ()).expect_err("refused").to_string();
    assert!(error.contains("fuse"), "{error}");
}

/// Two adapters, averaged: on linear layers the mean of what they add, so that one adapter twice is that adapter.
#[test]
fn an_average_of_the_same_is_the_same() {
    for case in ["bert-seq-1", "llama-lora-1"] {
        let folder = root().join("adapterhub").join(case);
        let case = Case::read(&folder).expect("a case");
        let one = folder.join("x").display().to_string();
        let both = [format!("p={one}"), format!("q={one}")];
        let model = case.model.display().to_string();
        let alone = case.open(&[one]).expect("opens");
        let (average, _) =
            ops::open_composed(&model, &both, Compose::Average, &LoadOptions::default())
                .expect("opens");
        let batch = batch(&case.facts).expect("a batch");
        let (a, b) = (
            logits(&alone, &batch).expect("runs"),
            logits(&average, &batch).expect("runs"),
        );
        close("average", &batch, &b, &a, 1e-5).expect("the same");
    }
}

/// Stage two of a fusion: adapters taken by their folders, frozen, their heads left behind; saved, it needs them no more.
#[test]
fn a_fusion_takes_trained_adapters_by_their_folders() {
    let scratch = tempfile::tempdir().expect("a folder");
    let model = root().join("models/bert-cls").display().to_string();
    let mut folders = Vec::new();
    for (seed, factor) in [(1, 4), (2, 6)] {
        let mut opened = Model::load(Path::new(&model), &LoadOptions::default()).expect("loads");
        let config =
            json!({"peft_type": "PFEIFFER", "reduction_factor": factor, "task_type": "SEQ_CLS"});
        let network = opened.network_mut().expect("alone");
        network.attach("a", &config, seed).expect("attaches");
        let folder = scratch.path().join(format!("{seed}"));
        ops::write_adapter(opened.network(), "a", &model, &folder, false).expect("writes");
        folders.push(folder.display().to_string());
    }
    let mut opened = Model::load(Path::new(&model), &LoadOptions::default()).expect("loads");
    let config = json!({"peft_type": "ADAPTER_FUSION", "task_type": "SEQ_CLS",
        "members": [{"path": folders[0]}, {"path": folders[1]}]});
    let network = opened.network_mut().expect("alone");
    network.attach("f", &config, 3).expect("attaches");
    let params = network.adapter_parameters("f").expect("there");
    let (members, own): (Vec<_>, Vec<_>) =
        params.iter().partition(|p| p.key().starts_with("members."));
    assert!(
        members
            .iter()
            .all(|p| p.is_frozen() && !p.key().contains("classifier"))
    );
    // Query, key and value at two layers, and one head.
    assert_eq!((members.len(), own.len()), (16, 2 * 5 + 2));
    assert!(own.iter().all(|p| p.is_trainable()));
    let batch = batch(&json!({"input_ids": [[5, 6, 7, 8], [9, 3, 2, 1]]})).expect("a batch");
    let before = logits(&opened, &batch).expect("runs");
    let out = scratch.path().join("fusion");
    ops::write_adapter(opened.network(), "f", &model, &out, false).expect("writes");
    for folder in &folders {
        std::fs::remove_dir_all(folder).expect("removed");
    }
    let spec = [out.display().to_string()];
    let (again, _) = ops::open(&model, &spec, &LoadOptions::default()).expect("opens");
    same_bits(
        "read again",
        &logits(&again, &batch).expect("runs"),
        &before,
    )
    .expect("the same");
}
