//! (IA)3: one learned factor for each key, value and inner activation.
//!
//! # Paper
//! Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv 2205.05638, section 3.3.
//!
//! # Formula
//! `y = l ⊙ (W x + b)` on keys and values; `y = W (l ⊙ x) + b` on the modules that `feedforward_modules` names, whose input
//! is the inner activation. Merged, W's rows and b, or W's columns, times l.
//!
//! # Saved keys
//! `<module>.ia3_l [out, 1]`, feedforward `<module>.ia3_l [1, in]`.
//!
//! # Defaults and their source
//! Target and feedforward modules by model type, l one: HF PEFT 0.21. The paper trains with a learning rate of 3e-3; 1e-2
//! to 3e-2 suits a small model.
//!
//! # Differences from HF
//! Unmerging is exact (HF divides by `l + 1e-8`). A feedforward name that ends no adapted module's path is an error.
//!
//! # Limits
//! No convolutions. The paper's two extra losses are not here.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, Injector, ModuleKind, ModuleTree, Param, PeftMethod,
    Result, Site, Targets, Tensor, matcher, register,
};
use serde::{Deserialize, Serialize};

/// (IA)3's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Ia3 {
    /// Adapted modules whose input is scaled instead of their output: the ends of their paths, or a regular expression
    /// for whole paths; by model type if not given.
    pub feedforward_modules: Option<Targets>,
    /// Whether a fresh adapter is the identity.
    pub init_ia3_weights: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for Ia3 {
    fn default() -> Self {
        let others = json!({
            "exclude_modules": null, "fan_in_fan_out": false, "modules_to_save": null, "target_modules": null
        });
        Self {
            feedforward_modules: None,
            init_ia3_weights: true,
            others: others.as_object().cloned().unwrap_or_default(),
        }
    }
}

register!(
    Ia3,
    id = "ia3",
    title = "(IA)3",
    family = Additive,
    subfamily = "rescaling",
    peft_type = "IA3",
    paper = "arXiv 2205.05638",
    example = r#"{"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}"#,
    hub = crate::hub::FACTORS,
);

/// HF's table: the modules to adapt, and which of them are feedforward.
fn table(model_type: &str) -> Option<(&'static [&'static str], &'static [&'static str])> {
    Some(match model_type {
        "llama" | "mistral" => (&["k_proj", "v_proj", "down_proj"], &["down_proj"]),
        "llama4" | "gemma" | "gemma2" | "gemma3_text" | "qwen2" | "qwen3" => {
            (&["q_proj", "v_proj", "down_proj"], &["down_proj"])
        }
        "mixtral" => (&["k_proj", "v_proj", "w2"], &["w2"]),
        "bert" | "roberta" => (&["key", "value", "output.dense"], &["output.dense"]),
        "deberta-v2" => (
            &["key_proj", "value_proj", "output.dense"],
            &["output.dense"],
        ),
        "deberta" => (&["in_proj", "output.dense"], &["output.dense"]),
        "gpt2" | "gpt_bigcode" => (&["c_attn", "mlp.c_proj"], &["mlp.c_proj"]),
        "gpt_neox" | "RefinedWebModel" | "RefinedWeb" | "falcon" => {
            (&["query_key_value", "dense_4h_to_h"], &["dense_4h_to_h"])
        }
        "bloom" => (
            &["query_key_value", "mlp.dense_4h_to_h"],
            &["mlp.dense_4h_to_h"],
        ),
        "gptj" => (&["q_proj", "v_proj", "fc_out"], &["fc_out"]),
        "gpt_neo" => (&["q_proj", "v_proj", "c_proj"], &["c_proj"]),
        "opt" => (&["q_proj", "k_proj", "fc2"], &["fc2"]),
        "bart" | "phi" => (&["q_proj", "v_proj", "fc2"], &["fc2"]),
        "t5" => (&["k", "v", "wo"], &["wo"]),
        "mt5" => (&["k", "v", "wi_1"], &[]),
        _ => return None,
    })
}

fn names(all: &[&str]) -> Targets {
    Targets::Names(all.iter().map(|&name| name.to_owned()).collect())
}

const FIELD: &str = "feedforward_modules";

impl Ia3 {
    fn feedforward(&self, tree: &ModuleTree) -> Result<Targets> {
        if let Some(given) = &self.feedforward_modules {
            return Ok(given.clone());
        }
        let model = &tree.facts().model_type;
        table(model).map(|(_, inner)| names(inner)).ok_or_else(|| {
            let detail = format!(
                "has to be given, [] for none: there is no default for model_type {model:?}"
            );
            Error::config(FIELD, detail)
        })
    }
}

