//! The modules that are adapted where a configuration names none, by `model_type`.
//!
//! These are facts of `peft` 0.21.2 (`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`), the table that most of its
//! methods share. A method whose defaults differ brings its own in its own file. `gemma4` is left out: there the
//! default is a pattern over a multimodal model's language half.

const QUERY_VALUE: &[&str] = &["q_proj", "v_proj"];

/// The projections that HF PEFT adapts by default in models of this `model_type`.
pub fn default_targets(model_type: &str) -> Option<&'static [&'static str]> {
    Some(match model_type {
        "llama" | "llama4" | "mistral" | "mixtral" | "stablelm" | "qwen2" | "qwen3" | "gemma"
        | "gemma2" | "gemma3_text" | "bart" | "opt" | "gptj" | "gpt_neo" => QUERY_VALUE,
        "bert" | "roberta" | "xlm-roberta" | "electra" | "layoutlm" => &["query", "value"],
        "t5" | "mt5" => &["q", "v"],
        "bloom" | "gpt_neox" | "chatglm" | "RefinedWebModel" | "RefinedWeb" | "falcon" => {
            &["query_key_value"]
        }
        "gpt2" | "gpt_bigcode" => &["c_attn"],
        "blip-2" => &["q", "v", "q_proj", "v_proj"],
        "deberta-v2" => &["query_proj", "value_proj"],
        "deberta" => &["in_proj"],
        "mpt" => &["Wqkv"],
        "btlm" => &["c_proj", "c_attn"],
        "codegen" => &["qkv_proj"],
        "phi" => &["q_proj", "v_proj", "fc1", "fc2"],
        "nemotron_h" => &["q_proj", "k_proj", "v_proj", "o_proj"],
        "rwkv" => &["key", "value", "receptance", "output"],
        "rwkv7" => &["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
        _ => return None,
    })
}
