//! LoHa: a weight's change as the elementwise product of two changes of low rank.
//!
//! # Paper
//! FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning, arXiv 2108.06098, section 2.2;
//! as LoHa in Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv 2309.14859.
//!
//! # Formula
//! `W' = W + s (A1 B1) ⊙ (A2 B2)` with `s = alpha / r`: rank up to r² from 2 r (in + out) parameters.
//!
//! # Saved keys
//! `<module>.hada_w1_a [out, r]`, `<module>.hada_w1_b [r, in]`, `<module>.hada_w2_a [out, r]`, `<module>.hada_w2_b [r, in]`.
//!
//! # Defaults and their source
//! r 8, alpha 8, no dropout; uniform with PyTorch's bounds, `hada_w2_b` zero: HF PEFT 0.21. The change is a product of
//! four small numbers and moves slowly at LoRA's learning rate; 1e-3 to 5e-3 suits it.
//!
//! # Differences from HF
//! GPT-2's layers work too. The product with the r² columns that A1, A2 and B1, B2 make together replaces the dense
//! change where it is cheaper. A rank beyond the smaller side of a layer is an error. Where rank dropout drops every
//! output, the change is zero (HF divides by zero).
//!
//! # Limits
//! No convolutions: `use_effective_conv2d` is kept for the file.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Init, ModuleTree, Param, PeftMethod, Result, Site, Tensor, register,
};
use serde::{Deserialize, Serialize};

use crate::change::{Change, Plus};
use crate::drops::Drops;
use crate::fields::{finite, kept_for_hf, rank_fits, whole};

/// LoHa's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LoHa {
    /// Rank of each factor; `rank_pattern` may set others.
    pub r: usize,
    /// Numerator of the scaling; `alpha_pattern` may set others.
    pub alpha: f64,
    /// Probability of dropping an output of the change while training.
    pub rank_dropout: f32,
    /// Probability of dropping a module's change while training.
    pub module_dropout: f32,
    /// Whether a fresh adapter is the identity.
    pub init_weights: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for LoHa {
    fn default() -> Self {
        let more = json!({"alpha_pattern": {}, "rank_pattern": {}, "use_effective_conv2d": false});
        Self {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            init_weights: true,
            others: kept_for_hf(&more),
        }
    }
}

register!(
    LoHa,
    id = "loha",
    title = "LoHa",
    family = Reparameterized,
    subfamily = "structured",
    peft_type = "LOHA",
    paper = "arXiv 2108.06098",
    example = r#"{"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl PeftMethod for LoHa {
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let drops = Drops {
            rank: self.rank_dropout,
            module: self.module_dropout,
            rescale: true,
        };
        drops.check()?;
        let rank = cx.common().rank_at(&site.path, self.r)?;
        rank_fits("r", rank, site.in_features.min(site.out_features), site)?;
        let alpha = cx.common().alpha_at(&site.path, self.alpha)?;
        finite("alpha", alpha)?;
        let (inside, out) = (site.in_features, site.out_features);
        let columns = Init::LinearDefault { fan_in: rank };
        let rows = Init::LinearDefault { fan_in: inside };
        let last = if self.init_weights {
            &Init::Zeros
        } else {
            &rows
        };
        Ok(Box::new(Plus(At {
            first: (
                cx.param("hada_w1_a", &[out, rank], &columns)?,
                cx.param("hada_w1_b", &[rank, inside], &rows)?,
            ),
            second: (
                cx.param("hada_w2_a", &[out, rank], &columns)?,
                cx.param("hada_w2_b", &[rank, inside], last)?,
            ),
            rank,
            scaling: (alpha / rank as f64) as f32,
            // Multiplications for each row of the input.
            thin: rank * rank * (inside + out) < inside * out,
            drops,
            path: site.path.clone(),
            out,
        })))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _tree: &ModuleTree) {
        whole(config, "alpha");
    }
}

struct At {
    /// `[out, r]` and `[r, in]`
    first: (Param, Param),
    second: (Param, Param),
    rank: usize,
    scaling: f32,
    /// Whether r² columns are cheaper than the dense change.
    thin: bool,
    drops: Drops,
    path: String,
    out: usize,
}

