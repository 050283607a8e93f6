//! LoRA: a weight's change as the product of two thin matrices.
//!
//! # Paper
//! LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1. rsLoRA: arXiv 2312.03732.
//!
//! # Formula
//! `y = W x + b + s B A dropout(x)` with `s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`; merged,
//! `W' = W + s B A`. On an embedding, `y = E[id] + s B A[:, id]`. With `lora_bias`, `y` gains `s b_B`.
//!
//! # Saved keys
//! `<module>.lora_A.weight [r, in]`, `<module>.lora_B.weight [out, r]`, with `lora_bias` `<module>.lora_B.bias [out]`;
//! embeddings `<module>.lora_embedding_A [r, rows]`, `<module>.lora_embedding_B [dim, r]`.
//!
//! # Defaults and their source
//! r 8, lora_alpha 8, dropout 0, A uniform with bound `1 / sqrt(in)`, B zero: HF PEFT 0.21. Starts from the weight:
//! PiSSA arXiv 2404.02948, OLoRA arXiv 2406.01775.
//!
//! # Differences from HF
//! PiSSA and OLoRA leave the base weight as it is and subtract the initial product beside it: the same function, but
//! the base can be shared, quantised and restored. `lora_bias` merges into a base bias only where there is one.
//! A tied embedding adapted on one side merges into that side alone; `ensure_weight_tying` adapts both by one pair.
//!
//! # Limits
//! The starts `eva`, `corda`, `loftq`, `lora_ga`, `mica` and HF's variants of LoRA are refused by name.

use std::sync::Arc;

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, Injector, ModuleKind, Param, PeftMethod, Result, Site,
    Tensor, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::init::{self, Shape};
use crate::tied::TiedPair;

/// LoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Rank; `rank_pattern` may set others.
    pub r: usize,
    /// Numerator of the scaling; `alpha_pattern` may set others.
    pub lora_alpha: f64,
    /// Dropout on the input of A.
    pub lora_dropout: f32,
    /// Scaling by `1 / sqrt(r)` instead of `1 / r`.
    pub use_rslora: bool,
    /// Whether B has a bias.
    pub lora_bias: bool,
    /// Start: true, false, `gaussian`, `pissa`, `pissa_niter_<N>`, `olora`, `orthogonal`.
    pub init_lora_weights: Value,
    /// Whether the weight is stored `[in, out]`; found out from the model, kept for the file.
    pub fan_in_fan_out: bool,
    /// Whether a tied pair of embeddings is adapted together.
    pub ensure_weight_tying: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    #[serde(skip)]
    tied: TiedPair,
}

impl Default for Lora {
    fn default() -> Self {
        let others = json!({
            "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "bias": "none",
            "corda_config": null, "eva_config": null, "exclude_modules": null, "kasa_config": null,
            "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {},
            "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core",
            "modules_to_save": null, "monteclora_config": null, "qalora_group_size": 16, "rank_pattern": {},
            "target_modules": null, "target_parameters": null, "trainable_token_indices": null,
            "use_bdlora": null, "use_dora": false, "use_qalora": false, "velora_config": null
        });
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            lora_bias: false,
            init_lora_weights: Value::Bool(true),
            fan_in_fan_out: false,
            ensure_weight_tying: false,
            others: others.as_object().cloned().unwrap_or_default(),
            tied: TiedPair::default(),
        }
    }
}

