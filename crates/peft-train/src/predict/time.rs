//! The time of a step, from running the layers of one block at the run's sizes, forward and backward.

use std::sync::Arc;
use std::time::Instant;

use peft_core::{Device, ModuleId, ModuleInfo, ModuleKind, Param, Pass, Result, Tensor};
use peft_models::Task;
use peft_tensor::{Attention, Glu, Mask, RngKey, Rope, Unary, no_grad};

use super::{Size, Trainer, keeps};
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

impl Seconds {
    fn add(&mut self, other: Self, times: f64) {
        self.forward += times * other.forward;
        self.both += times * other.both;
    }
}

/// Tries `run` on a fresh input of that shape.
fn timed(
    shape: &[usize],
    device: &Device,
    run: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Seconds> {
    let x = Tensor::normal(RngKey::new(1), 0.0, 1.0, shape, device)?.leaf();
    let (mut forward, mut both) = (Vec::new(), Vec::new());
    for _ in 0..=TRIES {
        let begun = Instant::now();
        let y = run(&x)?;
        forward.push(begun.elapsed().as_secs_f64());
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
pub(super) fn step(trainer: &Trainer<'_>, sizes: &[Size], batches: f64) -> Result<f64> {
    let n = sizes.len().max(1) as f64;
    let mean = |of: &dyn Fn(&Size) -> usize| sizes.iter().map(of).sum::<usize>() as f64 / n;
    let rows = (mean(&|s| s.rows).round() as usize).max(1);
    // The mean of the batches' areas, so that padding counts.
    let seq = ((mean(&|s| s.rows * s.seq) / rows as f64).round() as usize).max(1);
    let labels = mean(&|s| s.labels);
    let blocks = trainer.blocks();
    let live = blocks.iter().flatten().count() as f64;
    let below = blocks.len() as f64 - live;
    let block = block(trainer, rows, seq)?;
    let extra = match trainer.config().train.gradient_checkpointing {
        true => block.forward,
        false => 0.0,
    };
    let batch = live * (block.both + extra) + below * block.forward + head(trainer, labels)?;
    Ok(batches * batch + optimizer(trainer)?)
}

/// The last block: in it everything is live.
fn block(trainer: &Trainer<'_>, rows: usize, seq: usize) -> Result<Seconds> {
    let network = trainer.model().network();
    let (config, device) = (trainer.model().config(), network.device());
    let pass = Pass::train(RngKey::new(0));
    let last = config.num_layers.saturating_sub(1);
    let mut sum = Seconds::default();
    let tokens = rows * seq;
    let modules = network.tree().iter().filter(|(_, m)| m.layer == Some(last));
    for (id, info) in modules {
        let shape = match info.in_features {
            // Norms of queries and keys see a row for each head.
            n if info.kind == ModuleKind::Norm && n != config.hidden_size => {
                vec![tokens * config.num_heads, n]
            }
            n => vec![rows, seq, n],
        };
        match info.kind {
            ModuleKind::Linear | ModuleKind::Conv1d => {
                let run = |x: &Tensor| network.linear(id, x, &pass);
                sum.add(timed(&shape, device, run)?, 1.0);
            }
            ModuleKind::Norm => sum.add(
                timed(&shape, device, |x| norm(trainer, id, info, x, &pass))?,
                1.0,
            ),
            _ => {}
        }
    }
    let (q, kv) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let spec = Attention {
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        scale: config.attention_scale,
        causal: config.is_causal(),
        window: config.windows.get(last).copied().flatten(),
        prefix: 0,
        softcap: config.attention_softcap,
        mask: Mask::default(),
    };
    let keys = Tensor::normal(RngKey::new(2), 0.0, 1.0, &[rows, seq, kv], device)?.leaf();
    let run = |x: &Tensor| Ok(x.attention(&keys, &keys, &spec)?);
    sum.add(timed(&[rows, seq, q], device, run)?, 1.0);
    if config.rope.is_some() {
        for heads in [config.num_heads, config.num_kv_heads] {
            let rope = turn(heads, config.head_dim, rows, seq);
            let run = |x: &Tensor| Ok(x.rope(&rope)?);
            sum.add(
                timed(&[rows, seq, heads * config.head_dim], device, run)?,
                1.0,
            );
        }
    }
    let inner = [rows, seq, config.intermediate_size];
    let up = Tensor::full(0.5, &inner, device)?.leaf();
    let gated = trainer.is_gated();
    let run = |x: &Tensor| match gated {
        true => Ok(x.glu(Glu::Silu, &up)?),
        false => Ok(x.unary(Unary::Gelu)?),
    };
    sum.add(timed(&inner, device, run)?, 1.0);
    let hidden = [rows, seq, config.hidden_size];
    let other = Tensor::full(0.5, &hidden, device)?.leaf();
    // Two residuals, and gradients of q, k and v, and of gate and up, that meet in front of them.
    sum.add(timed(&hidden, device, |x| Ok(x.add(&other)?))?, 2.0);
    let meet = timed(&hidden, device, |x| Ok(x.add(&other)?))?.forward;
    sum.both += if gated { 5.0 } else { 4.0 } * meet;
    Ok(sum)
}

fn norm(
    trainer: &Trainer<'_>,
    id: ModuleId,
    info: &ModuleInfo,
    x: &Tensor,
    pass: &Pass,
) -> Result<Tensor> {
    let (network, config) = (trainer.model().network(), trainer.model().config());
    match info.bias {
        Some(_) => network.layer_norm(id, x, config.norm_eps, pass),
        None => network.rms_norm(id, x, config.norm_eps, config.norm_offset, pass),
    }
}

fn turn(heads: usize, head_dim: usize, rows: usize, seq: usize) -> Arc<Rope> {
    let half = head_dim / 2;
    let table = Arc::new(vec![std::f32::consts::FRAC_1_SQRT_2; seq * half]);
    Arc::new(Rope {
        heads,
        head_dim,
        half,
        cos: table.clone(),
        sin: table,
        positions: Arc::new((0..rows).flat_map(|_| 0..seq as u32).collect()),
    })
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
    let rows = (labels.round() as usize).clamp(1, keeps::LOGIT_ROWS);
    let pass = Pass::train(RngKey::new(0));
    let targets = vec![0; rows];
    let run = |x: &Tensor| Ok(network.linear(id, x, &pass)?.cross_entropy(&targets)?);
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