impl At {
    /// `x` times the change: its entry `[o, i]` is the sum over j, k of `A1[o, j] A2[o, k] B1[j, i] B2[k, i]`.
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        if !self.thin {
            return Ok(x.matmul_t(&self.dense()?)?);
        }
        let r = self.rank;
        let inside = x.last_dim();
        let pairs = |one: &Tensor, two: &Tensor, shapes: [[usize; 3]; 2], to: [usize; 2]| {
            one.reshape(&shapes[0])?
                .mul(&two.reshape(&shapes[1])?)?
                .reshape(&to)
        };
        let rows = pairs(
            &self.first.1.tensor(),
            &self.second.1.tensor(),
            [[r, 1, inside], [1, r, inside]],
            [r * r, inside],
        )?;
        let columns = pairs(
            &self.first.0.tensor(),
            &self.second.0.tensor(),
            [[self.out, r, 1], [self.out, 1, r]],
            [self.out, r * r],
        )?;
        Ok(x.matmul_t(&rows)?.scale(self.scaling)?.matmul_t(&columns)?)
    }
}

impl Change for At {
    fn dense(&self) -> Result<Tensor> {
        let product = |(a, b): &(Param, Param)| a.tensor().matmul(&b.tensor());
        Ok(product(&self.first)?
            .mul(&product(&self.second)?)?
            .scale(self.scaling)?)
    }

    fn applied(&self, call: &Call<'_>) -> Result<Tensor> {
        self.drops
            .apply(call, &self.path, self.out, |x| self.times(x))
    }

    fn by_rows(&self) -> bool {
        // Outputs and whole changes are dropped for all rows.
        true
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, RngKey};

    use crate::testing::{attached, fill, row};

    fn network(weight: Array2<f32>, fields: Value) -> Network {
        let base = Base::custom().linear("fc", weight, None).expect("a base");
        let config = json!({"peft_type": "LOHA", "target_modules": ["fc"]});
        attached(base, config, &fields).expect("attaches")
    }

    fn run(network: &Network, x: &[f32], pass: &Pass) -> Vec<f32> {
        row(network, "fc", x, pass)
    }

    /// (A1 B1) = [[3, 4], [6, 8]], (A2 B2) = [[1, 2], [-1, -2]], s = 2: the change is [[6, 16], [-12, -32]].
    #[test]
    fn by_hand() {
        let network = network(Array2::zeros((2, 2)), json!({"r": 1, "alpha": 2}));
        let all = [[1.0, 2.0], [3.0, 4.0], [1.0, -1.0], [1.0, 2.0]];
        fill(&network, |at| all[at].to_vec());
        assert_eq!(run(&network, &[1.0, 10.0], &Pass::eval()), [166.0, -332.0]);
    }

    /// 20 x 20 at rank 2 goes by columns, at rank 4 by the dense change: both are what is merged.
    #[test]
    fn either_way_is_the_merged_weight() {
        for rank in [2, 4] {
            let mut network = network(Array2::zeros((20, 20)), json!({"r": rank}));
            let size = 20 * rank;
            fill(&network, |at| {
                (0..size).map(|i| ((i * 7 + at) % 5) as f32 - 2.0).collect()
            });
            let x: Vec<f32> = (0..20).map(|i| (i % 3) as f32 - 0.5).collect();
            let adapted = run(&network, &x, &Pass::eval());
            network.merge().expect("merges");
            assert_eq!(adapted, run(&network, &x, &Pass::eval()), "rank {rank}");
        }
    }

    /// Of eight equal outputs some are zero, the others grown so that the sum stays.
    #[test]
    fn rank_dropout_keeps_the_sum_and_eval_is_without() {
        let fields = json!({"r": 1, "alpha": 1, "rank_dropout": 0.5});
        let network = network(Array2::zeros((8, 1)), fields);
        fill(
            &network,
            |at| if at % 2 == 0 { vec![1.0; 8] } else { vec![1.0] },
        );
        let y = run(&network, &[1.0], &Pass::train(RngKey::new(3)));
        assert!(
            y.contains(&0.0) && (y.iter().sum::<f32>() - 8.0).abs() < 1e-5,
            "{y:?}"
        );
        assert_eq!(run(&network, &[1.0], &Pass::eval()), [1.0; 8]);
    }

    #[test]
    fn a_rank_beyond_the_layer_is_refused() {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], None)
            .expect("a base");
        let config = json!({"peft_type": "LOHA", "r": 3, "target_modules": ["fc"]});
        let error = Network::new(base)
            .attach("a", &config, 0)
            .expect_err("refused");
        let error = error.to_string();
        assert!(
            error.contains("r") && error.contains("`fc`") && error.contains("1 to 2"),
            "{error}"
        );
    }
}
