//! LoKr: a weight's change as a Kronecker product, its large factor of low rank.
//!
//! # Paper
//! Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, arXiv 2309.14859, section 3.
//!
//! # Formula
//! `W' = W + s w1 ⊗ w2` with `s = alpha / r`, `w1 [l, m]` and `w2 [k, n]`, where `l k = out` and `m n = in` are split as
//! near to squares as they divide, or by `decompose_factor`. `w2 = w2_a w2_b` of rank r unless r is at least half of
//! its larger side, then it is full; `w1` is full unless `decompose_both` asks for the same of it.
//!
//! # Saved keys
//! `<module>.lokr_w1 [l, m]` or `<module>.lokr_w1_a [l, r]` and `<module>.lokr_w1_b [r, m]`; `<module>.lokr_w2 [k, n]` or
//! `<module>.lokr_w2_a [k, r]` and `<module>.lokr_w2_b [r, n]`.
//!
//! # Defaults and their source
//! r 8, alpha 8, sizes near to squares, no dropout; w1 (or w1_a) zero, the rest uniform with PyTorch's bounds: HF PEFT
//! 0.21. `init_weights = "lycoris"` zeroes w2 (or w2_b) instead, as LyCORIS does. A learning
//! rate of 1e-2 to 2e-2 suits a small model.
//!
//! # Differences from HF
//! The large product is never built to run: `y = w1 X w2ᵀ` with each input row as a matrix X. GPT-2's layers work too.
//! The scaling is alpha / r also where both factors are full, as in HF (LyCORIS takes 1 there).
//!
//! # Limits
//! No convolutions: `use_effective_conv2d` is kept for the file. `alpha` tensors in files of Kohya's tools are not read.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, ModuleTree, PeftMethod, Result, Site, Tensor, register,
};
use serde::{Deserialize, Serialize};

use crate::change::{Change, Plus};
use crate::drops::Drops;
use crate::fields::{finite, kept_for_hf, whole};
use crate::kron::{Factor, kron, split, times_kron};

/// LoKr's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LoKr {
    /// Rank; `rank_pattern` may set others.
    pub r: usize,
    /// Numerator of the scaling; `alpha_pattern` may set others.
    pub alpha: f64,
    /// Probability of dropping an output of the change while training.
    pub rank_dropout: f32,
    /// Whether the outputs that stay make up for the dropped.
    pub rank_dropout_scale: bool,
    /// Probability of dropping a module's change while training.
    pub module_dropout: f32,
    /// Whether the small factor is of low rank too, where it is large enough.
    pub decompose_both: bool,
    /// Size of the small factor; -1 for one near to the square root.
    pub decompose_factor: i64,
    /// Start: true, false (no identity) or `lycoris`.
    pub init_weights: Value,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for LoKr {
    fn default() -> Self {
        let more = json!({"alpha_pattern": {}, "rank_pattern": {}, "use_effective_conv2d": false});
        Self {
            r: 8,
            alpha: 8.0,
            rank_dropout: 0.0,
            rank_dropout_scale: false,
            module_dropout: 0.0,
            decompose_both: false,
            decompose_factor: -1,
            init_weights: Value::Bool(true),
            others: kept_for_hf(&more),
        }
    }
}

register!(
    LoKr,
    id = "lokr",
    title = "LoKr",
    family = Reparameterized,
    subfamily = "structured",
    peft_type = "LOKR",
    paper = "arXiv 2309.14859",
    example = r#"{"r": 1, "alpha": 2, "target_modules": ["q_proj", "v_proj"]}"#,
);

/// Which factor starts at zero.
#[derive(Clone, Copy, PartialEq)]
enum Zero {
    First,
    Second,
    Neither,
}

impl LoKr {
    fn zero(&self) -> Result<Zero> {
        match &self.init_weights {
            Value::Bool(true) => Ok(Zero::First),
            Value::Bool(false) => Ok(Zero::Neither),
            Value::String(s) if s == "lycoris" => Ok(Zero::Second),
            other => {
                let detail = format!("{other} is not one of true, false, \"lycoris\"");
                Err(Error::config("init_weights", detail))
            }
        }
    }
}

