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
//! Works with gradient checkpointing, which HF refuses. A saved prefix can be trained further, without its projection.
//!
//! # Limits
//! With `prefix_projection` the file holds the evaluated prefix only, as HF's does; training checkpoints keep the
//! projection.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Common, Error, Init, ModuleTree, Param, PeftMethod, Prefix, PrefixCx, Result,
    Site, Tensor, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::ModelFields;

/// Prefix tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixTuning {
    /// Positions in front.
    pub num_virtual_tokens: usize,
    /// Whether the prefix is made by a small network while training.
    pub prefix_projection: bool,
    /// Width of that network's hidden layer.
    pub encoder_hidden_size: Option<usize>,
    /// None (normal) or `zero`.
    pub init_weights: Option<String>,
    /// What HF fills in from the model.
    #[serde(flatten)]
    pub model: ModelFields,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for PrefixTuning {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 8,
            prefix_projection: false,
            encoder_hidden_size: None,
            init_weights: None,
            model: ModelFields::default(),
            others: [("modules_to_save".to_owned(), Value::Null)]
                .into_iter()
                .collect(),
        }
    }
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
);

const SAVED: &str = "prompt_embeddings";
const EMBEDDING: &str = "prompt_encoder.embedding.weight";
const HIDDEN: [&str; 2] = [
    "prompt_encoder.transform.0.weight",
    "prompt_encoder.transform.0.bias",
];
const OUT: [&str; 2] = [
    "prompt_encoder.transform.2.weight",
    "prompt_encoder.transform.2.bias",
];

impl PeftMethod for PrefixTuning {
    fn sites(&self, _tree: &ModuleTree, _common: &Common) -> Result<Vec<Site>> {
        Ok(vec![Site::root()])
    }

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let facts = cx.tree().facts();
        let (count, kv) = (self.num_virtual_tokens, facts.num_kv_heads * facts.head_dim);
        let width = facts.num_layers * 2 * kv;
        if count == 0 {
            return Err(Error::config("num_virtual_tokens", "has to be at least 1"));
        }
        if width == 0 {
            return Err(Error::config(
                "peft_type",
                "the model has no attention layers to put a prefix in",
            ));
        }
        self.model.check(kv)?;
        let init = match self.init_weights.as_deref() {
            None => Init::Normal { std: 1.0 },
            Some("zero") => Init::Zeros,
            Some(other) => {
                return Err(Error::config(
                    "init_weights",
                    format!("{other:?} is not null or \"zero\""),
                ));
            }
        };
        // A file holds the evaluated prefix: its projection is gone.
        let source = if self.prefix_projection && !cx.common().inference_mode {
            let hidden = self.encoder_hidden_size.unwrap_or(kv);
            if hidden == 0 {
                return Err(Error::config("encoder_hidden_size", "has to be at least 1"));
            }
            let (first, second) = (
                Init::LinearDefault { fan_in: kv },
                Init::LinearDefault { fan_in: hidden },
            );
            Source::Projected {
                embedding: cx.transient(EMBEDDING, &[count, kv], &init)?,
                hidden: (
                    cx.transient(HIDDEN[0], &[hidden, kv], &first)?,
                    cx.transient(HIDDEN[1], &[hidden], &first)?,
                ),
                out: (
                    cx.transient(OUT[0], &[width, hidden], &second)?,
                    cx.transient(OUT[1], &[width], &second)?,
                ),
            }
        } else {
            Source::Flat(cx.bare(SAVED, &[count, width], &init)?)
        };
        Ok(Box::new(At { source, count, kv }))
    }

    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        if let (Some(e), Some(w1), Some(b1), Some(w2), Some(b2)) = (
            params.get(EMBEDDING),
            params.get(HIDDEN[0]),
            params.get(HIDDEN[1]),
            params.get(OUT[0]),
            params.get(OUT[1]),
        ) {
            let prefix = e.matmul_t(w1)?.add(b1)?.tanh()?.matmul_t(w2)?.add(b2)?;
            params.insert(SAVED.to_owned(), prefix);
        }
        Ok(params)
    }

    fn module_prefix(&self) -> &'static str {
        "base_model."
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        let facts = tree.facts();
        let kv = facts.num_kv_heads * facts.head_dim;
        ModelFields::write(config, facts, kv, facts.num_kv_heads);
        config.insert(
            "encoder_hidden_size".to_owned(),
            json!(self.encoder_hidden_size.unwrap_or(kv)),
        );
    }
}

enum Source {
    /// `[V, layers * 2 * kv]`
    Flat(Param),
    /// The paper's reparameterization.
    Projected {
        /// `[V, kv]`
        embedding: Param,
        /// `[hidden, kv]`, `[hidden]`
        hidden: (Param, Param),
        /// `[layers * 2 * kv, hidden]`, `[layers * 2 * kv]`
        out: (Param, Param),
    },
}

struct At {
    source: Source,
    count: usize,
    kv: usize,
}

impl At {
    /// Slice `index` of the prefix, `[V, kv]`.
    fn slice(&self, index: usize) -> Result<Tensor> {
        let (start, kv) = (index * self.kv, self.kv);
        match &self.source {
            Source::Flat(prefix) => Ok(prefix.tensor().narrow(1, start, kv)?),
            Source::Projected {
                embedding,
                hidden,
                out,
            } => {
                let inner = embedding
                    .tensor()
                    .matmul_t(&hidden.0.tensor())?
                    .add(&hidden.1.tensor())?
                    .tanh()?;
                let (w, b) = (
                    out.0.tensor().narrow(0, start, kv)?,
                    out.1.tensor().narrow(0, start, kv)?,
                );
                Ok(inner.matmul_t(&w)?.add(&b)?)
            }
        }
    }
}

impl Adapter for At {
    fn prefix(&self, at: &PrefixCx<'_>) -> Result<Option<Prefix>> {
        Ok(Some(Prefix {
            k: self.slice(2 * at.layer)?,
            v: self.slice(2 * at.layer + 1)?,
        }))
    }

    fn prefix_len(&self) -> usize {
        self.count
    }
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
        let id = network.module("layers.1.self_attn").expect("there");
        let prefix = network
            .prefix(id, 1, &Pass::eval())
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
        let id = network.module("layers.0.self_attn").expect("there");
        let live = network
            .prefix(id, 1, &Pass::eval())
            .expect("runs")
            .expect("a prefix");
        let (config, tensors) = network.export("a").expect("exports");
        assert_eq!(tensors.keys().collect::<Vec<_>>(), ["prompt_embeddings"]);
        network.delete("a").expect("deletes");
        network.load("b", &config, tensors, true).expect("loads");
        let loaded = network
            .prefix(id, 1, &Pass::eval())
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
