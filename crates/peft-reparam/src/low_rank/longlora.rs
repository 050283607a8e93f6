//! LongLoRA: LoRA for longer contexts, trained with sparse attention.
//!
//! # Paper
//! LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models, arXiv 2309.12307, section 3.
//!
//! # Formula
//! LoRA, `y = W x + s B A x`, on the projections of attention, with norms and the input embedding trained whole. While
//! training, attention is shifted and sparse (S²-Attn): half of the heads attend within groups of neighbouring tokens,
//! the others within groups shifted by half a group, so that information flows between groups. Evaluation and
//! generation run the model's own attention. With `context_length`, positions are interpolated to it: divided by
//! `context_length` over the model's own length before they rotate queries and keys.
//!
//! # Saved keys
//! LoRA's `<module>.lora_A.weight [r, in]`, `<module>.lora_B.weight [out, r]`; norms and the embedding under the base
//! model's names, `<module>.weight`.
//!
//! # Defaults and their source
//! r 8, lora_alpha 16, dropout 0, groups of a quarter of the sequence, norms and embedding trained, every linear module
//! of attention adapted: the authors' fine-tuning script. Theirs is a learning rate of 2e-5 for thousands of steps at
//! 7 billion parameters; for small models and short runs `train.learning_rate = 2e-4` is a good start.
//!
//! # Differences from HF
//! HF PEFT has no LongLoRA; its `LORA` with `modules_to_save` reads the same tensors. The authors' plain code rolls the
//! sequence to shift it, which lets the first tokens see the last ones; here, as in their flash-attention code, the
//! half-groups at both ends stay apart and nobody sees the future. Sequences need not be divisible into groups.
//!
//! # Limits
//! Models with rotary positions and an even number of heads. A merged model needs the interpolation in its own
//! configuration (`rope_scaling` of type `linear`), which weights cannot hold. On a model with tied embeddings the
//! trained embedding acts on the input side alone.

use std::sync::Arc;

use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Call, Common, Error, Injector, ModelFacts, ModuleKind, ModuleTree, PeftMethod,
    Result, Selected, Site, Slot, Targets, Tensor, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::LowRank;
use crate::shifted;

/// LongLoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LongLora {
    /// Width of a group as a share of the sequence.
    pub group_size_ratio: f64,
    /// Length positions are interpolated to; null = the model's own.
    pub context_length: Option<usize>,
    /// Whether the norms are trained.
    pub train_norms: bool,
    /// Whether the input embedding is trained.
    pub train_embeddings: bool,
    /// LoRA's fields.
    #[serde(flatten)]
    pub factors: LowRank,
}

impl Default for LongLora {
    fn default() -> Self {
        Self {
            group_size_ratio: 0.25,
            context_length: None,
            train_norms: true,
            train_embeddings: true,
            factors: LowRank {
                lora_alpha: 16.0,
                ..LowRank::default()
            },
        }
    }
}

