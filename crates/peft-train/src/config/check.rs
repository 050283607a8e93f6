//! Ranges, required fields and what this build does not do.

use peft_core::{Error, Result};
use peft_models::Quantize;
use peft_tensor::{AUTO, Device, Keep, Precision, TensorError};

use super::{Checkpointing, ModelInit, TrainConfig};

impl TrainConfig {
    /// Checks values that have the right type.
    ///
    /// # Errors
    /// The first field that is missing, out of range, contradicts another, or asks for what is not built in.
    pub fn check(&self) -> Result<()> {
        self.check_offered()?;
        required(
            "model.path",
            self.model.path.is_empty(),
            "a model folder, a .gguf file or a hub id",
        )?;
        required(
            "data.train",
            self.data.train.is_empty(),
            "a .jsonl or .csv file, or a list of them",
        )?;
        required(
            "output.dir",
            self.output.dir.as_os_str().is_empty(),
            "the folder for the results",
        )?;
        self.init_from()?;
        if self.model.num_labels == Some(0) {
            return Err(Error::config("model.num_labels", "has to be at least 1"));
        }
        self.check_data()?;
        self.check_train()
    }

    fn check_offered(&self) -> Result<()> {
        let here = Device::names();
        match self.device.as_str() {
            AUTO => {}
            name if here.contains(&name) => {}
            "wgpu" => {
                let detail =
                    "\"wgpu\" is not in this build: build with `--features wgpu`, or use \"cpu\"";
                return Err(Error::config("device", detail));
            }
            other => {
                return Err(Error::config(
                    "device",
                    format!("{other:?} is not one of cpu, wgpu, auto"),
                ));
            }
        }
        self.precision()?;
        self.keep()?;
        if self.quantize()?.is_none() {
            return Ok(());
        }
        if self.model.init == ModelInit::Random {
            let detail = "needs weights to quantise, and `model.init` is random";
            return Err(Error::config("model.quantize", detail));
        }
        if self.adapter.is_none() {
            let detail = "a quantised base is not trained itself: give an [adapter]";
            return Err(Error::config("model.quantize", detail));
        }
        Ok(())
    }

    /// `precision`, read.
    ///
    /// # Errors
    /// If there is none of that name.
    pub(crate) fn precision(&self) -> Result<Precision> {
        self.precision
            .parse()
            .map_err(|e: TensorError| Error::config("precision", e.to_string()))
    }

    /// `train.activations`, read; the precision's own form where it says nothing.
    ///
    /// # Errors
    /// If there is none of that name.
    pub(crate) fn keep(&self) -> Result<Keep> {
        match &self.train.activations {
            None => Ok(self.precision()?.into()),
            Some(name) => name
                .parse()
                .map_err(|e: TensorError| Error::config("train.activations", e.to_string())),
        }
    }

    /// `model.quantize`, read.
    ///
    /// # Errors
    /// If there is no format of that name.
    pub(crate) fn quantize(&self) -> Result<Option<Quantize>> {
        let Some(name) = &self.model.quantize else {
            return Ok(None);
        };
        let made = name.parse().map_err(|_| {
            let detail = format!("{name:?} is not one of {}", Quantize::NAMES.join(", "));
            Error::config("model.quantize", detail)
        });
        made.map(Some)
    }

    fn check_data(&self) -> Result<()> {
        let data = &self.data;
        if data.max_length < 2 {
            return Err(Error::config(
                "data.max_length",
                format!("has to be at least 2, not {}", data.max_length),
            ));
        }
        if data.eval.as_ref().is_some_and(super::Files::is_empty) {
            return Err(Error::config(
                "data.eval",
                "is an empty name, or an empty list",
            ));
        }
        let Some(split) = data.eval_split else {
            return Ok(());
        };
        if data.eval.is_some() {
            return Err(Error::config(
                "data.eval_split",
                "`data.eval` is set too; give one of them",
            ));
        }
        if !(split.is_finite() && split > 0.0 && (split < 1.0 || split.fract() == 0.0)) {
            let detail =
                format!("has to be a share between 0 and 1 or a whole number of rows, not {split}");
            return Err(Error::config("data.eval_split", detail));
        }
        Ok(())
    }

    fn check_train(&self) -> Result<()> {
        let train = &self.train;
        for (field, value) in [
            ("train.batch_size", train.batch_size as u64),
            (
                "train.gradient_accumulation",
                train.gradient_accumulation as u64,
            ),
            ("train.steps", train.steps.unwrap_or(1)),
            (
                "train.eval_batch_size",
                train.eval_batch_size.unwrap_or(1) as u64,
            ),
            ("train.keep_checkpoints", train.keep_checkpoints as u64),
        ] {
            if value == 0 {
                return Err(Error::config(field, "has to be at least 1"));
            }
        }
        if train.memory_limit()?.is_none() && train.gradient_checkpointing == Checkpointing::Auto {
            let detail =
                "\"auto\" is as much as train.memory_limit makes necessary, which is not set";
            return Err(Error::config("train.gradient_checkpointing", detail));
        }
        within("train.epochs", train.epochs, f64::MIN_POSITIVE, 1e9)?;
        within("train.learning_rate", train.learning_rate, 0.0, f64::MAX)?;
        within("train.weight_decay", train.weight_decay, 0.0, f64::MAX)?;
        within("train.eps", train.eps, 0.0, f64::MAX)?;
        within("train.warmup_ratio", train.warmup_ratio, 0.0, 1.0)?;
        within("train.max_grad_norm", train.max_grad_norm, 0.0, f64::MAX)?;
        for beta in train.betas {
            within("train.betas", beta, 0.0, 1.0_f64.next_down())?;
        }
        for (i, rule) in train.lr_multipliers.iter().enumerate() {
            let field = format!("train.lr_multipliers[{i}]");
            required(
                &format!("{field}.pattern"),
                rule.pattern.is_empty(),
                "a regular expression on parameter keys",
            )?;
            if rule.multiplier.is_some() && rule.learning_rate.is_some() {
                return Err(Error::config(
                    field,
                    "give `multiplier` or `learning_rate`, not both",
                ));
            }
            if rule.multiplier.is_none()
                && rule.learning_rate.is_none()
                && rule.weight_decay.is_none()
            {
                return Err(Error::config(
                    field,
                    "needs `multiplier`, `learning_rate` or `weight_decay`",
                ));
            }
            for value in [rule.multiplier, rule.learning_rate, rule.weight_decay]
                .into_iter()
                .flatten()
            {
                within(&field, value, 0.0, f64::MAX)?;
            }
        }
        Ok(())
    }
}

fn required(field: &str, missing: bool, what: &str) -> Result<()> {
    if missing {
        Err(Error::config(field, format!("is required: {what}")))
    } else {
        Ok(())
    }
}

fn within(field: &str, value: f64, low: f64, high: f64) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    let range = match (low, high) {
        (0.0, f64::MAX) => "0 or more".to_owned(),
        (_, 1e9) => "more than 0".to_owned(),
        (low, high) if high < 1.0 => format!("at least {low} and less than 1"),
        (low, high) => format!("between {low} and {high}"),
    };
    Err(Error::config(
        field,
        format!("has to be {range}, not {value}"),
    ))
}
