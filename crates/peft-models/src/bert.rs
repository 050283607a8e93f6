//! BERT: an encoder with learnt positions and LayerNorm after the sublayers, a pooler, and a classification head.

use std::ops::Range;
use std::sync::Arc;

use peft_core::{
    Error, ModelFacts, ModuleId, ModuleInfo, ModuleTree, Network, Pass, PromptPlace, Result,
};
use peft_tensor::{Attention, Mask, Tensor, concat};

use crate::arch::{
    Architecture, Builder, PROMPTED, embedded, labels, layer, longest, numbered, positions,
};
use crate::attend::{KvCache, Rows, Sublayer, attend, per_row};
use crate::config::{Activation, ModelConfig};
use crate::gpt2::check_length;
use crate::model::{Batch, Task};

/// BERT over the modules of a network.
pub(crate) struct Bert {
    config: Arc<ModelConfig>,
    words: ModuleId,
    places: ModuleId,
    segments: ModuleId,
    norm: ModuleId,
    start: ModuleId,
    layers: Vec<Arc<Block>>,
    pooler: ModuleId,
    head: Option<ModuleId>,
}

struct Block {
    config: Arc<ModelConfig>,
    attention: ModuleId,
    query: ModuleId,
    key: ModuleId,
    value: ModuleId,
    output: ModuleId,
    first_junction: ModuleId,
    first_norm: ModuleId,
    up: ModuleId,
    down: ModuleId,
    second_junction: ModuleId,
    second_norm: ModuleId,
    block_end: ModuleId,
}

impl Bert {
    /// The model with its module tree, in the order Hugging Face registers modules.
    pub(crate) fn build(config: &ModelConfig, task: &Task) -> (ModuleTree, Self) {
        let prefix = if *task == Task::Features { "" } else { "bert." };
        let hidden = config.hidden_size;
        let facts = ModelFacts {
            model_type: config.model_type.clone(),
            hidden_size: hidden,
            num_layers: config.num_layers,
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_positions: config.max_positions,
            input_embedding: Some(format!("{prefix}embeddings.word_embeddings")),
            output_embedding: None,
            tied: false,
            rotary: false,
            task_heads: if labels(task).is_some() {
                vec!["classifier".to_owned()]
            } else {
                Vec::new()
            },
        };
        let mut b = Builder {
            tree: ModuleTree::new(facts),
        };
        if !prefix.is_empty() {
            b.container("bert");
        }
        let shared = Arc::new(config.clone());
        b.container(&format!("{prefix}embeddings"));
        let table = |b: &mut Builder, name: &str, rows: usize| {
            b.push(ModuleInfo::embedding(
                &format!("{prefix}embeddings.{name}"),
                rows,
                hidden,
            ))
        };
        let words = table(&mut b, "word_embeddings", config.vocab_size);
        let places = table(&mut b, "position_embeddings", config.max_positions);
        let segments = table(&mut b, "token_type_embeddings", config.type_vocab_size);
        let norm = b.norm(format!("{prefix}embeddings.LayerNorm"), hidden, true);
        let start = b.stream(format!("{prefix}invertible_adapters"), hidden);
        b.container(&format!("{prefix}encoder"));
        let layers = (0..config.num_layers)
            .map(|i| {
                Arc::new(Block::build(
                    &mut b,
                    shared.clone(),
                    &format!("{prefix}encoder.layer.{i}"),
                ))
            })
            .collect();
        b.container(&format!("{prefix}pooler"));
        let pooler = b.linear(format!("{prefix}pooler.dense"), hidden, hidden, true);
        let head = labels(task).map(|n| b.linear("classifier".to_owned(), hidden, n, true));
        (
            b.tree,
            Self {
                config: shared,
                words,
                places,
                segments,
                norm,
                start,
                layers,
                pooler,
                head,
            },
        )
    }
}

