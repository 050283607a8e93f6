//! One optimiser step: the mean loss over all labels of its batches, its gradient, hooks, clipping, AdamW.

use std::cell::Cell;
use std::time::Instant;

use peft_core::{Error, Grads, Param, Pass, Result, Tensor, TrainCx};

use super::{Progress, Rows, Trainer};
use crate::data::{Example, Goal};
use crate::optim::{clip_factor, norms, take_gradients, total_norm};
use crate::report::StepReport;

impl Trainer<'_> {
    /// Does the step after `progress.step`. However many batches the step has, its loss is the mean over all their labels
    /// together, as in transformers since 4.46 (`num_items_in_batch`), not the mean of the batches' means.
    pub(super) fn step(&self, progress: &mut Progress) -> Result<StepReport> {
        let begun = Instant::now();
        let train = &self.config.train;
        let network = self.model.network();
        let step = progress.step;
        let (per_epoch, total_steps) = self.steps();
        let batches = self.batches(progress, step).to_vec();
        let mut grads = Grads::default();

        self.hook(progress, &network.parameters(), &mut grads, |hook, cx| {
            hook.before_forward(cx)
        })?;
        // Hooks may freeze parameters.
        let params = network.parameters();
        let virtual_tokens = network.prompt_len() > 0;
        let examples = || {
            batches
                .iter()
                .flatten()
                .filter_map(|&row| self.train.examples.get(row))
        };
        let inside = network.prompt_labels().len();
        let labels: usize = examples()
            .map(|e| match e.goal {
                Goal::Tokens { .. } => e.labelled(virtual_tokens) + inside,
                Goal::Class(_) => e.labelled(virtual_tokens),
            })
            .sum();
        let (mut sum, mut tokens) = (0.0, 0);
        for (i, rows) in batches.iter().enumerate() {
            let rows: Vec<&Example> = rows
                .iter()
                .filter_map(|&row| self.train.examples.get(row))
                .collect();
            let collated = self.batch(&rows);
            let mut pass = Pass::train(self.key().fork("step").fork_n(step).fork_n(i as u64));
            pass.checkpoint = self.again;
            tokens += collated.tokens;
            let out = self.model.loss(&collated.batch, &collated.labels, &pass)?;
            if out.count == 0 {
                continue;
            }
            if !out.sum.is_finite() {
                return Err(self.not_finite(step, "the loss", out.sum, &rows));
            }
            sum += out.sum;
            let loss = if out.count == labels {
                out.loss
            } else {
                out.loss.scale(out.count as f32 / labels as f32)?
            };
            grads.merge(loss.backward()?)?;
        }

        let mut penalty = None;
        let (reset, rows) = (Cell::new(false), Rows(self));
        for (_, hook) in &progress.hooks {
            let cx = TrainCx {
                step,
                total_steps,
                network,
                params: &params,
                grads: &mut grads,
                used: &[],
                learning_rate: self.learning_rate(step),
                data: Some(&rows),
                reset_optimizer: &reset,
            };
            let Some(term) = hook.penalty(&cx)? else {
                continue;
            };
            let value = f64::from(term.item()?);
            if !value.is_finite() {
                return Err(Error::other(format!(
                    "step {}: the method's penalty is {value}",
                    step + 1
                )));
            }
            penalty = Some(penalty.unwrap_or(0.0) + value);
            if term.requires_grad() {
                grads.merge(term.backward()?)?;
            }
        }
        self.hook(progress, &params, &mut grads, |hook, cx| {
            hook.after_backward(cx)
        })?;

        let taken = take_gradients(&params, &mut grads)?;
        let each = norms(&taken);
        let norm = total_norm(&each);
        if !norm.is_finite() {
            let worst = each
                .iter()
                .position(|n| !n.is_finite())
                .and_then(|i| params.get(i));
            let what = format!(
                "the gradient of {}",
                worst.map_or("a parameter", |p| p.key())
            );
            return Err(self.not_finite(step, &what, norm, &examples().collect::<Vec<_>>()));
        }
        let factor = clip_factor(norm, train.max_grad_norm);
        let learning_rate = self.learning_rate(step);
        for (param, grad) in params.iter().zip(&taken) {
            if let Some(grad) = grad {
                let rate = progress.groups.rate(param.key(), learning_rate);
                progress.optimizer.step(param, grad, factor, rate)?;
            }
        }
        // Full-parameter training has no hooks: its gradients are as large as the model and are not copied for none.
        let used = match progress.hooks.is_empty() {
            true => Vec::new(),
            false => used(&params, &taken, factor)?,
        };
        progress.step += 1;
        self.hook_after(progress, &params, &mut grads, &used, |hook, cx| {
            hook.after_step(cx)
        })?;

        Ok(StepReport {
            step: progress.step,
            total_steps,
            epoch: progress.step as f64 / per_epoch as f64,
            loss: sum / labels.max(1) as f64,
            penalty,
            learning_rate,
            grad_norm: norm,
            tokens,
            tokens_per_second: tokens as f64 / begun.elapsed().as_secs_f64().max(1e-9),
            elapsed_s: progress.elapsed(),
        })
    }

    fn not_finite(&self, step: u64, what: &str, value: f64, rows: &[&Example]) -> Error {
        Error::other(format!(
            "step {}: {what} is {value}, with {}; no adapter was written. A lower train.learning_rate, or a \
             train.max_grad_norm above 0, may help",
            step + 1,
            self.train.places(rows)
        ))
    }
}

/// Gradients as the optimiser took them.
fn used(params: &[Param], taken: &[Option<Vec<f32>>], factor: f32) -> Result<Vec<Option<Tensor>>> {
    let one = |(param, grad): (&Param, &Option<Vec<f32>>)| {
        let Some(grad) = grad else { return Ok(None) };
        let clipped = grad.iter().map(|g| g * factor).collect();
        let value = param.tensor();
        Ok(Some(Tensor::from_vec(
            clipped,
            value.shape(),
            value.device(),
        )?))
    };
    params.iter().zip(taken).map(one).collect()
}
