//! The decoder family: Llama and what differs from it by switches of its configuration (Mistral, Qwen 2 and 3, Gemma
//! and Gemma 2, Phi-3). Modules and parameters are named as Hugging Face names them.

use std::sync::Arc;

use peft_core::{ModelFacts, ModuleId, ModuleInfo, ModuleTree, Network, Pass, Result};
use peft_tensor::{Attention, Glu, Mask, Rope, Tensor};

use crate::arch::{
    Architecture, Builder, embedded, labels, last_tokens, layer, numbered, positions, positions_of,
};
use crate::attend::{KvCache, LayerCache, Rows, Sublayer, attend};
use crate::config::{Activation, ModelConfig};
use crate::model::{Batch, Task};
use crate::rope::RopeTables;

/// A decoder over the modules of a network.
pub(crate) struct Decoder {
    config: Arc<ModelConfig>,
    embedding: ModuleId,
    start: ModuleId,
    layers: Vec<Arc<Layer>>,
    norm: ModuleId,
    end: Option<ModuleId>,
    head: Option<ModuleId>,
    rope: Option<RopeTables>,
}

struct Layer {
    config: Arc<ModelConfig>,
    attention: ModuleId,
    qkv: Qkv,
    qk_norms: Option<(ModuleId, ModuleId)>,
    output: ModuleId,
    gate_up: GateUp,
    down: ModuleId,
    input_norm: ModuleId,
    /// Before the feed-forward layer.
    middle_norm: ModuleId,
    /// After both sublayers, where there are such.
    after_norms: Option<(ModuleId, ModuleId)>,
    attention_junction: ModuleId,
    output_junction: ModuleId,
    block_end: ModuleId,
    window: Option<usize>,
}

#[derive(Clone, Copy)]
enum Qkv {
    Split(ModuleId, ModuleId, ModuleId),
    Fused(ModuleId),
}

enum GateUp {
    Split(ModuleId, ModuleId),
    Fused(ModuleId),
}

/// What the layers of one run share.
#[derive(Clone)]
struct Step {
    rows: Rows,
    rope: Option<(Arc<Rope>, Arc<Rope>)>,
}

impl Decoder {
    /// The model with its module tree, in the order Hugging Face registers modules.
    pub(crate) fn build(config: &ModelConfig, task: &Task) -> (ModuleTree, Self) {
        let prefix = if *task == Task::Features {
            ""
        } else {
            "model."
        };
        let head_path = match task {
            Task::CausalLm => Some("lm_head"),
            Task::SequenceClassification { .. } => Some("score"),
            Task::Features => None,
        };
        let embedding_path = format!("{prefix}embed_tokens");
        let causal = *task == Task::CausalLm;
        let facts = ModelFacts {
            model_type: config.model_type.clone(),
            hidden_size: config.hidden_size,
            num_layers: config.num_layers,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_positions: config.max_positions,
            input_embedding: Some(embedding_path.clone()),
            output_embedding: causal.then(|| "lm_head".to_owned()),
            tied: causal && config.tied,
            rotary: config.rope.is_some(),
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
            b.container("model");
        }
        let hidden = config.hidden_size;
        let shared = Arc::new(config.clone());
        let embedding = b.push(ModuleInfo::embedding(
            &embedding_path,
            config.vocab_size,
            hidden,
        ));
        let start = b.stream(format!("{prefix}invertible_adapters"), hidden);
        let layers = (0..config.num_layers)
            .map(|i| {
                Arc::new(Layer::build(
                    &mut b,
                    shared.clone(),
                    &format!("{prefix}layers.{i}"),
                    i,
                ))
            })
            .collect();
        let norm = b.push(
            ModuleInfo::norm(&format!("{prefix}norm"), hidden, false)
                .with_offset(config.norm_offset),
        );
        let end = causal.then(|| b.stream(format!("{prefix}invertible_adapters_rev"), hidden));
        let head = head_path.map(|path| {
            let out = labels(task).unwrap_or(config.vocab_size);
            let head = ModuleInfo::linear(path, hidden, out, false);
            let tied = causal && config.tied;
            b.push(if tied {
                head.with_weight(format!("{embedding_path}.weight"))
            } else {
                head
            })
        });
        let rope = config
            .rope
            .clone()
            .map(|rope| RopeTables::new(rope, config.head_dim));
        (
            b.tree,
            Self {
                config: shared,
                embedding,
                start,
                layers,
                norm,
                end,
                head,
                rope,
            },
        )
    }
}

