//! Models that bitsandbytes quantised, and models that are quantised while they load. The folders are made by
//! `xtask/python/bnb_models.py`.

use std::path::{Path, PathBuf};

use peft_core::Pass;
use peft_io::Checkpoint;
use peft_models::{Batch, LoadOptions, Model, Quantize};
use peft_tensor::WeightFormat;

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("testdata/bnb_{kind}"))
}

/// The golden's rows and logits.
fn golden(kind: &str) -> (Batch, Vec<f32>) {
    let file = Checkpoint::open(&folder(kind).join("golden.safetensors")).unwrap();
    let (shape, ids) = file.f32("input_ids").unwrap();
    let batch = Batch {
        ids: ids.iter().map(|v| *v as u32).collect(),
        batch: shape[0],
        seq: shape[1],
        ..Batch::default()
    };
    (batch, file.f32("logits").unwrap().1)
}

fn logits(model: &Model, batch: &Batch) -> Vec<f32> {
    let logits = model.logits(batch, &Pass::eval()).unwrap();
    logits.to_vec().unwrap()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |w, (a, b)| w.max((a - b).abs()))
}

#[test]
fn logits_are_those_of_the_dequantised_weights() {
    for (kind, format) in [
        ("nf4", WeightFormat::NF4),
        ("fp4", WeightFormat::FP4),
        ("int8", WeightFormat::INT8),
    ] {
        let model = Model::load(&folder(kind), &LoadOptions::default()).unwrap();
        let name = "model.layers.0.self_attn.q_proj.weight";
        let weight = model.network().base().weight(name).unwrap();
        assert_eq!(weight.as_frozen().unwrap().format(), format);
        let (batch, want) = golden(kind);
        let off = worst(&logits(&model, &batch), &want);
        assert!(off < 1e-4, "{kind}: {off}");
    }
}

/// The parts of a weight are one entry; embeddings and norms stay as they are.
#[test]
fn checkpoints_show_weights_and_not_their_parts() {
    for kind in ["nf4", "fp4", "int8"] {
        let checkpoint = Checkpoint::open(&folder(kind)).unwrap();
        let names: Vec<&str> = checkpoint.names().collect();
        // 7 matrices and 2 norms in each of 2 layers, the last norm, the embedding.
        assert_eq!(names.len(), 20, "{kind}");
        assert!(names.iter().all(|n| n.ends_with("weight")));
        assert_eq!(checkpoint.file_order().count(), 20);
        let meta = checkpoint
            .meta("model.layers.1.mlp.down_proj.weight")
            .unwrap();
        assert_eq!(
            (&meta.shape[..], meta.format.to_string()),
            (&[48, 56][..], kind.to_uppercase())
        );
    }
}

/// A model quantised while it loads is within the formats' error of the stored one, and the better the format the nearer.
#[test]
fn quantising_while_loading() {
    // A quantised base, as floats: what a model is that is quantised again.
    let plain = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/llama");
    let batch = Batch::single(vec![1, 5, 9, 2, 7, 3]);
    let load = |quantize: Option<&str>| {
        let options = LoadOptions {
            quantize: quantize.map(|name| name.parse().unwrap()),
            ..LoadOptions::default()
        };
        Model::load(&plain, &options).unwrap()
    };
    let want = logits(&load(None), &batch);
    let mut last = f32::INFINITY;
    for name in ["nf4", "int8"] {
        let model = load(Some(name));
        for (_, module) in model.network().tree().iter() {
            let Some(weight) = module.weight.as_ref() else {
                continue;
            };
            let weight = model.network().base().weight(weight).unwrap();
            let format = weight.as_frozen().map(|w| w.format().name());
            if Quantize::covers(module) {
                assert_eq!(format.map(str::to_lowercase).as_deref(), Some(name));
            } else {
                assert!(
                    format.is_none_or(|f| f == "F32"),
                    "{}: {format:?}",
                    module.path
                );
            }
        }
        let off = worst(&logits(&model, &batch), &want);
        assert!(off > 0.0 && off < last, "{name}: {off}");
        last = off;
    }
    let again = LoadOptions {
        quantize: Some(Quantize::NF4),
        ..LoadOptions::default()
    };
    let text = Model::load(&folder("nf4"), &again).unwrap_err().to_string();
    assert!(
        text.contains("NF4 already") && text.contains("_proj.weight"),
        "{text}"
    );
}

#[test]
fn other_libraries_are_refused_by_name() {
    let copy = tempfile::tempdir().unwrap();
    let from = folder("nf4");
    std::fs::copy(
        from.join("model.safetensors"),
        copy.path().join("model.safetensors"),
    )
    .unwrap();
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    std::fs::write(
        copy.path().join("config.json"),
        config.replace("bitsandbytes", "gptq"),
    )
    .unwrap();
    let text = Model::load(copy.path(), &LoadOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("quant_method") && text.contains("gptq") && text.contains("bitsandbytes"),
        "{text}"
    );
}
