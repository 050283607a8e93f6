//! LN tuning: train the norms and nothing else.
//!
//! # Paper
//! Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420, section 3.
//!
//! # Formula
//! `y = norm(x) * w' + b'` with w' and b' trained from the norm's own; everything else frozen.
//!
//! # Saved keys
//! `<norm>.ln_tuning_layers.weight [dim]` and, where the norm has one, `<norm>.ln_tuning_layers.bias [dim]`.
//!
//! # Defaults and their source
//! HF PEFT 0.21's table by model type; all norms of a model it does not have.
//!
//! # Differences from HF
//! HF wraps any module that is named; here a target that is no norm is an error.
//!
//! # Limits
//! None known.

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Common, Error, ModuleKind, ModuleTree, PeftMethod, Result, Selected, Site,
    Slot, Targets, register,
};
use serde::{Deserialize, Serialize};

/// LN tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LnTuning {
    /// Norms to train; all of them if not given.
    pub target_modules: Option<Value>,
    /// Norms left alone.
    pub exclude_modules: Option<Value>,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Value>,
}

register!(
    LnTuning,
    id = "ln_tuning",
    title = "LN tuning",
    family = Selective,
    subfamily = "structured",
    peft_type = "LN_TUNING",
    paper = "arXiv 2312.11420",
    example = r#"{"target_modules": ["input_layernorm"]}"#,
);

impl PeftMethod for LnTuning {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Norm]
    }

    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        let names: &[&str] = match tree.facts().model_type.as_str() {
            "llama" | "mistral" | "gemma" => {
                &["input_layernorm", "post_attention_layernorm", "norm"]
            }
            "qwen2" | "qwen3" => &["post_attention_layernorm"],
            "gpt2" => &["ln_1", "ln_2", "ln_f"],
            "phi" => &["input_layernorm", "final_layernorm"],
            _ => return None,
        };
        Some(Targets::Names(
            names.iter().map(|&n| n.to_owned()).collect(),
        ))
    }

    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        let defaults = self.default_targets(tree);
        if common.target_modules.is_some() || defaults.is_some() {
            return tree.matching(common, self.kinds(), defaults);
        }
        let norms = tree.iter().filter(|(_, m)| m.kind == ModuleKind::Norm);
        let sites: Vec<Site> = norms.map(|(id, _)| tree.site(id)).collect();
        if sites.is_empty() {
            return Err(Error::config(
                "peft_type",
                "LN tuning trains norms, and this model has none",
            ));
        }
        Ok(sites)
    }

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        cx.select(Slot::Weight, "ln_tuning_layers.weight")?;
        if cx.has(Slot::Bias) {
            cx.select(Slot::Bias, "ln_tuning_layers.bias")?;
        }
        Ok(Box::new(Selected))
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Pass, Tensor};

    /// A norm of (3, -3) is (1, -1) before its weight and bias.
    #[test]
    fn weight_and_bias_stand_in() {
        let base = Base::custom()
            .norm("norm", array![1.0, 1.0], Some(array![0.0, 0.0]))
            .expect("a base");
        let mut network = Network::new(base);
        network
            .attach("a", &json!({"peft_type": "LN_TUNING"}), 0)
            .expect("attaches");
        for (param, values) in network
            .parameters()
            .iter()
            .zip([vec![2.0, 4.0], vec![0.5, 0.25]])
        {
            param
                .set(Tensor::from_vec(values, &[2], network.device()).expect("a tensor"))
                .expect("fits");
        }
        let x = Tensor::from_vec(vec![3.0, -3.0], &[1, 2], network.device()).expect("a tensor");
        let id = network.module("norm").expect("there");
        let run = |network: &Network| {
            network
                .layer_norm(id, &x, 0.0, &Pass::eval())
                .expect("runs")
                .to_vec()
                .expect("values")
        };
        assert_eq!(run(&network), [2.5, -3.75]);
        network.merge().expect("merges");
        assert_eq!(run(&network), [2.5, -3.75]);
        network.unmerge();
        network.set_active(&[]).expect("disables");
        assert_eq!(run(&network), [1.0, -1.0]);
    }
}