impl Decoder {
    /// What the layers of a run share whose positions count from `first`.
    fn shared(&self, network: &Network, rows: Rows, first: usize) -> Result<Step> {
        let positions = positions(&rows, first)?;
        let rope = self.rope.as_ref().map(|r| {
            let heads = (self.config.num_heads, self.config.num_kv_heads);
            r.at(&positions, network.position_scale(), heads)
        });
        Ok(Step { rows, rope })
    }
}

impl Layer {
    fn build(b: &mut Builder, config: Arc<ModelConfig>, path: &str, index: usize) -> Self {
        let c = &config;
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        let (q_width, kv_width) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        b.container(path);
        let attention = b.push(ModuleInfo::attention(&format!("{path}.self_attn"), hidden));
        let at = |name: &str| format!("{path}.self_attn.{name}");
        let (qkv, output);
        if c.fused {
            output = b.linear(at("o_proj"), q_width, hidden, c.output_bias);
            qkv = Qkv::Fused(b.linear(at("qkv_proj"), hidden, q_width + 2 * kv_width, c.qkv_bias));
        } else {
            let q = b.linear(at("q_proj"), hidden, q_width, c.qkv_bias);
            let k = b.linear(at("k_proj"), hidden, kv_width, c.qkv_bias);
            let v = b.linear(at("v_proj"), hidden, kv_width, c.qkv_bias);
            qkv = Qkv::Split(q, k, v);
            output = b.linear(at("o_proj"), q_width, hidden, c.output_bias);
        }
        let qk_norms = c.qk_norm.then(|| {
            let mut norm = |name: &str| {
                let norm = ModuleInfo::norm(&at(name), c.head_dim, false);
                b.push(norm.with_offset(c.norm_offset))
            };
            (norm("q_norm"), norm("k_norm"))
        });
        b.container(&format!("{path}.mlp"));
        let at = |name: &str| format!("{path}.mlp.{name}");
        let gate_up = if c.fused {
            GateUp::Fused(b.linear(at("gate_up_proj"), hidden, 2 * inner, c.mlp_bias))
        } else {
            let gate = b.linear(at("gate_proj"), hidden, inner, c.mlp_bias);
            GateUp::Split(gate, b.linear(at("up_proj"), hidden, inner, c.mlp_bias))
        };
        let down = b.linear(at("down_proj"), inner, hidden, c.mlp_bias);
        let mut norm = |name: &str| {
            let norm = ModuleInfo::norm(&format!("{path}.{name}"), hidden, false);
            b.push(norm.with_offset(c.norm_offset))
        };
        let input_norm = norm("input_layernorm");
        let (middle_norm, after_norms) = if c.sandwich_norms {
            let after_attention = norm("post_attention_layernorm");
            let before = norm("pre_feedforward_layernorm");
            (
                before,
                Some((after_attention, norm("post_feedforward_layernorm"))),
            )
        } else {
            (norm("post_attention_layernorm"), None)
        };
        let mut junction =
            |name: &str| b.push(ModuleInfo::junction(&format!("{path}.{name}"), hidden));
        let attention_junction = junction("attention_adapters");
        let output_junction = junction("output_adapters");
        let block_end = b.stream(format!("{path}.refts"), hidden);
        let window = config.windows.get(index).copied().flatten();
        Self {
            config,
            attention,
            qkv,
            qk_norms,
            output,
            gate_up,
            down,
            input_norm,
            middle_norm,
            after_norms,
            attention_junction,
            output_junction,
            block_end,
            window,
        }
    }

    fn norm(&self, network: &Network, id: ModuleId, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        network.rms_norm(id, x, self.config.norm_eps, self.config.norm_offset, pass)
    }

    fn run(
        &self,
        network: &Network,
        x: &Tensor,
        step: &Step,
        cache: Option<&mut Option<LayerCache>>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let h = self.norm(network, self.input_norm, x, pass)?;
        let h = self.attended(network, &h, step, cache, pass)?;
        self.behind(network, x, &h, pass)
    }

