//! Steps whose values nobody has asked for yet.
//!
//! A device that works by itself is waited for only when values are shown: losses and gradient norms of a few steps are
//! then read together. So a loss or a gradient that is not finite is found up to [`MOST`] steps after it came up, and never
//! later than the next evaluation, checkpoint or end; the step that had it is named all the same, it has moved nothing if a
//! gradient was not finite, and nothing is saved behind it.

use std::time::{Duration, Instant};

use peft_core::{Error, Result, Tensor};
use peft_io::LineLog;
use peft_models::Model;

use super::{Progress, Trainer};
use crate::optim::Norm;
use crate::report::StepReport;
use crate::{Observer, io};

/// Steps that are shown together at most.
const MOST: usize = 8;
/// As many steps are shown together as take this long.
const EVERY: Duration = Duration::from_secs(4);

/// One forward pass of a step.
pub(super) struct Batch {
    /// Numbers that add up to its loss.
    pub(super) parts: Vec<Tensor>,
    /// Its rows.
    pub(super) rows: Vec<usize>,
}

/// A step that is done or under way.
pub(super) struct Pending {
    /// Without the loss, the penalty, the norm and what the clock says.
    pub(super) report: StepReport,
    pub(super) begun: Instant,
    pub(super) losses: Vec<Batch>,
    /// Labels of all batches.
    pub(super) labels: usize,
    /// What the methods add to the loss.
    pub(super) penalties: Vec<Tensor>,
    pub(super) norm: Norm,
}

/// What has been shown, and what waits for it.
pub(super) struct Shown {
    pub(super) waiting: Vec<Pending>,
    pub(super) last_loss: Option<f64>,
    /// Steps to show together.
    together: usize,
    /// Whether values are there when a step returns.
    at_once: bool,
}

impl Shown {
    pub(super) fn new(model: &Model) -> Self {
        Self {
            waiting: Vec::new(),
            last_loss: None,
            // The first step is: whoever waits sees that something happens.
            together: 1,
            at_once: model.device().backend().waits().is_none(),
        }
    }

    /// Whether those that wait should be shown.
    pub(super) fn is_time(&self) -> bool {
        self.at_once || self.waiting.len() >= self.together
    }
}

impl Batch {
    /// Its loss.
    ///
    /// # Errors
    /// If it is not finite.
    pub(super) fn sum(&self, trainer: &Trainer<'_>, step: u64) -> Result<f64> {
        let mut sum = 0.0;
        for part in &self.parts {
            sum += f64::from(part.item()?);
        }
        match sum.is_finite() {
            true => Ok(sum),
            false => Err(trainer.not_finite(step, "the loss", sum, &trainer.rows(&self.rows))),
        }
    }
}

/// The value of a penalty.
///
/// # Errors
/// If it is not finite.
pub(super) fn penalty(step: u64, value: f32) -> Result<f64> {
    match value.is_finite() {
        true => Ok(f64::from(value)),
        false => Err(Error::other(format!(
            "step {}: the method's penalty is {value}",
            step + 1
        ))),
    }
}

impl Trainer<'_> {
    /// Shows the steps that wait: in the log and to the observer.
    pub(super) fn show(
        &self,
        progress: &mut Progress,
        shown: &mut Shown,
        log: &mut LineLog,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let Some(first) = shown.waiting.first() else {
            return Ok(());
        };
        let begun = first.begun;
        let count = shown.waiting.len();
        let tokens: usize = shown.waiting.iter().map(|p| p.report.tokens).sum();
        here(&mut shown.waiting)?;
        let seconds = begun.elapsed().as_secs_f64().max(1e-9);
        let fit = EVERY.as_secs_f64() / (seconds / count as f64);
        shown.together = (fit as usize).clamp(1, MOST);
        for pending in shown.waiting.drain(..) {
            let mut report = self.settled(pending)?;
            report.seconds = seconds / count as f64;
            report.tokens_per_second = tokens as f64 / seconds;
            report.elapsed_s = progress.elapsed();
            progress.first_loss = progress.first_loss.or(Some(report.loss));
            shown.last_loss = Some(report.loss);
            log.push(&report.to_json()).map_err(io)?;
            observer.step(&report);
        }
        Ok(())
    }

    /// The report of a step whose values are here.
    fn settled(&self, pending: Pending) -> Result<StepReport> {
        let Pending {
            mut report,
            losses,
            labels,
            penalties,
            norm,
            ..
        } = pending;
        let step = report.step - 1;
        let mut sum = 0.0;
        for batch in &losses {
            sum += batch.sum(self, step)?;
        }
        for term in &penalties {
            let value = penalty(step, term.item()?)?;
            report.penalty = Some(report.penalty.unwrap_or(0.0) + value);
        }
        let rows: Vec<Vec<usize>> = losses.into_iter().map(|batch| batch.rows).collect();
        report.grad_norm = self.check_norm(step, &norm, &rows)?;
        report.loss = sum / labels.max(1) as f64;
        Ok(report)
    }

    /// The norm of a step's gradients.
    ///
    /// # Errors
    /// If it is not finite, with the parameter that has such a gradient.
    pub(super) fn check_norm(&self, step: u64, norm: &Norm, batches: &[Vec<usize>]) -> Result<f64> {
        let (value, whose) = norm.value()?;
        if value.is_finite() && whose.is_none() {
            return Ok(value);
        }
        let what = format!("the gradient of {}", whose.unwrap_or("a parameter"));
        Err(self.not_finite(step, &what, value, &self.rows(&batches.concat())))
    }
}

/// Brings the values of all steps to the processor, waiting for the device once.
fn here(waiting: &mut [Pending]) -> Result<()> {
    let mut places: Vec<&mut Tensor> = Vec::new();
    for pending in waiting {
        places.extend(pending.losses.iter_mut().flat_map(|batch| &mut batch.parts));
        places.extend(&mut pending.penalties);
        places.extend(pending.norm.tensor());
    }
    let device = match places.first() {
        Some(first) if first.device().backend().waits().is_some() => peft_tensor::Device::cpu(),
        _ => return Ok(()),
    };
    let values = Tensor::into_vecs(places.iter().map(|place| place.detach()).collect())?;
    for (place, values) in places.into_iter().zip(values) {
        *place = Tensor::from_vec(values, place.shape(), &device)?;
    }
    Ok(())
}
