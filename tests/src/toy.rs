//! Small models with everything a method can sit on, written over [`Network`] alone: two arithmetics, any weight
//! format, any device. Module names are Llama's, which the registry's example configurations are written for.

use std::sync::Arc;

use peft::core::{
    AttentionCall, Base, BaseWeight, Device, ModelFacts, ModuleId, ModuleInfo, ModuleTree, Network,
    Pass, Result, RngKey, Tensor, Tokens,
};
use peft::tensor::{Attention, Bytes, FrozenWeight, Glu, Mask, Rope, WeightFormat, concat, encode};

/// Which arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Llama's: RMSNorm in front, causal, linear layers stored `[out, in]`, no bias in the MLP.
    Decoder,
    /// BERT's: LayerNorm after the residual, sees both ways, linear layers stored `[in, out]` with biases everywhere.
    Encoder,
}

/// Sizes of a toy model.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its arithmetic.
    pub style: Style,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of one head, even.
    pub head_dim: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub inner: usize,
    /// Tokens.
    pub vocab: usize,
    /// Whether the head shares the embedding's weight.
    pub tied: bool,
    /// How the matrices are stored.
    pub format: WeightFormat,
    /// Seed of the weights.
    pub seed: u64,
}

/// One layer's modules.
struct Layer {
    norms: [ModuleId; 2],
    attention: ModuleId,
    qkvo: [ModuleId; 4],
    mlp: [ModuleId; 3],
    junctions: [ModuleId; 2],
    end: ModuleId,
}

/// A toy model with its network.
pub struct Toy {
    /// Base and adapters.
    pub network: Network,
    spec: Spec,
    embedding: ModuleId,
    start: ModuleId,
    layers: Vec<Layer>,
    norm: ModuleId,
    end: ModuleId,
    head: ModuleId,
}

/// Token ids `[batch, seq]`.
#[derive(Clone, Debug)]
pub struct Ids {
    /// Row by row.
    pub ids: Vec<u32>,
    /// Rows.
    pub batch: usize,
    /// Tokens a row.
    pub seq: usize,
}

/// Adds modules to a tree and their weights to a base.
struct Builder<'a> {
    spec: &'a Spec,
    tree: ModuleTree,
    weights: Vec<(String, BaseWeight)>,
    device: &'a Device,
}

impl Builder<'_> {
    fn values(&self, name: &str, n: usize, mean: f32, std: f32) -> Vec<f32> {
        let mut values = vec![0.0; n];
        RngKey::new(self.spec.seed)
            .fork(name)
            .fill_normal(mean, std, &mut values);
        values
    }

    /// A matrix `[rows, cols]` in the storage format.
    fn matrix(
        &mut self,
        path: &str,
        rows: usize,
        cols: usize,
        std: f32,
        transposed: bool,
    ) -> Result<()> {
        let name = format!("{path}.weight");
        let values = self.values(&name, rows * cols, 0.0, std);
        let bytes = Bytes::from_vec(encode(self.spec.format, &values, cols)?);
        let weight = FrozenWeight::new(rows, cols, self.spec.format, bytes)?;
        self.weights
            .push((name, BaseWeight::frozen(weight, transposed, self.device)));
        Ok(())
    }

    fn vector(&mut self, name: String, n: usize, mean: f32) -> Result<()> {
        let values = Tensor::from_vec(self.values(&name, n, mean, 0.2), &[n], self.device)?;
        self.weights.push((name, BaseWeight::dense(values, false)));
        Ok(())
    }

    fn linear(&mut self, path: &str, inside: usize, out: usize, bias: bool) -> Result<ModuleId> {
        let std = 1.0 / (inside as f32).sqrt();
        if bias {
            self.vector(format!("{path}.bias"), out, 0.0)?;
        }
        match self.spec.style {
            Style::Decoder => {
                self.matrix(path, out, inside, std, false)?;
                Ok(self.tree.push(ModuleInfo::linear(path, inside, out, bias)))
            }
            Style::Encoder => {
                self.matrix(path, inside, out, std, true)?;
                Ok(self.tree.push(ModuleInfo::conv1d(path, inside, out, bias)))
            }
        }
    }

    fn norm(&mut self, path: &str) -> Result<ModuleId> {
        let (dim, bias) = (self.spec.hidden, self.spec.style == Style::Encoder);
        self.vector(format!("{path}.weight"), dim, 1.0)?;
        if bias {
            self.vector(format!("{path}.bias"), dim, 0.0)?;
        }
        Ok(self.tree.push(ModuleInfo::norm(path, dim, bias)))
    }

    fn layer(&mut self, index: usize) -> Result<Layer> {
        let Spec { hidden, inner, .. } = *self.spec;
        let (q, kv) = (
            self.spec.heads * self.spec.head_dim,
            self.spec.kv_heads * self.spec.head_dim,
        );
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let biased = self.spec.style == Style::Encoder;
        let attention = self
            .tree
            .push(ModuleInfo::attention(&at("self_attn"), hidden));
        let qkvo = [
            self.linear(&at("self_attn.q_proj"), hidden, q, true)?,
            self.linear(&at("self_attn.k_proj"), hidden, kv, true)?,
            self.linear(&at("self_attn.v_proj"), hidden, kv, true)?,
            self.linear(&at("self_attn.o_proj"), q, hidden, true)?,
        ];
        let mlp = [
            self.linear(&at("mlp.gate_proj"), hidden, inner, biased)?,
            self.linear(&at("mlp.up_proj"), hidden, inner, biased)?,
            self.linear(&at("mlp.down_proj"), inner, hidden, biased)?,
        ];
        let norms = [
            self.norm(&at("input_layernorm"))?,
            self.norm(&at("post_attention_layernorm"))?,
        ];
        let mut junction = |name: &str| self.tree.push(ModuleInfo::junction(&at(name), hidden));
        let junctions = [junction("attention_adapters"), junction("output_adapters")];
        let end = self.tree.push(ModuleInfo::stream(&at("refts"), hidden));
        Ok(Layer {
            norms,
            attention,
            qkvo,
            mlp,
            junctions,
            end,
        })
    }
}

