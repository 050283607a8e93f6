//! Fields of prompt methods that HF fills in from the model and writes into every file.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{Error, ModelFacts, Result};
use serde::{Deserialize, Serialize};

/// What a saved prompt says of the model it was made for.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelFields {
    /// Width of a token, or of a layer's keys.
    pub token_dim: Option<usize>,
    /// Layers.
    pub num_layers: Option<usize>,
    /// Heads.
    pub num_attention_heads: Option<usize>,
    /// 1; 2 for encoder-decoders.
    pub num_transformer_submodules: Option<usize>,
}

/// The one of HF's other fields that a fresh prompt's file has.
pub(crate) fn kept_for_hf() -> Map<String, Value> {
    [("modules_to_save".to_owned(), Value::Null)]
        .into_iter()
        .collect()
}

impl ModelFields {
    /// Checks a width that a file states against the model's.
    pub(crate) fn check(&self, width: usize) -> Result<()> {
        if let Some(more @ 2..) = self.num_transformer_submodules {
            let detail = format!("is {more}: encoder-decoder models are not there yet");
            return Err(Error::config("num_transformer_submodules", detail));
        }
        match self.token_dim {
            Some(stated) if stated != width => Err(Error::config(
                "token_dim",
                format!("is {stated}, the model has {width}"),
            )),
            _ => Ok(()),
        }
    }

    /// Writes the model's numbers.
    pub(crate) fn write(
        config: &mut Map<String, Value>,
        facts: &ModelFacts,
        width: usize,
        heads: usize,
    ) {
        config.insert("token_dim".to_owned(), json!(width));
        config.insert("num_layers".to_owned(), json!(facts.num_layers));
        config.insert("num_attention_heads".to_owned(), json!(heads));
        config.insert("num_transformer_submodules".to_owned(), json!(1));
    }
}
