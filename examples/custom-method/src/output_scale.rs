//! Output scale: one trained factor for each output of a layer.
//!
//! # Paper
//! None: a small example. It is (IA)3's rescaling (arXiv 2205.05638, section 3.3) on any linear layer.
//!
//! # Formula
//! `y = l * (W x) + b`, l `[out]`; merged, `W' = diag(l) W`.
//!
//! # Saved keys
//! `<module>.output_scale [out]`.
//!
//! # Defaults and their source
//! All factors 1: the model starts unchanged.
//!
//! # Differences from HF
//! HF's (IA)3 scales the bias of the layer along.
//!
//! # Limits
//! Linear layers only.

use peft_core::{Adapter, Attach, Init, Param, PeftMethod, Result, Site, Tensor, register};
use serde::{Deserialize, Serialize};

/// The method's fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct OutputScale {
    /// Modules to scale.
    pub target_modules: Option<peft_core::serde_json::Value>,
}

register!(
    OutputScale,
    id = "output_scale",
    title = "Output scale",
    family = Additive,
    subfamily = "rescaling",
    peft_type = "OUTPUT_SCALE",
    paper = "none",
    example = r#"{"target_modules": ["q_proj", "v_proj"]}"#,
);

impl PeftMethod for OutputScale {
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(Scale {
            factors: cx.param("output_scale", &[site.out_features], &Init::Constant(1.0))?,
        }))
    }
}

struct Scale {
    /// `[out]`
    factors: Param,
}

impl Adapter for Scale {
    // With this facet alone the core runs, trains, merges and unmerges the method.
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let factors = self.factors.tensor();
        Ok(Some(w.mul(&factors.reshape(&[factors.numel(), 1])?)?))
    }
}
