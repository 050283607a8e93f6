//! What a run will need, said before it starts: peak memory by parts, and the time of a step.
//!
//! Memory is counted from the model, the adapter, the longest batch of the first epoch and [`keeps`], the table of what
//! each layer keeps. Time comes from running one block at the run's sizes on this machine ([`time`]).

mod keeps;
mod time;

use std::collections::HashSet;

use peft_core::{ModuleInfo, Param, Result};
use peft_models::Task;
use peft_tensor::Keep;
use serde_json::{Value, json};

use crate::Trainer;
use crate::config::TrainConfig;
use crate::data::Example;
use crate::optim::AdamW;
use keeps::{Trained, VALUE};

/// Peak memory of a run in bytes, by parts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The base's weights in their stored formats; those of a mapped file count, although the system may take them back.
    pub base: u64,
    /// Parameters of the adapter.
    pub adapter: u64,
    /// Gradients of what is trained, as far as they are there at the peak: as the backward pass makes them and as the
    /// optimiser takes them, or those of earlier batches of the step.
    pub gradients: u64,
    /// The optimiser's moments.
    pub optimizer: u64,
    /// What the layers keep for the backward pass.
    pub activations: u64,
    /// A chunk of logits with its gradient, or a block's work in the backward pass, whichever is more.
    pub work: u64,
    /// The program, the tokenizer, the data, buffers.
    pub other: u64,
}

impl Memory {
    /// All parts together.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The parts with their names.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("base", self.base),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("logits or block", self.work),
            ("program and data", self.other),
        ]
    }

    /// As a line for messages, in MB.
    pub fn describe(&self) -> String {
        let parts = self.parts().into_iter().filter(|(_, bytes)| *bytes > 0);
        let parts: Vec<String> = parts
            .map(|(name, bytes)| format!("{name} {} MB", bytes.div_ceil(1_000_000)))
            .collect();
        parts.join(", ")
    }
}

/// How a run gets by with its memory.
pub(crate) struct Plan {
    pub(crate) memory: Memory,
    /// Blocks that are computed again, of those that keep something.
    pub(crate) again: usize,
    /// Whether the moments go to a file.
    pub(crate) paged: bool,
}

/// A run as it will be.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// Peak resident memory.
    pub memory: Memory,
    /// Whether the moments go to a file because of `train.memory_limit`.
    pub paged: bool,
    /// Blocks that are computed again in the backward pass.
    pub again: usize,
    /// Optimiser steps in all.
    pub steps: u64,
    /// Rows and tokens of a row, padding included, of the largest batch.
    pub largest: (usize, usize),
    /// Seconds of a step, the mean over the first epoch.
    pub step_seconds: f64,
    /// Tokens of a step, padding not counted, the mean over the first epoch.
    pub step_tokens: f64,
}

impl Forecast {
    /// For machines.
    pub fn to_json(&self) -> Value {
        let parts = self.memory.parts().into_iter();
        let parts: serde_json::Map<String, Value> = parts
            .map(|(name, bytes)| (name.replace(' ', "_"), json!(bytes)))
            .collect();
        json!({
            "peak_bytes": self.memory.total(), "parts": parts, "paged": self.paged,
            "checkpointed_blocks": self.again, "steps": self.steps,
            "largest_batch": [self.largest.0, self.largest.1], "step_seconds": self.step_seconds,
            "step_tokens": self.step_tokens,
            "tokens_per_second": self.step_tokens / self.step_seconds.max(1e-9),
        })
    }
}

/// What a run with this configuration will need. Model, adapter and data are opened as for a run; nothing is written.
///
/// # Errors
/// As [`crate::train`], before its first step.
pub fn predict(config: &TrainConfig) -> Result<Forecast> {
    crate::trainer::prepare(config)?.forecast()
}

/// A batch as memory and time see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size {
    rows: usize,
    /// Tokens of a row with padding and virtual tokens; their mean where rows are joined without padding.
    seq: usize,
    /// Places whose prediction is learned from.
    labels: usize,
    /// Tokens that are looked at.
    tokens: usize,
}

