//! GPT-2: learnt positions, LayerNorm before the sublayers, linear layers stored transposed (`Conv1D`).

use std::sync::Arc;

use peft_core::{Error, ModelFacts, ModuleId, ModuleInfo, ModuleTree, Network, Pass, Result};
use peft_tensor::{Attention, Mask, Tensor};

use crate::arch::{
    Architecture, Builder, embedded, labels, last_tokens, layer, longest, numbered, positions,
};
use crate::attend::{KvCache, LayerCache, Rows, Sublayer, attend};
use crate::bert::activate;
use crate::config::ModelConfig;
use crate::model::{Batch, Task};

/// GPT-2 over the modules of a network.
pub(crate) struct Gpt2 {
    config: Arc<ModelConfig>,
    tokens: ModuleId,
    places: ModuleId,
    start: ModuleId,
    layers: Vec<Arc<Block>>,
    norm: ModuleId,
    end: Option<ModuleId>,
    head: Option<ModuleId>,
}

struct Block {
    config: Arc<ModelConfig>,
    scale: f32,
    attention: ModuleId,
    first_norm: ModuleId,
    qkv: ModuleId,
    output: ModuleId,
    second_norm: ModuleId,
    up: ModuleId,
    down: ModuleId,
    attention_junction: ModuleId,
    output_junction: ModuleId,
    block_end: ModuleId,
}

impl Gpt2 {
    /// The model with its module tree, in the order Hugging Face registers modules.
    pub(crate) fn build(config: &ModelConfig, task: &Task) -> (ModuleTree, Self) {
        let prefix = if *task == Task::Features {
            ""
        } else {
            "transformer."
        };
        let causal = *task == Task::CausalLm;
        let tokens_path = format!("{prefix}wte");
        let facts = ModelFacts {
            model_type: config.model_type.clone(),
            hidden_size: config.hidden_size,
            num_layers: config.num_layers,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_positions: config.max_positions,
            input_embedding: Some(tokens_path.clone()),
            output_embedding: causal.then(|| "lm_head".to_owned()),
            tied: causal && config.tied,
            rotary: false,
            task_heads: if labels(task).is_some() {
                vec!["score".to_owned()]
            } else {
                Vec::new()
            },
        };
        let mut b = Builder {
            tree: ModuleTree::new(facts),
        };
        if !prefix.is_empty() {
            b.container("transformer");
        }
        let hidden = config.hidden_size;
        let shared = Arc::new(config.clone());
        let tokens = b.push(ModuleInfo::embedding(
            &tokens_path,
            config.vocab_size,
            hidden,
        ));
        let places = b.push(ModuleInfo::embedding(
            &format!("{prefix}wpe"),
            config.max_positions,
            hidden,
        ));
        let start = b.stream(format!("{prefix}invertible_adapters"), hidden);
        let layers = (0..config.num_layers)
            .map(|i| {
                Arc::new(Block::build(
                    &mut b,
                    shared.clone(),
                    &format!("{prefix}h.{i}"),
                    i,
                ))
            })
            .collect();
        let norm = b.norm(format!("{prefix}ln_f"), hidden, true);
        let end = causal.then(|| b.stream(format!("{prefix}invertible_adapters_rev"), hidden));
        let head = match task {
            Task::CausalLm => {
                let head = ModuleInfo::linear("lm_head", hidden, config.vocab_size, false);
                Some(b.push(if config.tied {
                    head.with_weight(format!("{tokens_path}.weight"))
                } else {
                    head
                }))
            }
            Task::SequenceClassification { num_labels } => {
                Some(b.push(ModuleInfo::linear("score", hidden, *num_labels, false)))
            }
            Task::Features => None,
        };
        (
            b.tree,
            Self {
                config: shared,
                tokens,
                places,
                start,
                layers,
                norm,
                end,
                head,
            },
        )
    }
}