register!(
    LongLora,
    id = "longlora",
    title = "LongLoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "LONGLORA",
    paper = "arXiv 2309.12307",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl LongLora {
    fn check(&self, facts: &ModelFacts) -> Result<()> {
        self.factors.check(&[])?;
        let wrong = |field: &str, detail: String| Err(Error::config(field, detail));
        if !facts.rotary {
            let detail = format!(
                "this method stretches rotary positions, and a {} model has none: its positions are learnt one by one",
                facts.model_type
            );
            return wrong("peft_type", detail);
        }
        if !facts.num_heads.is_multiple_of(2) {
            let detail = format!(
                "half of the heads are shifted, and this model has {} of them",
                facts.num_heads
            );
            return wrong("peft_type", detail);
        }
        if !(self.group_size_ratio > 0.0 && self.group_size_ratio <= 1.0) {
            return wrong(
                "group_size_ratio",
                "has to be above 0, at most 1".to_owned(),
            );
        }
        match self.context_length {
            Some(_) if facts.max_positions == 0 => {
                let detail = "the model does not say what length it was made for".to_owned();
                wrong("context_length", detail)
            }
            Some(length) if length < facts.max_positions => {
                let own = facts.max_positions;
                let detail = format!("{length} is below the model's own {own}");
                wrong("context_length", detail)
            }
            _ => Ok(()),
        }
    }

    /// Whether a module is trained whole.
    fn whole(&self, site: &Site, facts: &ModelFacts) -> bool {
        match site.kind {
            ModuleKind::Norm => self.train_norms,
            ModuleKind::Embedding => {
                self.train_embeddings && facts.input_embedding.as_ref() == Some(&site.path)
            }
            _ => false,
        }
    }
}

/// All modules of a kind.
fn all(tree: &ModuleTree, kind: ModuleKind) -> impl Iterator<Item = Site> {
    let of_kind = tree.iter().filter(move |(_, m)| m.kind == kind);
    of_kind.map(|(id, _)| tree.site(id))
}

impl PeftMethod for LongLora {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[
            ModuleKind::Linear,
            ModuleKind::Conv1d,
            ModuleKind::Norm,
            ModuleKind::Embedding,
        ]
    }

    /// The linear modules inside of attention.
    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        let mut names: Vec<String> = Vec::new();
        for attention in all(tree, ModuleKind::Attention) {
            let inside = tree.iter().filter(|(_, m)| m.kind.is_linear());
            let inside = inside.filter_map(|(_, m)| m.path.strip_prefix(&attention.path));
            for name in inside.filter_map(|rest| rest.strip_prefix('.')) {
                if !names.iter().any(|n| n == name) {
                    names.push(name.to_owned());
                }
            }
        }
        (!names.is_empty()).then_some(Targets::Names(names))
    }

    /// What is adapted, and what is trained whole besides.
    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        let mut sites = tree.matching(common, self.kinds(), self.default_targets(tree))?;
        let facts = tree.facts();
        for kind in [ModuleKind::Norm, ModuleKind::Embedding] {
            for site in all(tree, kind).filter(|s| self.whole(s, facts)) {
                if !sites.iter().any(|s| s.path == site.path) {
                    sites.push(site);
                }
            }
        }
        Ok(sites)
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        let tree = cx.tree();
        self.check(tree.facts())?;
        let sites = self.sites(tree, cx.common())?;
        cx.attach_all(sites, |site, cx| self.attach(site, cx))?;
        let sparse = Arc::new(Sparse(self.group_size_ratio));
        for site in all(tree, ModuleKind::Attention) {
            cx.place(site, sparse.clone(), false);
        }
        if let Some(length) = self.context_length {
            let scale = length as f64 / tree.facts().max_positions.max(1) as f64;
            cx.place(Site::root(), Arc::new(Stretched(scale as f32)), false);
        }
        Ok(())
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        if !matches!(site.kind, ModuleKind::Norm | ModuleKind::Embedding) {
            return Ok(Box::new(self.factors.pair(site, cx)?));
        }
        cx.select(Slot::Weight, "weight")?;
        if cx.has(Slot::Bias) {
            cx.select(Slot::Bias, "bias")?;
        }
        Ok(Box::new(Selected))
    }

    fn save(&self, params: Tensors) -> Result<Tensors> {
        self.factors.save(params)
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        Ok(self.factors.load(params))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.factors.finish_config(config, tree);
    }
}

/// A layer's attention: sparse while training.
struct Sparse(f64);

impl Adapter for Sparse {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        if call.pass().train {
            shifted::attention(call, self.0)
        } else {
            call.base()
        }
    }

    fn only_in_training(&self) -> bool {
        true
    }
}

/// The model as a whole: positions closer together.
struct Stretched(f32);

impl Adapter for Stretched {
    fn position_scale(&self) -> f32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::peft_tensor::{Attention, Mask};
    use peft_core::serde_json::{Value, json};
    use peft_core::{
        AttentionCall, Base, BaseWeight, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Pass,
        RngKey, Tensor,
    };