impl Trainer<'_> {
    /// What this run will need.
    ///
    /// # Errors
    /// Whatever the layers say when they are tried.
    pub fn forecast(&self) -> Result<Forecast> {
        self.model().forget_tokenizer();
        peft_tensor::release_heap();
        let sizes = self.sizes();
        let plan = self.within_limit()?;
        let largest = largest(&sizes);
        let (per_epoch, steps) = self.steps();
        let tokens: usize = sizes.iter().map(|size| size.tokens).sum();
        // The first epoch, or as much of it as the run has.
        let known = per_epoch.min(steps).max(1) as f64;
        let batches = sizes.len() as f64 / known;
        Ok(Forecast {
            memory: plan.memory,
            paged: plan.paged,
            again: plan.again,
            steps,
            largest: (largest.rows, largest.seq),
            step_seconds: time::step(self, &sizes, batches, plan.again)?,
            step_tokens: tokens as f64 / known,
        })
    }

    /// Peak memory with what `train.memory_limit` makes necessary: as few blocks computed again as it takes, where that is
    /// left open, and the moments in a file if not even all of them are enough.
    ///
    /// # Errors
    /// If nothing is, with the parts.
    pub(crate) fn within_limit(&self) -> Result<Plan> {
        let train = &self.config().train;
        let (sizes, blocks) = (self.sizes(), self.blocks());
        let live = blocks.iter().flatten().count();
        let plan = |again, paged| Plan {
            memory: self.memory(&sizes, &blocks, again, paged),
            again,
            paged,
        };
        let given = train.gradient_checkpointing.of(live);
        let Some(limit) = train.memory_limit()? else {
            return Ok(plan(given.unwrap_or(live), false));
        };
        let counts = given.map_or(0..=live, |count| count..=count);
        for paged in [false, true] {
            let mut plans = counts.clone().map(|again| plan(again, paged));
            if let Some(plan) = plans.find(|plan| plan.memory.total() <= limit) {
                return Ok(plan);
            }
        }
        let least = plan(given.unwrap_or(live), true).memory;
        let detail = format!(
            "the run is predicted to need {} MB with the optimizer's moments on disk ({}); the limit is {} MB. \
             train.gradient_checkpointing, train.activations = \"int8\", a smaller train.batch_size or data.max_length \
             need less",
            least.total().div_ceil(1_000_000),
            least.describe(),
            limit / 1_000_000
        );
        Err(peft_core::Error::config("train.memory_limit", detail))
    }

    /// The first block that keeps anything for the backward pass.
    pub(crate) fn first_live(&self) -> usize {
        let blocks = self.blocks();
        blocks.iter().position(Option::is_some).unwrap_or(0)
    }

    /// The batches of the first epoch, as far as the run goes.
    fn sizes(&self) -> Vec<Size> {
        let network = self.model().network();
        let front = network.prompt_len();
        let inside = network.prompt_labels().len();
        let (_, steps) = self.steps();
        let many = self.config().train.gradient_accumulation.max(1);
        let wanted = (steps as usize).saturating_mul(many);
        let size = |rows: &Vec<usize>| {
            let examples = &self.examples();
            let rows: Vec<&Example> = rows.iter().filter_map(|&row| examples.get(row)).collect();
            let lengths = || rows.iter().map(|e| e.ids.len());
            let once = self.shared(&rows);
            let seq = match once > 0 || self.joined(&rows) {
                true => {
                    let more = once * rows.len().saturating_sub(1);
                    (lengths().sum::<usize>() - more).div_ceil(rows.len())
                }
                false => front + lengths().max().unwrap_or(0),
            };
            Size {
                rows: rows.len(),
                seq,
                labels: rows.iter().map(|e| e.labelled(front > 0) + inside).sum(),
                tokens: rows.iter().map(|e| e.tokens()).sum(),
            }
        };
        self.epoch(0).iter().take(wanted.max(1)).map(size).collect()
    }

    fn memory(
        &self,
        sizes: &[Size],
        blocks: &[Option<Trained>],
        again: usize,
        paged: bool,
    ) -> Memory {
        let network = self.model().network();
        let config = self.model().config();
        let params = self.all_params().unwrap_or_default();
        let trained = || params.iter().filter(|p| p.is_trainable());
        let values: usize = trained().map(Param::numel).sum();
        let eight_bit = self.config().train.optimizer.eight_bit();
        // Without an adapter the trained base is dense, beside the file it was read from.
        let own = network.adapters().is_empty();
        let adapter: u64 = params.iter().map(|p| VALUE * p.numel() as u64).sum();
        // Hooks see a copy of the gradients as they were used.
        let copies = if network.trainers().is_empty() { 1 } else { 2 };
        let size = largest(sizes);
        let tokens = size.rows * size.seq;
        let gated = self.is_gated();
        let keep = self.config().keep().unwrap_or_default();
        let unpacked = Keep::F32.bytes(tokens * keeps::unpacked(config, tokens, size.seq));
        let kept = |trained: &Trained| -> u64 {
            let packed = keeps::block(config, gated, trained, tokens, size.seq).into_iter();
            let packed = packed.map(|(_, count, width)| count as u64 * keep.bytes(tokens * width));
            packed.sum::<u64>() + unpacked
        };
        let live: Vec<u64> = blocks.iter().flatten().map(kept).collect();
        let attended = keep.bytes(tokens * keeps::attended(config, tokens, size.seq)) + unpacked;
        let inputs = again as u64 * (keep.bytes(tokens * keeps::between(config)) + attended);
        let rest: u64 = live.iter().skip(again).sum();
        let backward = tokens * keeps::backward(config, gated, keep != Keep::F32);
        let backward = VALUE * backward as u64;
        // The first of the blocks that are computed again comes when nothing of the others is kept any more.
        let computed = match live.iter().take(again).max() {
            Some(block) => (block + backward).saturating_sub(rest),
            None => 0,
        };
        let backward = if again < live.len() { backward } else { 0 };
        let width = match self.model().task() {
            Task::CausalLm => config.vocab_size,
            Task::SequenceClassification { num_labels } => num_labels,
            Task::Features => 0,
        };
        let rows = peft_models::logit_rows(width, size.labels);
        let logits = rows * width + size.labels * keeps::labelled(config);
        let logits = VALUE * logits as u64;
        let memory = Memory {
            base: self.base_bytes() + if own { adapter } else { 0 },
            adapter: if own { 0 } else { adapter },
            gradients: 0,
            optimizer: match paged {
                true => 0,
                false => trained()
                    .map(|p| AdamW::bytes(p.numel(), eight_bit) as u64)
                    .sum(),
            },
            // Behind the last block, the last norm's input.
            activations: inputs + rest + keep.bytes(tokens * config.hidden_size),
            work: logits.max(backward).max(computed),
            other: self.resident_now(adapter),
        };
        // The peak is where the forward pass ends, with the gradients of earlier batches of the step, or where the
        // backward pass ends, when all gradients are there and activations are not any more.
        let gradients = VALUE * values as u64;
        let earlier = if self.config().train.gradient_accumulation > 1 {
            gradients
        } else {
            0
        };
        let forward = Memory {
            gradients: earlier,
            ..memory
        };
        let backward = Memory {
            gradients: copies * gradients,
            activations: 0,
            work: 0,
            ..memory
        };
        match forward.total() >= backward.total() {
            true => forward,
            false => backward,
        }
    }

    /// Stored bytes of the base's weights, shared ones once.
    fn base_bytes(&self) -> u64 {
        let base = self.model().network().base();
        let bytes = base
            .weights()
            .values()
            .map(|weight| match weight.as_frozen() {
                Some(frozen) => frozen.nbytes() as u64,
                None => weight.as_dense().map_or(0, |t| VALUE * t.numel() as u64),
            });
        bytes.sum()
    }

    /// What the process has in memory already, parameters and weights left out, and what a step leaves behind.
    fn resident_now(&self, adapter: u64) -> u64 {
        /// The code that runs, mapped from the program's file.
        const PROGRAM: u64 = 16 << 20;
        /// Where the system does not say: tokenizer, data, the allocator's own.
        const REST: u64 = 32 << 20;
        /// Buffers of products, stacks, the graph, the optimiser's copies, what lies idle between: as measured with LoRA on
        /// MiniLM and SmolLM2-135M.
        const STEP: u64 = 32 << 20;
        if cfg!(test) {
            // Tests share a process: what others hold just then is no part of a prediction.
            return PROGRAM + REST + STEP;
        }
        let base = self.model().network().base().weights().values();
        let owned: usize = base
            .filter_map(|weight| weight.as_frozen())
            .filter(|weight| !weight.bytes().is_mapped())
            .map(|weight| weight.nbytes())
            .sum();
        let rest = match peft_io::resident_memory() {
            Some(now) => now.anonymous.saturating_sub(adapter + owned as u64),
            None => REST,
        };
        PROGRAM + rest + STEP
    }

    /// For each block, what is trained at it; None for blocks in front of everything that is, which keep nothing.
    fn blocks(&self) -> Vec<Option<Trained>> {
        let network = self.model().network();
        let tree = network.tree();
        let layers = self.model().config().num_layers;
        let all = network.adapters().is_empty();
        let changed: HashSet<_> = network.changed_modules().into_iter().collect();
        let mut blocks = vec![Trained::default(); layers];
        // Embeddings, prompts and prefixes reach every block.
        let mut first = match all || network.prompt_len() + network.prefix_len() > 0 {
            true => 0,
            false => layers,
        };
        for (id, info) in tree.iter() {
            if !(all || changed.contains(&id)) {
                continue;
            }
            let Some(layer) = info.layer else {
                if info.kind == peft_core::ModuleKind::Embedding {
                    first = 0;
                }
                continue;
            };
            first = first.min(layer);
            let Some(block) = blocks.get_mut(layer) else {
                continue;
            };
            let inside = if all { 0 } else { self.inside(info) };
            block.inside.extend((inside > 0).then_some(inside));
            // Linear layers read what norms, attention and gates give.
            let reads = inside > 0 && !info.kind.is_linear();
            block.read.extend(reads.then_some(info.in_features));
        }
        let live = |(i, block)| (i >= first).then_some(block);
        blocks.into_iter().enumerate().map(live).collect()
    }

    /// Values a token has inside of what is attached to a module: for a pair of factors, the rank.
    fn inside(&self, info: &ModuleInfo) -> usize {
        let here = format!(".{}.", info.path);
        let params = self.all_params().unwrap_or_default();
        let own = params
            .iter()
            .filter(|p| p.is_trainable() && p.key().contains(&here));
        own.map(Param::numel).sum::<usize>() / (info.in_features + info.out_features).max(1)
    }

    /// Whether the feed-forward layer has a gate.
    fn is_gated(&self) -> bool {
        let mut modules = self.model().network().tree().iter();
        modules.any(|(_, m)| m.kind.is_linear() && m.path.contains("gate"))
    }
}

fn largest(sizes: &[Size]) -> Size {
    let largest = sizes.iter().max_by_key(|size| size.rows * size.seq);
    largest.copied().unwrap_or_default()
}
