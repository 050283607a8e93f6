//! Keys and values in front of every layer's own: what methods of that form share.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Error, Init, ModuleTree, Param, Prefix, PrefixCx, Result, Tensor, Tensors,
};
use serde::{Deserialize, Serialize};

use crate::ModelFields;
use crate::virtual_tokens::{PROMPT, check_count};

/// The fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PrefixFields {
    /// Positions in front.
    pub num_virtual_tokens: usize,
    /// Whether the prefix is made by a small network while training.
    pub prefix_projection: bool,
    /// Width of that network's hidden layer.
    pub encoder_hidden_size: Option<usize>,
    /// None (normal) or `zero`.
    pub init_weights: Option<String>,
    /// Whether the text's positions begin behind the prefix, as in HF; in AdapterHub they begin at its first token.
    pub shift_positions: bool,
    /// Layers without a prefix.
    pub leave_out: Vec<usize>,
    /// What HF fills in from the model.
    #[serde(flatten)]
    pub model: ModelFields,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for PrefixFields {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 8,
            prefix_projection: false,
            encoder_hidden_size: None,
            init_weights: None,
            shift_positions: true,
            leave_out: Vec::new(),
            model: ModelFields::default(),
            others: [("modules_to_save".to_owned(), Value::Null)]
                .into_iter()
                .collect(),
        }
    }
}

const EMBEDDING: &str = "prompt_encoder.embedding.weight";
const HIDDEN: [&str; 2] = [
    "prompt_encoder.transform.0.weight",
    "prompt_encoder.transform.0.bias",
];
const OUT: [&str; 2] = [
    "prompt_encoder.transform.2.weight",
    "prompt_encoder.transform.2.bias",
];

impl PrefixFields {
    /// Makes the prefix of the whole model.
    pub(crate) fn attach(&self, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let facts = cx.tree().facts();
        let (count, kv) = (self.num_virtual_tokens, facts.num_kv_heads * facts.head_dim);
        let layers = self.layers(facts.num_layers)?;
        let width = layers.iter().flatten().count() * 2 * kv;
        check_count(cx, "num_virtual_tokens", count)?;
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
            Source::Flat(cx.bare(PROMPT, &[count, width], &init)?)
        };
        Ok(Box::new(At {
            source,
            layers,
            moved: if self.shift_positions { count } else { 0 },
            kv,
        }))
    }

    /// For each layer, which of the prefixes is its own.
    fn layers(&self, count: usize) -> Result<Vec<Option<usize>>> {
        if let Some(layer) = self.leave_out.iter().find(|&&layer| layer >= count) {
            let detail = format!("there is no layer {layer}; the model has {count}");
            return Err(Error::config("leave_out", detail));
        }
        let mut next = 0..;
        let layers: Vec<_> = (0..count)
            .map(|layer| match self.leave_out.contains(&layer) {
                true => None,
                false => next.next(),
            })
            .collect();
        if count > 0 && layers.iter().all(Option::is_none) {
            return Err(Error::config("leave_out", "leaves out every layer"));
        }
        Ok(layers)
    }

    /// Evaluates the prefix for a file.
    pub(crate) fn save(&self, mut params: Tensors) -> Result<Tensors> {
        if let (Some(e), Some(w1), Some(b1), Some(w2), Some(b2)) = (
            params.get(EMBEDDING),
            params.get(HIDDEN[0]),
            params.get(HIDDEN[1]),
            params.get(OUT[0]),
            params.get(OUT[1]),
        ) {
            let prefix = e.matmul_t(w1)?.add(b1)?.tanh()?.matmul_t(w2)?.add(b2)?;
            params.insert(PROMPT.to_owned(), prefix);
        }
        Ok(params)
    }

    /// Writes what HF fills in, and leaves out what it does not know where that says nothing.
    pub(crate) fn finish(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        if self.shift_positions {
            config.shift_remove("shift_positions");
        }
        if self.leave_out.is_empty() {
            config.shift_remove("leave_out");
        }
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
    /// The reparameterization of prefix tuning's paper.
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
    /// For each layer, which of the prefixes is its own.
    layers: Vec<Option<usize>>,
    /// By how much the text's positions are moved.
    moved: usize,
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
        let Some(own) = self.layers.get(at.layer).copied().flatten() else {
            return Ok(None);
        };
        Ok(Some(Prefix {
            k: self.slice(2 * own)?,
            v: self.slice(2 * own + 1)?,
        }))
    }

    fn prefix_len(&self) -> usize {
        self.moved
    }

    fn has_prefix(&self) -> bool {
        true
    }
}

/// The parts of a [`peft_core::PeftMethod`] that a prefix in every layer has; `self.fields` makes it.
macro_rules! deep_prefix {
    () => {
        $crate::virtual_tokens::soft_prompt!();

        fn attach(
            &self,
            _site: &peft_core::Site,
            cx: &mut peft_core::Attach<'_>,
        ) -> peft_core::Result<Box<dyn peft_core::Adapter>> {
            self.fields.attach(cx)
        }

        fn save(&self, params: peft_core::Tensors) -> peft_core::Result<peft_core::Tensors> {
            self.fields.save(params)
        }

        fn finish_config(
            &self,
            config: &mut peft_core::serde_json::Map<String, peft_core::serde_json::Value>,
            tree: &peft_core::ModuleTree,
        ) {
            self.fields.finish(config, tree);
        }
    };
}
pub(crate) use deep_prefix;
