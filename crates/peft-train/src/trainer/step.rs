//! One optimiser step: the mean loss over all labels of its batches, its gradient, hooks, clipping, AdamW.

use std::cell::Cell;
use std::time::Instant;

use peft_core::{Error, Grads, Pass, Result, TrainCx};

use super::pending::{Batch, Pending};
use super::{Progress, Rows, Trainer, pending};
use crate::data::{Example, Goal};
use crate::optim::take_gradients;
use crate::report::StepReport;

impl Trainer<'_> {
    /// Does the step after `progress.step`. However many batches the step has, its loss is the mean over all their labels
    /// together, as in transformers since 4.46 (`num_items_in_batch`), not the mean of the batches' means.
    ///
    /// On a device that works by itself the step is under way when this returns, and nothing has been waited for: what
    /// it came to is looked at by [`Trainer::settled`].
    pub(super) fn step(&self, progress: &mut Progress) -> Result<Pending> {
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
        let at_once = self.model.device().backend().waits().is_none();
        let (mut losses, mut tokens) = (Vec::new(), 0);
        for (i, rows) in batches.iter().enumerate() {
            let collated = self.batch(&self.rows(rows));
            let mut pass = Pass::train(self.key().fork("step").fork_n(step).fork_n(i as u64));
            pass.checkpoint = self.again;
            tokens += collated.tokens;
            let out = self.model.loss(&collated.batch, &collated.labels, &pass)?;
            if out.count == 0 {
                continue;
            }
            let batch = Batch {
                parts: out.parts,
                rows: rows.clone(),
            };
            if at_once {
                batch.sum(self, step)?;
            }
            losses.push(batch);
            let loss = if out.count == labels {
                out.loss
            } else {
                out.loss.scale(out.count as f32 / labels as f32)?
            };
            grads.merge(loss.backward()?)?;
        }

        let mut penalties = Vec::new();
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
            if at_once {
                pending::penalty(step, term.item()?)?;
            }
            penalties.push(term.detach());
            if term.requires_grad() {
                grads.merge(term.backward()?)?;
            }
        }
        self.hook(progress, &params, &mut grads, |hook, cx| {
            hook.after_backward(cx)
        })?;

        let taken = take_gradients(&params, &mut grads);
        let learning_rate = self.learning_rate(step);
        let groups = &mut progress.groups;
        let (norm, used) = progress.optimizer.step(
            &params,
            taken,
            |key| groups.rate(key, learning_rate),
            train.max_grad_norm,
            progress.hooks.iter().any(|(_, hook)| hook.reads_used()),
        )?;
        if at_once {
            self.check_norm(step, &norm, &batches)?;
        }
        progress.step += 1;
        self.hook_at(progress, &params, &mut grads, (step, &used), |hook, cx| {
            hook.after_step(cx)
        })?;

        self.model.device().backend().hand_over()?;

        let report = StepReport {
            step: progress.step,
            total_steps,
            epoch: progress.step as f64 / per_epoch as f64,
            loss: f64::NAN,
            penalty: None,
            learning_rate,
            grad_norm: f64::NAN,
            tokens,
            seconds: 0.0,
            tokens_per_second: 0.0,
            elapsed_s: 0.0,
        };
        Ok(Pending {
            report,
            begun,
            losses,
            labels,
            penalties,
            norm,
        })
    }

    /// The rows of these numbers.
    pub(super) fn rows(&self, rows: &[usize]) -> Vec<&Example> {
        let all = &self.train.examples;
        rows.iter().filter_map(|&row| all.get(row)).collect()
    }

    pub(super) fn not_finite(&self, step: u64, what: &str, value: f64, rows: &[&Example]) -> Error {
        Error::other(format!(
            "step {}: {what} is {value}, with {}; no adapter was written. A lower train.learning_rate, or a \
             train.max_grad_norm above 0, may help",
            step + 1,
            self.train.places(rows)
        ))
    }
}
