//! What a model is made of, read from Hugging Face's `config.json` (or the same JSON made from GGUF metadata).
//!
//! Architectures that are one another's variants share one description: a decoder is Llama with some of biases,
//! query and key norms, `1 + w` norms, sandwich norms, windows, soft caps and fused projections switched on.

use peft_core::{Error, Result};
use serde_json::{Value, json};

use crate::fields::Fields;
use crate::rope::RopeConfig;

/// Values of `model_type` that can be run.
pub const MODEL_TYPES: [&str; 9] = [
    "bert", "gemma", "gemma2", "gpt2", "llama", "mistral", "phi3", "qwen2", "qwen3",
];

/// The largest number of layers, heads or labels, and of anything else, that a configuration may state: far beyond
/// any model, small enough that products of two do not overflow.
const MAX_COUNT: usize = 1 << 16;
const MAX_SIZE: usize = 1 << 28;

/// The activation of a feed-forward layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x sigmoid(x)
    Silu,
    /// with the error function
    Gelu,
    /// the tanh approximation
    GeluTanh,
    /// max(x, 0)
    Relu,
}

impl Activation {
    fn parse(field: &str, name: &str) -> Result<Self> {
        Ok(match name {
            "silu" | "swish" => Self::Silu,
            "gelu" => Self::Gelu,
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" | "gelu_python_tanh" => Self::GeluTanh,
            "relu" => Self::Relu,
            _ => {
                let known = "silu, swish, gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, relu";
                return Err(Error::config(
                    field,
                    format!("{name:?} is not known; known are {known}"),
                ));
            }
        })
    }
}

