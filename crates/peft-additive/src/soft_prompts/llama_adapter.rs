//! LLaMA-Adapter: trained prompts that attention sees through a gate that starts at zero.
//!
//! # Paper
//! LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention, arXiv 2303.16199, section 3.2.
//!
//! # Formula
//! In each of the last `adapter_layers` layers, with P `[adapter_len, hidden]` and a gate g:
//! `attention(q, K, V) + g softmax(q (P Wk)ᵀ / sqrt(d)) P Wv` in front of the output projection, by head. Keys of P are
//! not rotated, and the two softmaxes are apart. On GPT-2 the second term joins behind the output projection.
//!
//! # Saved keys
//! `base_model.model.<attention>.adaption_prompt [1, adapter_len, hidden]`,
//! `base_model.model.<attention>.adaption_gate [1]`.
//!
//! # Defaults and their source
//! Gate 0, prompts standard normal: HF PEFT 0.21 and the paper's code. `adapter_len` 10: the paper (section 4.1).
//! `adapter_layers`: 15 of every 16 layers, rounded up, from the paper's 30 of 32. HF has no default for either. The
//! gates open slowly: at a learning rate of 1e-2 MiniLM is at accuracy 0.58 after 100 steps of 16 rows.
//!
//! # Differences from HF
//! HF knows Llama, Mistral and GPT-2; here every attention will do, BERT's too. Several such adapters can act together,
//! which HF refuses. The place of the term on GPT-2, which the paper does not have, is HF's. Where
//! the output projection has a bias, HF adds it a second time with the prompts' term, at a gate of zero too; here once.
//!
//! # Limits
//! One gate for a layer, as HF; the paper's code has one for each head.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Common, Error, Init, Injector, ModuleKind, ModuleTree, Param,
    PeftMethod, Result, Site, Tensor, register,
};
use serde::{Deserialize, Serialize};

use crate::virtual_tokens::check_count;

/// LLaMA-Adapter's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LlamaAdapter {
    /// Last name of the attention modules; by default the model's own.
    pub target_modules: Option<String>,
    /// Prompts of a layer.
    pub adapter_len: usize,
    /// Layers, counted from the last.
    pub adapter_layers: Option<usize>,
}

impl Default for LlamaAdapter {
    fn default() -> Self {
        Self {
            target_modules: None,
            adapter_len: 10,
            adapter_layers: None,
        }
    }
}

register!(
    LlamaAdapter,
    id = "llama_adapter",
    title = "LLaMA-Adapter",
    family = Additive,
    subfamily = "soft prompts",
    peft_type = "ADAPTION_PROMPT",
    paper = "arXiv 2303.16199",
    example = r#"{"adapter_len": 3}"#,
    mergeable = false,
);

impl LlamaAdapter {
    /// Attention modules of the name asked for, in order.
    fn attentions(&self, tree: &ModuleTree) -> Vec<Site> {
        let wanted = |path: &str| match &self.target_modules {
            Some(name) => last(path) == name,
            None => true,
        };
        tree.iter()
            .filter(|(_, m)| m.kind == ModuleKind::Attention && wanted(&m.path))
            .map(|(id, _)| tree.site(id))
            .collect()
    }