    /// The block's end from its input and from what the heads read.
    fn behind(&self, network: &Network, x: &Tensor, h: &Tensor, pass: &Pass) -> Result<Tensor> {
        let mut h = network.linear(self.output, h, pass)?;
        if let Some((after, _)) = self.after_norms {
            h = self.norm(network, after, &h, pass)?;
        }
        let x = network.junction(self.attention_junction, &h, x, None, pass)?;
        let h = self.norm(network, self.middle_norm, &x, pass)?;
        let mut h = self.feed_forward(network, &h, pass)?;
        if let Some((_, after)) = self.after_norms {
            h = self.norm(network, after, &h, pass)?;
        }
        let x = network.junction(self.output_junction, &h, &x, None, pass)?;
        network.stream(self.block_end, &x, pass)
    }

    /// What the heads read, for a block's normed input.
    fn attended(
        &self,
        network: &Network,
        x: &Tensor,
        step: &Step,
        cache: Option<&mut Option<LayerCache>>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let c = &self.config;
        let (q_width, kv_width) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        let per_head = |norm: Option<ModuleId>, x: Tensor| -> Result<Tensor> {
            let Some(id) = norm else { return Ok(x) };
            let rows = x.reshape(&[x.numel() / c.head_dim, c.head_dim])?;
            Ok(self.norm(network, id, &rows, pass)?.reshape(x.shape())?)
        };
        let (q_norm, k_norm) = (self.qk_norms.map(|n| n.0), self.qk_norms.map(|n| n.1));
        let keys_values = |x: &Tensor, fused: Option<&Tensor>| match (self.qkv, fused) {
            (Qkv::Split(_, k, v), _) => Ok((
                per_head(k_norm, network.linear(k, x, pass)?)?,
                network.linear(v, x, pass)?,
            )),
            (Qkv::Fused(qkv), fused) => {
                let all = match fused {
                    Some(all) => all.clone(),
                    None => network.linear(qkv, x, pass)?,
                };
                let k = all.narrow(2, q_width, kv_width)?;
                let v = all.narrow(2, q_width + kv_width, kv_width)?;
                Ok((per_head(k_norm, k)?, v))
            }
        };
        let project = |x: &Tensor| keys_values(x, None);
        let (q, (mut k, v)) = match self.qkv {
            Qkv::Split(q, k, v) => {
                let [q, k, v] = network.linear_all([q, k, v], x, pass)?;
                (q, (per_head(k_norm, k)?, v))
            }
            Qkv::Fused(qkv) => {
                let all = network.linear(qkv, x, pass)?;
                (all.narrow(2, 0, q_width)?, keys_values(x, Some(&all))?)
            }
        };
        let mut q = per_head(q_norm, q)?;
        if let Some((rope_q, rope_k)) = &step.rope {
            (q, k) = (q.rope(rope_q)?, k.rope(rope_k)?);
        }
        let spec = Attention {
            heads: c.num_heads,
            kv_heads: c.num_kv_heads,
            head_dim: c.head_dim,
            scale: c.attention_scale,
            causal: true,
            window: self.window,
            prefix: 0,
            shared: 0,
            softcap: c.attention_softcap,
            mask: Mask::default(),
        };
        attend(
            network,
            Sublayer {
                module: self.attention,
                hidden: x,
                project: &project,
            },
            (&q, k, v),
            &spec,
            &step.rows,
            cache,
            pass,
        )
    }

    fn feed_forward(&self, network: &Network, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let (gate, up) = match self.gate_up {
            GateUp::Split(gate, up) => network.linear_all([gate, up], x, pass)?.into(),
            GateUp::Fused(both) => {
                let inner = self.config.intermediate_size;
                let all = network.linear(both, x, pass)?;
                (all.narrow(2, 0, inner)?, all.narrow(2, inner, inner)?)
            }
        };
        let kind = match self.config.activation {
            Activation::Gelu => Glu::Gelu,
            Activation::GeluTanh => Glu::GeluTanh,
            // The configuration refuses a gate of relu.
            Activation::Silu | Activation::Relu => Glu::Silu,
        };
        network.linear(self.down, &gate.glu(kind, &up)?, pass)
    }
}

