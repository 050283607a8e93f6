//! What a training step holds in memory: the figures of the prediction, in one place. They follow from what the operations
//! of peft-tensor and the blocks of peft-models keep for the backward pass; whoever changes these changes the table.
//!
//! Outputs of norms, gates, activations and dropout, and of attention with few keys of many tokens, are made again from
//! their inputs and count nowhere.

use peft_models::ModelConfig;
use peft_tensor::Attention;

/// Bytes of a value that is not packed.
pub(super) const VALUE: u64 = 4;

/// What is trained at the modules of a block.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Trained {
    /// Values a token has inside of each adapter, such as a rank.
    pub(super) inside: Vec<usize>,
    /// Widths of what adapters read that nothing else keeps: what they find between a sublayer and its residual.
    pub(super) read: Vec<usize>,
}

/// Tensors that one block keeps in the form of `train.activations`, by what they are for: how many, and values of a token.
/// There are `tokens` tokens, of which a query sees `keys` keys at most.
pub(super) fn block(
    config: &ModelConfig,
    gated: bool,
    trained: &Trained,
    tokens: usize,
    keys: usize,
) -> Vec<(&'static str, usize, usize)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    );
    let when = |there: bool, count: usize| if there { count } else { 0 };
    let mut kept = vec![
        // Both norms hold their inputs, for BERT the sums in front of them.
        ("inputs of the norms", 2, hidden),
        ("after-norms", when(config.sandwich_norms, 2), hidden),
        // As they are in front of their norms.
        ("queries to norm", when(config.qk_norm, 1), q),
        ("keys to norm", when(config.qk_norm, 1), kv),
        ("queries", 1, q),
        ("attention's output", 1, attended(config, tokens, keys)),
        ("keys and values", 2, kv),
        // A gate and what it multiplies, or an activation's input.
        ("feed-forward", when(gated, 1) + 1, inner),
    ];
    kept.extend(trained.read.iter().map(|n| ("inputs of adapters", 1, *n)));
    kept.extend(trained.inside.iter().map(|n| ("inside of adapters", 1, *n)));
    kept
}

/// Values of a token that a block keeps in f32 in any case: attention's log-sum-exp, where its output is kept.
pub(super) fn unpacked(config: &ModelConfig, tokens: usize, keys: usize) -> usize {
    match attended(config, tokens, keys) {
        0 => 0,
        _ => config.num_heads,
    }
}

/// Values of a token in attention's output, where that is kept: also of a block that is run again.
pub(super) fn attended(config: &ModelConfig, tokens: usize, keys: usize) -> usize {
    let width = config.num_heads * config.head_dim;
    match Attention::is_kept(keys, tokens * width) {
        true => width,
        false => 0,
    }
}

/// Values a token needs besides while a block is run backward, most of all at its gate or activation: the gradient behind
/// it, those in front (of a gate written over what was unpacked for it), and the residual stream's.
pub(super) fn backward(config: &ModelConfig, gated: bool, packed: bool) -> usize {
    let inner = match (gated, packed) {
        (true, _) | (false, true) => 3,
        (false, false) => 2,
    };
    inner * config.intermediate_size + 2 * config.hidden_size
}

/// Values of a token between blocks: with what attention made, all that is kept of one that is run again.
pub(super) fn between(config: &ModelConfig) -> usize {
    config.hidden_size
}

/// Values of a label behind the last block: the norm's output where it is read, and its gradient, twice.
pub(super) fn labelled(config: &ModelConfig) -> usize {
    4 * config.hidden_size
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
        let sum = |gated, trained: &Trained| -> usize {
            let kept = block(&config, gated, trained, 1 << 20, 9);
            kept.iter().map(|(_, count, width)| count * width).sum()
        };
        // Norms 2 x 16; q 16, k and v 8 each; gate and up 20 each.
        let bare = 32 + 32 + 40;
        assert_eq!(sum(true, &Trained::default()), bare);
        assert_eq!(sum(false, &Trained::default()), bare - 20);
        // Attention's output where there are many keys or few tokens, and two log-sum-exps.
        for (tokens, keys, more) in [(1 << 20, 1000, 16), (9, 9, 16), (1 << 20, 9, 0)] {
            let kept: usize = block(&config, true, &Trained::default(), tokens, keys)
                .iter()
                .map(|(_, count, width)| count * width)
                .sum();
            assert_eq!(kept, bare + more);
            assert_eq!(attended(&config, tokens, keys), more);
            assert_eq!(unpacked(&config, tokens, keys), more / 8);
        }
        let all = Trained {
            inside: vec![3; 7],
            read: vec![16],
        };
        assert_eq!(sum(true, &all), bare + 16 + 21);
        // The gradient from one side of the gate, to two; an activation's input may be unpacked besides. Two of the
        // residual stream.
        assert_eq!(backward(&config, true, false), 3 * 20 + 32);
        assert_eq!(backward(&config, true, true), 3 * 20 + 32);
        assert_eq!(backward(&config, false, false), 2 * 20 + 32);
        assert_eq!(backward(&config, false, true), 3 * 20 + 32);
    }
}
