//! Prefix tuning: trained keys and values in front of each layer's own.
//!
//! # Paper
//! Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190, sections 4.2 and 4.3.
//!
//! # Formula
//! Layer l attends over `[P_k; K]` and `[P_v; V]`, its slices of `P [V, layers * 2 * kv_width]`: key 2l, value 2l + 1.
//! With `prefix_projection`, `P = W2 tanh(W1 E + b1) + b2` while training (eq. 4 of the paper, one hidden layer).
//!
//! # Saved keys
//! `prompt_embeddings [V, layers * 2 * kv_width]`: the evaluated prefix, without any key prefix.
//!
//! # Defaults and their source
//! Start: standard normal, HF PEFT 0.21 (`nn.Embedding`'s); `init_weights = "zero"` for zeros. `num_virtual_tokens` 8:
//! HF has no default. `encoder_hidden_size`: the width of a key, as HF fills it in.
//!
//! # Differences from HF
//! With `task_type` `SEQ_CLS`, which trains a head along, the same file is P-Tuning v2 here. Works with gradient
//! checkpointing, which HF refuses. A saved prefix can be trained further, without its projection.
//! A sliding window passes over the prefix as it does in HF; texts do not share a row then.
//!
//! # Limits
//! With `prefix_projection` the file holds the evaluated prefix only, as HF's does; training checkpoints keep the
//! projection.

use peft_core::{PeftMethod, register};
use serde::{Deserialize, Serialize};

use crate::PrefixFields;
use crate::deep_prefix::deep_prefix;

/// Prefix tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixTuning {
    /// All of them.
    #[serde(flatten)]
    pub fields: PrefixFields,
}

register!(
    PrefixTuning,
    id = "prefix_tuning",
    title = "Prefix tuning",
    family = Additive,
    subfamily = "soft prompts",
    peft_type = "PREFIX_TUNING",
    paper = "arXiv 2101.00190",
    example = r#"{"num_virtual_tokens": 3}"#,
    identity_at_init = false,
    mergeable = false,
    hub = crate::hub::prefix(crate::hub::is_prefix),
);

impl PeftMethod for PrefixTuning {
    deep_prefix!();
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;
    use peft_core::{
        Base, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Tensor, Tensors,
    };

    fn network() -> Network {
        let facts = ModelFacts {
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 2,
            ..ModelFacts::default()
        };
        let mut tree = ModuleTree::new(facts);
        tree.push(ModuleInfo::attention("layers.0.self_attn", 4));
        tree.push(ModuleInfo::attention("layers.1.self_attn", 4));
        Network::new(Base::new(tree, &Device::cpu()))
    }

    /// One position, columns 0..8: layer 1's key is columns 4 and 5, its value 6 and 7.
    #[test]
    fn layers_take_their_slices() {
        let mut network = network();
        let values = Tensor::from_vec(
            (0..8).map(|i| i as f32).collect(),
            &[1, 8],
            network.device(),
        )
        .expect("values");
        let config = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 1});
        let tensors: Tensors = [("prompt_embeddings".to_owned(), values)]
            .into_iter()
            .collect();
        network.load("a", &config, tensors, true).expect("loads");
        let hidden = Tensor::zeros(&[1, 1, 4], network.device()).expect("hidden states");
        let id = network.module("layers.1.self_attn").expect("there");
        let prefix = network
            .prefix(id, &hidden, &Pass::eval())
            .expect("runs")
            .expect("a prefix");
        assert_eq!(prefix.k.to_vec().expect("values"), [4.0, 5.0]);
        assert_eq!(prefix.v.to_vec().expect("values"), [6.0, 7.0]);
    }

    /// What a projection gives while training is what its file holds.
    #[test]
    fn a_projection_is_saved_evaluated() {
        let mut network = network();
        let config = json!({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3, "prefix_projection": true});
        network.attach("a", &config, 3).expect("attaches");
        let hidden = Tensor::zeros(&[1, 1, 4], network.device()).expect("hidden states");
        let id = network.module("layers.0.self_attn").expect("there");
        let live = network
            .prefix(id, &hidden, &Pass::eval())
            .expect("runs")
            .expect("a prefix");
        let (config, tensors) = network.export("a").expect("exports");
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["prompt_embeddings"]);
        network.delete("a").expect("deletes");
        network.load("b", &config, tensors, true).expect("loads");
        let loaded = network
            .prefix(id, &hidden, &Pass::eval())
            .expect("runs")
            .expect("a prefix");
        for (a, b) in [(live.k, loaded.k), (live.v, loaded.v)] {
            let gap = a
                .sub(&b)
                .and_then(|d| d.abs()?.max_rows()?.to_vec())
                .expect("values");
            assert!(gap.iter().all(|g| *g < 1e-6), "{gap:?}");
        }
    }
}