impl Block {
    fn build(b: &mut Builder, config: Arc<ModelConfig>, path: &str) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        b.container(path);
        b.container(&format!("{path}.attention"));
        let attention = b.push(ModuleInfo::attention(
            &format!("{path}.attention.self"),
            hidden,
        ));
        let query = b.linear(format!("{path}.attention.self.query"), hidden, hidden, true);
        let key = b.linear(format!("{path}.attention.self.key"), hidden, hidden, true);
        let value = b.linear(format!("{path}.attention.self.value"), hidden, hidden, true);
        let first_junction = b.push(ModuleInfo::junction(
            &format!("{path}.attention.output"),
            hidden,
        ));
        let output = b.linear(
            format!("{path}.attention.output.dense"),
            hidden,
            hidden,
            true,
        );
        let first_norm = b.norm(format!("{path}.attention.output.LayerNorm"), hidden, true);
        b.container(&format!("{path}.intermediate"));
        let up = b.linear(format!("{path}.intermediate.dense"), hidden, inner, true);
        let second_junction = b.push(ModuleInfo::junction(&format!("{path}.output"), hidden));
        let down = b.linear(format!("{path}.output.dense"), inner, hidden, true);
        let second_norm = b.norm(format!("{path}.output.LayerNorm"), hidden, true);
        let block_end = b.stream(format!("{path}.refts"), hidden);
        Self {
            config,
            attention,
            query,
            key,
            value,
            output,
            first_junction,
            first_norm,
            up,
            down,
            second_junction,
            second_norm,
            block_end,
        }
    }

    fn run(&self, network: &Network, x: &Tensor, rows: &Rows, pass: &Pass) -> Result<Tensor> {
        let h = self.attended(network, x, rows, pass)?;
        self.behind(network, x, &h, pass)
    }

    /// What the heads read, before the output projection.
    fn attended(&self, network: &Network, x: &Tensor, rows: &Rows, pass: &Pass) -> Result<Tensor> {
        let c = &self.config;
        let q = network.linear(self.query, x, pass)?;
        let k = network.linear(self.key, x, pass)?;
        let v = network.linear(self.value, x, pass)?;
        let spec = Attention {
            heads: c.num_heads,
            kv_heads: c.num_kv_heads,
            head_dim: c.head_dim,
            scale: c.attention_scale,
            causal: false,
            window: None,
            prefix: 0,
            shared: 0,
            softcap: None,
            mask: Mask::default(),
        };
        let project = |x: &Tensor| {
            Ok((
                network.linear(self.key, x, pass)?,
                network.linear(self.value, x, pass)?,
            ))
        };
        let sublayer = Sublayer {
            module: self.attention,
            hidden: x,
            project: &project,
        };
        attend(network, sublayer, (&q, k, v), &spec, rows, None, pass)
    }

    /// The block's end from its input and from what the heads read.
    fn behind(&self, network: &Network, x: &Tensor, h: &Tensor, pass: &Pass) -> Result<Tensor> {
        let c = &self.config;
        let h = network.linear(self.output, h, pass)?;
        let norm = |x: &Tensor| network.layer_norm(self.first_norm, x, c.norm_eps, pass);
        let x = network.junction(self.first_junction, &h, x, Some(&norm), pass)?;
        let h = activate(&network.linear(self.up, &x, pass)?, c.activation)?;
        let h = network.linear(self.down, &h, pass)?;
        let norm = |x: &Tensor| network.layer_norm(self.second_norm, x, c.norm_eps, pass);
        let x = network.junction(self.second_junction, &h, &x, Some(&norm), pass)?;
        network.stream(self.block_end, &x, pass)
    }

    /// Whether each row of [`behind`](Self::behind) comes from that row of its inputs alone.
    fn ends_by_rows(&self, network: &Network) -> bool {
        let behind = [
            self.output,
            self.first_junction,
            self.first_norm,
            self.up,
            self.down,
            self.second_junction,
            self.second_norm,
            self.block_end,
        ];
        behind.into_iter().all(|id| network.is_bare(id))
    }
}

impl Bert {
    /// What goes into the first block.
    fn start(&self, network: &Network, batch: &Batch, pass: &Pass) -> Result<(Tensor, Rows)> {
        let (x, rows) = embedded(network, self.words, None, batch, 0, pass)?;
        let pass = &rows.pass(pass);
        let first = network.prefix_len();
        check_length(
            first + longest(&rows),
            &self.config,
            "max_position_embeddings",
        )?;
        let shape = x.shape().to_vec();
        let segments = network
            .embed(self.segments, &vec![0; rows.batch * rows.seq], pass)?
            .reshape(&shape)?;
        let places = network
            .embed(self.places, &positions(&rows, first)?, pass)?
            .reshape(&shape)?;
        let x = x.add(&segments)?.add(&places)?;
        let x = network.layer_norm(self.norm, &x, self.config.norm_eps, pass)?;
        let x = network.stream(self.start, &x, pass)?;
        with_prompts(network, x, rows, pass)
    }
}

/// Runs blocks one after the other.
fn through(
    blocks: &[Arc<Block>],
    network: &Arc<Network>,
    mut x: Tensor,
    rows: &Rows,
    pass: &Pass,
) -> Result<Tensor> {
    for (i, block) in blocks.iter().enumerate() {
        let (block, rows) = (block.clone(), rows.clone());
        x = layer(i, network, &x, pass, move |network, x, pass| {
            block.run(network, x, &rows, pass)
        })?;
    }
    Ok(x)
}

