//! The training loop.
//!
//! A run is a function of its configuration, data and weights: which rows a step sees and what dropout drops follow
//! from the seed and the step's number alone, so a checkpoint needs no generator state, and a resumed run ends in the
//! same bytes as one that was never stopped.

mod output;
mod pending;
mod setup;
mod state;
mod step;

use std::cell::Cell;
use std::path::Path;
use std::time::Instant;

use peft_core::{
    Error, Grads, Param, ParamGroups, Pass, Result, Tensor, TrainCx, TrainData, TrainHooks,
};
use peft_io::{LineLog, Scratch};
use peft_models::Model;
use peft_tensor::{AUTO, RngKey};

use pending::Shown;
pub use setup::{encode_for, task_for};

use crate::config::TrainConfig;
use crate::data::{
    Collated, Dataset, Example, LabelNames, beginning, collate, join, joins, plan_epoch,
};
use crate::optim::{Groups, Optimizer};
use crate::{EvalOptions, EvalReport, Observer, Summary, evaluate, io};

/// The name the trained adapter has in the network.
pub const ADAPTER_NAME: &str = "default";
/// The device that is there everywhere.
const CPU: &str = "cpu";
/// The log's file name.
const METRICS: &str = "metrics.jsonl";
/// The folder of the checkpoints.
const CHECKPOINTS: &str = "checkpoints";

/// Trains as a configuration says, from its files to its output folder.
///
/// With `resume`, goes on from the newest complete checkpoint in `output.dir` (from the start if there is none) and ends
/// in the same adapter and the same metrics as an uninterrupted run.
///
/// Where the device was left to choose (`auto`) and one that was chosen runs out of memory or goes away, the run goes on by
/// the processor, from the newest checkpoint if there is one.
///
/// # Errors
/// Anything wrong with configuration, model, adapter or data, before anything is written; a loss or gradient that is not
/// finite, with the step and the rows; a folder that holds another run.
pub fn train(config: &TrainConfig, resume: bool, observer: &mut dyn Observer) -> Result<Summary> {
    let (failed, ready) = match setup::trainer(config, resume, observer) {
        Ok(mut trainer) => match trainer.run(resume, observer) {
            Ok(summary) => return Ok(summary),
            Err(e) => (e, trainer.ready),
        },
        Err(e) => (e, false),
    };
    if config.device != AUTO || !failed.is_device() {
        return Err(failed);
    }
    observer.message(&format!("{failed}; from here on by the processor"));
    let mut config = config.clone();
    CPU.clone_into(&mut config.device);
    // What is in the folder is this run's once it has been made ready for it.
    let resume = resume || ready;
    setup::trainer(&config, resume, observer)?.run(resume, observer)
}

/// A run that could start, with nothing written yet.
pub(crate) fn prepare(config: &TrainConfig) -> Result<Trainer<'_>> {
    setup::trainer(config, true, &mut ())
}

/// A run about to start: a model with its trainable parameters, and encoded data.
pub struct Trainer<'a> {
    config: &'a TrainConfig,
    model: Model,
    train: Dataset,
    eval: Option<Dataset>,
    labels: Option<LabelNames>,
    /// Whether rows of different lengths become one.
    joins: bool,
    /// Whether what they begin with is run once.
    shares: bool,
    /// Whether the output folder has nothing of other runs in it any more.
    ready: bool,
    /// Blocks in front of this one are computed again in the backward pass; found out when the run starts.
    again: usize,
}

/// What changes from step to step.
struct Progress {
    hooks: Vec<(String, Box<dyn TrainHooks>)>,
    groups: Groups,
    optimizer: Optimizer,
    step: u64,
    /// Seconds spent before this process.
    earlier: f64,
    begun: Instant,
    /// Batches of the epoch in progress.
    epoch: Option<(u64, Vec<Vec<usize>>)>,
    first_loss: Option<f64>,
    eval_before: Option<EvalReport>,
    eval_after: Option<EvalReport>,
}

impl Progress {
    fn elapsed(&self) -> f64 {
        self.earlier + self.begun.elapsed().as_secs_f64()
    }
}

