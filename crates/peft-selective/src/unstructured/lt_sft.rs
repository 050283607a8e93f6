//! LT-SFT: lottery-ticket sparse fine-tuning: train everything, keep what moved most, start again with that alone.
//!
//! # Paper
//! Composable Sparse Fine-Tuning for Cross-Lingual Transfer, arXiv 2110.07560, section 3.
//!
//! # Formula
//! Phase 1 trains all of D in `W' = W + D`. Then the `keep_ratio` largest |D| of all target weights together are kept, D is
//! rewound to 0 and the optimiser forgets its moments; phase 2 trains those entries alone.
//!
//! # Saved keys
//! `<module>.sparse_values [k]` and `<module>.sparse_indices [2, k]` (rows, then columns, of the weight as `[out, in]` or
//! `[rows, dim]`; a vector is one row). In phase 1: whatever is not zero.
//!
//! # Defaults and their source
//! `keep_ratio` 0.05 (the authors' code: 0.01; the paper: 0.076 on tasks); `dense_share` 0.3, where the authors' phases are
//! as long as each other: with a learning rate that falls over both, the sparse one needs the larger part. All linear
//! layers. Learning rate: 1e-3, that of sparse methods, on small models: at 3e-4 what is rewound is not made up for.
//!
//! # Differences from HF
//! HF PEFT has no such method. The authors' code restarts the learning rate's schedule in phase 2 and rewinds a head too;
//! here one schedule spans both phases, and a head that is trained along keeps what it learned.
//!
//! # Limits
//! Phase 1 needs the memory of full fine-tuning. Weight decay pulls the changes to 0, not the weights.

use peft_core::{Adapter, Attach, PeftMethod, Result, Site, TrainCx, TrainHooks, register};
use serde::{Deserialize, Serialize};

use crate::fields::Places;
use crate::select::phase_end;
use crate::sparse::{At, Differences, SPARSE, sparse_method};

/// LT-SFT's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LtSft {
    /// Share of the target weights that phase 2 trains.
    pub keep_ratio: f64,
    /// Share of the steps that phase 1 has.
    pub dense_share: f64,
    /// Where it acts.
    #[serde(flatten)]
    pub places: Places,
    #[serde(skip)]
    found: Differences,
}

impl Default for LtSft {
    fn default() -> Self {
        Self {
            keep_ratio: 0.05,
            dense_share: 0.3,
            places: Places::default(),
            found: Differences::default(),
        }
    }
}

register!(
    LtSft,
    id = "lt_sft",
    title = "LT-SFT",
    family = Selective,
    subfamily = "unstructured",
    peft_type = "LT_SFT",
    paper = "arXiv 2110.07560",
    example = r#"{"keep_ratio": 0.2, "target_modules": ["v_proj", "up_proj"]}"#,
);

impl PeftMethod for LtSft {
    sparse_method!();

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(At(self.found.make(site, cx, SPARSE, true)?)))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Hooks(self.clone()))
    }
}

struct Hooks(LtSft);

impl TrainHooks for Hooks {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let LtSft {
            keep_ratio,
            dense_share,
            found,
            ..
        } = &self.0;
        if found.is_dense() {
            found.budget("keep_ratio", *keep_ratio)?;
            phase_end("dense_share", *dense_share, cx.total_steps)?;
        }
        Ok(())
    }

    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let LtSft {
            keep_ratio,
            dense_share,
            found,
            ..
        } = &self.0;
        if !found.is_dense() || cx.step < phase_end("dense_share", *dense_share, cx.total_steps)? {
            return Ok(());
        }
        let budget = found.budget("keep_ratio", *keep_ratio)?;
        found.choose(budget, true, true, |_, d| d.magnitudes())?;
        cx.reset_optimizer.set(true);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;

    use crate::testing::{Rows, descend, network};

    /// Gradients of (1, -4, 2): after two steps of 0.5 the second weight has moved most; it starts again at 0.
    #[test]
    fn dense_then_rewound_then_sparse() {
        let config = json!({"peft_type": "LT_SFT", "keep_ratio": 0.34, "dense_share": 0.4});
        let network = network(array![[1.0, 2.0, 3.0]], &config);
        let rows = Rows {
            network: &network,
            inputs: vec![vec![1.0, -4.0, 2.0]],
        };
        let value = || network.parameters()[0].tensor().to_vec().expect("values");
        let mut seen = Vec::new();
        let resets = descend(&rows, 5, 0.5, false, |_| seen.push(value())).expect("trains");
        assert_eq!(resets, [2]);
        let phase_1 = [vec![0.0; 3], vec![-0.5, 2.0, -1.0]];
        assert_eq!(seen[..2], phase_1);
        assert_eq!(seen[2..], [vec![0.0], vec![2.0], vec![4.0]]);
        assert_eq!(value(), [6.0]);
        let (_, tensors) = network.export("a").expect("exports");
        let places = &tensors["base_model.model.fc.sparse_indices"];
        assert_eq!(places.to_vec().expect("values"), [0.0, 1.0]);
    }

    #[test]
    fn phases_and_budgets_that_cannot_be() {
        for (config, field) in [
            (
                json!({"dense_share": 1.0, "keep_ratio": 0.5}),
                "dense_share",
            ),
            (json!({"keep_ratio": 0.01}), "keep_ratio"),
        ] {
            let mut config = config;
            config["peft_type"] = json!("LT_SFT");
            let network = network(array![[1.0, 2.0, 3.0]], &config);
            let rows = Rows {
                network: &network,
                inputs: vec![vec![1.0, 1.0, 1.0]],
            };
            let error = descend(&rows, 4, 0.5, false, |_| ()).expect_err("refused");
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