    fn layers(&self, of: usize) -> usize {
        self.adapter_layers.unwrap_or((of * 15).div_ceil(16))
    }
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Where the term joins the sublayer's output instead of attention's: there, HF leaves the projection out.
fn output_projection(tree: &ModuleTree, attention: &Site) -> Option<Site> {
    let behind = tree.facts().model_type == "gpt2";
    let id = tree.get(&format!("{}.c_proj", attention.path));
    id.filter(|_| behind).map(|id| tree.site(id))
}

impl PeftMethod for LlamaAdapter {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Attention]
    }

    fn sites(&self, tree: &ModuleTree, _common: &Common) -> Result<Vec<Site>> {
        let mut sites = self.attentions(tree);
        if sites.is_empty() {
            let all = Self::default().attentions(tree);
            let mut names: Vec<&str> = all.iter().map(|site| last(&site.path)).collect();
            names.dedup();
            let detail = match names[..] {
                [] => "the model has no attention to put prompts in".to_owned(),
                _ => format!("names no attention; there is {}", names.join(", ")),
            };
            return Err(Error::config("target_modules", detail));
        }
        let (there, wanted) = (sites.len(), self.layers(sites.len()));
        if !(1..=there).contains(&wanted) {
            let detail = format!("has to be between 1 and {there}, not {wanted}");
            return Err(Error::config("adapter_layers", detail));
        }
        Ok(sites.split_off(there - wanted))
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        let sites = self.sites(cx.tree(), cx.common())?;
        let mut behind = Vec::new();
        cx.attach_all(sites, |site, cx| {
            let mut adapter = Gated::new(self.adapter_len, cx)?;
            if let Some(output) = output_projection(cx.tree(), site) {
                let pending = Arc::new(Pending::default());
                adapter.pending = Some(pending.clone());
                behind.push((output, pending));
            }
            Ok(Box::new(adapter))
        })?;
        for (site, pending) in behind {
            cx.place(site, Arc::new(Behind(pending)), false);
        }
        Ok(())
    }

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(Gated::new(self.adapter_len, cx)?))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        let sites = self.attentions(tree);
        let layers = self.layers(sites.len());
        config.insert("adapter_layers".to_owned(), json!(layers));
        if let Some(site) = sites.first() {
            config.insert("target_modules".to_owned(), json!(last(&site.path)));
        }
    }
}

struct Gated {
    /// `[1, adapter_len, hidden]`
    prompt: Param,
    /// `[1]`
    gate: Param,
    /// Where the term waits for the output projection, on models that add it there.
    pending: Option<Arc<Pending>>,
}

impl Gated {
    fn new(len: usize, cx: &mut Attach<'_>) -> Result<Self> {
        check_count(cx, "adapter_len", len)?;
        let hidden = cx.tree().facts().hidden_size;
        let start = Init::Normal { std: 1.0 };
        Ok(Self {
            prompt: cx.param("adaption_prompt", &[1, len, hidden], &start)?,
            gate: cx.param("adaption_gate", &[1], &Init::Zeros)?,
            pending: None,
        })
    }

    /// The gated term, `[B, S, heads * head_dim]`.
    fn term(&self, call: &Call<'_>) -> Result<Tensor> {
        let at = call.attention()?;
        let (heads, groups, dim) = (at.spec.heads, at.spec.kv_heads, at.spec.head_dim);
        let each = heads / groups.max(1);
        let (batch, seq, width) = at.q.dims3()?;
        let (k, v) = (at.project)(&self.prompt.tensor())?;
        let len = k.dims3()?.1;
        // All rows share the prompts: what is left are as many products as there are heads of keys.
        let by_group = |x: &Tensor| x.reshape(&[len, groups, dim])?.permute(&[1, 0, 2]);
        let (k, v) = (by_group(&k)?, by_group(&v)?);
        let q =
            at.q.reshape(&[batch * seq, groups, each, dim])?
                .permute(&[1, 0, 2, 3])?
                .reshape(&[groups, batch * seq * each, dim])?;
        let scale = 1.0 / (dim as f32).sqrt();
        let seen = q.matmul_t(&k)?.scale(scale)?.softmax()?.matmul(&v)?;
        let joined = seen
            .reshape(&[groups, batch * seq, each, dim])?
            .permute(&[1, 0, 2, 3])?
            .reshape(&[batch, seq, width])?;
        Ok(joined.mul(&self.gate.tensor())?)
    }
}

impl Adapter for Gated {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let (base, term) = (call.base()?, self.term(call)?);
        match &self.pending {
            Some(pending) => {
                pending.put(term);
                Ok(base)
            }
            None => Ok(base.add(&term)?),
        }
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        match self.pending {
            Some(_) => Ok(None),
            None => self.term(call).map(Some),
        }
    }
}