impl Toy {
    /// A model of those sizes, the same values for the same seed on every device.
    ///
    /// # Errors
    /// If the sizes do not fit the weight format.
    pub fn new(spec: &Spec, device: &Device) -> Result<Self> {
        let facts = ModelFacts {
            model_type: "llama".to_owned(),
            hidden_size: spec.hidden,
            num_layers: spec.layers,
            num_heads: spec.heads,
            num_kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            vocab_size: spec.vocab,
            max_positions: 0,
            input_embedding: Some("model.embed_tokens".to_owned()),
            output_embedding: Some("lm_head".to_owned()),
            tied: spec.tied,
            rotary: true,
            task_heads: Vec::new(),
        };
        let mut b = Builder {
            spec,
            tree: ModuleTree::new(facts),
            weights: Vec::new(),
            device,
        };
        let table = "model.embed_tokens";
        b.matrix(table, spec.vocab, spec.hidden, 0.7, false)?;
        let embedding = b
            .tree
            .push(ModuleInfo::embedding(table, spec.vocab, spec.hidden));
        let stream =
            |b: &mut Builder<'_>, path: &str| b.tree.push(ModuleInfo::stream(path, spec.hidden));
        let start = stream(&mut b, "model.invertible_adapters");
        let layers = (0..spec.layers)
            .map(|i| b.layer(i))
            .collect::<Result<_>>()?;
        let norm = b.norm("model.norm")?;
        let end = stream(&mut b, "model.invertible_adapters_rev");
        let mut head = ModuleInfo::linear("lm_head", spec.hidden, spec.vocab, false);
        if spec.tied {
            head = head.with_weight(format!("{table}.weight"));
        } else {
            b.matrix("lm_head", spec.vocab, spec.hidden, 0.3, false)?;
        }
        let head = b.tree.push(head);
        let Builder { tree, weights, .. } = b;
        let mut base = Base::new(tree, device);
        for (name, weight) in weights {
            base.insert(name, weight);
        }
        base.check()?;
        Ok(Self {
            network: Network::new(base),
            spec: spec.clone(),
            embedding,
            start,
            layers,
            norm,
            end,
            head,
        })
    }

    fn normed(&self, id: ModuleId, x: &Tensor, pass: &Pass) -> Result<Tensor> {
        match self.spec.style {
            Style::Decoder => self.network.rms_norm(id, x, 1e-5, 0.0, pass),
            Style::Encoder => self.network.layer_norm(id, x, 1e-5, pass),
        }
    }