register!(
    Lora,
    id = "lora",
    title = "LoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "LORA",
    paper = "arXiv 2106.09685",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

/// Options that change what the file means; taking them silently would load something else than was trained.
const REFUSED: &str = "use_dora use_qalora use_bdlora alora_invocation_tokens arrow_config kasa_config \
    layer_replication monteclora_config target_parameters velora_config megatron_config";

impl Lora {
    fn check(&self) -> Result<()> {
        let wrong = |field: &str, detail: &str| Err(Error::config(field, detail));
        let unset = |v: &Value| [json!(null), json!(false), json!([]), json!({})].contains(v);
        let set = |field: &&str| self.others.get(*field).is_some_and(|v| !unset(v));
        if let Some(field) = REFUSED.split_whitespace().find(set) {
            return wrong(field, "is a variant of LoRA that this build does not have");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", "has to be in [0, 1)");
        }
        if !self.lora_alpha.is_finite() {
            return wrong("lora_alpha", "has to be a number");
        }
        Ok(())
    }
}

impl PeftMethod for Lora {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[
            ModuleKind::Linear,
            ModuleKind::Conv1d,
            ModuleKind::Embedding,
        ]
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.check()?;
        let mut sites = self.sites(cx.tree(), cx.common())?;
        let pair = if self.ensure_weight_tying {
            cx.tied_pair()
        } else {
            None
        };
        let Some((input, output)) =
            pair.filter(|(i, o)| sites.iter().any(|s| s.path == i.path || s.path == o.path))
        else {
            return cx.attach_all(sites, |site, cx| self.attach(site, cx));
        };
        // One pair of matrices, kept by the embedding, for both sides.
        sites.retain(|s| s.path != output.path);
        if !sites.iter().any(|s| s.path == input.path) {
            sites.push(input.clone());
        }
        let mut shared = None;
        cx.attach_all(sites, |site, cx| {
            let at = self.at(site, cx)?;
            if site.path == input.path {
                shared = Some(At {
                    kind: Kind::Head,
                    ..at.clone()
                });
            }
            Ok(Box::new(at))
        })?;
        if let Some(head) = shared {
            self.tied.set(&input.path, &output.path);
            cx.place(output, Arc::new(head), true);
        }
        Ok(())
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(self.at(site, cx)?))
    }

    fn save(&self, params: Tensors) -> Result<Tensors> {
        self.tied.save(params)
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        Ok(self.tied.load(params))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &peft_core::ModuleTree) {
        // HF writes whole alphas as integers, and knows GPT-2's layers by this flag.
        if self.lora_alpha.fract() == 0.0 {
            config.insert("lora_alpha".to_owned(), json!(self.lora_alpha as i64));
        }
        if tree.iter().any(|(_, m)| m.kind == ModuleKind::Conv1d) {
            config.insert("fan_in_fan_out".to_owned(), json!(true));
        }
    }
}

