//! SSF: scale and shift what every layer puts out.
//!
//! # Paper
//! Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, arXiv 2210.08823, section 3.2.
//!
//! # Formula
//! `y' = γ ⊙ y + β` with `y = W x + b` or `y = norm(x)`; merged, `W' = diag(γ) W` and `b' = γ ⊙ b + β`, and the same for a
//! norm's weight and bias.
//!
//! # Saved keys
//! `<module>.ssf_scale [out]` and, where there is a shift, `<module>.ssf_shift [out]`.
//!
//! # Defaults and their source
//! Every linear layer but the head, and every norm, as in the paper; γ normal around 1 and β around 0 with standard
//! deviation 0.02, as in its code, so that a fresh adapter is near the model, not equal to it (`init_std = 0` makes it
//! equal). A shift only where the module has a bias to merge it into; `shift_everywhere` for one in every place, as in
//! the paper, whose models have a bias everywhere. The paper's learning rates are 1e-3 to 1e-2.
//!
//! # Differences from HF
//! HF PEFT has no SSF.
//!
//! # Limits
//! With `shift_everywhere` on a model without biases the adapter merges in memory but into no file: there is no place for
//! the shifts in it. Embeddings are left alone.

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Call, Error, Init, ModuleKind, ModuleTree, Param, PeftMethod, Result, Site,
    Slot, Targets, Tensor, register,
};
use serde::{Deserialize, Serialize};

/// SSF's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Ssf {
    /// Whether places without a bias are shifted too.
    pub shift_everywhere: bool,
    /// Standard deviation of the initial values around 1 and 0.
    pub init_std: f64,
    /// Linear layers and norms to adapt; all but the head if not given.
    pub target_modules: Option<Value>,
    /// Modules left alone.
    pub exclude_modules: Option<Value>,
    /// Layers to adapt.
    pub layers_to_transform: Option<Value>,
    /// Names of the list the layers are in.
    pub layers_pattern: Option<Value>,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Value>,
}

impl Default for Ssf {
    fn default() -> Self {
        Self {
            shift_everywhere: false,
            init_std: 0.02,
            target_modules: None,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            modules_to_save: None,
        }
    }
}

register!(
    Ssf,
    id = "ssf",
    title = "SSF",
    family = Additive,
    subfamily = "rescaling",
    peft_type = "SSF",
    paper = "arXiv 2210.08823",
    example = r#"{"target_modules": ["q_proj", "down_proj", "input_layernorm"]}"#,
    identity_at_init = false,
);

const KINDS: &[ModuleKind] = &[ModuleKind::Linear, ModuleKind::Conv1d, ModuleKind::Norm];

impl PeftMethod for Ssf {
    fn kinds(&self) -> &'static [ModuleKind] {
        KINDS
    }

    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        let facts = tree.facts();
        let is_head = |path: &String| {
            facts.output_embedding.as_ref() == Some(path) || facts.task_heads.contains(path)
        };
        let all = tree.iter().filter(|(_, m)| KINDS.contains(&m.kind));
        let paths = all.map(|(_, m)| &m.path).filter(|path| !is_head(path));
        let mut names: Vec<String> = paths
            .filter_map(|path| path.rsplit('.').next().map(str::to_owned))
            .collect();
        names.sort_unstable();
        names.dedup();
        Some(Targets::Names(names))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        if !(0.0..=1.0).contains(&self.init_std) {
            return Err(Error::config("init_std", "has to be in [0, 1]"));
        }
        let (dim, std) = (site.out_features, self.init_std as f32);
        let key = cx.key("ssf_scale");
        let scale = Tensor::normal(key, 1.0, std, &[dim], &cx.device())?;
        let shifted = self.shift_everywhere || cx.has(Slot::Bias);
        Ok(Box::new(At {
            scale: cx.param("ssf_scale", &[dim], &Init::Value(scale))?,
            shift: if shifted {
                Some(cx.param("ssf_shift", &[dim], &Init::Normal { std })?)
            } else {
                None
            },
        }))
    }
}

struct At {
    /// `[out]`
    scale: Param,
    shift: Option<Param>,
}

impl Adapter for At {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let scale = self.scale.tensor();
        // A norm's weight is a vector; a matrix is scaled by rows.
        Ok(Some(if w.rank() == 1 {
            w.mul(&scale)?
        } else {
            w.mul(&scale.reshape(&[scale.numel(), 1])?)?
        }))
    }

    fn bias(&self, b: Option<Tensor>) -> Result<Option<Tensor>> {
        let scaled = b.map(|b| b.mul(&self.scale.tensor())).transpose()?;
        Ok(match (scaled, &self.shift) {
            (Some(b), Some(shift)) => Some(b.add(&shift.tensor())?),
            (None, Some(shift)) => Some(shift.tensor()),
            (b, None) => b,
        })
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let y = call.base()?.mul(&self.scale.tensor())?;
        Ok(match &self.shift {
            Some(shift) => y.add(&shift.tensor())?,
            None => y,
        })
    }

    fn by_rows(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Tensor};

    fn network(fields: Value) -> Network {
        let weight = array![[1.0, 2.0], [3.0, 4.0]];
        let base = Base::custom()
            .linear("layers.0.one", weight.clone(), Some(array![0.5, 1.0]))
            .and_then(|base| base.linear("layers.0.two", weight, None))
            .expect("a base");
        let mut config = fields;
        config["peft_type"] = json!("SSF");
        let mut network = Network::new(base);
        network.attach("a", &config, 0).expect("attaches");
        network
    }

    fn run(network: &Network, path: &str) -> Vec<f32> {
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        let y = network.run(path, &x, &Pass::eval()).expect("runs");
        y.to_vec().expect("values")
    }

    /// W x + b = (3.5, 8), scaled by (2, 10) and shifted by (1, 3): (8, 83). Without a bias (6, 70), shifted where asked.
    #[test]
    fn by_hand() {
        for (everywhere, without_bias) in [(false, [6.0, 70.0]), (true, [7.0, 73.0])] {
            let mut network = network(json!({"shift_everywhere": everywhere}));
            for param in network.parameters() {
                let values = if param.key().ends_with("scale") {
                    [2.0, 10.0]
                } else {
                    [1.0, 3.0]
                };
                let value = Tensor::from_vec(values.to_vec(), &[2], network.device());
                param.set(value.expect("a tensor")).expect("fits");
            }
            for merged in [false, true] {
                if merged {
                    network.merge().expect("merges");
                }
                assert_eq!(run(&network, "layers.0.one"), [8.0, 83.0]);
                assert_eq!(run(&network, "layers.0.two"), without_bias);
            }
        }
    }

    #[test]
    fn starts_near_the_model_or_as_the_model() {
        assert_eq!(
            run(&network(json!({"init_std": 0})), "layers.0.one"),
            [3.5, 8.0]
        );
        let near = run(&network(json!({})), "layers.0.one");
        assert!(
            near != [3.5, 8.0] && (near[0] - 3.5).abs() < 0.5,
            "{near:?}"
        );
    }
}
