//! Methods that Hugging Face PEFT has not, against numbers from their papers' formulas in double precision
//! (`xtask/python/golden/numbers`), made without this project's code.

use std::collections::BTreeSet;

use peft::core::Tensor;
use peft_tests::compare::{same_bits, size};
use peft_tests::golden::{Case, every, expected, logits, tensors};
use peft_tests::subject::told;
use serde_json::json;

/// What f32 leaves of f64, at outputs of about ten.
const F32: f64 = 5e-5;

/// On, off, on again, merged and unmerged.
#[test]
fn outputs() {
    every("numbers", |_, folder| {
        let case = Case::read(folder)?;
        let (mut model, adapter) = case.open()?;
        let (base, want) = (case.expected("base")?, case.expected("adapted")?);
        let adapted = logits(&model, &case.batch)?;
        case.close("adapted", &adapted, &want, F32)?;
        let switch = |model: &mut peft::models::Model, names: &[&str]| {
            told("network", model.network_mut())
                .and_then(|n| told("set_active", n.set_active(names)))
        };
        switch(&mut model, &[])?;
        case.close("switched off", &logits(&model, &case.batch)?, &base, F32)?;
        switch(&mut model, &[&adapter.name])?;
        let merged = told("network", model.network_mut())?.merge();
        match (&case.facts["merge"], merged) {
            (m, Ok(_)) if *m == json!(false) => return Err("merged, which it cannot".to_owned()),
            (m, Err(_)) if *m == json!(false) => return Ok(()),
            // Positions are no weights: merged weights alone are another model.
            (m, _) if m.is_null() => return Ok(()),
            (_, merged) => told("merge", merged)?,
        };
        let out = logits(&model, &case.batch)?;
        let allowed = 1e-5 * (1.0 + size(&adapted)?);
        case.close("merged against adapted", &out, &adapted, allowed)?;
        told("network", model.network_mut())?.unmerge();
        same_bits("unmerged", &logits(&model, &case.batch)?, &adapted)
    });
}

/// A file under the documented keys comes back as it was.
#[test]
fn files() {
    every("numbers", |_, folder| {
        let case = Case::read(folder)?;
        let (model, adapter) = case.open()?;
        let (config, out) = told("export", model.network().export(&adapter.name))?;
        let wanted = tensors(&case.adapter.join(peft::io::ADAPTER_WEIGHTS))?;
        let (got, want): (BTreeSet<_>, BTreeSet<_>) =
            (out.keys().collect(), wanted.keys().collect());
        if got != want {
            return Err(format!("keys are {got:?}, documented are {want:?}"));
        }
        let loose: Vec<String> =
            serde_json::from_value(case.facts["loose"].clone()).unwrap_or_default();
        for key in wanted.keys() {
            let want: Tensor = expected(&wanted, key)?;
            if loose.iter().any(|suffix| key.ends_with(suffix)) {
                peft_tests::compare::close(key, &out[key], &want, 1e-6)?;
            } else {
                same_bits(key, &out[key], &want)?;
            }
        }
        let given = peft_tests::golden::json(&case.adapter.join(peft::io::ADAPTER_CONFIG))?;
        for (field, value) in given.as_object().into_iter().flatten() {
            if !value.is_null() && config[field] != *value {
                return Err(format!("{field} is {}, given was {value}", config[field]));
            }
        }
        Ok(())
    });
}

/// Fastfood (arXiv 2012.13255) on weights of 2^n numbers, from what it is, whatever signs, order and factors it drew: a
/// direction's image is as long as the direction, and two directions i and j meet at an angle that depends on the bits
/// of i xor j alone, up to sign. Images of different weights have nothing to do with each other.
#[test]
fn fastfood() {
    const D: usize = 12;
    let folder = peft_tests::golden::root().join("models/llama");
    let mut model = peft::models::Model::load(&folder, &Default::default()).expect("loads");
    let network = model.network_mut().expect("a network");
    // Three value projections of 16 x 32.
    let config = json!({"peft_type": "SAID", "intrinsic_dimension": D + 3, "projection_prng_key": 9,
        "target_modules": ["v_proj"]});
    network.attach("a", &config, 0).expect("attaches");
    let theta = network
        .parameters()
        .into_iter()
        .find(|p| p.key().ends_with("said_theta"))
        .expect("theta");
    assert_eq!(theta.shape(), [D]);
    let paths = [0, 1, 2].map(|i| format!("model.layers.{i}.self_attn.v_proj"));
    let base: Vec<Vec<f64>> = paths.iter().map(|p| weight(network, p)).collect();
    let mut images = vec![Vec::new(); 3];
    for i in 0..D {
        let mut unit = vec![0.0; D];
        unit[i] = 1.0;
        let value = Tensor::from_vec(unit, &[D], network.device()).expect("a tensor");
        theta.set(value).expect("fits");
        network.merge().expect("merges");
        for (m, path) in paths.iter().enumerate() {
            let moved = weight(network, path);
            images[m].push(
                moved
                    .iter()
                    .zip(&base[m])
                    .map(|(a, b)| a - b)
                    .collect::<Vec<f64>>(),
            );
        }
        network.unmerge();
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    for columns in &images {
        for i in 0..D {
            let length = dot(&columns[i], &columns[i]);
            assert!((length - 1.0).abs() < 1e-4, "|P e_{i}|^2 is {length}");
            for j in 0..i {
                let other = (0..D).find(|&k| (k ^ i ^ j) < k).map(|k| (k, k ^ i ^ j));
                let (k, l) = other.expect("at least the pair itself");
                let (one, two) = (dot(&columns[i], &columns[j]), dot(&columns[k], &columns[l]));
                assert!(
                    (one.abs() - two.abs()).abs() < 1e-4,
                    "{i}, {j}: {one}; {k}, {l}: {two}"
                );
            }
        }
        let spread: f64 = (1..D).map(|i| dot(&columns[0], &columns[i]).powi(2)).sum();
        assert!(spread > 1e-6, "a random projection is not orthogonal");
    }
    let strange = dot(&images[0][0], &images[1][0]).abs();
    assert!(
        strange < 0.3,
        "two weights share their projection: {strange}"
    );
}

fn weight(network: &peft::core::Network, path: &str) -> Vec<f64> {
    let id = network.module(path).expect("a module");
    network
        .weight(id)
        .and_then(|w| Ok(w.to_f64()?))
        .expect("a weight")
}
