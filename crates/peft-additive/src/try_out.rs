//! What the tests of bottleneck methods run on: a network of nothing but a layer's two junctions.

use std::collections::BTreeMap;

use peft_core::serde_json::Value;
use peft_core::{Base, Network, Pass, Tensor, Tensors};

#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Place {
    Attention,
    Output,
}

const PLACES: [(Place, &str); 2] = [
    (Place::Attention, "layers.0.attention_adapters"),
    (Place::Output, "layers.0.output_adapters"),
];

fn network(dim: usize) -> Network {
    let base = PLACES
        .iter()
        .fold(Base::custom(), |base, (_, path)| base.junction(path, dim));
    Network::new(base)
}

/// Initial values by key.
pub(crate) fn started(config: &Value, dim: usize) -> BTreeMap<String, Vec<f32>> {
    let mut network = network(dim);
    network.attach("a", config, 0).expect("attaches");
    let params = network.parameters();
    params
        .iter()
        .map(|p| (p.key().to_owned(), p.tensor().to_vec().expect("values")))
        .collect()
}

/// y for `[1, 1, d]` h and x at one place, with these parameters there and zeros for all others.
pub(crate) fn wide(
    config: &Value,
    place: Place,
    params: &[(&str, &[usize], &[f32])],
    h: &[f32],
    x: &[f32],
) -> Result<Vec<f32>, String> {
    let text = |e: peft_core::Error| e.to_string();
    let mut network = network(h.len());
    network.attach("a", config, 0).map_err(text)?;
    let (_, path) = PLACES
        .iter()
        .find(|(p, _)| *p == place)
        .expect("one of them");
    let device = network.device().clone();
    let mut tensors = Tensors::new();
    for param in network.parameters() {
        tensors.insert(
            param.key().to_owned(),
            Tensor::zeros(&param.shape(), &device).expect("zeros"),
        );
    }
    for (name, shape, values) in params {
        let local = format!("base_model.model.{path}.adapters.{name}");
        let key = if tensors.contains_key(&local) {
            local
        } else {
            format!("base_model.{name}")
        };
        let value = Tensor::from_vec(values.to_vec(), shape, &device).expect("a tensor");
        assert!(tensors.insert(key, value).is_some(), "no parameter {name}");
    }
    network.delete("a").expect("there");
    network.load("a", config, tensors, true).map_err(text)?;
    let id = network.module(path).map_err(text)?;
    let row = |v: &[f32]| Tensor::from_vec(v.to_vec(), &[1, 1, v.len()], &device).expect("a row");
    let y = network
        .junction(id, &row(h), &row(x), None, &Pass::eval())
        .map_err(text)?;
    Ok(y.to_vec().expect("values"))
}

/// y for h = (1, 2) and x = (3, -1), with D = (1, 1), U = (1, 2)^T, u = (0, 1) and these vectors.
pub(crate) fn one_wide(
    config: &Value,
    place: Place,
    more: &[(&str, &[f32])],
) -> Result<Vec<f32>, String> {
    let mut params: Vec<(&str, &[usize], &[f32])> = vec![
        ("adapter_down.0.weight", &[1, 2], &[1.0, 1.0]),
        ("adapter_up.weight", &[2, 1], &[1.0, 2.0]),
        ("adapter_up.bias", &[2], &[0.0, 1.0]),
    ];
    let shapes: Vec<Vec<usize>> = more
        .iter()
        .map(|(name, values)| match *name {
            "gate.weight" => vec![1, values.len()],
            _ => vec![values.len()],
        })
        .collect();
    params.extend(
        more.iter()
            .zip(&shapes)
            .map(|((name, values), shape)| (*name, &shape[..], *values)),
    );
    wide(config, place, &params, &[1.0, 2.0], &[3.0, -1.0])
}
