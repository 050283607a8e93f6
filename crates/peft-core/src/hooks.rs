//! What a method does between the steps of training.

use std::cell::Cell;

use peft_tensor::{Grads, Tensor};

use crate::{Network, Param, Result};

/// Behaviour that spans sites and steps; `()` is the no-op. Called by the training loop alone, in this order:
/// `prepare` once, then for each step `before_forward`, `penalty` (with the loss), `after_backward`, `after_step`.
pub trait TrainHooks: Send {
    /// Once before the first step: data-driven starts, phases.
    ///
    /// # Errors
    /// Ends the run.
    fn prepare(&mut self, _cx: &mut TrainCx<'_>) -> Result<()> {
        Ok(())
    }

    /// Before each step's forward pass.
    ///
    /// # Errors
    /// Ends the run.
    fn before_forward(&mut self, _cx: &mut TrainCx<'_>) -> Result<()> {
        Ok(())
    }

    /// Whether [`TrainHooks::after_step`] reads [`TrainCx::used`], which is a copy of all gradients.
    fn reads_used(&self) -> bool {
        false
    }

    /// Learning-rate and weight-decay rules for some parameters.
    fn param_groups(&self, _groups: &mut ParamGroups) {}

    /// A scalar added to the loss.
    ///
    /// # Errors
    /// Ends the run.
    fn penalty(&self, _cx: &TrainCx<'_>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// After the gradients of a step are complete, before they are clipped and used.
    ///
    /// # Errors
    /// Ends the run.
    fn after_backward(&mut self, _cx: &mut TrainCx<'_>) -> Result<()> {
        Ok(())
    }

    /// After the parameters have moved.
    ///
    /// # Errors
    /// Ends the run.
    fn after_step(&mut self, _cx: &mut TrainCx<'_>) -> Result<()> {
        Ok(())
    }

    /// What has to be kept to resume, by key; restored by [`TrainHooks::restore`].
    ///
    /// # Errors
    /// Ends the run.
    fn state(&self) -> Result<crate::Tensors> {
        Ok(crate::Tensors::new())
    }

    /// The inverse of [`TrainHooks::state`].
    ///
    /// # Errors
    /// Ends the run.
    fn restore(&mut self, _state: crate::Tensors) -> Result<()> {
        Ok(())
    }
}

impl TrainHooks for () {}

/// What the hooks see of a run.
pub struct TrainCx<'a> {
    /// Optimiser steps done so far.
    pub step: u64,
    /// Optimiser steps in all.
    pub total_steps: u64,
    /// The network.
    pub network: &'a Network,
    /// Its trainable parameters.
    pub params: &'a [Param],
    /// Gradients of this step; empty before the backward pass and after the optimiser took them.
    pub grads: &'a mut Grads,
    /// In `after_step`, if some hook [reads them](TrainHooks::reads_used): the gradients as the optimiser took them,
    /// clipped, one for each of `params`. The parameters themselves have moved by then.
    pub used: &'a [Option<Tensor>],
    /// This step's learning rate, before the factors of parameter groups.
    pub learning_rate: f64,
    /// The training rows, where there are any: for starts and masks that depend on data.
    pub data: Option<&'a dyn TrainData>,
    /// Set to true to make the optimiser forget its moments (a rewind).
    pub reset_optimizer: &'a Cell<bool>,
}

/// The rows a run trains on, as a method may ask about them.
pub trait TrainData {
    /// Number of rows.
    fn rows(&self) -> usize;

    /// The mean loss over these rows and its gradient with respect to the parameters that are trainable now, without
    /// dropout.
    ///
    /// # Errors
    /// If a row does not exist, or whatever the model returns.
    fn gradient(&self, rows: &[usize]) -> Result<(f64, Grads)>;
}

/// Rules that set parameters apart, later ones first.
#[derive(Clone, Debug, Default)]
pub struct ParamGroups {
    /// The rules.
    pub rules: Vec<GroupRule>,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct GroupRule {
    /// Regular expression searched for in a parameter's key.
    pub pattern: String,
    /// Factor on the learning rate.
    pub learning_rate: f64,
    /// Weight decay instead of the run's.
    pub weight_decay: Option<f64>,
}
