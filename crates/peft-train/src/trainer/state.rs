//! Checkpoints of a run: `checkpoints/step-N/` with parameters, the optimiser's moments, what the methods remember, and
//! where the run is. Randomness and the place in the data follow from the seed and the step's number.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft_core::{Error, Param, Result, Tensors};
use peft_io::NamedTensors;
use peft_tensor::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Progress, Trainer};
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
    let (mut tensors, optimizer_steps) = progress.optimizer.export();
    for param in params {
        tensors.insert(format!("param/{}", param.key()), named(&param.tensor())?);
    }
    for (adapter, hook) in &progress.hooks {
        for (key, tensor) in hook.state()? {
            tensors.insert(format!("hook/{adapter}/{key}"), named(&tensor)?);
        }
    }
    let config = serde_json::to_value(trainer.config).map_err(unwritable)?;
    let state = State {
        version: VERSION,
        step: progress.step,
        total_steps: trainer.steps().1,
        config,
        data: format!("{:016x}", trainer.train.fingerprint()),
        optimizer_steps,
        elapsed_s: progress.elapsed(),
        first_loss: progress.first_loss,
        eval_before: progress.eval_before.clone(),
        eval_after: progress.eval_after.clone(),
    };
    let json = serde_json::to_value(&state).map_err(unwritable)?;
    let name = format!("{PREFIX}{}", progress.step);
    peft_io::write_state(folder, &name, &tensors, &json).map_err(io)?;
    let there = states(folder)?;
    let keep = trainer.config.train.keep_checkpoints;
    for old in &there[..there.len().saturating_sub(keep)] {
        peft_io::remove_state(folder, old).map_err(io)?;
    }
    Ok(folder.join(name))
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
    let (mut tensors, json) = peft_io::read_state(folder, name).map_err(io)?;
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
        match tensors.remove(&key) {
            Some((shape, data)) if param.accepts(&shape) => {
                values.push(Tensor::from_vec(data, &shape, trainer.model.device())?);
            }
            Some((shape, _)) => {
                let detail = format!(
                    "`{}` has shape {shape:?}, the run's is {:?}",
                    param.key(),
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
    progress
        .optimizer
        .restore(&mut tensors, &state.optimizer_steps)
        .map_err(|e| e.context(path.display().to_string()))?;
    for (adapter, hook) in &mut progress.hooks {
        hook.restore(hook_state(&mut tensors, adapter, trainer)?)?;
    }
    if let Some(extra) = tensors.keys().next() {
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

fn hook_state(tensors: &mut NamedTensors, adapter: &str, trainer: &Trainer<'_>) -> Result<Tensors> {
    let prefix = format!("hook/{adapter}/");
    let keys: Vec<String> = tensors
        .keys()
        .filter(|key| key.starts_with(&prefix))
        .cloned()
        .collect();
    let mut found = Tensors::new();
    for key in keys {
        if let Some((shape, data)) = tensors.remove(&key) {
            let tensor = Tensor::from_vec(data, &shape, trainer.model.device())?;
            found.insert(key[prefix.len()..].to_owned(), tensor);
        }
    }
    Ok(found)
}

pub(super) fn named(tensor: &Tensor) -> Result<(Vec<usize>, Vec<f32>)> {
    Ok((tensor.shape().to_vec(), tensor.to_vec()?))
}
