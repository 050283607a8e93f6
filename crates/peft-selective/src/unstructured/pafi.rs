//! PaFi: train the weights that are smallest to begin with.
//!
//! # Paper
//! Parameter-Efficient Fine-Tuning without Introducing New Latency, arXiv 2305.16742, section 3.1.
//!
//! # Formula
//! `W' = W + D` with D nonzero only where |W| is among the `keep_ratio` smallest of all target weights together. No data is
//! asked: every task of a model has the same mask.
//!
//! # Saved keys
//! `<module>.sparse_values [k]` and `<module>.sparse_indices [2, k]` (rows, then columns, of the weight as `[out, in]` or
//! `[rows, dim]`; a vector is one row).
//!
//! # Defaults and their source
//! `keep_ratio` 0.005, the paper's share on GLUE; all linear layers. Learning rate: 3e-3 on small models, far above full
//! fine-tuning's, as few weights have to do the work.
//!
//! # Differences from HF
//! HF PEFT has no such method.
//!
//! # Limits
//! Weight decay pulls the changes to 0, not the weights. Of equal weights the earlier ones are taken.

use peft_core::{Adapter, Attach, Error, Injector, PeftMethod, Result, Site, register};
use serde::{Deserialize, Serialize};

use crate::fields::Places;
use crate::sparse::{At, Differences, SPARSE, sparse_method};

/// PaFi's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Pafi {
    /// Share of the target weights to train.
    pub keep_ratio: f64,
    /// Where it acts.
    #[serde(flatten)]
    pub places: Places,
    #[serde(skip)]
    found: Differences,
}

impl Default for Pafi {
    fn default() -> Self {
        Self {
            keep_ratio: 0.005,
            places: Places::default(),
            found: Differences::default(),
        }
    }
}

register!(
    Pafi,
    id = "pafi",
    title = "PaFi",
    family = Selective,
    subfamily = "unstructured",
    peft_type = "PAFI",
    paper = "arXiv 2305.16742",
    example = r#"{"keep_ratio": 0.3, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl PeftMethod for Pafi {
    sparse_method!();

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(At(self.found.make(site, cx, SPARSE, false)?)))
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        cx.attach_all(self.sites(cx.tree(), cx.common())?, |site, cx| {
            self.attach(site, cx)
        })?;
        if cx.common().inference_mode {
            return Ok(());
        }
        let budget = self.found.budget("keep_ratio", self.keep_ratio)?;
        self.found
            .choose(budget, false, true, |_, d| d.base_magnitudes())
            .map_err(|e: Error| e.context("choosing the smallest weights"))
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Pass, Tensor};

    fn network() -> Network {
        let base = Base::custom()
            .linear("a", array![[1.0, -0.1], [2.0, 3.0]], None)
            .and_then(|b| b.linear("b", array![[0.2, -4.0]], None));
        Network::new(base.expect("a base"))
    }

    /// The two smallest of six are -0.1 in one layer and 0.2 in the other.
    #[test]
    fn smallest_of_all_layers() {
        let mut network = network();
        network
            .attach("p", &json!({"peft_type": "PAFI", "keep_ratio": 0.34}), 0)
            .expect("attaches");
        let (_, tensors) = network.export("p").expect("exports");
        let places = |module: &str| {
            tensors[&format!("base_model.model.{module}.sparse_indices")]
                .to_vec()
                .expect("values")
        };
        assert_eq!((places("a"), places("b")), (vec![0.0, 1.0], vec![0.0, 0.0]));
        let params = network.parameters();
        assert_eq!(params.len(), 2);
        for (param, value) in params.iter().zip([0.5, 10.0]) {
            param
                .set(Tensor::from_vec(vec![value], &[1], network.device()).expect("a tensor"))
                .expect("fits");
        }
        let x = Tensor::from_vec(vec![1.0, 2.0], &[1, 2], network.device()).expect("a tensor");
        let run = |network: &Network, path| {
            network
                .run(path, &x, &Pass::eval())
                .expect("runs")
                .to_vec()
                .expect("values")
        };
        // 1 - 0.2 + 2 * 0.5, 8; and 0.2 - 8 + 10.
        let close = |got: Vec<f32>, want: &[f32]| {
            assert!(
                got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6),
                "{got:?}"
            );
        };
        close(run(&network, "a"), &[1.8, 8.0]);
        close(run(&network, "b"), &[2.2]);
        network.merge().expect("merges");
        close(run(&network, "a"), &[1.8, 8.0]);
    }

    #[test]
    fn a_budget_that_cannot_be_met() {
        for share in [0.0, 1.5, 0.01] {
            let config = json!({"peft_type": "PAFI", "keep_ratio": share});
            let error = network().attach("p", &config, 0).expect_err("refused");
            assert!(error.to_string().contains("keep_ratio"), "{error}");
        }
    }
}
