//! VeRA: one pair of random matrices for the whole model, scaled by trained vectors at each module.
//!
//! # Paper
//! VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454, section 3.
//!
//! # Formula
//! `y = W x + b ∘ B (d ∘ A dropout(x))`; merged, `W' = W + diag(b) B diag(d) A`. A `[r, in]` and B `[out, r]` are
//! frozen, drawn once for the widest adapted modules and sliced for the others: the first `in` columns of A, the first
//! `out` rows of B.
//!
//! # Saved keys
//! `<module>.vera_lambda_b [out]`, `<module>.vera_lambda_d [r]`; with `save_projection` also `base_model.vera_A
//! [r, widest in]` and `base_model.vera_B [widest out, r]`.
//!
//! # Defaults and their source
//! r 256, d 0.1, b zero, A and then B from PyTorch's generator seeded with `projection_prng_key` 0, uniform with bound
//! `sqrt(6 / fan_in)`, saved with the adapter: HF PEFT 0.21. The paper trains b and d with 4e-3 to 1e-2, some ten times
//! LoRA's learning rate: `train.learning_rate = 5e-3` is a good start.
//!
//! # Differences from HF
//! Several adapters of one model may have different seeds and ranks. The widest sizes are those of the modules that are
//! adapted, as in HF; an adapter for another set of modules has other matrices.
//!
//! # Limits
//! Linear and Conv1D modules.

use std::sync::OnceLock;

use peft_core::peft_tensor::torch_rng::TorchRng;
use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Device, Error, Init, Injector, ModuleTree, Param, PeftMethod, Result,
    Site, Targets, Tensor, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::change::{Change, Plus};
use crate::fields;

/// VeRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Vera {
    /// Rows of A, columns of B.
    pub r: usize,
    /// Seed of A and B.
    pub projection_prng_key: u64,
    /// Whether the file holds A and B; without them a reader makes them from the seed.
    pub save_projection: bool,
    /// Dropout on the input of A.
    pub vera_dropout: f32,
    /// Initial value of d.
    pub d_initial: f64,
    /// Whether b starts at zero and d at `d_initial`; without, b is one and d normal, for tests.
    pub init_weights: bool,
    /// Whether the weight is stored `[in, out]`; found out from the model, kept for the file.
    pub fan_in_fan_out: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    /// A and B as drawn, on the processor.
    #[serde(skip)]
    drawn: OnceLock<(Tensor, Tensor)>,
}

impl Default for Vera {
    fn default() -> Self {
        let others = json!({
            "bias": "none", "layers_pattern": null, "layers_to_transform": null, "modules_to_save": null,
            "target_modules": null
        });
        Self {
            r: 256,
            projection_prng_key: 0,
            save_projection: true,
            vera_dropout: 0.0,
            d_initial: 0.1,
            init_weights: true,
            fan_in_fan_out: false,
            others: others.as_object().cloned().unwrap_or_default(),
            drawn: OnceLock::new(),
        }
    }
}

register!(
    Vera,
    id = "vera",
    title = "VeRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "VERA",
    paper = "arXiv 2310.11454",
    example = r#"{"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}"#,
);

const NAMES: [&str; 2] = ["vera_A", "vera_B"];

impl Vera {
    fn check(&self) -> Result<()> {
        fields::probability("vera_dropout", self.vera_dropout)?;
        fields::finite("d_initial", self.d_initial)?;
        if self.r == 0 {
            return Err(Error::config("r", "has to be at least 1"));
        }
        Ok(())
    }

    /// A `[r, inside]` and B `[out, r]` as HF draws them, A first.
    fn draw(&self, inside: usize, out: usize) -> Result<(Tensor, Tensor)> {
        let mut rng = TorchRng::new(self.projection_prng_key);
        let mut matrix = |rows: usize, cols: usize| {
            // Kaiming's bound for a gain of sqrt 2, in the order of operations HF has.
            let bound = 3f64.sqrt() * (2f64.sqrt() / (cols as f64).sqrt());
            let mut values = vec![0.0; rows * cols];
            rng.fill_uniform(-bound, bound, &mut values);
            Ok::<_, Error>(Tensor::from_vec(values, &[rows, cols], &Device::cpu())?)
        };
        Ok((matrix(self.r, inside)?, matrix(out, self.r)?))
    }