    /// Logits `[batch, virtual + seq, vocab]`.
    ///
    /// # Errors
    /// Whatever the network says.
    pub fn logits(&self, ids: &Ids, pass: &Pass) -> Result<Tensor> {
        let net = &self.network;
        let Ids { batch, seq, .. } = *ids;
        let hidden = self.spec.hidden;
        let mut x = net
            .embed(self.embedding, &ids.ids, pass)?
            .reshape(&[batch, seq, hidden])?;
        if let Some(prompt) = net.prompt(batch, pass)? {
            x = concat(&[&per_row(&prompt, batch)?, &x], 1)?;
        }
        let width = x.dims3()?.1;
        let pass = &Pass {
            tokens: Some(Arc::new(Tokens {
                batch,
                seq: width,
                seen: 0,
                virtual_tokens: width - seq,
                mask: None,
                segments: None,
            })),
            ..pass.clone()
        };
        let mut x = net.stream(self.start, &x, pass)?;
        let rope = |heads: usize, seq: usize| self.rope(heads, batch, seq);
        for layer in &self.layers {
            let h = if self.spec.style == Style::Decoder {
                self.normed(layer.norms[0], &x, pass)?
            } else {
                x.clone()
            };
            let o = self.attend(layer, &h, &rope, pass)?;
            x = self.meet(layer, 0, &o, &x, pass)?;
            let h = if self.spec.style == Style::Decoder {
                self.normed(layer.norms[1], &x, pass)?
            } else {
                x.clone()
            };
            let gate = net.linear(layer.mlp[0], &h, pass)?;
            let inside = gate.glu(Glu::Silu, &net.linear(layer.mlp[1], &h, pass)?)?;
            let down = net.linear(layer.mlp[2], &inside, pass)?;
            x = self.meet(layer, 1, &down, &x, pass)?;
            x = net.stream(layer.end, &x, pass)?;
        }
        let x = net.stream(self.end, &self.normed(self.norm, &x, pass)?, pass)?;
        net.linear(self.head, &x, pass)
    }

    /// A sublayer's output and its residual.
    fn meet(
        &self,
        layer: &Layer,
        which: usize,
        y: &Tensor,
        residual: &Tensor,
        pass: &Pass,
    ) -> Result<Tensor> {
        let (net, id) = (&self.network, layer.junctions[which]);
        let norm = |x: &Tensor| self.normed(layer.norms[which], x, pass);
        match self.spec.style {
            Style::Decoder => net.junction(id, y, residual, None, pass),
            Style::Encoder => net.junction(id, y, residual, Some(&norm), pass),
        }
    }

    fn attend(
        &self,
        layer: &Layer,
        h: &Tensor,
        rope: &dyn Fn(usize, usize) -> Arc<Rope>,
        pass: &Pass,
    ) -> Result<Tensor> {
        let net = &self.network;
        let (batch, seq, _) = h.dims3()?;
        let Spec {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.spec;
        let q = net
            .linear(layer.qkvo[0], h, pass)?
            .rope(&rope(heads, seq))?;
        let project = |x: &Tensor| {
            Ok((
                net.linear(layer.qkvo[1], x, pass)?,
                net.linear(layer.qkvo[2], x, pass)?,
            ))
        };
        let (k, mut v) = project(h)?;
        let mut k = k.rope(&rope(kv_heads, seq))?;
        let mut prefixed = 0;
        if let Some(prefix) = net.prefix(layer.attention, h, pass)? {
            let (pk, pv) = (per_row(&prefix.k, batch)?, per_row(&prefix.v, batch)?);
            prefixed = pk.dims3()?.1;
            k = concat(&[&pk, &k], 1)?;
            v = concat(&[&pv, &v], 1)?;
        }
        let spec = Attention {
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            causal: self.spec.style == Style::Decoder,
            window: None,
            prefix: prefixed,
            shared: 0,
            softcap: None,
            mask: Mask::default(),
        };
        let call = AttentionCall {
            q,
            k,
            v,
            spec: &spec,
            hidden: h,
            project: &project,
        };
        net.linear(
            layer.qkvo[3],
            &net.attention(layer.attention, &call, pass)?,
            pass,
        )
    }

    /// Both styles rotate: without positions a bias of keys moves nothing, and the laws want a gradient everywhere.
    fn rope(&self, heads: usize, batch: usize, seq: usize) -> Arc<Rope> {
        let half = self.spec.head_dim / 2;
        let start = self.network.prefix_len();
        let scale = self.network.position_scale();
        let angle = |at: usize| (at / half) as f32 / scale * 0.3f32.powf((at % half) as f32);
        let table = |f: fn(f32) -> f32| {
            Arc::new(
                (0..(start + seq) * half)
                    .map(|at| f(angle(at)))
                    .collect::<Vec<f32>>(),
            )
        };
        let positions = (0..batch * seq).map(|i| (start + i % seq) as u32).collect();
        let (cos, sin) = (table(f32::cos), table(f32::sin));
        Arc::new(Rope {
            heads,
            head_dim: self.spec.head_dim,
            half,
            cos,
            sin,
            positions: Arc::new(positions),
        })
    }
}

/// `[n, dim]` for every row of the batch, or what is `[batch, n, dim]` already.
fn per_row(x: &Tensor, batch: usize) -> Result<Tensor> {
    match *x.shape() {
        [n, dim] => Ok(x.reshape(&[1, n, dim])?.broadcast_to(&[batch, n, dim])?),
        _ => Ok(x.clone()),
    }
}