impl<'a> Trainer<'a> {
    /// A run on a model that has what is to be trained attached under [`ADAPTER_NAME`], or, without an adapter, trains its
    /// base ([`peft_core::Network::train_base`]). The configuration's `train` and `output` count; its `model` and `data`
    /// only where they say how batches are made.
    pub fn new(
        config: &'a TrainConfig,
        model: Model,
        train: Dataset,
        eval: Option<Dataset>,
        labels: Option<LabelNames>,
    ) -> Self {
        let joins = config.data.padding_free && setup::try_sharing(&model, None).is_ok();
        let shares = joins && config.data.shared_prompts && model.shares_beginnings();
        Self {
            config,
            model,
            train,
            eval,
            labels,
            joins,
            shares,
            ready: false,
            again: 0,
        }
    }

    /// Whether a batch of these rows has no padding because they are joined.
    pub(crate) fn joined(&self, rows: &[&Example]) -> bool {
        self.joins && joins(rows)
    }

    /// How many tokens these rows begin with are run once for all of them.
    pub(crate) fn shared(&self, rows: &[&Example]) -> usize {
        if self.shares { beginning(rows) } else { 0 }
    }

    /// A batch of these rows, without padding where that is possible.
    fn batch(&self, rows: &[&Example]) -> Collated {
        match self.joins {
            true => join(rows, self.train.pad, self.shares),
            false => collate(rows, self.train.pad),
        }
    }

    pub(crate) fn config(&self) -> &TrainConfig {
        self.config
    }

    /// The rows to train on.
    pub(crate) fn examples(&self) -> &[Example] {
        &self.train.examples
    }

    /// The model, trained or not.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Optimiser steps of one epoch and of the whole run.
    pub fn steps(&self) -> (u64, u64) {
        let train = &self.config.train;
        let batches = self.train.examples.len().div_ceil(train.batch_size.max(1));
        let per_epoch = batches.div_ceil(train.gradient_accumulation.max(1)).max(1) as u64;
        let total = train
            .steps
            .unwrap_or_else(|| (train.epochs * per_epoch as f64).ceil() as u64);
        (per_epoch, total)
    }

