//! Checkpoints of a run: `checkpoints/step-N/` with parameters, the optimiser's moments, what the methods remember, and
//! where the run is. Randomness and the place in the data follow from the seed and the step's number.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use peft_core::{Error, Param, Result, Tensors};
use peft_io::{DType, PlanEntry, StateWriter};
use peft_tensor::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Progress, Trainer};
use crate::optim::AdamW;
use crate::{EvalReport, io};

/// Start of a checkpoint's name; the step follows.
const PREFIX: &str = "step-";
/// Changes when the meaning of a checkpoint does.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct State {
    version: u32,
    step: u64,
    total_steps: u64,
    config: Value,
    /// Of the encoded training rows, in hexadecimal.
    data: String,
    optimizer_steps: BTreeMap<String, u64>,
    elapsed_s: f64,
    first_loss: Option<f64>,
    eval_before: Option<EvalReport>,
    eval_after: Option<EvalReport>,
}

/// The newest complete checkpoint's name.
pub(super) fn newest(folder: &Path) -> Result<Option<String>> {
    Ok(states(folder)?.pop())
}

fn states(folder: &Path) -> Result<Vec<String>> {
    let mut names = peft_io::list_states(folder).map_err(io)?;
    names.retain(|name| {
        name.strip_prefix(PREFIX)
            .is_some_and(|n| n.parse::<u64>().is_ok())
    });
    Ok(names)
}

/// Writes a checkpoint, then removes the oldest beyond those to keep.
pub(super) fn save(
    trainer: &Trainer<'_>,
    progress: &Progress,
    params: &[Param],
    folder: &Path,
) -> Result<PathBuf> {
    let mut tensors: BTreeMap<String, Tensor> = params
        .iter()
        .map(|param| (format!("param/{}", param.key()), param.tensor()))
        .collect();
    for (adapter, hook) in &progress.hooks {
        let state = hook.state()?.into_iter();
        tensors.extend(state.map(|(key, tensor)| (format!("hook/{adapter}/{key}"), tensor)));
    }
    let config = serde_json::to_value(trainer.config).map_err(unwritable)?;
    let optimizer = progress.optimizer.at_hand()?;
    let state = State {
        version: VERSION,
        step: progress.step,
        total_steps: trainer.steps().1,
        config,
        data: format!("{:016x}", trainer.train.fingerprint()),
        optimizer_steps: optimizer.steps(),
        elapsed_s: progress.elapsed(),
        first_loss: progress.first_loss,
        eval_before: progress.eval_before.clone(),
        eval_after: progress.eval_after.clone(),
    };
    let json = serde_json::to_value(&state).map_err(unwritable)?;
    let name = format!("{PREFIX}{}", progress.step);
    let plan = plan(&tensors, &optimizer);
    let mut writer = StateWriter::create(folder, &name, &plan).map_err(io)?;
    for entry in &plan {
        match tensors.get(&entry.name) {
            Some(tensor) => {
                let values = tensor.to_vec()?.into_iter();
                let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
                writer.write(&bytes).map_err(io)?;
            }
            None => optimizer.write(&entry.name, &mut |bytes| writer.write(bytes).map_err(io))?,
        }
    }
    writer.finish(&json).map_err(io)?;
    let there = states(folder)?;
    let keep = trainer.config.train.keep_checkpoints;
    for old in &there[..there.len().saturating_sub(keep)] {
        peft_io::remove_state(folder, old).map_err(io)?;
    }
    Ok(folder.join(name))
}

/// The tensors of a checkpoint, those of f32 first; the moments may be in a file and stay there.
fn plan(tensors: &BTreeMap<String, Tensor>, optimizer: &AdamW) -> Vec<PlanEntry> {
    let entry = |(name, tensor): (&String, &Tensor)| PlanEntry {
        name: name.clone(),
        shape: tensor.shape().to_vec(),
        dtype: DType::F32,
    };
    let mut plan: Vec<PlanEntry> = tensors.iter().map(entry).collect();
    plan.extend(optimizer.plan());
    plan.sort_by_key(|entry| std::cmp::Reverse(entry.dtype.bitsize()));
    plan
}

