//! GGUF in Hugging Face's terms: hyper-parameters as a `config.json`, tensor names, and the changes llama.cpp makes to
//! values when it converts a checkpoint.

use peft_core::{Error, Result};
use peft_io::{Checkpoint, Gguf, MetaValue};
use serde_json::{Map, Value, json};

use crate::source::io;

/// Values of `general.architecture` that can be run.
const ARCHITECTURES: [&str; 7] = ["gemma", "gemma2", "gpt2", "llama", "phi3", "qwen2", "qwen3"];

/// What has to be undone to a stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Nothing.
    None,
    /// Rows of each of this many heads are in interleaved rope order.
    Heads(usize),
    /// One was added (Gemma's norms).
    PlusOne,
}

/// A `config.json` from the metadata.
pub(crate) fn config(checkpoint: &Checkpoint, gguf: &Gguf) -> Result<Value> {
    let architecture = gguf.architecture().map_err(io)?;
    if !ARCHITECTURES.contains(&architecture) {
        let known = ARCHITECTURES.join(", ");
        let detail = format!("{architecture:?} cannot be run from GGUF; known are {known}");
        return Err(Error::config("general.architecture", detail));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let count = |name: &str| gguf.u64(&key(name)).map_err(io);
    let number = |name: &str| gguf.get(&key(name)).and_then(MetaValue::as_f64);
    let vocab = match checkpoint.meta("token_embd.weight") {
        Some(meta) => meta.shape.first().copied().unwrap_or(0),
        None => {
            return Err(Error::file(
                gguf.path(),
                "has no tensor token_embd.weight: it is no language model",
            ));
        }
    };
    let mut out = Map::new();
    let mut set = |name: &str, value: Value| out.insert(name.to_owned(), value);
    set("model_type", json!(architecture));
    set("vocab_size", json!(vocab));
    set(
        "tie_word_embeddings",
        json!(checkpoint.meta("output.weight").is_none()),
    );
    for (name, id) in [
        ("bos_token_id", "bos"),
        ("eos_token_id", "eos"),
        ("pad_token_id", "padding"),
    ] {
        set(
            name,
            json!(
                gguf.get(&format!("tokenizer.ggml.{id}_token_id"))
                    .and_then(MetaValue::as_u64)
            ),
        );
    }
    if architecture == "gpt2" {
        set("architectures", json!(["GPT2LMHeadModel"]));
        set("n_embd", json!(count("embedding_length")?));
        set("n_layer", json!(count("block_count")?));
        set("n_head", json!(count("attention.head_count")?));
        set("n_inner", json!(count("feed_forward_length")?));
        set("n_positions", json!(count("context_length")?));
        set(
            "layer_norm_epsilon",
            json!(number("attention.layer_norm_epsilon").unwrap_or(1e-5)),
        );
        return Ok(Value::Object(out));
    }
    let class = match architecture {
        "llama" => "LlamaForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        "gemma" => "GemmaForCausalLM",
        "gemma2" => "Gemma2ForCausalLM",
        _ => "Phi3ForCausalLM",
    };
    set("architectures", json!([class]));
    let (hidden, heads) = (count("embedding_length")?, count("attention.head_count")?);
    set("hidden_size", json!(hidden));
    set("num_hidden_layers", json!(count("block_count")?));
    set("num_attention_heads", json!(heads));
    set(
        "num_key_value_heads",
        json!(number("attention.head_count_kv").map_or(heads, |n| n as u64)),
    );
    set("intermediate_size", json!(count("feed_forward_length")?));
    set("max_position_embeddings", json!(count("context_length")?));
    set(
        "rms_norm_eps",
        json!(number("attention.layer_norm_rms_epsilon").unwrap_or(1e-6)),
    );
    let head_dim = number("attention.key_length").map_or(hidden / heads.max(1), |n| n as u64);
    set("head_dim", json!(head_dim));
    set(
        "attention_bias",
        json!(architecture == "llama" && checkpoint.meta("blk.0.attn_q.bias").is_some()),
    );
    set(
        "mlp_bias",
        json!(checkpoint.meta("blk.0.ffn_up.bias").is_some()),
    );
    if let Some(window) = number("attention.sliding_window").filter(|&w| w > 0.0) {
        set("sliding_window", json!(window as u64));
    }
    for (name, stored) in [
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ] {
        if let Some(cap) = number(stored) {
            set(name, json!(cap));
        }
    }
    if architecture == "gemma2" {
        // The 27B model alone divides by the width per head of its residual stream.
        let scalar = if count("block_count")? == 46 {
            hidden / heads.max(1)
        } else {
            head_dim
        };
        set("query_pre_attn_scalar", json!(scalar));
    }
    let mut rope = Map::new();
    rope.insert("rope_type".into(), json!("default"));
    rope.insert(
        "rope_theta".into(),
        json!(number("rope.freq_base").unwrap_or(10_000.0)),
    );
    if let Some(rotated) = number("rope.dimension_count") {
        rope.insert(
            "partial_rotary_factor".into(),
            json!(rotated / head_dim.max(1) as f64),
        );
    }
    if let Some(kind) = gguf
        .get(&key("rope.scaling.type"))
        .and_then(MetaValue::as_str)
        && kind != "none"
    {
        rope.insert("rope_type".into(), json!(kind));
        rope.insert("factor".into(), json!(number("rope.scaling.factor")));
        if let Some(length) = number("rope.scaling.original_context_length") {
            rope.insert("original_max_position_embeddings".into(), json!(length));
        }
        if let Some(factor) = number("rope.scaling.attn_factor") {
            rope.insert("attention_factor".into(), json!(factor));
        }
    }
    set("rope_parameters", Value::Object(rope));
    Ok(Value::Object(out))
}

/// Parts of a layer's parameter names, Hugging Face's and llama.cpp's.
const LAYER: [(&str, &str); 17] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("mlp.c_fc", "ffn_up"),
];

