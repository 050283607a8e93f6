//! Intrinsic SAID: all weights of a model move in a random subspace of a few dimensions, each by its own factor.
//!
//! # Paper
//! Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning, arXiv 2012.13255, section 3
//! (structure-aware intrinsic dimension).
//!
//! # Formula
//! `W_i' = W_i + λ_i P_i(θ)` for every adapted weight i: one θ for the whole model, a trained factor λ_i, and a fixed
//! random projection P_i of θ's numbers to the weight's, the Fastfood transform `H G Π H B`, scaled so that it keeps
//! lengths on average. θ has `intrinsic_dimension` less the number of adapted weights elements: the λ count too.
//!
//! # Saved keys
//! `base_model.said_theta [intrinsic_dimension - m]`, `<module>.said_lambda [1]` for each of the m modules. The
//! projections follow from `projection_prng_key` and the modules' paths.
//!
//! # Defaults and their source
//! θ zero and λ one: the paper. `intrinsic_dimension` 1000 (the paper reaches 90% of full fine-tuning with 200 for
//! RoBERTa-large on MRPC, with its biases and norms among what moves). `train.learning_rate = 1e-2` is a good start.
//!
//! # Differences from HF
//! HF PEFT has no intrinsic SAID. The known implementations scale the gradient of each Hadamard transform by one over the
//! root of its width though the transform itself is not scaled, which shrinks the gradient by the width; here the
//! gradient is the true slope. Signs, permutation and normal factors are this library's own, made anew for each use
//! instead of kept, so that nothing of the weight's size is stored.
//!
//! # Limits
//! Weights of Linear and Conv1D modules. Each call forms the weight's change, as full fine-tuning forms its gradient.

use std::sync::OnceLock;

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Error, Init, Injector, Param, PeftMethod, Result, RngKey, Site, Tensor,
    register,
};
use serde::{Deserialize, Serialize};

use crate::change::{Change, Plus};
use crate::fastfood::Fastfood;

/// The fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Said {
    /// Trained numbers in all: θ's and one for each module.
    pub intrinsic_dimension: usize,
    /// Seed of the projections.
    pub projection_prng_key: u64,
    /// Modules that are adapted.
    pub target_modules: Option<Value>,
    /// Modules left alone.
    pub exclude_modules: Option<Value>,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Value>,
    /// Length of θ, once the modules are counted.
    #[serde(skip)]
    theta: OnceLock<usize>,
}

impl Default for Said {
    fn default() -> Self {
        Self {
            intrinsic_dimension: 1000,
            projection_prng_key: 0,
            target_modules: None,
            exclude_modules: None,
            modules_to_save: None,
            theta: OnceLock::new(),
        }
    }
}

register!(
    Said,
    id = "intrinsic_said",
    title = "Intrinsic SAID",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "SAID",
    paper = "arXiv 2012.13255",
    example = r#"{"intrinsic_dimension": 12, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl PeftMethod for Said {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        let sites = self.sites(cx.tree(), cx.common())?;
        let m = sites.len();
        let sizes = sites.iter().map(|s| s.in_features * s.out_features);
        let weights: usize = sizes.sum();
        if !(m + 1..=m + weights).contains(&self.intrinsic_dimension) {
            let detail = format!(
                "{}: {m} modules have a factor each, and {weights} weights move: {} to {}",
                self.intrinsic_dimension,
                m + 1,
                m + weights
            );
            return Err(Error::config("intrinsic_dimension", detail));
        }
        // A method is attached once; the first count stands.
        let _ = self.theta.set(self.intrinsic_dimension - m);
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        // As if this were the only module, for a caller that attaches sites by itself.
        let alone = self.intrinsic_dimension.saturating_sub(1).max(1);
        let length = self.theta.get().copied().unwrap_or(alone);
        let (out, inside) = (site.out_features, site.in_features);
        let key = RngKey::new(self.projection_prng_key).fork(&site.path);
        Ok(Box::new(Plus(Subspace {
            theta: cx.shared("said_theta", &[length], &Init::Zeros)?,
            lambda: cx.param("said_lambda", &[1], &Init::Constant(1.0))?,
            projection: Fastfood::new(length, out * inside, key, &cx.device())?,
            shape: [out, inside],
        })))
    }
}

struct Subspace {
    /// `[d - m]`, the whole model's
    theta: Param,
    /// `[1]`
    lambda: Param,
    projection: Fastfood,
    shape: [usize; 2],
}

impl Change for Subspace {
    fn dense(&self) -> Result<Tensor> {
        let moved = self.projection.apply(&self.theta.tensor())?;
        Ok(moved.mul(&self.lambda.tensor())?.reshape(&self.shape)?)
    }

    fn by_rows(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Tensor};

    fn network(dimension: usize) -> peft_core::Result<Network> {
        let base = Base::custom()
            .linear("fc1", Array2::zeros((3, 5)), None)
            .and_then(|b| b.linear("fc2", Array2::zeros((3, 5)), None))
            .expect("a base");
        let mut network = Network::new(base);
        let config = json!({"peft_type": "SAID", "intrinsic_dimension": dimension, "target_modules": ["fc1", "fc2"]});
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// The whole model has as many trained numbers as it says, and a weight moves by its factor times the projection.
    #[test]
    fn one_theta_for_all() {
        let network = network(9).expect("attaches");
        let params = network.parameters();
        let count: usize = params.iter().map(peft_core::Param::numel).sum();
        assert_eq!(count, 9);
        let set = |suffix: &str, values: &[f32]| {
            let param = params.iter().find(|p| p.key().ends_with(suffix));
            let value = Tensor::from_vec(values.to_vec(), &[values.len()], network.device());
            param
                .expect("there")
                .set(value.expect("a tensor"))
                .expect("fits");
        };
        let change = |path: &str| {
            let id = network.module(path).expect("there");
            let zero = peft_core::BaseWeight::dense(
                Tensor::zeros(&[3, 5], network.device()).expect("zeros"),
                false,
            );
            let merged = network.merged(id, Some(&zero), None).expect("merges");
            merged.weight.expect("changed").to_vec().expect("values")
        };
        set("said_theta", &[1.0, 0.0, -2.0, 0.5, 0.0, 0.0, 3.0]);
        let (one, two) = (change("fc1"), change("fc2"));
        assert!(one != two && one.iter().all(|v| *v != 0.0));
        set("fc1.said_lambda", &[-2.0]);
        let doubled: Vec<f32> = one.iter().map(|v| -2.0 * v).collect();
        assert_eq!(change("fc1"), doubled);
        assert_eq!(change("fc2"), two);
    }

    #[test]
    fn a_dimension_below_the_modules_is_refused() {
        let error = network(2).expect_err("refused").to_string();
        assert!(
            error.contains("intrinsic_dimension") && error.contains("3 to 32"),
            "{error}"
        );
    }
}