impl Decoder {
    /// What goes into the first block, and what all blocks share.
    fn begin(
        &self,
        network: &Network,
        batch: &Batch,
        seen: usize,
        pass: &Pass,
    ) -> Result<(Tensor, Step, Pass)> {
        let scale = self.config.embed_scale;
        let (x, rows) = embedded(network, self.embedding, scale, batch, seen, pass)?;
        let pass = rows.pass(pass);
        let x = network.stream(self.start, &x, &pass)?;
        let step = self.shared(network, rows, network.prefix_len() + seen)?;
        Ok((x, step, pass))
    }

    fn last_norm(&self, network: &Network, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        let c = &self.config;
        network.rms_norm(self.norm, x, c.norm_eps, c.norm_offset, pass)
    }
}

/// Runs the first blocks without a cache.
fn through(
    blocks: &[Arc<Layer>],
    network: &Arc<Network>,
    mut x: Tensor,
    step: &Step,
    pass: &Pass,
) -> Result<Tensor> {
    for (i, block) in blocks.iter().enumerate() {
        let (block, step) = (block.clone(), step.clone());
        x = layer(i, network, &x, pass, move |network, x, pass| {
            block.run(network, x, &step, None, pass)
        })?;
    }
    Ok(x)
}

impl Architecture for Decoder {
    fn hidden(
        &self,
        network: &Arc<Network>,
        batch: &Batch,
        cache: Option<&mut KvCache>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let seen = cache.as_ref().map_or(0, |c| c.seen);
        let (mut x, step, pass) = self.begin(network, batch, seen, pass)?;
        match cache {
            Some(cache) => {
                for (i, block) in self.layers.iter().enumerate() {
                    x = block.run(network, &x, &step, Some(cache.layer(i)), &pass)?;
                }
                cache.seen += step.rows.seq;
            }
            None => x = through(&self.layers, network, x, &step, &pass)?,
        }
        self.last_norm(network, &x, &pass)
    }

    fn hidden_of(
        &self,
        network: &Arc<Network>,
        batch: &Batch,
        ids: &[u32],
        pass: &Pass,
    ) -> Result<Tensor> {
        let few = ids.len() < batch.ids.len() / 2;
        let apart = few && pass.adapter_names.is_none() && network.by_rows();
        let Some((last, others)) = self.layers.split_last().filter(|_| apart) else {
            let all = self.hidden(network, batch, None, pass)?;
            return positions_of(network, &all, batch, ids, pass);
        };
        let (x, step, pass) = self.begin(network, batch, 0, pass)?;
        let x = through(others, network, x, &step, &pass)?;
        // All rows are attended to; behind that, the last block works for those alone that are looked at.
        let (last, ids) = (last.clone(), ids.to_vec());
        let x = layer(others.len(), network, &x, &pass, move |network, x, pass| {
            let h = last.norm(network, last.input_norm, x, pass)?;
            let h = last.attended(network, &h, &step, None, pass)?;
            let picked = |t: &Tensor| {
                let rows = t.flatten_rows()?.gather_rows(&ids)?;
                rows.reshape(&[1, ids.len(), t.last_dim()])
            };
            last.behind(network, &picked(x)?, &picked(&h)?, pass)
        })?;
        Ok(self.last_norm(network, &x, &pass)?.flatten_rows()?)
    }

    fn block(
        &self,
        number: usize,
        network: &Network,
        x: &Tensor,
        rows: &Rows,
        pass: &Pass,
    ) -> Result<Tensor> {
        let step = self.shared(network, rows.clone(), network.prefix_len())?;
        numbered(&self.layers, number)?.run(network, x, &step, None, pass)
    }

    fn head(&self, network: &Network, rows: &Tensor, pass: &Pass) -> Result<Tensor> {
        let Some(head) = self.head else {
            return Ok(rows.clone());
        };
        let rows = match self.end {
            Some(end) => &network.stream(end, rows, pass)?,
            None => rows,
        };
        let logits = network.linear(head, rows, pass)?;
        match self.config.logit_softcap {
            // A classifier's scores are not capped.
            Some(cap) if network.tree().facts().task_heads.is_empty() => {
                Ok(logits.scale(1.0 / cap)?.tanh()?.scale(cap)?)
            }
            _ => Ok(logits),
        }
    }

    fn pool(&self, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        last_tokens(&self.config, hidden, batch)
    }
}