    /// A and B for the adapters of one model.
    fn projections(&self, cx: &mut Attach<'_>, drawn: &(Tensor, Tensor)) -> Result<[Param; 2]> {
        let mut make = |name: &str, value: &Tensor| {
            if self.save_projection {
                return cx.shared_frozen(name, value.shape(), &Init::Value(value.clone()));
            }
            let param = Param::new(name, &value.to_device(&cx.device())?, false);
            param.set_trainable(false);
            Ok(param)
        };
        Ok([make(NAMES[0], &drawn.0)?, make(NAMES[1], &drawn.1)?])
    }
}

impl PeftMethod for Vera {
    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        let names = peft_core::matcher::default_targets(&tree.facts().model_type)?;
        // HF leaves the feed-forward layers out where its table for most methods has them.
        let kept = names.iter().filter(|n| !matches!(**n, "fc1" | "fc2"));
        Some(Targets::Names(kept.map(|&n| n.to_owned()).collect()))
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.check()?;
        let sites = self.sites(cx.tree(), cx.common())?;
        let widest = |size: fn(&Site) -> usize| sites.iter().map(size).max().unwrap_or(0);
        let drawn = self.draw(widest(|s| s.in_features), widest(|s| s.out_features))?;
        // A method is attached once; the first matrices stand.
        let _ = self.drawn.set(drawn);
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        // As if this were the only module, for a caller that attaches sites by itself.
        let alone;
        let drawn = match self.drawn.get() {
            Some(drawn) => drawn,
            None => {
                alone = self.draw(site.in_features, site.out_features)?;
                &alone
            }
        };
        let [a, b] = self.projections(cx, drawn)?;
        let (lambda_b, lambda_d) = if self.init_weights {
            (Init::Zeros, Init::Constant(self.d_initial as f32))
        } else {
            (Init::Constant(1.0), Init::Normal { std: 1.0 })
        };
        Ok(Box::new(Plus(Scaled {
            a,
            b,
            lambda_b: cx.param("vera_lambda_b", &[site.out_features], &lambda_b)?,
            lambda_d: cx.param("vera_lambda_d", &[self.r], &lambda_d)?,
            inside: site.in_features,
            out: site.out_features,
            dropout: self.vera_dropout,
        })))
    }

    fn load(&self, mut params: Tensors) -> Result<Tensors> {
        if !self.save_projection {
            // Written by someone who changed their mind; the seed counts, as in HF.
            for name in NAMES {
                params.remove(&format!("base_model.{name}"));
            }
        }
        Ok(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        fields::fan_in_fan_out(config, tree);
    }
}

struct Scaled {
    /// `[r, widest in]`
    a: Param,
    /// `[widest out, r]`
    b: Param,
    /// `[out]`
    lambda_b: Param,
    /// `[r]`
    lambda_d: Param,
    inside: usize,
    out: usize,
    dropout: f32,
}

impl Scaled {
    /// This module's parts of A and B.
    fn slices(&self) -> Result<(Tensor, Tensor)> {
        let (mut a, mut b) = (self.a.tensor(), self.b.tensor());
        if a.last_dim() != self.inside {
            a = a.narrow(1, 0, self.inside)?;
        }
        if b.shape().first() != Some(&self.out) {
            b = b.narrow(0, 0, self.out)?;
        }
        Ok((a, b))
    }
}

impl Change for Scaled {
    fn dense(&self) -> Result<Tensor> {
        let (a, b) = self.slices()?;
        let rows = self.lambda_b.tensor().reshape(&[self.out, 1])?;
        Ok(b.mul(&rows)?.mul(&self.lambda_d.tensor())?.matmul(&a)?)
    }

    fn applied(&self, call: &Call<'_>) -> Result<Tensor> {
        let (a, b) = self.slices()?;
        let inner = call.dropout(call.x()?, self.dropout)?.matmul_t(&a)?;
        let outer = inner.mul(&self.lambda_d.tensor())?.matmul_t(&b)?;
        Ok(outer.mul(&self.lambda_b.tensor())?)
    }

    fn by_rows(&self) -> bool {
        self.dropout == 0.0
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Tensor, Tensors};