    /// Runs to the end and writes the result.
    ///
    /// # Errors
    /// As [`train`].
    pub fn run(&mut self, resume: bool, observer: &mut dyn Observer) -> Result<Summary> {
        let (_, total) = self.steps();
        let config = self.config;
        let folder = &config.output.dir;
        let checkpoints = folder.join(CHECKPOINTS);
        let params = self.all_params()?;
        let trainable = params
            .iter()
            .filter(|p| p.is_trainable())
            .map(Param::numel)
            .sum();
        // What reading the model and the data left behind.
        self.model.forget_tokenizer();
        peft_tensor::release_heap();
        let plan = self.within_limit()?;
        self.again = match plan.again {
            0 => 0,
            again => self.first_live() + again,
        };
        let mut progress = self.progress(&params)?;
        if plan.paged {
            let file = Scratch::create(folder).map_err(io)?;
            progress.optimizer.page_to(file);
            observer.message(&format!(
                "the optimizer's moments are kept on disk, which leaves {} MB to be predicted: {}",
                plan.memory.total().div_ceil(1_000_000),
                plan.memory.describe()
            ));
        }
        if let Some(note) = progress.optimizer.note(self.model.device()) {
            observer.message(&note);
        }
        let newest = if resume {
            state::newest(&checkpoints)?
        } else {
            None
        };
        let mut log = match &newest {
            Some(name) => {
                state::restore(self, &mut progress, &params, &checkpoints, name)?;
                observer.message(&format!(
                    "going on from {}",
                    checkpoints.join(name).display()
                ));
                let done = progress.step;
                LineLog::resume(&folder.join(METRICS), |line| {
                    line["step"].as_u64().is_some_and(|s| s <= done)
                })
            }
            None => {
                if resume {
                    observer.message(&format!(
                        "no checkpoint in {}: from the start",
                        checkpoints.display()
                    ));
                }
                self.hook(&mut progress, &params, &mut Grads::default(), |hook, cx| {
                    hook.prepare(cx)
                })?;
                output::clear(folder, &checkpoints, config.output.overwrite || resume)?;
                self.ready = true;
                LineLog::create(&folder.join(METRICS))
            }
        }
        .map_err(io)?;

        observer.start(progress.step, total, trainable);
        if config.train.eval_before && progress.step == 0 {
            progress.eval_before = self.evaluate(0, &mut log, observer)?;
        }
        let mut shown = Shown::new(&self.model);
        while progress.step < total {
            let done = self.step(&mut progress);
            let failed = match done {
                Ok(step) => {
                    shown.waiting.push(step);
                    None
                }
                Err(e) => Some(e),
            };
            let step = progress.step;
            let evaluates = step == total || due(step, config.train.eval_every);
            let saves = due(step, config.train.save_every);
            // What went wrong before is what the user should hear of.
            if failed.is_some() || evaluates || saves || shown.is_time() {
                self.show(&mut progress, &mut shown, &mut log, observer)?;
            }
            if let Some(e) = failed {
                return Err(e);
            }
            if evaluates {
                progress.eval_after = self.evaluate(step, &mut log, observer)?;
            }
            // After everything else of the step, so that a checkpoint's log is complete.
            if saves {
                let path = state::save(self, &progress, &params, &checkpoints)?;
                observer.saved(&path);
            }
        }
        output::write(config, &self.model, self.labels.as_ref())?;
        observer.saved(folder);
        Ok(Summary {
            output: folder.clone(),
            steps: progress.step,
            trainable,
            classifier: self.labels.is_some(),
            first_loss: progress.first_loss,
            last_loss: shown.last_loss,
            elapsed_s: progress.elapsed(),
            eval_before: progress.eval_before,
            eval_after: progress.eval_after,
        })
    }

    fn progress(&self, params: &[Param]) -> Result<Progress> {
        let hooks = self.model.network().trainers();
        let mut rules = ParamGroups::default();
        hooks
            .iter()
            .for_each(|(_, hook)| hook.param_groups(&mut rules));
        let train = &self.config.train;
        Ok(Progress {
            groups: Groups::new(train, &rules, params)?,
            optimizer: Optimizer::new(
                train.betas,
                train.eps,
                train.optimizer.eight_bit(),
                self.model.device(),
            ),
            hooks,
            step: 0,
            earlier: 0.0,
            begun: Instant::now(),
            epoch: None,
            first_loss: None,
            eval_before: None,
            eval_after: None,
        })
    }

    /// Every parameter a checkpoint holds: those of all adapters, also frozen ones, or the trained base.
    pub(crate) fn all_params(&self) -> Result<Vec<Param>> {
        let network = self.model.network();
        let mut params = Vec::new();
        for name in network.adapters() {
            params.extend(network.adapter_parameters(name)?);
        }
        if params.is_empty() {
            params = network.parameters();
        }
        if !params.iter().any(Param::is_trainable) {
            return Err(peft_core::Error::other(
                "there is nothing to train: no adapter is attached and the base is frozen",
            ));
        }
        Ok(params)
    }

