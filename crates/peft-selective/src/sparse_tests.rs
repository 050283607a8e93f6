//! The sparse product and the dense weight are the same function, also to a gradient.

use peft_core::ndarray::Array2;
use peft_core::serde_json::json;
use peft_core::{Base, Network, Param, Pass, Tensor};

use super::*;

const ROWS: usize = 40;
const COLS: usize = 64;

/// A layer and a table of `ROWS` x `COLS` with so few trained entries that no dense weight is made.
fn network() -> Network {
    let weights = |seed: f32| {
        Array2::from_shape_fn((ROWS, COLS), |(i, j)| ((i * COLS + j) as f32 * seed).sin())
    };
    let base = Base::custom()
        .linear("fc", weights(0.37), None)
        .and_then(|b| b.embedding("emb", weights(0.73)));
    let mut network = Network::new(base.expect("a base"));
    // The method that chooses without data; `target_modules` a pattern, as all-linear leaves embeddings out.
    let all = peft_core::methods();
    let method = all.iter().find(|e| e.file.ends_with("/pafi.rs"));
    let peft_type = method.expect("registered").peft_type;
    let config = json!({"peft_type": peft_type, "keep_ratio": 0.03, "target_modules": "fc|emb"});
    network.attach("a", &config, 0).expect("attaches");
    for param in network.parameters() {
        let n = param.numel();
        assert!(n * DENSITY < ROWS * COLS && n > 10, "{n} entries");
        let values = (0..n).map(|i| (i as f32 * 1.7).cos()).collect();
        let values = Tensor::from_vec(values, &[n], network.device());
        param.set(values.expect("a tensor")).expect("fits");
    }
    network
}

fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_vec().expect("values")
}

fn close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!(
            (got - want).abs() < 2e-5 * (1.0 + want.abs()),
            "{got} for {want}"
        );
    }
}

#[test]
fn few_entries_merge_to_what_they_do() {
    let mut network = network();
    let x: Vec<f32> = (0..6 * COLS).map(|i| (i as f32 * 0.9).sin()).collect();
    let x = Tensor::from_vec(x, &[2, 3, COLS], network.device()).expect("a tensor");
    let table = network.module("emb").expect("there");
    let run = |network: &Network| {
        let rows = network.run("fc", &x, &Pass::eval()).expect("runs");
        assert_eq!(rows.shape(), [2, 3, ROWS]);
        let looked_up = network.embed(table, &[5, 0, 39, 5], &Pass::eval());
        (values(&rows), values(&looked_up.expect("runs")))
    };
    let adapted = run(&network);
    network.set_active(&[]).expect("disables");
    let base = run(&network);
    assert!(adapted.0 != base.0 && adapted.1 != base.1);
    network.set_active(&["a"]).expect("enables");
    network.merge().expect("merges");
    let merged = run(&network);
    close(&adapted.0, &merged.0);
    close(&adapted.1, &merged.1);
}

/// dL/dv of entry (r, c) is `sum_t dy[t, r] x[t, c]`, worked out entry by entry.
#[test]
fn gradients_of_few_entries() {
    let network = network();
    let x: Vec<f32> = (0..3 * COLS).map(|i| (i as f32 * 0.9).sin()).collect();
    let input = Tensor::from_vec(x.clone(), &[3, COLS], network.device()).expect("a tensor");
    let dy: Vec<f32> = (0..3 * ROWS).map(|i| (i as f32 * 0.31).cos()).collect();
    let weights = Tensor::from_vec(dy.clone(), &[3, ROWS], network.device()).expect("a tensor");
    let params = network.adapter_parameters("a").expect("there");
    let find = |name: &str| -> Param {
        let key = format!("base_model.model.fc.{name}");
        let found = params.iter().find(|p| p.key() == key);
        found.expect("there").clone()
    };
    let (entries, places) = (
        find("sparse_values"),
        values(&find("sparse_indices").tensor()),
    );
    let leaf = entries.tensor();
    let y = network.run("fc", &input, &Pass::eval()).expect("runs");
    let loss = y.mul(&weights).and_then(|p| p.sum_all()).expect("a loss");
    let grads = loss.backward().expect("backward");
    let (rows, cols) = places.split_at(places.len() / 2);
    let want: Vec<f32> = rows
        .iter()
        .zip(cols)
        .map(|(r, c)| {
            let (r, c) = (*r as usize, *c as usize);
            (0..3).map(|t| dy[t * ROWS + r] * x[t * COLS + c]).sum()
        })
        .collect();
    close(&values(grads.get(&leaf).expect("a gradient")), &want);
}

