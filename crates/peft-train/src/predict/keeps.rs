//! What a training step holds in memory: the figures of the prediction, in one place. They follow from what the operations
//! of peft-tensor and the blocks of peft-models keep for the backward pass; whoever changes these changes the table.
//!
//! Outputs of norms, gates and dropout, which are made again and not kept, are still counted as inputs of adapters, and
//! every value as f32: the figures are upper bounds until they are measured anew.

use peft_core::ModuleInfo;
use peft_models::ModelConfig;

/// Bytes of a value that is kept between forward and backward.
pub(super) const VALUE: u64 = 4;

/// Rows of logits made at a time (`peft_models`' loss).
pub(super) const LOGIT_ROWS: usize = 256;
/// Tensors of the size of a chunk of logits that are there at once: the logits and their gradient, then that and its
/// product with the factor of the loss.
pub(super) const LOGIT_COPIES: u64 = 2;

/// Where a linear layer stands in its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Reads what attention reads.
    AttentionIn,
    /// Reads what attention gives, which attention keeps anyway.
    AttentionOut,
    /// Reads what the feed-forward layer reads.
    Up,
    /// Reads what the feed-forward layer has inside.
    Down,
}

impl Place {
    /// By the last part of the module's path, as Hugging Face names it.
    pub(super) fn of(module: &ModuleInfo) -> Option<Self> {
        const NAMES: [(&str, Place); 17] = [
            ("self_attn.q_proj", Place::AttentionIn),
            ("self_attn.k_proj", Place::AttentionIn),
            ("self_attn.v_proj", Place::AttentionIn),
            ("self_attn.qkv_proj", Place::AttentionIn),
            ("self.query", Place::AttentionIn),
            ("self.key", Place::AttentionIn),
            ("self.value", Place::AttentionIn),
            ("attn.c_attn", Place::AttentionIn),
            ("self_attn.o_proj", Place::AttentionOut),
            ("attention.output.dense", Place::AttentionOut),
            ("attn.c_proj", Place::AttentionOut),
            ("gate_proj", Place::Up),
            ("up_proj", Place::Up),
            ("intermediate.dense", Place::Up),
            ("mlp.c_fc", Place::Up),
            ("down_proj", Place::Down),
            ("output.dense", Place::Down),
        ];
        let found = NAMES.iter().find(|(end, _)| module.path.ends_with(end));
        let last = module.path.ends_with("mlp.c_proj").then_some(Place::Down);
        found.map(|(_, place)| *place).or(last)
    }
}

/// What is trained at the linear layers of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Trained {
    /// Whether some layer of each [`Place`] keeps its input for a gradient.
    pub(super) inputs: [bool; 4],
    /// Values a token has inside of the adapters, such as a rank for each.
    pub(super) inside: usize,
    /// Inputs that dropout copies: the sum of their widths.
    pub(super) dropped: usize,
}

/// Values that one block keeps for each token, by what they are for.
pub(super) fn block(
    config: &ModelConfig,
    gated: bool,
    trained: &Trained,
) -> Vec<(&'static str, usize)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let when = |place: Place, width: usize| match trained.inputs[place as usize] {
        true => width,
        false => 0,
    };
    vec![
        // Both norms hold their inputs, for BERT the sums in front of them.
        ("inputs of the norms", 2 * hidden),
        (
            "after-norms",
            if config.sandwich_norms { 2 * hidden } else { 0 },
        ),
        (
            "norms of queries and keys",
            if config.qk_norm { q + kv } else { 0 },
        ),
        (
            "adapters on what attention reads",
            when(Place::AttentionIn, hidden),
        ),
        ("queries, keys, values and output", 2 * q + 2 * kv),
        ("log-sum-exp", config.num_heads),
        (
            "adapters on what the feed-forward reads",
            when(Place::Up, hidden),
        ),
        // A gate and what it multiplies; an activation's input and output.
        ("feed-forward", 2 * inner),
        // Without a gate that is the activation's output.
        (
            "adapters on what it has inside",
            if gated { when(Place::Down, inner) } else { 0 },
        ),
        ("inside of adapters", trained.inside),
        ("dropout", trained.dropped),
    ]
}

/// Values a token needs besides while a block is run backward: gradients of what is inside the feed-forward layer, and of
/// the residual stream on both sides of it.
pub(super) fn backward(config: &ModelConfig) -> usize {
    3 * config.intermediate_size + 3 * config.hidden_size
}

/// Values of a token between blocks: all that is kept of one that is run again.
pub(super) fn between(config: &ModelConfig) -> usize {
    config.hidden_size
}

/// Values behind the last block: its output in front of the last norm, the norm's, and their gradients.
pub(super) fn end(config: &ModelConfig) -> usize {
    3 * config.hidden_size
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Hidden 16, inside 20, two heads of 8, one of keys and values.
    #[test]
    fn a_block_by_hand() {
        let config = ModelConfig::from_json(&json!({
            "model_type": "llama", "vocab_size": 31, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "tie_word_embeddings": false
        }))
        .unwrap();
        let sum = |trained: &Trained| {
            block(&config, true, trained)
                .iter()
                .map(|(_, n)| n)
                .sum::<usize>()
        };
        // Norms 2 x 16; q and out 16 each, k and v 8 each; two log-sum-exps; gate and up 20 each.
        let bare = 32 + 48 + 2 + 40;
        assert_eq!(sum(&Trained::default()), bare);
        let all = Trained {
            inputs: [true; 4],
            inside: 7 * 3,
            dropped: 0,
        };
        // Both normed inputs, what the gate makes, and seven ranks of 3.
        assert_eq!(sum(&all), bare + 16 + 16 + 20 + 21);
    }

    #[test]
    fn modules_are_placed_by_their_names() {
        for (path, place) in [
            ("model.layers.0.self_attn.k_proj", Place::AttentionIn),
            (
                "bert.encoder.layer.0.attention.self.query",
                Place::AttentionIn,
            ),
            (
                "bert.encoder.layer.0.attention.output.dense",
                Place::AttentionOut,
            ),
            ("bert.encoder.layer.0.output.dense", Place::Down),
            ("transformer.h.0.attn.c_proj", Place::AttentionOut),
            ("transformer.h.0.mlp.c_proj", Place::Down),
            ("model.layers.0.mlp.gate_up_proj", Place::Up),
        ] {
            assert_eq!(
                Place::of(&ModuleInfo::linear(path, 1, 1, false)),
                Some(place),
                "{path}"
            );
        }
        assert_eq!(Place::of(&ModuleInfo::linear("score", 1, 1, false)), None);
    }
}
