//! KronA: a weight's change as the Kronecker product of two small full matrices.
//!
//! # Paper
//! KronA: Parameter Efficient Tuning with Kronecker Adapter, arXiv 2212.10650, section 3.1.
//!
//! # Formula
//! `y = W x + b + s (A ⊗ B) x`, A `[a1, a2]`, B `[b1, b2]` with `a1 b1 = out` and `a2 b2 = in`; merged, `W' = W + s A ⊗ B`.
//! Its rank is that of A times that of B: full where both are.
//!
//! # Saved keys
//! `<module>.krona_A [a1, a2]`, `<module>.krona_B [b1, b2]`.
//!
//! # Defaults and their source
//! A's sizes as near to the square roots as they divide, which is near the fewest parameters; scale 1; A uniform with
//! PyTorch's bound, B zero, so that a fresh adapter changes nothing. The paper searches sizes and scale for each task.
//! With so few parameters a learning rate of about 1e-2 suits a small model.
//!
//! # Differences from HF
//! HF PEFT has no KronA. Its nearest is the Kronecker product with factors of low rank.
//!
//! # Limits
//! The paper's modules beside the feed-forward block (KronA^B, and KronA^B_res with a residual) are not here.

use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Call, Init, ModuleTree, PeftMethod, Result, Site, Tensor, register,
};
use serde::{Deserialize, Serialize};

use crate::change::{Change, Plus};
use crate::fields::{divides, finite, probability, whole};
use crate::kron::{Factor, kron, split, times_kron};

/// KronA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct KronA {
    /// Rows of A, which divide the layer's outputs; not given: near the square root.
    pub a1: Option<usize>,
    /// Columns of A, which divide the layer's inputs; not given: near the square root.
    pub a2: Option<usize>,
    /// Factor on the change.
    pub scale: f64,
    /// Dropout on the input of the change.
    pub krona_dropout: f32,
    /// Modules to adapt.
    pub target_modules: Option<Value>,
    /// Modules left alone.
    pub exclude_modules: Option<Value>,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Value>,
}

impl Default for KronA {
    fn default() -> Self {
        Self {
            a1: None,
            a2: None,
            scale: 1.0,
            krona_dropout: 0.0,
            target_modules: None,
            exclude_modules: None,
            modules_to_save: None,
        }
    }
}

register!(
    KronA,
    id = "krona",
    title = "KronA",
    family = Reparameterized,
    subfamily = "structured",
    peft_type = "KRONA",
    paper = "arXiv 2212.10650",
    example = r#"{"target_modules": ["q_proj", "v_proj"]}"#,
);

/// A's size and B's along one side of a layer.
fn sizes(
    field: &str,
    wanted: Option<usize>,
    size: usize,
    what: &str,
    site: &Site,
) -> Result<(usize, usize)> {
    if let Some(value) = wanted {
        divides(field, value, size, what, site)?;
    }
    Ok(split(size, wanted))
}

impl PeftMethod for KronA {
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        finite("scale", self.scale)?;
        probability("krona_dropout", self.krona_dropout)?;
        let (a1, b1) = sizes("a1", self.a1, site.out_features, "outputs", site)?;
        let (a2, b2) = sizes("a2", self.a2, site.in_features, "inputs", site)?;
        let start = Init::LinearDefault { fan_in: a2 };
        Ok(Box::new(Plus(At {
            a: Factor::Full(cx.param("krona_A", &[a1, a2], &start)?),
            b: Factor::Full(cx.param("krona_B", &[b1, b2], &Init::Zeros)?),
            scale: self.scale as f32,
            dropout: self.krona_dropout,
        })))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _tree: &ModuleTree) {
        whole(config, "scale");
    }
}

struct At {
    a: Factor,
    b: Factor,
    scale: f32,
    dropout: f32,
}

impl Change for At {
    fn dense(&self) -> Result<Tensor> {
        Ok(kron(&self.a.dense()?, &self.b.dense()?)?.scale(self.scale)?)
    }

    fn applied(&self, call: &Call<'_>) -> Result<Tensor> {
        let x = call.dropout(call.x()?, self.dropout)?;
        Ok(times_kron(&x, &self.a, &self.b)?.scale(self.scale)?)
    }

    fn by_rows(&self) -> bool {
        self.dropout == 0.0
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Result, Tensor};

    use crate::testing::attached;

    fn network(fields: Value) -> Result<Network> {
        let base = Base::custom().linear("fc", Array2::zeros((6, 4)), None)?;
        let config = json!({"peft_type": "KRONA", "target_modules": ["fc"]});
        attached(base, config, &fields)
    }

    /// A = [[1, 2], [3, 4], [0, 1]], B = [[1, 0], [1, 1]], s = 2, x = (1, 10, 100, 1000): as a matrix X = [[1, 10],
    /// [100, 1000]], A X Bᵀ = [[201, 2211], [403, 4433], [100, 1100]].
    #[test]
    fn by_hand() {
        let network = network(json!({"a1": 3, "a2": 2, "scale": 2})).expect("attaches");
        let values = [vec![1.0, 2.0, 3.0, 4.0, 0.0, 1.0], vec![1.0, 0.0, 1.0, 1.0]];
        for (param, values) in network.parameters().iter().zip(values) {
            let value = Tensor::from_vec(values, &param.shape(), network.device());
            param.set(value.expect("a tensor")).expect("fits");
        }
        let x = Tensor::from_vec(vec![1.0, 10.0, 100.0, 1000.0], &[1, 4], network.device());
        let y = network
            .run("fc", &x.expect("a tensor"), &Pass::eval())
            .expect("runs");
        assert_eq!(
            y.to_vec().expect("values"),
            [402.0, 4422.0, 806.0, 8866.0, 200.0, 2200.0]
        );
    }

    #[test]
    fn sizes_that_do_not_divide_are_refused_with_those_that_do() {
        for (field, value, valid) in [
            ("a1", 4, "1, 2, 3, 6"),
            ("a2", 3, "1, 2, 4"),
            ("a2", 0, "1, 2, 4"),
        ] {
            let Err(error) = network(json!({ field: value })) else {
                panic!("{field} = {value} was accepted");
            };
            let error = error.to_string();
            assert!(
                error.contains(field) && error.contains("`fc`") && error.contains(valid),
                "{error}"
            );
        }
    }
}
