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
//! embedding; `TEXT` takes the tokens of `prompt_tuning_init_text`, repeated or cut to the prompt's length, as HF does;
//! `CLASS_LABELS` takes one token for each of `class_labels` (the mean of the label's own tokens) and fills up from the
//! vocabulary. The paper found the labels best and random values worst (section 3.2), at a learning rate of 0.3;
//! on MiniLM 0.03 does with random values (200 steps of 16 rows: accuracy 0.69).
//! `num_virtual_tokens` 8: HF has no default; the paper's smallest prompts that work across sizes have 5 to 20 tokens.
//!
//! # Differences from HF
//! A saved prompt can be trained further; HF refuses to load one trainable. `TEXT` uses the model's own tokenizer,
//! whatever `tokenizer_name_or_path` and `tokenizer_kwargs` say. HF has no `CLASS_LABELS`; it loads such a file all the
//! same. A decoder reads a text's class from its last token; HF, with virtual tokens in front, from the last column, be
//! it padding (so with every method that puts tokens in front).
//!
//! # Limits
//! Encoder-decoder models are not there yet. A prompt takes its positions from the text's, but for AdapterHub's places in
//! BERT (`prompt_place`), which have none.

use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Error, ModuleTree, PeftMethod, PromptPlace, Result, Site, register,
};
use serde::{Deserialize, Serialize};

use crate::model_fields::kept_for_hf;
use crate::virtual_tokens::{PROMPT, Prompt, check_count, soft_prompt};
use crate::{ModelFields, PromptStart};

/// Prompt tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptTuning {
    /// Virtual tokens.
    pub num_virtual_tokens: usize,
    /// Where they come in: `input`, or for BERT as AdapterHub has it `behind_embeddings` or, then, `behind_first`.
    pub prompt_place: String,
    /// Initial values.
    #[serde(flatten)]
    pub start: PromptStart,
    /// What HF fills in from the model.
    #[serde(flatten)]
    pub model: ModelFields,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for PromptTuning {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 8,
            prompt_place: PLACES[0].to_owned(),
            start: PromptStart::default(),
            model: ModelFields::default(),
            others: kept_for_hf(),
        }
    }
}

/// Where virtual tokens come in: in front of the input embeddings, in front of what the first block sees, behind the first
/// token there.
const PLACES: [&str; 3] = ["input", "behind_embeddings", "behind_first"];

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
    hub = crate::hub::PROMPTS,
);

impl PeftMethod for PromptTuning {
    soft_prompt!();

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (count, hidden) = (self.num_virtual_tokens, cx.tree().facts().hidden_size);
        check_count(cx, "num_virtual_tokens", count)?;
        self.model.check(hidden)?;
        let init = self.start.init(cx, count, &[])?;
        Ok(Box::new(Prompt {
            tokens: cx.bare(PROMPT, &[count, hidden], &init)?,
            place: self.place(&cx.tree().facts().model_type)?,
        }))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        let facts = tree.facts();
        ModelFields::write(config, facts, facts.hidden_size, facts.num_heads);
        self.start.finish(config);
        if self.prompt_place == PLACES[0] {
            config.shift_remove("prompt_place");
        }
    }
}

impl PromptTuning {
    fn place(&self, model: &str) -> Result<PromptPlace> {
        const FIELD: &str = "prompt_place";
        let found = PLACES.iter().position(|name| *name == self.prompt_place);
        let place = match found {
            Some(0) => return Ok(PromptPlace::Input),
            Some(1) => PromptPlace::Blocks,
            Some(2) => PromptPlace::BlocksBehindFirst,
            _ => {
                let detail = format!(
                    "{:?} is not one of {}",
                    self.prompt_place,
                    PLACES.join(", ")
                );
                return Err(Error::config(FIELD, detail));
            }
        };
        if model != "bert" {
            let detail = format!(
                "{:?} is for BERT alone, the model is {model:?}",
                self.prompt_place
            );
            return Err(Error::config(FIELD, detail));
        }
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use peft_core::ndarray::array;
    use peft_core::serde_json::{Value, json};
    use peft_core::{
        Base, BaseWeight, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Result, Tensor,
        Tokenize,
    };

    /// Ids are what the digits say, behind a token 0.
    struct Digits;

    impl Tokenize for Digits {
        fn tokens(&self, text: &str) -> Result<Vec<u32>> {
            Ok(std::iter::once(0)
                .chain(text.chars().filter_map(|c| c.to_digit(10)))
                .collect())
        }
    }

    fn network() -> Network {
        let facts = ModelFacts {
            hidden_size: 2,
            input_embedding: Some("embed".to_owned()),
            max_positions: 6,
            ..ModelFacts::default()
        };
        let mut tree = ModuleTree::new(facts);
        tree.push(ModuleInfo::embedding("embed", 3, 2));
        let device = peft_core::Device::cpu();
        let mut base = Base::new(tree, &device);
        let table = Tensor::from_array(array![[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], &device)
            .expect("a table");
        base.insert("embed.weight", BaseWeight::dense(table, false));
        let mut network = Network::new(base);
        network.set_tokenizer(Arc::new(Digits));
        network
    }

    fn attached(fields: Value) -> Result<Vec<f32>> {
        let mut config = json!({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4});
        for (key, value) in fields.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let mut network = network();
        network.attach("a", &config, 7)?;
        let prompt = network.prompt(1, &Pass::eval())?.expect("a prompt");
        assert_eq!(prompt.shape(), [network.prompt_len(), 2]);
        Ok(prompt.to_vec()?)
    }

    #[test]
    fn sampled_tokens_are_rows_of_the_vocabulary() {
        let prompt = attached(json!({"prompt_tuning_init": "SAMPLE_VOCAB"})).expect("attaches");
        for row in prompt.chunks(2) {
            let known = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]];
            assert!(known.iter().any(|known| known == row), "{row:?}");
        }
    }

    /// "2" is the tokens 0 and 2, repeated; a longer text is cut.
    #[test]
    fn a_text_is_repeated_or_cut() {
        let of = |text: &str| {
            attached(json!({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}))
        };
        assert_eq!(
            of("2").expect("attaches"),
            [1.0, 2.0, 5.0, 6.0, 1.0, 2.0, 5.0, 6.0]
        );
        assert_eq!(of("2112").expect("attaches")[6..], [3.0, 4.0]);
        let error = of("9").expect_err("refused").to_string();
        assert!(error.contains("prompt_tuning_init_text"), "{error}");
    }

    /// The label of two tokens is their mean, without the token 0 in front; the other rows are drawn.
    #[test]
    fn labels_are_means_of_their_tokens() {
        let of = |labels: Value| {
            attached(json!({"prompt_tuning_init": "CLASS_LABELS", "class_labels": labels}))
        };
        let prompt = of(json!(["12", "1"])).expect("attaches");
        assert_eq!(prompt[..4], [4.0, 5.0, 3.0, 4.0]);
        let error = of(json!(["1", "1", "1", "1", "1"]))
            .expect_err("refused")
            .to_string();
        assert!(error.contains("class_labels"), "{error}");
    }

    #[test]
    fn lengths_that_cannot_be_are_errors() {
        for (count, named) in [(0, "num_virtual_tokens"), (6, "between 1 and 5")] {
            let error = attached(json!({"num_virtual_tokens": count}))
                .expect_err("refused")
                .to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