/// Whether a module's input is scaled. HF takes names as ends of paths, also within a dotted part.
fn is_feedforward(which: &Targets, path: &str) -> Result<bool> {
    match which {
        Targets::Names(names) => Ok(names.iter().any(|name| path.ends_with(name.as_str()))),
        Targets::Pattern(pattern) => Ok(matcher::compile(FIELD, pattern)?.is_match(path)),
        Targets::AllLinear => Err(Error::config(
            FIELD,
            "takes names or a regular expression, not \"all-linear\"",
        )),
    }
}

impl PeftMethod for Ia3 {
    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        table(&tree.facts().model_type).map(|(all, _)| names(all))
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        let sites = self.sites(cx.tree(), cx.common())?;
        // What the table names beyond the targets is no mistake of the user's.
        if let Some(Targets::Names(names)) = &self.feedforward_modules {
            for name in names {
                if !sites.iter().any(|s| s.path.ends_with(name.as_str())) {
                    let paths = sites.iter().map(|s| s.path.as_str());
                    cx.common().unused(Error::NoMatch {
                        field: FIELD.to_owned(),
                        name: name.clone(),
                        nearest: peft_core::nearest(name, paths),
                    })?;
                }
            }
        }
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let feedforward = is_feedforward(&self.feedforward(cx.tree())?, &site.path)?;
        let shape = if feedforward {
            [1, site.in_features]
        } else {
            [site.out_features, 1]
        };
        let start = if self.init_ia3_weights {
            Init::Constant(1.0)
        } else {
            Init::Normal { std: 1.0 }
        };
        Ok(Box::new(At {
            l: cx.param("ia3_l", &shape, &start)?,
            feedforward,
        }))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        if let (None, Ok(which)) = (&self.feedforward_modules, self.feedforward(tree)) {
            config.insert(FIELD.to_owned(), json!(which));
        }
        if tree.iter().any(|(_, m)| m.kind == ModuleKind::Conv1d) {
            config.insert("fan_in_fan_out".to_owned(), json!(true));
        }
    }
}

struct At {
    /// `[1, in]` or `[out, 1]`
    l: Param,
    feedforward: bool,
}

impl At {
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        let l = self.l.tensor();
        Ok(x.mul(&l.reshape(&[l.numel()])?)?)
    }
}

impl Adapter for At {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        Ok(Some(w.mul(&self.l.tensor())?))
    }

    fn bias(&self, b: Option<Tensor>) -> Result<Option<Tensor>> {
        match b {
            Some(b) if !self.feedforward => self.times(&b).map(Some),
            b => Ok(b),
        }
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        if self.feedforward {
            call.base_with(&self.times(call.x()?)?)
        } else {
            self.times(&call.base()?)
        }
    }

    fn by_rows(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Result, Tensor};

    fn network(config: Value) -> Result<Network> {
        let weight = array![[1.0, 2.0], [3.0, 4.0]];
        let base = Base::custom()
            .linear("layers.0.key", weight.clone(), Some(array![0.5, 1.0]))?
            .linear("layers.0.xdense", weight, Some(array![0.5, 1.0]))?;
        let mut config = config;
        config["peft_type"] = json!("IA3");
        let mut network = Network::new(base);
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// W x + b = (3.5, 8) for x = (1, 1); l = (2, 10). The output times l is (7, 80); W (l x) + b is (22.5, 47).
    #[test]
    fn by_hand() {
        let config =
            json!({"target_modules": ["key", "xdense"], "feedforward_modules": ["dense", "key2"]});
        let error = network(config).expect_err("refused").to_string();
        assert!(error.contains("key2"), "{error}");
        // HF's ends of paths need no dot in front.
        let config = json!({"target_modules": ["key", "xdense"], "feedforward_modules": ["dense"]});
        let mut network = network(config).expect("attaches");
        let params = network.parameters();
        assert_eq!([params[0].shape(), params[1].shape()], [[2, 1], [1, 2]]);
        for param in &params {
            let l = Tensor::from_vec(vec![2.0, 10.0], &param.shape(), network.device());
            param.set(l.expect("a tensor")).expect("fits");
        }
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        let run = |network: &Network, path: &str| {
            let y = network.run(path, &x, &Pass::eval()).expect("runs");
            y.to_vec().expect("values")
        };
        for merged in [false, true] {
            if merged {
                network.merge().expect("merges");
            }
            assert_eq!(run(&network, "layers.0.key"), [7.0, 80.0]);
            assert_eq!(run(&network, "layers.0.xdense"), [22.5, 47.0]);
        }
    }

    #[test]
    fn a_model_without_defaults_has_to_be_told() {
        let config = json!({"target_modules": ["key"]});
        let error = network(config).expect_err("refused").to_string();
        assert!(error.contains("feedforward_modules"), "{error}");
        network(json!({"target_modules": ["key"], "feedforward_modules": []})).expect("attaches");
    }
}