/// Terms on their way from a layer's attention to its output projection; one thread runs both of a pass, the one right
/// after the other.
#[derive(Default)]
struct Pending(Mutex<HashMap<ThreadId, Tensor>>);

impl Pending {
    fn put(&self, term: Tensor) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(std::thread::current().id(), term);
    }

    fn take(&self) -> Option<Tensor> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(&std::thread::current().id())
    }
}

/// On the output projection: adds the term that waits.
struct Behind(Arc<Pending>);

impl Adapter for Behind {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let base = call.base()?;
        match self.0.take() {
            Some(term) => Ok(base.add(&term)?),
            None => Ok(base),
        }
    }
}

#[cfg(test)]
mod tests {
    use peft_core::peft_tensor::{Attention, Mask};
    use peft_core::serde_json::{Value, json};
    use peft_core::{
        AttentionCall, Base, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Result,
        Tensor,
    };

    fn network(layers: usize, fields: Value) -> Result<Network> {
        let facts = ModelFacts {
            hidden_size: 1,
            num_layers: layers,
            ..ModelFacts::default()
        };
        let mut tree = ModuleTree::new(facts);
        for layer in 0..layers {
            tree.push(ModuleInfo::attention(
                &format!("layers.{layer}.self_attn"),
                1,
            ));
        }
        let mut config = json!({"peft_type": "ADAPTION_PROMPT", "adapter_len": 2});
        for (key, value) in fields.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let mut network = Network::new(Base::new(tree, &Device::cpu()));
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// One head of width 1, q = 2, prompts (ln 2, 0) as keys and three times that as values: weights (4/5, 1/5), gate
    /// 1/2. The text's own attention gives 7.
    #[test]
    fn by_hand() {
        let network = network(1, json!({})).expect("attaches");
        let tensor = |values: Vec<f32>, shape: &[usize]| {
            Tensor::from_vec(values, shape, network.device()).expect("a tensor")
        };
        for param in network.parameters() {
            let values = if param.key().ends_with("gate") {
                vec![0.5]
            } else {
                vec![2f32.ln(), 0.0]
            };
            param.set(tensor(values, &param.shape())).expect("fits");
        }
        let spec = Attention {
            heads: 1,
            kv_heads: 1,
            head_dim: 1,
            scale: 1.0,
            causal: true,
            window: None,
            prefix: 0,
            shared: 0,
            softcap: None,
            mask: Mask::default(),
        };
        let one = |value: f32| tensor(vec![value], &[1, 1, 1]);
        let hidden = one(0.0);
        let call = AttentionCall {
            q: one(2.0),
            k: one(1.0),
            v: one(7.0),
            spec: &spec,
            hidden: &hidden,
            project: &|x| Ok((x.clone(), x.scale(3.0)?)),
        };
        let id = network.module("layers.0.self_attn").expect("there");
        let out = network.attention(id, &call, &Pass::eval()).expect("runs");
        let wanted = 7.0 + 0.5 * 0.8 * 3.0 * 2f32.ln();
        assert!((out.item().expect("a value") - wanted).abs() < 1e-6);
    }

    #[test]
    fn the_last_layers_have_prompts() {
        let of = |fields: Value| -> Result<(usize, Value)> {
            let (config, tensors) = network(4, fields)?.export("a")?;
            let first = tensors.keys().next().cloned().unwrap_or_default();
            assert!(first.starts_with("base_model.model.layers."), "{first}");
            Ok((tensors.len(), config))
        };
        let (count, config) = of(json!({"adapter_layers": 3})).expect("attaches");
        assert_eq!((count, &config["target_modules"]), (6, &json!("self_attn")));
        let (count, config) = of(json!({})).expect("attaches");
        assert_eq!((count, &config["adapter_layers"]), (8, &json!(4)));
        for (fields, named) in [
            (json!({"adapter_layers": 5}), "between 1 and 4"),
            (json!({"target_modules": "attn"}), "self_attn"),
            (json!({"adapter_len": 0}), "adapter_len"),
        ] {
            let error = of(fields).expect_err("refused").to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
