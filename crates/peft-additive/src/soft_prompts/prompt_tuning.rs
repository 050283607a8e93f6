//! Prompt tuning: trained virtual tokens in front of the input embeddings.
//!
//! # Paper
//! The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691, section 2.
//!
//! # Formula
//! `[P; E(x)]` instead of `E(x)`, P `[num_virtual_tokens, hidden]`; the rest of the model is frozen.
//!
//! # Saved keys
//! `prompt_embeddings [num_virtual_tokens, hidden]`, without any prefix.
//!
//! # Defaults and their source
//! Start `RANDOM`: standard normal, as HF PEFT 0.21 (`nn.Embedding`'s). `SAMPLE_VOCAB` draws rows of the input
//! embedding, which the paper found better (section 3.2). `num_virtual_tokens` 8: HF has no default; the paper's
//! smallest prompts that work across sizes have 5 to 20 tokens.
//!
//! # Differences from HF
//! A saved prompt can be trained further; HF refuses to load one trainable.
//!
//! # Limits
//! The start `TEXT` needs a tokenizer and is refused by name. Encoder-decoder models are not there yet.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Common, Error, Init, ModuleTree, Param, PeftMethod, PromptCx, Result, Site,
    Tensor, register,
};
use serde::{Deserialize, Serialize};

use crate::ModelFields;

/// Prompt tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptTuning {
    /// Virtual tokens.
    pub num_virtual_tokens: usize,
    /// `RANDOM` or `SAMPLE_VOCAB`.
    pub prompt_tuning_init: String,
    /// What HF fills in from the model.
    #[serde(flatten)]
    pub model: ModelFields,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for PromptTuning {
    fn default() -> Self {
        let others = json!({
            "modules_to_save": null, "prompt_tuning_init_text": null, "tokenizer_kwargs": null,
            "tokenizer_name_or_path": null
        });
        Self {
            num_virtual_tokens: 8,
            prompt_tuning_init: "RANDOM".to_owned(),
            model: ModelFields::default(),
            others: others.as_object().cloned().unwrap_or_default(),
        }
    }
}

register!(
    PromptTuning,
    id = "prompt_tuning",
    title = "Prompt tuning",
    family = Additive,
    subfamily = "soft prompts",
    peft_type = "PROMPT_TUNING",
    paper = "arXiv 2104.08691",
    example = r#"{"num_virtual_tokens": 3}"#,
    identity_at_init = false,
    mergeable = false,
);

impl PeftMethod for PromptTuning {
    fn sites(&self, _tree: &ModuleTree, _common: &Common) -> Result<Vec<Site>> {
        Ok(vec![Site::root()])
    }

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let facts = cx.tree().facts().clone();
        let (count, hidden) = (self.num_virtual_tokens, facts.hidden_size);
        if count == 0 {
            return Err(Error::config("num_virtual_tokens", "has to be at least 1"));
        }
        self.model.check(hidden)?;
        let init = match self.prompt_tuning_init.as_str() {
            "RANDOM" => Init::Normal { std: 1.0 },
            "SAMPLE_VOCAB" => {
                let path = facts.input_embedding.ok_or_else(|| {
                    Error::config(
                        "prompt_tuning_init",
                        "SAMPLE_VOCAB: the model has no input embedding",
                    )
                })?;
                let table = cx.base_values(&format!("{path}.weight"))?;
                let (rows, _) = table.dims2()?;
                let key = cx.key("sample_vocab");
                let ids: Vec<u32> = (0..count)
                    .map(|i| key.below(i as u64, rows as u64) as u32)
                    .collect();
                Init::Value(table.gather_rows(&ids)?)
            }
            other => {
                let detail = format!("{other:?} is not one of RANDOM, SAMPLE_VOCAB");
                return Err(Error::config("prompt_tuning_init", detail));
            }
        };
        Ok(Box::new(Prompt {
            tokens: cx.bare("prompt_embeddings", &[count, hidden], &init)?,
        }))
    }

    fn module_prefix(&self) -> &'static str {
        "base_model."
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        let facts = tree.facts();
        ModelFields::write(config, facts, facts.hidden_size, facts.num_heads);
    }
}

struct Prompt {
    /// `[V, hidden]`
    tokens: Param,
}

impl Adapter for Prompt {
    fn prompt(&self, _at: &PromptCx<'_>) -> Result<Option<Tensor>> {
        Ok(Some(self.tokens.tensor()))
    }

    fn prompt_len(&self) -> usize {
        self.tokens.shape()[0]
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{Base, BaseWeight, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Tensor};

    fn network() -> Network {
        let facts = ModelFacts {
            hidden_size: 2,
            input_embedding: Some("embed".to_owned()),
            ..ModelFacts::default()
        };
        let mut tree = ModuleTree::new(facts);
        tree.push(ModuleInfo::embedding("embed", 3, 2));
        let device = peft_core::Device::cpu();
        let mut base = Base::new(tree, &device);
        let table = Tensor::from_array(array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device)
            .expect("a table");
        base.insert("embed.weight", BaseWeight::dense(table, false));
        Network::new(base)
    }

    #[test]
    fn sampled_tokens_are_rows_of_the_vocabulary() {
        let mut network = network();
        let config = json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "SAMPLE_VOCAB"});
        network.attach("a", &config, 7).expect("attaches");
        let prompt = network
            .prompt(1, &Pass::eval())
            .expect("runs")
            .expect("a prompt");
        assert_eq!(prompt.shape(), [4, 2]);
        assert_eq!(network.prompt_len(), 4);
        for row in prompt.to_vec().expect("values").chunks(2) {
            assert!(
                [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
                    .iter()
                    .any(|known| known == row),
                "{row:?}"
            );
        }
    }

    #[test]
    fn an_empty_prompt_is_an_error() {
        let config = json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 0});
        let error = network()
            .attach("a", &config, 7)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("num_virtual_tokens"), "{error}");
    }
}