impl PeftMethod for LoKr {
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let drops = Drops {
            rank: self.rank_dropout,
            module: self.module_dropout,
            rescale: self.rank_dropout_scale,
        };
        drops.check()?;
        let wanted = match self.decompose_factor {
            -1 => None,
            factor => match usize::try_from(factor) {
                Ok(factor) if factor > 0 => Some(factor),
                _ => {
                    let detail = format!("has to be -1 or at least 1, not {factor}");
                    return Err(Error::config("decompose_factor", detail));
                }
            },
        };
        let rank = cx.common().rank_at(&site.path, self.r)?;
        let alpha = cx.common().alpha_at(&site.path, self.alpha)?;
        finite("alpha", alpha)?;
        let zero = self.zero()?;
        let ((m, n), (l, k)) = (
            split(site.in_features, wanted),
            split(site.out_features, wanted),
        );
        let uniform = |fan_in| Init::LinearDefault { fan_in };
        let unless = |zeroed: bool, fan_in| {
            if zeroed { Init::Zeros } else { uniform(fan_in) }
        };
        let (first_zero, second_zero) = (zero == Zero::First, zero == Zero::Second);
        let small = |rows: usize, columns: usize| 2 * rank < rows.max(columns);
        let first = if self.decompose_both && small(l, m) {
            Factor::Thin(
                cx.param("lokr_w1_a", &[l, rank], &unless(first_zero, rank))?,
                cx.param("lokr_w1_b", &[rank, m], &uniform(m))?,
            )
        } else {
            Factor::Full(cx.param("lokr_w1", &[l, m], &unless(first_zero, m))?)
        };
        let second = if small(k, n) {
            Factor::Thin(
                cx.param("lokr_w2_a", &[k, rank], &uniform(rank))?,
                cx.param("lokr_w2_b", &[rank, n], &unless(second_zero, n))?,
            )
        } else {
            Factor::Full(cx.param("lokr_w2", &[k, n], &unless(second_zero, n))?)
        };
        Ok(Box::new(Plus(At {
            first,
            second,
            scaling: (alpha / rank as f64) as f32,
            drops,
            path: site.path.clone(),
            out: site.out_features,
        })))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _tree: &ModuleTree) {
        whole(config, "alpha");
    }
}

struct At {
    /// `[l, m]`
    first: Factor,
    /// `[k, n]`
    second: Factor,
    scaling: f32,
    drops: Drops,
    path: String,
    out: usize,
}

impl Change for At {
    fn dense(&self) -> Result<Tensor> {
        Ok(kron(&self.first.dense()?, &self.second.dense()?)?.scale(self.scaling)?)
    }

    fn applied(&self, call: &Call<'_>) -> Result<Tensor> {
        self.drops.apply(call, &self.path, self.out, |x| {
            Ok(times_kron(x, &self.first, &self.second)?.scale(self.scaling)?)
        })
    }

    fn by_rows(&self) -> bool {
        // Outputs and whole changes are dropped for all rows.
        true
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Result, Tensor};

    use crate::testing::attached;

    fn network(out: usize, inside: usize, fields: Value) -> Result<Network> {
        let base = Base::custom().linear("fc", Array2::zeros((out, inside)), None)?;
        let config = json!({"peft_type": "LOKR", "target_modules": ["fc"]});
        attached(base, config, &fields)
    }

    fn shapes(out: usize, inside: usize, fields: Value) -> Vec<(String, Vec<usize>)> {
        let network = network(out, inside, fields).expect("attaches");
        let params = network.parameters();
        let named = params.iter().map(|p| {
            let name = p.key().rsplit('.').next().unwrap_or_default();
            (name.to_owned(), p.shape().to_vec())
        });
        named.collect()
    }

    /// What HF makes for a layer of 32 inputs and 64 outputs.
    #[test]
    fn sizes_are_those_of_hf() {
        let named = |all: &[(&str, [usize; 2])]| -> Vec<(String, Vec<usize>)> {
            let one = |(name, shape): &(&str, [usize; 2])| ((*name).to_owned(), shape.to_vec());
            all.iter().map(one).collect()
        };
        let w1 = ("lokr_w1", [8, 4]);
        assert_eq!(
            shapes(64, 32, json!({"r": 2})),
            named(&[w1, ("lokr_w2_a", [8, 2]), ("lokr_w2_b", [2, 8])])
        );
        assert_eq!(
            shapes(64, 32, json!({"r": 4})),
            named(&[w1, ("lokr_w2", [8, 8])])
        );
        let fields = json!({"r": 1, "decompose_both": true, "decompose_factor": 4});
        assert_eq!(
            shapes(64, 32, fields),
            named(&[
                ("lokr_w1_a", [4, 1]),
                ("lokr_w1_b", [1, 4]),
                ("lokr_w2_a", [16, 1]),
                ("lokr_w2_b", [1, 8])
            ])
        );
    }

    /// w1 = [[1, 2], [0, 1]], w2 = [[1, 0], [3, 1]], s = 4 / 2: rows of the product are (1 0 2 0), (3 1 6 2), (0 0 1 0),
    /// (0 0 3 1).
    #[test]
    fn by_hand() {
        let network = network(4, 4, json!({"r": 2, "alpha": 4})).expect("attaches");
        let values = [vec![1.0, 2.0, 0.0, 1.0], vec![1.0, 0.0, 3.0, 1.0]];
        for (param, values) in network.parameters().iter().zip(values) {
            let value = Tensor::from_vec(values, &[2, 2], network.device()).expect("a tensor");
            param.set(value).expect("fits");
        }
        let x = Tensor::from_vec(vec![1.0, 10.0, 100.0, 1000.0], &[1, 4], network.device());
        let y = network
            .run("fc", &x.expect("a tensor"), &Pass::eval())
            .expect("runs");
        assert_eq!(
            y.to_vec().expect("values"),
            [2.0 * 201.0, 2.0 * 2613.0, 2.0 * 100.0, 2.0 * 1300.0]
        );
    }

    #[test]
    fn wrong_fields_are_named() {
        for (field, value) in [
            ("decompose_factor", json!(0)),
            ("init_weights", json!("pissa")),
            ("rank_dropout", json!(1.0)),
        ] {
            let Err(error) = network(4, 4, json!({ field: value })) else {
                panic!("{field} was accepted");
            };
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