/// The shape and switches of a model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// `model_type`, one of [`MODEL_TYPES`].
    pub model_type: String,
    /// `architectures`: the classes the checkpoint was saved from.
    pub architectures: Vec<String>,
    /// Rows of the input embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward layer.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Positions the model was made for; a hard limit where positions are learnt.
    pub max_positions: usize,
    /// Rows of BERT's segment embedding.
    pub type_vocab_size: usize,
    /// Epsilon of the norms.
    pub norm_eps: f32,
    /// Activation of the feed-forward layer.
    pub activation: Activation,
    /// Rotary position embedding; None where positions are learnt.
    pub rope: Option<RopeConfig>,
    /// Factor on the scores before the softmax.
    pub attention_scale: f32,
    /// GPT-2's further division of the scores by the layer's number.
    pub scale_by_layer: bool,
    /// Per layer, how many keys back a query sees.
    pub windows: Vec<Option<usize>>,
    /// Bias on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Bias in the feed-forward layer.
    pub mlp_bias: bool,
    /// RMSNorm on queries and keys, per head (Qwen 3).
    pub qk_norm: bool,
    /// Norms multiply by `offset + weight` (1 for Gemma).
    pub norm_offset: f32,
    /// Norms also after the sublayers (Gemma 2).
    pub sandwich_norms: bool,
    /// Factor on the input embeddings (Gemma).
    pub embed_scale: Option<f32>,
    /// Soft cap of attention scores (Gemma 2).
    pub attention_softcap: Option<f32>,
    /// Soft cap of logits (Gemma 2).
    pub logit_softcap: Option<f32>,
    /// Query, key and value in one matrix, gate and up in one matrix (Phi-3).
    pub fused: bool,
    /// Whether the output embedding is the input embedding.
    pub tied: bool,
    /// Labels of a classification head, as `num_labels` or `id2label` say.
    pub num_labels: Option<usize>,
    /// Token that fills rows up.
    pub pad_token: Option<u32>,
    /// Token that starts a text.
    pub bos_token: Option<u32>,
    /// Tokens that end a text.
    pub eos_tokens: Vec<u32>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f32,
    json: Value,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// Names the field that is missing or wrong; an unknown `model_type` lists the known ones.
    pub fn from_json(json: &Value) -> Result<Self> {
        let f = Fields::new(json)?;
        let model_type = f.text("model_type")?.to_owned();
        let mut config = match model_type.as_str() {
            "bert" => bert(&f)?,
            "gpt2" => gpt2(&f)?,
            "llama" | "mistral" | "qwen2" | "qwen3" | "gemma" | "gemma2" | "phi3" => {
                decoder(&f, &model_type)?
            }
            other => {
                let known = MODEL_TYPES.join(", ");
                return Err(Error::config(
                    "model_type",
                    format!("{other:?} cannot be run; known are {known}"),
                ));
            }
        };
        config.model_type = model_type;
        config.json = json.clone();
        config.architectures = f.texts("architectures")?;
        config.num_labels = match f.opt_count("num_labels")? {
            Some(n) => Some(n),
            None => json
                .get("id2label")
                .and_then(Value::as_object)
                .map(serde_json::Map::len),
        };
        config.pad_token = f.opt_token("pad_token_id")?;
        config.bos_token = f.opt_token("bos_token_id")?;
        config.eos_tokens = f.tokens("eos_token_id")?;
        config.initializer_range = f.float_or("initializer_range", 0.02)? as f32;
        config.check()?;
        Ok(config)
    }

    /// The JSON it was read from: what a checkpoint of this model has as its `config.json`.
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// The same with `tie_word_embeddings` set.
    #[must_use]
    pub fn with_tied(mut self, tied: bool) -> Self {
        self.tied = tied;
        if let Some(map) = self.json.as_object_mut() {
            map.insert("tie_word_embeddings".into(), json!(tied));
        }
        self
    }

    /// Whether tokens see only what is before them.
    pub fn is_causal(&self) -> bool {
        self.model_type != "bert"
    }

    fn check(&self) -> Result<()> {
        let fail = |field: &str, detail: String| Err(Error::config(field, detail));
        for (field, value, limit) in [
            ("num_hidden_layers", self.num_layers, MAX_COUNT),
            ("num_attention_heads", self.num_heads, MAX_COUNT),
            ("num_key_value_heads", self.num_kv_heads, MAX_COUNT),
            ("head_dim", self.head_dim, MAX_COUNT),
            ("num_labels", self.num_labels.unwrap_or(1), MAX_COUNT),
            ("vocab_size", self.vocab_size, MAX_SIZE),
            ("hidden_size", self.hidden_size, MAX_SIZE),
            ("intermediate_size", self.intermediate_size, MAX_SIZE),
            ("max_position_embeddings", self.max_positions, MAX_SIZE),
        ] {
            if value == 0 || value > limit {
                return fail(field, format!("{value} is not between 1 and {limit}"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let detail = format!(
                "{} does not divide the {} attention heads",
                self.num_kv_heads, self.num_heads
            );
            return fail("num_key_value_heads", detail);
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0 && self.attention_scale.is_finite())
        {
            return fail(
                "rms_norm_eps",
                "the norms' epsilon and the attention's scale have to be finite".into(),
            );
        }
        if let Some(rope) = &self.rope
            && (rope.dim == 0 || rope.dim > self.head_dim || !rope.dim.is_multiple_of(2))
        {
            return fail(
                "head_dim",
                format!("{} of {} cannot be rotated", rope.dim, self.head_dim),
            );
        }
        Ok(())
    }

    fn blank(model_type: &str) -> Self {
        Self {
            model_type: model_type.to_owned(),
            architectures: Vec::new(),
            vocab_size: 0,
            hidden_size: 0,
            intermediate_size: 0,
            num_layers: 0,
            num_heads: 0,
            num_kv_heads: 0,
            head_dim: 0,
            max_positions: 0,
            type_vocab_size: 0,
            norm_eps: 1e-5,
            activation: Activation::Gelu,
            rope: None,
            attention_scale: 1.0,
            scale_by_layer: false,
            windows: Vec::new(),
            qkv_bias: true,
            output_bias: true,
            mlp_bias: true,
            qk_norm: false,
            norm_offset: 0.0,
            sandwich_norms: false,
            embed_scale: None,
            attention_softcap: None,
            logit_softcap: None,
            fused: false,
            tied: true,
            num_labels: None,
            pad_token: None,
            bos_token: None,
            eos_tokens: Vec::new(),
            initializer_range: 0.02,
            json: Value::Null,
        }
    }
}

/// Width of a head where the configuration does not state it.
fn head_width(hidden: usize, heads: usize) -> Result<usize> {
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(Error::config(
            "num_attention_heads",
            format!("{heads} does not divide hidden_size {hidden}"),
        ));
    }
    Ok(hidden / heads)
}

fn bert(f: &Fields<'_>) -> Result<ModelConfig> {
    let hidden_size = f.count("hidden_size")?;
    let num_heads = f.count("num_attention_heads")?;
    let head_dim = head_width(hidden_size, num_heads)?;
    let embedding = f.text_or("position_embedding_type", "absolute")?;
    if embedding != "absolute" {
        return Err(Error::config(
            "position_embedding_type",
            format!("{embedding:?} cannot be run, only \"absolute\""),
        ));
    }
    if f.flag_or("is_decoder", false)? {
        return Err(Error::config("is_decoder", "a BERT decoder cannot be run"));
    }
    let num_layers = f.count("num_hidden_layers")?;
    Ok(ModelConfig {
        vocab_size: f.count("vocab_size")?,
        hidden_size,
        intermediate_size: f.count("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: num_heads,
        head_dim,
        max_positions: f.count("max_position_embeddings")?,
        type_vocab_size: f.count_or("type_vocab_size", 2)?,
        norm_eps: f.float_or("layer_norm_eps", 1e-12)? as f32,
        activation: Activation::parse("hidden_act", f.text_or("hidden_act", "gelu")?)?,
        attention_scale: 1.0 / (head_dim as f32).sqrt(),
        windows: vec![None; num_layers.min(MAX_COUNT)],
        ..ModelConfig::blank("bert")
    })
}

fn gpt2(f: &Fields<'_>) -> Result<ModelConfig> {
    let hidden_size = f.count("n_embd")?;
    let num_heads = f.count("n_head")?;
    let head_dim = head_width(hidden_size, num_heads)?;
    let num_layers = f.count("n_layer")?;
    let scaled = f.flag_or("scale_attn_weights", true)?;
    Ok(ModelConfig {
        vocab_size: f.count("vocab_size")?,
        hidden_size,
        intermediate_size: f
            .opt_count("n_inner")?
            .unwrap_or(hidden_size.saturating_mul(4)),
        num_layers,
        num_heads,
        num_kv_heads: num_heads,
        head_dim,
        max_positions: f.count_or("n_positions", 1024)?,
        norm_eps: f.float_or("layer_norm_epsilon", 1e-5)? as f32,
        activation: Activation::parse(
            "activation_function",
            f.text_or("activation_function", "gelu_new")?,
        )?,
        attention_scale: if scaled {
            1.0 / (head_dim as f32).sqrt()
        } else {
            1.0
        },
        scale_by_layer: f.flag_or("scale_attn_by_inverse_layer_idx", false)?,
        windows: vec![None; num_layers.min(MAX_COUNT)],
        tied: f.flag_or("tie_word_embeddings", true)?,
        ..ModelConfig::blank("gpt2")
    })
}

fn decoder(f: &Fields<'_>, kind: &str) -> Result<ModelConfig> {
    let hidden_size = f.count("hidden_size")?;
    let num_heads = f.count("num_attention_heads")?;
    let default_dim = if kind == "qwen3" { Some(128) } else { None };
    let head_dim = match f.opt_count("head_dim")?.or(default_dim) {
        Some(dim) => dim,
        None => head_width(hidden_size, num_heads)?,
    };
    let num_layers = f.count("num_hidden_layers")?;
    if num_layers > MAX_COUNT {
        return Err(Error::config(
            "num_hidden_layers",
            format!("{num_layers} is not between 1 and {MAX_COUNT}"),
        ));
    }
    let max_positions = f.count_or("max_position_embeddings", 2048)?;
    let gemma = kind.starts_with("gemma");
    let gemma2 = kind == "gemma2";
    let attention_bias = f.flag_or("attention_bias", false)?;
    let act = match (
        gemma,
        f.opt_text("hidden_activation")?,
        f.opt_text("hidden_act")?,
    ) {
        // Gemma was trained with the approximation; its first configurations said "gelu".
        (true, None | Some("gelu"), None | Some("gelu")) => "gelu_pytorch_tanh",
        (true, Some(name), _) | (_, _, Some(name)) => name,
        _ => "silu",
    };
    let activation = Activation::parse("hidden_act", act)?;
    if activation == Activation::Relu {
        return Err(Error::config(
            "hidden_act",
            "\"relu\" cannot gate; known are silu, gelu, gelu_pytorch_tanh",
        ));
    }
    let scalar = if gemma2 {
        f.float_or("query_pre_attn_scalar", 256.0)?
    } else {
        head_dim as f64
    };
    let positive = |field: &str| -> Result<Option<f32>> {
        Ok(if gemma2 {
            f.opt_float(field)?
                .filter(|&cap| cap > 0.0)
                .map(|cap| cap as f32)
        } else {
            None
        })
    };
    Ok(ModelConfig {
        vocab_size: f.count("vocab_size")?,
        hidden_size,
        intermediate_size: f.count("intermediate_size")?,
        num_layers,
        num_heads,
        num_kv_heads: f.opt_count("num_key_value_heads")?.unwrap_or(num_heads),
        head_dim,
        max_positions,
        norm_eps: f.float_or("rms_norm_eps", 1e-6)? as f32,
        activation,
        rope: Some(RopeConfig::from_fields(f, head_dim, max_positions)?),
        attention_scale: (1.0 / scalar.sqrt()) as f32,
        windows: windows(f, kind, num_layers)?,
        qkv_bias: attention_bias || kind == "qwen2",
        output_bias: attention_bias && kind != "qwen2",
        mlp_bias: f.flag_or("mlp_bias", false)?,
        qk_norm: kind == "qwen3",
        norm_offset: if gemma { 1.0 } else { 0.0 },
        sandwich_norms: gemma2,
        embed_scale: gemma.then(|| (hidden_size as f32).sqrt()),
        attention_softcap: positive("attn_logit_softcapping")?,
        logit_softcap: positive("final_logit_softcapping")?,
        fused: kind == "phi3",
        tied: f.flag_or("tie_word_embeddings", gemma)?,
        ..ModelConfig::blank(kind)
    })
}

/// Which layers have a sliding window: as `layer_types` says, else by the architecture's rule.
fn windows(f: &Fields<'_>, kind: &str, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = f.opt_count("sliding_window")?;
    let by_rule = match kind {
        "mistral" | "phi3" => vec![window; layers],
        "gemma2" => (0..layers)
            .map(|i| {
                if i % 2 == 0 {
                    window.or(Some(4096))
                } else {
                    None
                }
            })
            .collect(),
        "qwen2" | "qwen3" if f.flag_or("use_sliding_window", false)? => {
            let full = f.count_or("max_window_layers", 28)?;
            (0..layers)
                .map(|i| if i >= full { window } else { None })
                .collect()
        }
        _ => return Ok(vec![None; layers]),
    };
    let types = f.texts("layer_types")?;
    if types.is_empty() {
        return Ok(by_rule);
    }
    if types.len() != layers {
        return Err(Error::config(
            "layer_types",
            format!("{} entries for {layers} layers", types.len()),
        ));
    }
    let window = window.or(if kind == "gemma2" { Some(4096) } else { None });
    types
        .iter()
        .map(|t| match t.as_str() {
            "sliding_attention" => Ok(window),
            "full_attention" => Ok(None),
            other => {
                let detail =
                    format!("{other:?} is not known; known are full_attention, sliding_attention");
                Err(Error::config("layer_types", detail))
            }
        })
        .collect()
}
