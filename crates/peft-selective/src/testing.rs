//! A training loop in small, for the tests of hooks: plain gradient descent on the sum of a layer's outputs.

use std::cell::Cell;

use peft_core::ndarray::Array2;
use peft_core::{
    Base, Grads, Network, Pass, Result, RngKey, Tensor, TrainCx, TrainData, serde_json::Value,
};

/// A network of one layer `fc` with this method on it.
pub(crate) fn network(weight: Array2<f32>, config: &Value) -> Network {
    let base = Base::custom().linear("fc", weight, None).expect("a layer");
    let mut network = Network::new(base);
    network.attach("a", config, 0).expect("attaches");
    network
}

/// Rows of inputs; the loss is the sum of the outputs, so that a row's gradient with respect to W is the row, for each
/// output.
pub(crate) struct Rows<'a> {
    pub(crate) network: &'a Network,
    pub(crate) inputs: Vec<Vec<f32>>,
}

impl Rows<'_> {
    fn loss(&self, rows: &[usize], pass: &Pass) -> Result<Tensor> {
        let width = self.inputs[0].len();
        let x: Vec<f32> = rows.iter().flat_map(|&r| self.inputs[r].clone()).collect();
        let x = Tensor::from_vec(x, &[rows.len(), width], self.network.device())?;
        let sum = self.network.run("fc", &x, pass)?.sum_all()?;
        Ok(sum.scale(1.0 / rows.len() as f32)?)
    }
}

impl TrainData for Rows<'_> {
    fn rows(&self) -> usize {
        self.inputs.len()
    }

    fn gradient(&self, rows: &[usize]) -> Result<(f64, Grads)> {
        let loss = self.loss(rows, &Pass::eval())?;
        Ok((f64::from(loss.item()?), loss.backward()?))
    }
}

/// Steps of gradient descent on all rows, the hooks called as the training loop calls them; `asks` says whether they may
/// ask about rows. `seen` looks at the network before each step; returns at which steps the optimiser was reset.
pub(crate) fn descend(
    rows: &Rows<'_>,
    steps: u64,
    rate: f32,
    asks: bool,
    mut seen: impl FnMut(u64),
) -> Result<Vec<u64>> {
    let network = rows.network;
    let mut hooks = network.trainers();
    let reset = Cell::new(false);
    let mut resets = Vec::new();
    let all: Vec<usize> = (0..rows.inputs.len()).collect();
    for step in 0..steps {
        let mut grads = Grads::default();
        let before = network.parameters();
        let mut cx = TrainCx {
            step,
            total_steps: steps,
            network,
            params: &before,
            grads: &mut grads,
            used: &[],
            learning_rate: f64::from(rate),
            data: if asks { Some(rows) } else { None },
            reset_optimizer: &reset,
        };
        for (_, hook) in &mut hooks {
            if step == 0 {
                hook.prepare(&mut cx)?;
            }
            hook.before_forward(&mut cx)?;
        }
        if reset.replace(false) {
            resets.push(step);
        }
        seen(step);
        let mut loss = rows.loss(&all, &Pass::train(RngKey::new(step)))?;
        for (_, hook) in &hooks {
            if let Some(penalty) = hook.penalty(&cx)? {
                loss = loss.add(&penalty)?;
            }
        }
        let mut grads = loss.backward()?;
        let params = network.parameters();
        let mut cx = TrainCx {
            params: &params,
            grads: &mut grads,
            ..cx
        };
        for (_, hook) in &mut hooks {
            hook.after_backward(&mut cx)?;
        }
        for param in &params {
            let value = param.tensor();
            if let Some(grad) = cx.grads.get(&value) {
                param.set(value.detach().sub(&grad.scale(rate)?)?)?;
            }
        }
    }
    Ok(resets)
}