fn unwritable(error: serde_json::Error) -> Error {
    Error::other(format!("cannot write the run's state: {error}"))
}

/// Puts a run back to where a checkpoint was made.
pub(super) fn restore(
    trainer: &Trainer<'_>,
    progress: &mut Progress,
    params: &[Param],
    folder: &Path,
    name: &str,
) -> Result<()> {
    let path = folder.join(name);
    let (tensors, json) = peft_io::open_state(folder, name).map_err(io)?;
    let state: State = serde_json::from_value(json)
        .map_err(|e| Error::file(&path, format!("is not a checkpoint of this version: {e}")))?;
    if state.version != VERSION {
        return Err(Error::file(
            &path,
            format!("has version {}, this build reads {VERSION}", state.version),
        ));
    }
    check_same(trainer, &state, &path)?;
    // All values are looked at before the first is set.
    let mut values = Vec::with_capacity(params.len());
    for param in params {
        let key = format!("param/{}", param.key());
        match tensors.meta(&key) {
            Some(meta) if param.accepts(&meta.shape) => {
                let (shape, data) = tensors.f32(&key).map_err(io)?;
                values.push(Tensor::from_vec(data, &shape, trainer.model.device())?);
            }
            Some(meta) => {
                let detail = format!(
                    "`{}` has shape {:?}, the run's is {:?}",
                    param.key(),
                    meta.shape,
                    param.shape()
                );
                return Err(Error::file(&path, detail));
            }
            None => {
                return Err(Error::file(
                    &path,
                    format!("has no parameter `{}`", param.key()),
                ));
            }
        }
    }
    // A step may have shaped a parameter anew: the checkpoint's sizes count.
    let sizes: HashMap<&str, usize> = params
        .iter()
        .zip(&values)
        .map(|(param, value)| (param.key(), value.numel()))
        .collect();
    let moments = progress
        .optimizer
        .restore(&tensors, &state.optimizer_steps, |key| {
            sizes.get(key).copied()
        })
        .map_err(|e| e.context(path.display().to_string()))?;
    let mut known: HashSet<String> = moments.into_iter().collect();
    known.extend(params.iter().map(|param| format!("param/{}", param.key())));
    for (adapter, hook) in &mut progress.hooks {
        let prefix = format!("hook/{adapter}/");
        let mut own = Tensors::new();
        for name in tensors.names().filter(|name| name.starts_with(&prefix)) {
            let (shape, data) = tensors.f32(name).map_err(io)?;
            let tensor = Tensor::from_vec(data, &shape, trainer.model.device())?;
            own.insert(name[prefix.len()..].to_owned(), tensor);
            known.insert(name.to_owned());
        }
        hook.restore(own)?;
    }
    if let Some(extra) = tensors.names().find(|name| !known.contains(*name)) {
        return Err(Error::file(
            &path,
            format!("has `{extra}`, which this run does not know"),
        ));
    }
    params
        .iter()
        .zip(values)
        .try_for_each(|(param, value)| param.set(value))?;
    progress.step = state.step;
    progress.earlier = state.elapsed_s;
    progress.first_loss = state.first_loss;
    progress.eval_before = state.eval_before;
    progress.eval_after = state.eval_after;
    Ok(())
}

fn check_same(trainer: &Trainer<'_>, state: &State, path: &Path) -> Result<()> {
    let differences = trainer.config.differences(&state.config);
    if !differences.is_empty() {
        let detail = format!(
            "was made with other values of {}; put them back, or start anew",
            differences.join(", ")
        );
        return Err(Error::file(path, detail));
    }
    if state.data != format!("{:016x}", trainer.train.fingerprint()) {
        let detail = format!(
            "was made with other rows than {} has now",
            trainer.train.files
        );
        return Err(Error::file(path, detail));
    }
    let total = trainer.steps().1;
    if state.total_steps != total || state.step > total {
        let detail = format!(
            "is at step {} of {}, the run has {total}",
            state.step, state.total_steps
        );
        return Err(Error::file(path, detail));
    }
    Ok(())
}

pub(super) fn named(tensor: &Tensor) -> Result<(Vec<usize>, Vec<f32>)> {
    Ok((tensor.shape().to_vec(), tensor.to_vec()?))
}