impl Block {
    fn build(b: &mut Builder, config: Arc<ModelConfig>, path: &str, index: usize) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        b.container(path);
        let first_norm = b.norm(format!("{path}.ln_1"), hidden, true);
        let attention = b.push(ModuleInfo::attention(&format!("{path}.attn"), hidden));
        let qkv = b.push(ModuleInfo::conv1d(
            &format!("{path}.attn.c_attn"),
            hidden,
            3 * hidden,
            true,
        ));
        let output = b.push(ModuleInfo::conv1d(
            &format!("{path}.attn.c_proj"),
            hidden,
            hidden,
            true,
        ));
        let second_norm = b.norm(format!("{path}.ln_2"), hidden, true);
        b.container(&format!("{path}.mlp"));
        let up = b.push(ModuleInfo::conv1d(
            &format!("{path}.mlp.c_fc"),
            hidden,
            inner,
            true,
        ));
        let down = b.push(ModuleInfo::conv1d(
            &format!("{path}.mlp.c_proj"),
            inner,
            hidden,
            true,
        ));
        let attention_junction = b.push(ModuleInfo::junction(
            &format!("{path}.attention_adapters"),
            hidden,
        ));
        let output_junction = b.push(ModuleInfo::junction(
            &format!("{path}.output_adapters"),
            hidden,
        ));
        let block_end = b.stream(format!("{path}.refts"), hidden);
        let by_layer = if config.scale_by_layer {
            (index + 1) as f32
        } else {
            1.0
        };
        let scale = config.attention_scale / by_layer;
        Self {
            config,
            scale,
            attention,
            first_norm,
            qkv,
            output,
            second_norm,
            up,
            down,
            attention_junction,
            output_junction,
            block_end,
        }
    }

    fn run(
        &self,
        network: &Network,
        x: &Tensor,
        rows: &Rows,
        cache: Option<&mut Option<LayerCache>>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let c = &self.config;
        let h = network.layer_norm(self.first_norm, x, c.norm_eps, pass)?;
        let all = network.linear(self.qkv, &h, pass)?;
        let part = |i: usize| all.narrow(2, i * c.hidden_size, c.hidden_size);
        let spec = Attention {
            heads: c.num_heads,
            kv_heads: c.num_kv_heads,
            head_dim: c.head_dim,
            scale: self.scale,
            causal: true,
            window: None,
            prefix: 0,
            shared: 0,
            softcap: None,
            mask: Mask::default(),
        };
        let project = |x: &Tensor| {
            let all = network.linear(self.qkv, x, pass)?;
            let part = |i: usize| all.narrow(2, i * c.hidden_size, c.hidden_size);
            Ok((part(1)?, part(2)?))
        };
        let sublayer = Sublayer {
            module: self.attention,
            hidden: &h,
            project: &project,
        };
        let h = attend(
            network,
            sublayer,
            (&part(0)?, part(1)?, part(2)?),
            &spec,
            rows,
            cache,
            pass,
        )?;
        let h = network.linear(self.output, &h, pass)?;
        let x = network.junction(self.attention_junction, &h, x, None, pass)?;
        let h = network.layer_norm(self.second_norm, &x, c.norm_eps, pass)?;
        let h = activate(&network.linear(self.up, &h, pass)?, c.activation)?;
        let h = network.linear(self.down, &h, pass)?;
        let x = network.junction(self.output_junction, &h, &x, None, pass)?;
        network.stream(self.block_end, &x, pass)
    }
}

impl Architecture for Gpt2 {
    fn hidden(
        &self,
        network: &Arc<Network>,
        batch: &Batch,
        mut cache: Option<&mut KvCache>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let seen = cache.as_ref().map_or(0, |c| c.seen);
        let (x, rows) = embedded(network, self.tokens, None, batch, seen, pass)?;
        let pass = &rows.pass(pass);
        let first = network.prefix_len() + seen;
        check_length(first + longest(&rows), &self.config, "n_positions")?;
        let places = network.embed(self.places, &positions(&rows, first)?, pass)?;
        let x = x.add(&places.reshape(x.shape())?)?;
        let mut x = network.stream(self.start, &x, pass)?;
        for (i, block) in self.layers.iter().enumerate() {
            x = match &mut cache {
                Some(cache) => block.run(network, &x, &rows, Some(cache.layer(i)), pass)?,
                None => {
                    let (block, rows) = (block.clone(), rows.clone());
                    layer(i, network, &x, pass, move |network, x, pass| {
                        block.run(network, x, &rows, None, pass)
                    })?
                }
            };
        }
        if let Some(cache) = cache {
            cache.seen += rows.seq;
        }
        network.layer_norm(self.norm, &x, self.config.norm_eps, pass)
    }

    fn block(
        &self,
        number: usize,
        network: &Network,
        x: &Tensor,
        rows: &Rows,
        pass: &Pass,
    ) -> Result<Tensor> {
        numbered(&self.layers, number)?.run(network, x, rows, None, pass)
    }

    fn head(&self, network: &Network, rows: &Tensor, pass: &Pass) -> Result<Tensor> {
        match self.head {
            Some(head) => match self.end {
                Some(end) => network.linear(head, &network.stream(end, rows, pass)?, pass),
                None => network.linear(head, rows, pass),
            },
            None => Ok(rows.clone()),
        }
    }

    fn pool(&self, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        last_tokens(&self.config, hidden, batch)
    }
}

/// Refuses what is longer than the learnt positions.
pub(crate) fn check_length(len: usize, config: &ModelConfig, field: &str) -> Result<()> {
    if len <= config.max_positions {
        return Ok(());
    }
    let detail = format!(
        "the model has {} positions; a text needs {len}, virtual tokens included",
        config.max_positions
    );
    Err(Error::config(field, detail))
}
