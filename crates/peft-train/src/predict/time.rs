//! The time of a step, from running one block at the run's sizes, forward and backward, with everything that is packed or
//! made again, and the head on one chunk of labels.

use std::time::Instant;

use peft_core::{Device, Param, Pass, Result, Tensor};
use peft_models::Task;
use peft_tensor::{RngKey, no_grad};

use super::{Size, Trainer};
use crate::optim::{AdamW, Rate};

/// Times each layer is run for the median, after a first time that reads the weights in.
const TRIES: usize = 3;

/// Seconds of something.
#[derive(Clone, Copy, Debug, Default)]
struct Seconds {
    forward: f64,
    /// Forward and backward.
    both: f64,
}

/// Tries `run` on an input of that shape which some operation made, as it is in a step: a leaf would not be packed.
fn timed(
    shape: &[usize],
    device: &Device,
    run: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Seconds> {
    let leaf = Tensor::normal(RngKey::new(1), 0.0, 1.0, shape, device)?.leaf();
    let (mut forward, mut both) = (Vec::new(), Vec::new());
    for _ in 0..=TRIES {
        let x = leaf.scale(1.0)?;
        let begun = Instant::now();
        let y = run(&x)?;
        forward.push(begun.elapsed().as_secs_f64());
        drop(x);
        if y.requires_grad() {
            y.sum_all()?.backward()?;
        }
        both.push(begun.elapsed().as_secs_f64());
    }
    Ok(Seconds {
        forward: median(&forward[1..]),
        both: median(&both[1..]),
    })
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Mean seconds of an optimiser step of `batches` batches.
pub(super) fn step(
    trainer: &Trainer<'_>,
    sizes: &[Size],
    batches: f64,
    again: usize,
) -> Result<f64> {
    let n = sizes.len().max(1) as f64;
    let mean = |of: &dyn Fn(&Size) -> usize| sizes.iter().map(of).sum::<usize>() as f64 / n;
    let rows = (mean(&|s| s.rows).round() as usize).max(1);
    // The mean of the batches' areas, so that padding counts.
    let seq = ((mean(&|s| s.rows * s.seq) / rows as f64).round() as usize).max(1);
    let labels = mean(&|s| s.labels);
    let blocks = trainer.blocks();
    let live = blocks.iter().flatten().count() as f64;
    let below = blocks.len() as f64 - live;
    let kept = block(trainer, rows, seq, 0)?;
    let computed = match again {
        0 => 0.0,
        _ => again as f64 * block(trainer, rows, seq, usize::MAX)?.both,
    };
    let blocks = below * kept.forward + (live - again as f64) * kept.both + computed;
    let batch = blocks + head(trainer, labels)?;
    Ok(batches * batch + optimizer(trainer)?)
}

/// The last block, with its adapters: in it everything is live. It is computed again where blocks up to `checkpoint` are.
fn block(trainer: &Trainer<'_>, rows: usize, seq: usize, checkpoint: usize) -> Result<Seconds> {
    let model = trainer.model();
    let pass = Pass {
        checkpoint,
        ..Pass::train(RngKey::new(0))
    };
    let last = model.config().num_layers.saturating_sub(1);
    let shape = [rows, seq, model.config().hidden_size];
    timed(&shape, model.device(), |x| model.block(last, x, &pass))
}

/// The language model's head with its loss, forward and backward; a classifier's is too small to count.
fn head(trainer: &Trainer<'_>, labels: f64) -> Result<f64> {
    let network = trainer.model().network();
    let facts = network.tree().facts();
    let head = facts
        .output_embedding
        .as_ref()
        .filter(|_| trainer.model().task() == Task::CausalLm);
    let Some(id) = head.and_then(|path| network.tree().get(path)) else {
        return Ok(0.0);
    };
    let rows = peft_models::logit_rows(facts.vocab_size, labels.round() as usize);
    let pass = Pass::train(RngKey::new(0));
    let targets = vec![0; rows];
    let run = |x: &Tensor| Ok(network.linear(id, x, &pass)?.into_cross_entropy(&targets)?);
    let one = timed(&[rows, facts.hidden_size], network.device(), run)?;
    Ok(one.both * labels / rows as f64)
}

/// The update of all parameters, from one of at most a million values.
fn optimizer(trainer: &Trainer<'_>) -> Result<f64> {
    let train = &trainer.config().train;
    let device = trainer.model().network().device();
    let values: usize = trainer
        .all_params()?
        .iter()
        .filter(|p| p.is_trainable())
        .map(Param::numel)
        .sum();
    let n = values.clamp(1, 1 << 20);
    let param = Param::new("calibration", &Tensor::zeros(&[n], device)?, false);
    let mut adamw = AdamW::new(train.betas, train.eps, train.optimizer.eight_bit());
    let rate = Rate {
        learning_rate: train.learning_rate,
        weight_decay: train.weight_decay,
    };
    let mut times = Vec::new();
    for _ in 0..TRIES {
        let begun = Instant::now();
        // The copies that norms and hooks make cost about as much as a step.
        let grad = vec![1e-3; n];
        no_grad(|| adamw.step(&param, &grad, 1.0, rate))?;
        times.push(begun.elapsed().as_secs_f64());
    }
    Ok(2.0 * median(&times) * values as f64 / n as f64)
}