/// The stored name of a Hugging Face parameter, and what has to be undone to its values. `prefix` is the tree's base
/// prefix (`model.`, `transformer.` or nothing).
pub(crate) fn stored(
    architecture: &str,
    name: &str,
    prefix: &str,
    heads: (usize, usize),
) -> Option<(String, Change)> {
    if name == "lm_head.weight" {
        return Some(("output.weight".into(), Change::None));
    }
    let name = name.strip_prefix(prefix)?;
    let (path, parameter) = name.rsplit_once('.')?;
    let gemma = architecture.starts_with("gemma");
    let norm = if gemma { Change::PlusOne } else { Change::None };
    let top = match path {
        "embed_tokens" | "wte" => Some(("token_embd", Change::None)),
        "wpe" => Some(("position_embd", Change::None)),
        "norm" | "ln_f" => Some(("output_norm", norm)),
        _ => None,
    };
    if let Some((stored, change)) = top {
        return Some((format!("{stored}.{parameter}"), change));
    }
    let rest = path
        .strip_prefix("layers.")
        .or_else(|| path.strip_prefix("h."))?;
    let (layer, part) = rest.split_once('.')?;
    let stored = match (architecture, part) {
        ("gemma2", "post_attention_layernorm") => "post_attention_norm",
        (_, "post_attention_layernorm" | "ln_2") => "ffn_norm",
        (_, "ln_1") => "attn_norm",
        (_, "mlp.c_proj") => "ffn_down",
        _ => LAYER.iter().find(|(hf, _)| *hf == part)?.1,
    };
    let change = match part {
        "self_attn.q_proj" if architecture == "llama" => Change::Heads(heads.0),
        "self_attn.k_proj" if architecture == "llama" => Change::Heads(heads.1),
        _ if part.ends_with("layernorm") => norm,
        _ => Change::None,
    };
    Some((format!("blk.{layer}.{stored}.{parameter}"), change))
}

/// The stored row of each row: llama.cpp interleaves the two halves of a head that rope turns together.
pub(crate) fn head_order(rows: usize, heads: usize) -> Vec<usize> {
    let half = rows / heads.max(1) / 2;
    if half == 0 || half * 2 * heads != rows {
        return (0..rows).collect();
    }
    (0..rows)
        .map(|row| {
            let (head, at) = (row / (2 * half), row % (2 * half));
            head * 2 * half + 2 * (at % half) + at / half
        })
        .collect()
}