    /// Calls one hook of every method.
    fn hook(
        &self,
        progress: &mut Progress,
        params: &[Param],
        grads: &mut Grads,
        call: impl Fn(&mut dyn TrainHooks, &mut TrainCx<'_>) -> Result<()>,
    ) -> Result<()> {
        let step = progress.step;
        self.hook_at(progress, params, grads, (step, &[]), call)
    }

    /// As [`Trainer::hook`], with the number of steps before the one that is meant and the gradients that were used.
    fn hook_at(
        &self,
        progress: &mut Progress,
        params: &[Param],
        grads: &mut Grads,
        (taken, used): (u64, &[Option<Tensor>]),
        call: impl Fn(&mut dyn TrainHooks, &mut TrainCx<'_>) -> Result<()>,
    ) -> Result<()> {
        let (_, total_steps) = self.steps();
        let reset = Cell::new(false);
        let rows = Rows(self);
        let mut cx = TrainCx {
            step: progress.step,
            total_steps,
            network: self.model.network(),
            params,
            grads,
            used,
            learning_rate: self.learning_rate(taken),
            data: Some(&rows),
            reset_optimizer: &reset,
        };
        progress
            .hooks
            .iter_mut()
            .try_for_each(|(_, hook)| call(hook.as_mut(), &mut cx))?;
        if reset.get() {
            progress.optimizer.reset()?;
        }
        Ok(())
    }

    /// The learning rate of the step after `step`, before the factors of parameter groups.
    fn learning_rate(&self, step: u64) -> f64 {
        let (_, total) = self.steps();
        let train = &self.config.train;
        let warmup = self.config.warmup(total);
        train.learning_rate * train.schedule.factor(step, warmup, total)
    }

    fn evaluate(
        &self,
        step: u64,
        log: &mut LineLog,
        observer: &mut dyn Observer,
    ) -> Result<Option<EvalReport>> {
        let Some(data) = &self.eval else {
            return Ok(None);
        };
        let train = &self.config.train;
        let options = EvalOptions {
            batch_size: train.eval_batch_size.unwrap_or(train.batch_size),
            choices: self.config.data.choices,
        };
        let report = evaluate(&self.model, data, &options, observer)?;
        log.push(&report.to_json(step)).map_err(io)?;
        observer.eval(step, &report);
        Ok(Some(report))
    }

    /// The rows of each forward pass of step `step`, from 0.
    fn batches<'p>(&self, progress: &'p mut Progress, step: u64) -> &'p [Vec<usize>] {
        let (per_epoch, _) = self.steps();
        let (epoch, at) = (step / per_epoch, (step % per_epoch) as usize);
        if progress
            .epoch
            .as_ref()
            .is_none_or(|(planned, _)| *planned != epoch)
        {
            progress.epoch = Some((epoch, self.epoch(epoch)));
        }
        let all = progress
            .epoch
            .as_ref()
            .map_or(&[][..], |(_, batches)| batches);
        let many = self.config.train.gradient_accumulation.max(1);
        &all[(at * many).min(all.len())..((at + 1) * many).min(all.len())]
    }

    /// The batches of an epoch.
    pub(crate) fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let data = &self.config.data;
        let size = self.config.train.batch_size;
        let lengths = self.train.lengths();
        plan_epoch(&lengths, size, data.shuffle, data.bucket, self.key(), epoch)
    }

    /// The stream of everything random in the run but initial values.
    fn key(&self) -> RngKey {
        RngKey::new(self.config.train.seed).fork("train")
    }
}

fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Whether a folder has results of a run in it.
fn holds_a_run(folder: &Path) -> bool {
    [
        METRICS,
        CHECKPOINTS,
        peft_io::ADAPTER_CONFIG,
        peft_io::ADAPTER_WEIGHTS,
        "model.safetensors",
    ]
    .iter()
    .any(|name| folder.join(name).exists())
}

/// The run's training rows, as methods may ask about them.
struct Rows<'a>(&'a Trainer<'a>);

impl TrainData for Rows<'_> {
    fn rows(&self) -> usize {
        self.0.train.examples.len()
    }

    fn gradient(&self, rows: &[usize]) -> Result<(f64, Grads)> {
        let all = &self.0.train.examples;
        let examples: Vec<&Example> = rows.iter().filter_map(|&row| all.get(row)).collect();
        if examples.len() != rows.len() {
            return Err(Error::other(format!(
                "a method asked for training rows beyond the {} there are",
                all.len()
            )));
        }
        let collated = self.0.batch(&examples);
        let mut pass = Pass::eval();
        pass.checkpoint = self.0.again;
        let model = &self.0.model;
        let out = model.loss(&collated.batch, &collated.labels, &pass)?;
        if out.count == 0 {
            return Ok((0.0, Grads::default()));
        }
        Ok((out.sum()? / out.count as f64, out.loss.backward()?))
    }
}

#[cfg(test)]
mod tests;
