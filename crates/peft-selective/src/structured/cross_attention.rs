//! Cross-attention tuning: train what looks from the decoder at the encoder, and nothing else.
//!
//! # Paper
//! Cross-Attention is All You Need: Adapting Pretrained Transformers for Machine Translation, arXiv 2104.08771,
//! section 3.
//!
//! # Formula
//! Queries, keys, values and output of every cross-attention, and the norm beside it, are trained from their own values;
//! the rest frozen.
//!
//! # Saved keys
//! `<module>.weight`, `<module>.bias`: the trained parameters themselves, under the base model's names for them.
//!
//! # Defaults and their source
//! The modules are known by the names HF's models give them: `encoder_attn` and `encoder_attn_layer_norm` (BART, Marian,
//! Whisper), `EncDecAttention` (T5), `crossattention` and `ln_cross_attn` (BERT and GPT-2 with an encoder), `cross_attn`
//! (multimodal models). Learning rate: that of full fine-tuning, 2e-5 to 1e-4.
//!
//! # Differences from HF
//! HF PEFT has no such method.
//!
//! # Limits
//! A model without cross-attention is refused, unless `target_modules` says what takes its place. The embeddings of a new
//! language, which the paper trains along, are named in `modules_to_save`.

use peft_core::{
    Adapter, Attach, Common, Error, ModuleKind, ModuleTree, PeftMethod, Result, Site, register,
};
use serde::{Deserialize, Serialize};

use crate::fields::{Places, WITH_PARAMETERS, sites_of, train_whole};

/// Its fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CrossAttention {
    /// Modules to train instead of those known by name, and modules left alone.
    #[serde(flatten)]
    pub places: Places,
}

register!(
    CrossAttention,
    id = "cross_attention",
    title = "Cross-attention tuning",
    family = Selective,
    subfamily = "structured",
    peft_type = "CROSS_ATTENTION",
    paper = "arXiv 2104.08771",
    example = r#"{"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}"#,
);

/// Parts of a path that are a cross-attention or its norm.
const PARTS: &[&str] = &[
    "encoder_attn",
    "encoder_attn_layer_norm",
    "EncDecAttention",
    "crossattention",
    "cross_attention",
    "cross_attn",
    "ln_cross_attn",
];

impl PeftMethod for CrossAttention {
    fn kinds(&self) -> &'static [ModuleKind] {
        WITH_PARAMETERS
    }

    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        if common.target_modules.is_some() {
            return tree.matching(common, self.kinds(), None);
        }
        let sites = sites_of(tree, common, |id| {
            tree.info(id).path.split('.').any(|p| PARTS.contains(&p))
        })?;
        if sites.is_empty() {
            let detail = format!(
                "this {} model has no cross-attention to train: no decoder of it looks at an encoder; with target_modules \
                 other modules take its place",
                tree.facts().model_type
            );
            return Err(Error::config("peft_type", detail));
        }
        Ok(sites)
    }

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        train_whole(cx)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Param};

    fn network(paths: &[&str]) -> Network {
        Network::new(paths.iter().fold(Base::custom(), |base, path| {
            base.linear(path, array![[1.0, 2.0]], None)
                .expect("a layer")
        }))
    }

    #[test]
    fn found_by_name() {
        let mut network = network(&[
            "decoder.layers.0.self_attn.q_proj",
            "decoder.layers.0.encoder_attn.q_proj",
            "block.0.layer.1.EncDecAttention.k",
        ]);
        network
            .attach("a", &json!({"peft_type": "CROSS_ATTENTION"}), 0)
            .expect("attaches");
        let params = network.parameters();
        let keys: Vec<_> = params.iter().map(Param::key).collect();
        assert_eq!(
            keys,
            [
                "base_model.model.decoder.layers.0.encoder_attn.q_proj.weight",
                "base_model.model.block.0.layer.1.EncDecAttention.k.weight"
            ]
        );
    }

    #[test]
    fn a_model_without_is_refused() {
        let error = network(&["layers.0.self_attn.q_proj"])
            .attach("a", &json!({"peft_type": "CROSS_ATTENTION"}), 0)
            .expect_err("refused");
        assert!(
            error.to_string().contains("has no cross-attention"),
            "{error}"
        );
    }
}
