//! Training as the laws do it: plain gradient descent with a method's hooks, called as the training loop calls them.

use std::cell::Cell;

use peft::core::{Grads, Network, Param, Pass, RngKey, Tensor, TrainCx, TrainData};

use crate::compare::Check;
use crate::subject::{Subject, told};
use crate::toy::Toy;

/// Plain gradient descent, the hooks called in the order the training loop calls them.
pub(crate) fn descend(s: &Subject<'_>, toy: &Toy, steps: u64) -> Check {
    let network = &toy.network;
    let mut hooks = network.trainers();
    let run = Run {
        network,
        steps,
        rows: Rows { s, toy },
        reset: Cell::new(false),
    };
    for step in 0..steps {
        let mut params = network.parameters();
        let mut grads = Grads::default();
        for (_, hook) in &mut hooks {
            if step == 0 {
                let mut cx = run.cx(&params, &mut grads, &[], step);
                told("prepare", hook.prepare(&mut cx))?;
            }
        }
        params = network.parameters();
        for (_, hook) in &mut hooks {
            let mut cx = run.cx(&params, &mut grads, &[], step);
            told("before_forward", hook.before_forward(&mut cx))?;
        }
        params = network.parameters();
        let mut loss = s.loss(toy, &Pass::train(RngKey::new(s.case.seed).fork_n(step)))?;
        for (_, hook) in &hooks {
            let cx = run.cx(&params, &mut grads, &[], step);
            if let Some(penalty) = told("penalty", hook.penalty(&cx))? {
                loss = told("penalty", loss.add(&penalty))?;
            }
        }
        let mut grads = told("backward", loss.backward())?;
        for (_, hook) in &mut hooks {
            let mut cx = run.cx(&params, &mut grads, &[], step);
            told("after_backward", hook.after_backward(&mut cx))?;
        }
        let mut used = Vec::new();
        for param in &params {
            let value = param.tensor();
            let grad = grads.get(&value).cloned();
            if let Some(grad) = &grad {
                let moved = grad
                    .scale(RATE as f32)
                    .and_then(|g| value.detach().sub(&g))
                    .map_err(Into::into);
                told("step", moved.and_then(|v| param.set(v)))?;
            }
            used.push(grad);
        }
        // As training does: they are there for who says so.
        if !hooks.iter().any(|(_, hook)| hook.reads_used()) {
            used.clear();
        }
        for (_, hook) in &mut hooks {
            let mut cx = run.cx(&params, &mut grads, &used, step + 1);
            told("after_step", hook.after_step(&mut cx))?;
        }
    }
    Ok(())
}

/// Learning rate of the laws' gradient descent.
const RATE: f64 = 0.05;

/// What the hooks see of the laws' gradient descent.
struct Run<'a> {
    network: &'a Network,
    steps: u64,
    rows: Rows<'a>,
    reset: Cell<bool>,
}

impl Run<'_> {
    fn cx<'b>(
        &'b self,
        params: &'b [Param],
        grads: &'b mut Grads,
        used: &'b [Option<Tensor>],
        step: u64,
    ) -> TrainCx<'b> {
        TrainCx {
            step,
            total_steps: self.steps,
            network: self.network,
            params,
            grads,
            used,
            learning_rate: RATE,
            data: Some(&self.rows),
            reset_optimizer: &self.reset,
        }
    }
}

/// The drawn batch as the rows a method may ask about.
struct Rows<'a> {
    s: &'a Subject<'a>,
    toy: &'a Toy,
}

impl TrainData for Rows<'_> {
    fn rows(&self) -> usize {
        self.s.case.batch
    }

    fn gradient(&self, rows: &[usize]) -> peft::Result<(f64, Grads)> {
        let mut ids = self.s.ids();
        ids.ids = rows
            .iter()
            .flat_map(|&r| ids.ids[r * ids.seq..(r + 1) * ids.seq].to_vec())
            .collect();
        ids.batch = rows.len();
        let logits = self.toy.logits(&ids, &Pass::eval())?;
        let loss = logits.mul(&logits)?.mean_all()?;
        Ok((f64::from(loss.item()?), loss.backward()?))
    }
}
