//! What the tests of methods attach, fill and run.

use peft_core::serde_json::{Value, json};
use peft_core::{Base, Network, Pass, Result, Tensor};

/// `base` with the adapter "a": `config`, with `fields` over it.
pub(crate) fn attached(base: Base, mut config: Value, fields: &Value) -> Result<Network> {
    for (field, value) in fields.as_object().into_iter().flatten() {
        config[field] = value.clone();
    }
    let mut network = Network::new(base);
    network.attach("a", &config, 3)?;
    Ok(network)
}

/// Gives the parameters these values, in the order they were made.
pub(crate) fn fill(network: &Network, values: impl Fn(usize) -> Vec<f32>) {
    for (at, param) in network.parameters().iter().enumerate() {
        let value = Tensor::from_vec(values(at), &param.shape(), network.device());
        param.set(value.expect("a tensor")).expect("fits");
    }
}

/// What the module gives for one row.
pub(crate) fn row(network: &Network, path: &str, x: &[f32], pass: &Pass) -> Vec<f32> {
    let x = Tensor::from_vec(x.to_vec(), &[1, x.len()], network.device()).expect("a tensor");
    let y = network.run(path, &x, pass).expect("runs");
    y.to_vec().expect("values")
}

/// Fields given as pairs.
pub(crate) fn fields(pairs: &[(&str, Value)]) -> Value {
    pairs.iter().fold(json!({}), |mut all, (field, value)| {
        all[*field] = value.clone();
        all
    })
}