    /// A wide module and a tall one: A is `[r, 3]`, B `[4, r]`.
    fn network() -> Network {
        let base = Base::custom()
            .linear("wide", Array2::zeros((2, 3)), None)
            .and_then(|b| b.linear("tall", Array2::zeros((4, 2)), None))
            .expect("a base");
        Network::new(base)
    }

    fn config(more: Value) -> Value {
        let mut config = json!({"peft_type": "VERA", "r": 2, "target_modules": ["wide", "tall"]});
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }

    fn values(tensors: &Tensors, key: &str) -> Vec<f32> {
        tensors[key].to_vec().expect("values")
    }

    /// A and B of a model of these two layers by HF PEFT 0.21.2, seed 7.
    #[test]
    fn the_projections_are_hfs() {
        let mut network = network();
        network
            .attach("a", &config(json!({"projection_prng_key": 7})), 0)
            .expect("attaches");
        let (_, tensors) = network.export("a").expect("exports");
        assert_eq!(tensors["base_model.vera_B"].shape(), [4, 2]);
        assert_eq!(values(&tensors, "base_model.vera_A"), HF_A);
        assert_eq!(values(&tensors, "base_model.vera_B"), HF_B);
    }

    const HF_A: [f32; 6] = [
        0.098_775_856,
        -0.851_913_2,
        0.450_318_66,
        0.443_752_7,
        -0.755_864_44,
        -0.211_958_35,
    ];
    const HF_B: [f32; 8] = [
        -1.014_683_7,
        0.449_419_95,
        -0.466_558_52,
        1.216_829_3,
        1.229_559_2,
        0.176_444_74,
        -0.738_411_3,
        -1.017_339_5,
    ];

    /// Tall: A's first two columns (1 2; 4 5), B = rows (1 0), (0 1), (1 1), (2 0); x = (1, 1): A x = (3, 9);
    /// d = (1, 2): (3, 18); B: (3, 18, 21, 6); b = (1, 1, 2, 0.5).
    #[test]
    fn by_hand() {
        let mut network = network();
        let device = network.device().clone();
        let tensor = |values: &[f32], shape: &[usize]| {
            Tensor::from_vec(values.to_vec(), shape, &device).expect("a tensor")
        };
        let key = |name: &str| format!("base_model.model.{name}");
        let tensors: Tensors = [
            (
                "base_model.vera_A".to_owned(),
                tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]),
            ),
            (
                "base_model.vera_B".to_owned(),
                tensor(&[1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 0.0], &[4, 2]),
            ),
            (key("wide.vera_lambda_b"), tensor(&[0.0, 0.0], &[2])),
            (key("wide.vera_lambda_d"), tensor(&[1.0, 1.0], &[2])),
            (
                key("tall.vera_lambda_b"),
                tensor(&[1.0, 1.0, 2.0, 0.5], &[4]),
            ),
            (key("tall.vera_lambda_d"), tensor(&[1.0, 2.0], &[2])),
        ]
        .into_iter()
        .collect();
        network
            .load("a", &config(json!({})), tensors, true)
            .expect("loads");
        let x = Tensor::from_array(array![[1.0, 1.0]], &device).expect("a tensor");
        let y = network.run("tall", &x, &Pass::eval()).expect("runs");
        assert_eq!(y.to_vec().expect("values"), [3.0, 18.0, 42.0, 3.0]);
        assert_eq!(network.parameters().len(), 4, "A and B are not trained");
    }

    /// Without the matrices in the file, the seed makes the same function.
    #[test]
    fn the_seed_is_enough() {
        let run = |network: &Network| {
            let x = Tensor::from_array(array![[1.0, -2.0]], network.device()).expect("a tensor");
            let y = network.run("tall", &x, &Pass::eval()).expect("runs");
            y.to_vec().expect("values")
        };
        let mut first = network();
        first
            .attach("a", &config(json!({"init_weights": false})), 3)
            .expect("attaches");
        let (_, mut tensors) = first.export("a").expect("exports");
        tensors.remove("base_model.vera_A");
        let mut second = network();
        let seeded = config(json!({"save_projection": false}));
        second.load("a", &seeded, tensors, false).expect("loads");
        assert_eq!(run(&first), run(&second));
        let (_, saved) = second.export("a").expect("exports");
        assert!(saved.keys().all(|k| !k.contains("vera_A")), "{saved:?}");
    }
}