/// Where each text's label is read: its first row of hidden states, which are `len` long.
fn first_rows(batch: &Batch, len: usize) -> Vec<u32> {
    // Virtual tokens that are read out stand in front, so that a row's first is one of them.
    let first = |text: Range<usize>| (text.start / batch.seq * len + text.start % batch.seq) as u32;
    batch.texts().into_iter().map(first).collect()
}

impl Architecture for Bert {
    fn hidden(
        &self,
        network: &Arc<Network>,
        batch: &Batch,
        cache: Option<&mut KvCache>,
        pass: &Pass,
    ) -> Result<Tensor> {
        if cache.is_some() {
            return Err(Error::other(
                "BERT sees both sides of a token and cannot generate text",
            ));
        }
        let (x, rows) = self.start(network, batch, pass)?;
        through(&self.layers, network, x, &rows, &rows.pass(pass))
    }

    fn block(
        &self,
        number: usize,
        network: &Network,
        x: &Tensor,
        rows: &Rows,
        pass: &Pass,
    ) -> Result<Tensor> {
        numbered(&self.layers, number)?.run(network, x, rows, pass)
    }

    fn head(&self, network: &Network, rows: &Tensor, pass: &Pass) -> Result<Tensor> {
        let Some(head) = self.head else {
            return Ok(rows.clone());
        };
        let pooled = network.linear(self.pooler, rows, pass)?.tanh()?;
        network.linear(head, &pooled, pass)
    }

    fn pool(&self, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (_, len, _) = hidden.dims3()?;
        Ok(hidden
            .flatten_rows()?
            .gather_rows(&first_rows(batch, len))?)
    }

    fn texts(&self, network: &Arc<Network>, batch: &Batch, pass: &Pass) -> Result<Tensor> {
        let Some((last, others)) = self.layers.split_last() else {
            return self.pool(&self.hidden(network, batch, None, pass)?, batch);
        };
        if pass.adapter_names.is_some() || !last.ends_by_rows(network) {
            return self.pool(&self.hidden(network, batch, None, pass)?, batch);
        }
        let (x, rows) = self.start(network, batch, pass)?;
        let pass = &rows.pass(pass);
        let x = through(others, network, x, &rows, pass)?;
        // All rows are attended to; behind that, the last block works for those alone that are looked at.
        let (_, len, _) = x.dims3()?;
        let (last, first) = (last.clone(), first_rows(batch, len));
        layer(others.len(), network, &x, pass, move |network, x, pass| {
            let h = last.attended(network, x, &rows, pass)?;
            let picked = |t: &Tensor| t.flatten_rows()?.gather_rows(&first);
            last.behind(network, &picked(x)?, &picked(&h)?, pass)
        })
    }
}

/// Puts virtual tokens that come in behind the embeddings in front of each row, or behind its first token.
fn with_prompts(network: &Network, x: Tensor, rows: Rows, pass: &Pass) -> Result<(Tensor, Rows)> {
    let (mut x, mut rows) = (x, rows);
    for place in [PromptPlace::BlocksBehindFirst, PromptPlace::Blocks] {
        let Some(prompt) = network.prompts_at(place, rows.batch, pass)? else {
            continue;
        };
        if rows.segments.is_some() {
            return Err(Error::config("segments", PROMPTED));
        }
        let prompt = per_row(&prompt, rows.batch)?;
        let (_, added, _) = prompt.dims3()?;
        let front = usize::from(place == PromptPlace::BlocksBehindFirst).min(rows.seq);
        x = match front {
            0 => concat(&[&prompt, &x], 1)?,
            _ => {
                let (first, rest) = (x.narrow(1, 0, 1)?, x.narrow(1, 1, rows.seq - 1)?);
                concat(&[&first, &prompt, &rest], 1)?
            }
        };
        rows.keys = rows.keys.map(|keys| {
            let row = |r: &[bool]| {
                let (first, rest) = r.split_at(front);
                let prompt = std::iter::repeat_n(true, added);
                let first = first.iter().copied().chain(prompt);
                first.chain(rest.iter().copied()).collect::<Vec<_>>()
            };
            Arc::new(keys.chunks(rows.seq.max(1)).flat_map(row).collect())
        });
        rows.seq += added;
        rows.virtual_tokens += added;
    }
    Ok((x, rows))
}

/// The activation of a feed-forward layer without a gate.
pub(crate) fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu(),
        Activation::GeluTanh => x.gelu_tanh(),
        Activation::Relu => x.relu(),
    }?)
}
