//! P-Tuning v2: deep prompts in every layer, with a classification head trained along.
//!
//! # Paper
//! P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks, arXiv 2110.07602,
//! section 3.
//!
//! # Formula
//! Layer l attends over `[P_k; K]` and `[P_v; V]`, its slices of `P [V, layers * 2 * kv_width]`: key 2l, value 2l + 1.
//! The label is read by the model's classification head, which is trained with the prompts. With `prefix_projection`,
//! `P = W2 tanh(W1 E + b1) + b2` while training; the paper finds that it helps some tasks and hurts others (section 3.3).
//!
//! # Saved keys
//! `prompt_embeddings [V, layers * 2 * kv_width]`: the evaluated prompts, without any key prefix, and
//! `base_model.<head>.weight`, `base_model.<head>.bias`: the head.
//!
//! # Defaults and their source
//! Start: standard normal, as the paper's code (`nn.Embedding`'s). No projection, as there. `num_virtual_tokens` 16,
//! between the paper's code's 8 (BoolQ) and 128 (RTE); learning rates there are 5e-3 to 7e-3 for the prompts.
//!
//! Several data sets: the paper first trains one prompt over all of them, then goes on for each task. List the files in
//! `data.train` for the first run, and name its folder in `adapter.init_from` of each of the others; a head for another
//! number of classes starts anew there.
//!
//! # Differences from HF
//! HF has it as prefix tuning with `task_type` `SEQ_CLS`, and that is what such a file is called here. Works with
//! gradient checkpointing, which HF refuses. A saved prompt can be trained further.
//!
//! # Limits
//! The data sets of a first run share one head: their labels are numbered together. Labels of single tokens (tagging)
//! are not there yet. With `prefix_projection` the file holds the evaluated prompts only; training checkpoints keep the
//! projection.

use peft_core::{PeftMethod, register};
use serde::{Deserialize, Serialize};

use crate::PrefixFields;
use crate::deep_prefix::deep_prefix;

/// P-Tuning v2's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PTuningV2 {
    /// All of them.
    #[serde(flatten)]
    pub fields: PrefixFields,
}

impl Default for PTuningV2 {
    fn default() -> Self {
        Self {
            fields: PrefixFields {
                num_virtual_tokens: 16,
                ..PrefixFields::default()
            },
        }
    }
}

register!(
    PTuningV2,
    id = "p_tuning_v2",
    title = "P-Tuning v2",
    family = Additive,
    subfamily = "soft prompts",
    peft_type = "PREFIX_TUNING",
    paper = "arXiv 2110.07602",
    example = r#"{"num_virtual_tokens": 3, "task_type": "SEQ_CLS"}"#,
    identity_at_init = false,
    mergeable = false,
    when = |config| matches!(config["task_type"].as_str(), Some("SEQ_CLS" | "TOKEN_CLS")),
    hub = crate::hub::prefix(|_| false),
);

impl PeftMethod for PTuningV2 {
    deep_prefix!();
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;
    use peft_core::{
        Base, BaseWeight, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Tensor,
    };

    /// The head is trained and saved beside the prompts; HF's file without a task is prefix tuning.
    #[test]
    fn the_head_is_trained_along() {
        let facts = ModelFacts {
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 2,
            task_heads: vec!["classifier".to_owned()],
            ..ModelFacts::default()
        };
        let mut tree = ModuleTree::new(facts);
        tree.push(ModuleInfo::attention("layers.0.self_attn", 2));
        tree.push(ModuleInfo::linear("classifier", 2, 3, false));
        let device = Device::cpu();
        let mut base = Base::new(tree, &device);
        let head = Tensor::zeros(&[3, 2], &device).expect("a head");
        base.insert("classifier.weight", BaseWeight::dense(head, false));
        let mut network = Network::new(base);
        let config =
            json!({"peft_type": "PREFIX_TUNING", "task_type": "SEQ_CLS", "num_virtual_tokens": 2});
        network.attach("a", &config, 0).expect("attaches");
        assert_eq!(network.method_of("a").expect("there").id, "p_tuning_v2");
        let (config, tensors) = network.export("a").expect("exports");
        let shapes: Vec<_> = tensors
            .iter()
            .map(|(k, t)| (k.as_str(), t.shape()))
            .collect();
        assert_eq!(
            shapes,
            [
                ("base_model.classifier.weight", &[3, 2][..]),
                ("prompt_embeddings", &[2, 4])
            ]
        );
        assert_eq!(config["modules_to_save"], json!(["classifier", "score"]));
    }
}