impl Lora {
    fn at(&self, site: &Site, cx: &mut Attach<'_>) -> Result<At> {
        let rank = cx.common().rank_at(&site.path, self.r)?;
        let alpha = cx.common().alpha_at(&site.path, self.lora_alpha)?;
        let divisor = if self.use_rslora {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        let scaling = (alpha / divisor) as f32;
        let (inside, out) = (site.in_features, site.out_features);
        if site.kind == ModuleKind::Embedding {
            // HF starts an embedding the other way round: A zero, B normal.
            let a = if self.init_lora_weights == json!(false) {
                Init::Normal { std: 1.0 }
            } else {
                Init::Zeros
            };
            return Ok(At {
                kind: Kind::Embedding,
                a: cx.param("lora_embedding_A", &[rank, inside], &a)?,
                b: cx.param("lora_embedding_B", &[out, rank], &Init::Normal { std: 1.0 })?,
                bias: None,
                removed: None,
                scaling,
                dropout: 0.0,
            });
        }
        let shape = Shape {
            inside,
            out,
            rank,
            scaling,
        };
        let start = init::start(&self.init_lora_weights, shape, cx, &site.path)?;
        Ok(At {
            kind: Kind::Linear,
            a: cx.param("lora_A.weight", &[rank, inside], &start.a)?,
            b: cx.param("lora_B.weight", &[out, rank], &start.b)?,
            bias: if self.lora_bias {
                Some(cx.param("lora_B.bias", &[out], &Init::Zeros)?)
            } else {
                None
            },
            removed: start.removed,
            scaling,
            dropout: self.lora_dropout,
        })
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Linear,
    Embedding,
    /// The head tied to an adapted embedding: its change is the embedding's.
    Head,
}

#[derive(Clone)]
struct At {
    kind: Kind,
    /// `[r, in]`
    a: Param,
    /// `[out, r]`
    b: Param,
    /// `[out]`
    bias: Option<Param>,
    /// `(b0, a0)` of a start that comes out of the base weight.
    removed: Option<(Tensor, Tensor)>,
    scaling: f32,
    dropout: f32,
}

/// `s x Aᵀ Bᵀ`, scaled where it is narrowest.
fn through(x: &Tensor, a: &Tensor, b: &Tensor, scaling: f32) -> Result<Tensor> {
    Ok(x.matmul_t(a)?.scale(scaling)?.matmul_t(b)?)
}

impl Adapter for At {
    fn weight(&self, w: &Tensor) -> Result<Option<Tensor>> {
        let (a, b) = (self.a.tensor(), self.b.tensor());
        if self.kind != Kind::Linear {
            // The table is [rows, dim], its change (B A)ᵀ.
            return Ok(Some(w.add(&a.t_matmul(&b.t()?)?.scale(self.scaling)?)?));
        }
        let mut changed = w.add(&b.matmul(&a)?.scale(self.scaling)?)?;
        if let Some((b0, a0)) = &self.removed {
            changed = changed.sub(&b0.matmul(a0)?.scale(self.scaling)?)?;
        }
        Ok(Some(changed))
    }

    fn bias(&self, b: Option<Tensor>) -> Result<Option<Tensor>> {
        let Some(own) = &self.bias else { return Ok(b) };
        let own = own.tensor().scale(self.scaling)?;
        Ok(Some(match b {
            Some(b) => b.add(&own)?,
            None => own,
        }))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let (a, b) = (self.a.tensor(), self.b.tensor());
        let base = call.base()?;
        let change = match self.kind {
            Kind::Embedding => a
                .t()?
                .gather_rows(call.ids()?)?
                .scale(self.scaling)?
                .matmul_t(&b)?,
            Kind::Head => call.x()?.matmul(&b)?.scale(self.scaling)?.matmul(&a)?,
            Kind::Linear => {
                let x = call.x()?;
                let mut change = through(&call.dropout(x, self.dropout)?, &a, &b, self.scaling)?;
                if let Some((b0, a0)) = &self.removed {
                    change = change.sub(&through(x, a0, b0, self.scaling)?)?;
                }
                if let Some(bias) = &self.bias {
                    change = change.add(&bias.tensor().scale(self.scaling)?)?;
                }
                change
            }
        };
        Ok(base.add(&change)?)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Tensor};

    fn network(config: Value) -> Network {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0], [3.0, 4.0]], None)
            .expect("a base");
        let mut network = Network::new(base);
        network.attach("a", &config, 0).expect("attaches");
        network
    }

    fn set(network: &Network, suffix: &str, values: Array2<f32>) {
        let params = network.parameters();
        let param = params
            .iter()
            .find(|p| p.key().ends_with(suffix))
            .expect("the parameter");
        param
            .set(Tensor::from_array(values, network.device()).expect("a tensor"))
            .expect("the shape fits");
    }

    /// x = (1, 1): W x = (3, 7); A x = 3; B A x = (3, 6); s = 4 / 1.
    #[test]
    fn by_hand() {
        let config =
            json!({"peft_type": "LORA", "r": 1, "lora_alpha": 4, "target_modules": ["fc"]});
        let network = network(config);
        set(&network, "lora_A.weight", array![[1.0, 2.0]]);
        set(&network, "lora_B.weight", array![[1.0], [2.0]]);
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        let y = network.run("fc", &x, &Pass::eval()).expect("runs");
        assert_eq!(
            y.to_vec().expect("values"),
            [3.0 + 4.0 * 3.0, 7.0 + 4.0 * 6.0]
        );
    }

    /// rsLoRA at rank 4 scales by alpha / 2, LoRA by alpha / 4.
    #[test]
    fn rslora_scales_by_the_root() {
        let run = |rslora: bool| {
            let network = network(
                json!({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_rslora": rslora, "target_modules": ["fc"]}),
            );
            set(&network, "lora_A.weight", Array2::ones((4, 2)));
            set(&network, "lora_B.weight", Array2::ones((2, 4)));
            let x = Tensor::from_vec(vec![1.0, 0.0], &[1, 2], network.device()).expect("a tensor");
            network
                .run("fc", &x, &Pass::eval())
                .expect("runs")
                .to_vec()
                .expect("values")
        };
        // W x = (1, 3); B A x = (4, 4).
        assert_eq!(run(false), [5.0, 7.0]);
        assert_eq!(run(true), [9.0, 11.0]);
    }

    #[test]
    fn a_variant_is_refused_by_name() {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0]], None)
            .expect("a base");
        let config = json!({"peft_type": "LORA", "use_qalora": true, "target_modules": ["fc"]});
        let error = Network::new(base)
            .attach("a", &config, 0)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("use_qalora"), "{error}");
    }
}