    /// One attention of four heads, two of them for keys, one wide.
    fn network(more: Value, rotary: bool) -> peft_core::Result<Network> {
        let mut tree = ModuleTree::new(ModelFacts {
            model_type: "toy".to_owned(),
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 1,
            max_positions: 8,
            rotary,
            ..ModelFacts::default()
        });
        tree.push(ModuleInfo::attention("layers.0.attn", 4));
        tree.push(ModuleInfo::linear("layers.0.attn.q", 4, 4, false));
        let mut base = Base::new(tree, &Device::cpu());
        let eye = Tensor::from_array(Array2::<f32>::eye(4), &Device::cpu())?;
        base.insert("layers.0.attn.q.weight", BaseWeight::dense(eye, false));
        let mut config = json!({"peft_type": "LONGLORA", "r": 1});
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let mut network = Network::new(base);
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// Slopes of the output at `token` with respect to keys and values, `[16 positions][k then v]` summed over widths.
    fn seen(network: &Network, token: usize, half: usize, pass: &Pass) -> Vec<bool> {
        let device = network.device();
        let draw = |label: &str, width| {
            let key = RngKey::new(1).fork(label);
            Tensor::normal(key, 0.0, 1.0, &[1, 16, width], device).expect("a tensor")
        };
        let (k, v) = (draw("k", 2).leaf(), draw("v", 2).leaf());
        let spec = Attention {
            heads: 4,
            kv_heads: 2,
            head_dim: 1,
            scale: 1.0,
            causal: true,
            window: None,
            prefix: 0,
            shared: 0,
            softcap: None,
            mask: Mask::default(),
        };
        let hidden = draw("hidden", 4);
        let call = AttentionCall {
            q: draw("q", 4),
            k: k.clone(),
            v: v.clone(),
            spec: &spec,
            hidden: &hidden,
            project: &|_| unreachable!("nobody projects here"),
        };
        let id = network.module("layers.0.attn").expect("there");
        let y = network.attention(id, &call, pass).expect("runs");
        let y = y
            .narrow(1, token, 1)
            .and_then(|y| y.narrow(2, 2 * half, 2)?.sum_all());
        let grads = y.and_then(Tensor::backward).expect("a gradient");
        let of = |t: &Tensor| grads.get(t).map(|g| g.to_vec().expect("values"));
        let (dk, dv) = (of(&k).expect("of k"), of(&v).expect("of v"));
        let at = |i: usize| {
            [&dk, &dv]
                .iter()
                .any(|d| d[2 * i] != 0.0 || d[2 * i + 1] != 0.0)
        };
        (0..16).map(at).collect()
    }

    /// Groups of 4 of 16 tokens: heads of the first half see from their group's start, those of the second half from
    /// half a group before, and exactly nothing of the future, nor the first tokens anything of the last.
    #[test]
    fn nobody_sees_the_future() {
        let network = network(json!({}), true).expect("attaches");
        let train = Pass::train(RngKey::new(0));
        for token in 0..16 {
            let starts = [token / 4 * 4, (token + 2) / 4 * 4];
            for (half, start) in starts.into_iter().enumerate() {
                let first = if half == 0 { start } else { start.max(2) - 2 };
                let want: Vec<bool> = (0..16).map(|i| (first..=token).contains(&i)).collect();
                assert_eq!(seen(&network, token, half, &train), want, "{token}, {half}");
                let all: Vec<bool> = (0..16).map(|i| i <= token).collect();
                assert_eq!(seen(&network, token, half, &Pass::eval()), all);
            }
        }
    }

    #[test]
    fn positions_are_interpolated() {
        let scale = |more: Value| network(more, true).map(|n| n.position_scale());
        assert_eq!(scale(json!({})).expect("attaches"), 1.0);
        let longer = json!({"context_length": 32});
        assert_eq!(scale(longer).expect("attaches"), 4.0);
        let error = scale(json!({"context_length": 4})).expect_err("refused");
        assert!(error.to_string().contains("context_length"), "{error}");
        let error = network(json!({}), false).expect_err("refused").to_string();
        assert!(error.contains("rotary"), "{error}");
    }
}