#[test]
fn files_that_do_not_fit() {
    let network = network();
    let (config, tensors) = network.export("a").expect("exports");
    let load = |name: &str, change: &dyn Fn(&mut Vec<f32>)| {
        let mut tensors = tensors.clone();
        let key = format!("base_model.model.fc.{name}");
        let tensor = &tensors[&key];
        let mut all = values(tensor);
        change(&mut all);
        let mut shape = tensor.shape().to_vec();
        *shape.last_mut().expect("a dimension") = all.len() / if shape.len() == 2 { 2 } else { 1 };
        let changed = Tensor::from_vec(all, &shape, network.device()).expect("a tensor");
        tensors.insert(key, changed);
        let base = Base::custom()
            .linear("fc", Array2::zeros((ROWS, COLS)), None)
            .and_then(|b| b.embedding("emb", Array2::zeros((ROWS, COLS))));
        let mut other = Network::new(base.expect("a base"));
        other.load("b", &config, tensors, false)?;
        let x = Tensor::zeros(&[1, COLS], other.device())?;
        other.run("fc", &x, &Pass::eval())
    };
    let error = load("sparse_values", &|v| v.push(1.0)).expect_err("refused");
    assert!(error.to_string().contains("sparse_indices"), "{error}");
    for bad in [ROWS as f32, -1.0, 0.5] {
        let error = load("sparse_indices", &|v| v[0] = bad).expect_err("refused");
        assert!(
            error.to_string().contains("`fc`") && error.to_string().contains("40 x 64"),
            "{error}"
        );
    }
}

/// What is kept of the places is dropped when they change: 1 at (0, 0), then 1 at (2, 3), then a place that is none.
#[test]
fn places_that_change() {
    let network = network();
    let params = network.adapter_parameters("a").expect("there");
    let param = |name: &str| {
        let found = params.iter().find(|p| p.key().ends_with(name));
        found.expect("there").clone()
    };
    let (entries, places) = (param("fc.sparse_values"), param("fc.sparse_indices"));
    let tensor = |values: &[f32], shape: &[usize]| {
        Tensor::from_vec(values.to_vec(), shape, network.device()).expect("a tensor")
    };
    let x: Vec<f32> = (0..COLS).map(|i| i as f32 + 1.0).collect();
    let x = tensor(&x, &[1, COLS]);
    entries.set(tensor(&[0.0], &[1])).expect("fits");
    places.set(tensor(&[0.0, 0.0], &[2, 1])).expect("fits");
    let base = values(&network.run("fc", &x, &Pass::eval()).expect("runs"));
    entries.set(tensor(&[1.0], &[1])).expect("fits");
    for (row, col) in [(0, 0), (2, 3), (2, 3)] {
        places
            .set(tensor(&[row as f32, col as f32], &[2, 1]))
            .expect("fits");
        for _ in 0..2 {
            let y = values(&network.run("fc", &x, &Pass::eval()).expect("runs"));
            let mut want = base.clone();
            want[row] += col as f32 + 1.0;
            close(&y, &want);
        }
    }
    places
        .set(tensor(&[0.0, COLS as f32], &[2, 1]))
        .expect("fits");
    let error = network.run("fc", &x, &Pass::eval()).expect_err("refused");
    assert!(error.to_string().contains("64 is no place"), "{error}");
}
