//! Two thin factors at one module: the fields of a configuration, how the factors are made, and how they run. The
//! methods that are built on such a pair share it.

use std::collections::BTreeSet;
use std::sync::Arc;

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, Injector, ModuleKind, ModuleTree, Param, Result, Site,
    Tensor, Tensors,
};
use serde::{Deserialize, Serialize};

use crate::init::{self, Shape};
use crate::tied::TiedPair;

/// The fields of a pair, named as in HF's `LoraConfig`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LowRank {
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
    /// Start: true, false, `gaussian`, `pissa`, `pissa_niter_<N>`, `olora`, `orthogonal`, `loftq`.
    pub init_lora_weights: Value,
    /// Whether the weight is stored `[in, out]`; found out from the model, kept for the file.
    pub fan_in_fan_out: bool,
    /// Whether a tied pair of embeddings is adapted together.
    pub ensure_weight_tying: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    #[serde(skip)]
    pub(crate) tied: TiedPair,
}

impl Default for LowRank {
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

/// Options that change what the file means; taking them silently would load something else than was trained.
const VARIANTS: &str = "use_dora use_qalora use_bdlora alora_invocation_tokens arrow_config kasa_config \
    layer_replication monteclora_config target_parameters velora_config megatron_config";

impl LowRank {
    /// What a pair can sit on.
    pub(crate) const KINDS: &'static [ModuleKind] = &[
        ModuleKind::Linear,
        ModuleKind::Conv1d,
        ModuleKind::Embedding,
    ];

    /// Whether the numbers are in range and no variant is asked for but those `handled`.
    ///
    /// # Errors
    /// Names the field that is not.
    pub(crate) fn check(&self, handled: &[&str]) -> Result<()> {
        let wrong = |field: &str, detail: &str| Err(Error::config(field, detail));
        let unset = |v: &Value| [json!(null), json!(false), json!([]), json!({})].contains(v);
        let set = |field: &&str| {
            !handled.contains(field) && self.others.get(*field).is_some_and(|v| !unset(v))
        };
        if let Some(field) = VARIANTS.split_whitespace().find(set) {
            return wrong(
                field,
                "is a variant that this method does not have in this build",
            );
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return wrong("lora_dropout", "has to be in [0, 1)");
        }
        if !self.lora_alpha.is_finite() {
            return wrong("lora_alpha", "has to be a number");
        }
        Ok(())
    }

    /// Refuses the starts that count on the bare product B A: with something between the factors it is another one.
    ///
    /// # Errors
    /// Names the starts there are.
    pub(crate) fn check_start(&self) -> Result<()> {
        let fits = match &self.init_lora_weights {
            Value::Bool(_) => true,
            Value::String(name) => name.eq_ignore_ascii_case("gaussian"),
            _ => false,
        };
        if fits {
            return Ok(());
        }
        let detail = format!(
            "{} does not fit this method: true, false, gaussian",
            self.init_lora_weights
        );
        Err(Error::config("init_lora_weights", detail))
    }

    /// Makes a pair at each site, one for both sides of a tied pair of embeddings where that is asked for.
    ///
    /// # Errors
    /// Whatever `make` returns.
    pub(crate) fn inject(
        &self,
        mut sites: Vec<Site>,
        cx: &mut Injector<'_>,
        mut make: impl FnMut(&Site, &mut Attach<'_>) -> Result<Pair>,
    ) -> Result<()> {
        let pair = if self.ensure_weight_tying {
            cx.tied_pair()
        } else {
            None
        };
        let Some((input, output)) =
            pair.filter(|(i, o)| sites.iter().any(|s| s.path == i.path || s.path == o.path))
        else {
            return cx.attach_all(sites, |site, cx| Ok(Box::new(make(site, cx)?)));
        };
        // One pair of matrices, kept by the embedding, for both sides.
        sites.retain(|s| s.path != output.path);
        if !sites.iter().any(|s| s.path == input.path) {
            sites.push(input.clone());
        }
        let mut shared = None;
        cx.attach_all(sites, |site, cx| {
            let made = make(site, cx)?;
            if site.path == input.path {
                shared = Some(Pair {
                    kind: Kind::Head,
                    ..made.clone()
                });
            }
            Ok(Box::new(made))
        })?;
        if let Some(head) = shared {
            self.tied.set(&input.path, &output.path);
            cx.place(output, Arc::new(head), true);
        }
        Ok(())
    }

    /// The parameters of one site.
    ///
    /// # Errors
    /// If a field does not fit the site.
    pub(crate) fn pair(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Pair> {
        self.make(site, cx, true)
    }

    /// The parameters of one site, A saved but never trained.
    ///
    /// # Errors
    /// If a field does not fit the site.
    pub(crate) fn half_pair(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Pair> {
        self.make(site, cx, false)
    }

    /// Rank at a site, and the factor on the product there.
    ///
    /// # Errors
    /// If a pattern is wrong, or the rank 0.
    pub(crate) fn scaling_at(&self, site: &Site, cx: &Attach<'_>) -> Result<(usize, f32)> {
        let rank = cx.common().rank_at(&site.path, self.r)?;
        let alpha = cx.common().alpha_at(&site.path, self.lora_alpha)?;
        let divisor = if self.use_rslora {
            (rank as f64).sqrt()
        } else {
            rank as f64
        };
        Ok((rank, (alpha / divisor) as f32))
    }

    fn make(&self, site: &Site, cx: &mut Attach<'_>, train_a: bool) -> Result<Pair> {
        let (rank, scaling) = self.scaling_at(site, cx)?;
        let (inside, out) = (site.in_features, site.out_features);
        let make_a = |cx: &mut Attach<'_>, name: &str, init: &Init| {
            if train_a {
                cx.param(name, &[rank, inside], init)
            } else {
                cx.frozen(name, &[rank, inside], init)
            }
        };
        if site.kind == ModuleKind::Embedding {
            // HF starts an embedding the other way round: A zero, B normal.
            let a = if self.init_lora_weights == json!(false) {
                Init::Normal { std: 1.0 }
            } else {
                Init::Zeros
            };
            return Ok(Pair {
                kind: Kind::Embedding,
                a: make_a(cx, "lora_embedding_A", &a)?,
                b: cx.param("lora_embedding_B", &[out, rank], &Init::Normal { std: 1.0 })?,
                bias: None,
                removed: None,
                scaling,
                dropout: 0.0,
                acting: None,
            });
        }
        let shape = Shape {
            inside,
            out,
            rank,
            scaling,
        };
        let loftq = self.others.get("loftq_config").unwrap_or(&Value::Null);
        let start = init::start(&self.init_lora_weights, loftq, shape, cx, &site.path)?;
        Ok(Pair {
            kind: Kind::Linear,
            a: make_a(cx, "lora_A.weight", &start.a)?,
            b: cx.param("lora_B.weight", &[out, rank], &start.b)?,
            bias: if self.lora_bias {
                Some(cx.param("lora_B.bias", &[out], &Init::Zeros)?)
            } else {
                None
            },
            removed: start.removed,
            scaling,
            dropout: self.lora_dropout,
            acting: None,
        })
    }

    /// Adds what HF's file holds besides the live parameters.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn save(&self, params: Tensors) -> Result<Tensors> {
        self.tied.save(params)
    }

    /// The inverse of [`LowRank::save`].
    pub(crate) fn load(&self, mut params: Tensors) -> Tensors {
        // HF saves an adapted head whole, after its start was taken out of it; here that is subtracted beside the base.
        if init::comes_out_of_the_weight(&self.init_lora_weights) {
            let factors = |key: &str| {
                let module = key.strip_suffix(".base_layer.weight");
                module.map(|m| format!("{m}.lora_A.weight"))
            };
            let kept = params.keys().cloned().collect::<BTreeSet<_>>();
            params.retain(|key, _| factors(key).is_none_or(|a| !kept.contains(&a)));
        }
        self.tied.load(params)
    }

    /// HF writes whole alphas as integers, and knows GPT-2's layers by a flag.
    pub(crate) fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        if self.lora_alpha.fract() == 0.0 {
            config.insert("lora_alpha".to_owned(), json!(self.lora_alpha as i64));
        }
        if tree.iter().any(|(_, m)| m.kind == ModuleKind::Conv1d) {
            config.insert("fan_in_fan_out".to_owned(), json!(true));
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Linear,
    Embedding,
    /// The head tied to an adapted embedding: its change is the embedding's.
    Head,
}

/// The factors as they act, and the factor on their product.
pub(crate) struct Factors {
    /// `[r, in]`
    pub(crate) a: Tensor,
    /// `[out, r]`
    pub(crate) b: Tensor,
    pub(crate) scaling: f32,
}

/// Turns the factors that are kept into those that act; told whether this is a step of training.
pub(crate) type Acting = Arc<dyn Fn(Factors, bool) -> Result<Factors> + Send + Sync>;

/// An adapter `y = W x + s B A x`; on an embedding, its table changes by `s (B A)ᵀ`.
#[derive(Clone)]
pub(crate) struct Pair {
    kind: Kind,
    /// `[r, in]`
    pub(crate) a: Param,
    /// `[out, r]`
    pub(crate) b: Param,
    /// `[out]`
    bias: Option<Param>,
    /// `(b0, a0)` of a start that comes out of the base weight.
    removed: Option<(Tensor, Tensor)>,
    pub(crate) scaling: f32,
    pub(crate) dropout: f32,
    acting: Option<Acting>,
}

/// `s x Aᵀ Bᵀ`, scaled where it is narrowest.
fn through(x: &Tensor, a: &Tensor, b: &Tensor, scaling: f32) -> Result<Tensor> {
    Ok(x.matmul_t(a)?.scale(scaling)?.matmul_t(b)?)
}

impl Pair {
    /// Of factors made elsewhere, on a linear module: A `[r, in]`, B `[out, r]`.
    pub(crate) fn of(a: Param, b: Param, scaling: f32, dropout: f32) -> Self {
        Self {
            kind: Kind::Linear,
            a,
            b,
            bias: None,
            removed: None,
            scaling,
            dropout,
            acting: None,
        }
    }

    /// Its parameters.
    pub(crate) fn params(&self) -> impl Iterator<Item = &Param> {
        [&self.a, &self.b].into_iter().chain(&self.bias)
    }

    /// With something between the factors.
    pub(crate) fn acting(self, acting: Acting) -> Self {
        Self {
            acting: Some(acting),
            ..self
        }
    }

    /// Its rank.
    pub(crate) fn rank(&self) -> usize {
        self.a.shape().first().copied().unwrap_or(0)
    }

    /// Whether it changes a table by ids.
    pub(crate) fn is_embedding(&self) -> bool {
        self.kind == Kind::Embedding
    }

    /// The factors as they act now.
    ///
    /// # Errors
    /// Whatever lies between them returns.
    pub(crate) fn factors(&self, train: bool) -> Result<Factors> {
        let kept = Factors {
            a: self.a.tensor(),
            b: self.b.tensor(),
            scaling: self.scaling,
        };
        match &self.acting {
            Some(acting) => acting(kept, train),
            None => Ok(kept),
        }
    }

    /// The factors of a product taken out of the base weight at the start, `(b0, a0)`.
    pub(crate) fn removed(&self) -> Option<&(Tensor, Tensor)> {
        self.removed.as_ref()
    }

    /// `s B A x` and B's bias, for a linear module's input `[.., in]`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn through(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let Factors { a, b, scaling } = self.factors(train)?;
        let y = through(x, &a, &b, scaling)?;
        match &self.bias {
            Some(bias) => Ok(y.add(&bias.tensor().scale(self.scaling)?)?),
            None => Ok(y),
        }
    }

    /// `y` without what was taken out of the base weight.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn without_removed(&self, y: Tensor, x: &Tensor) -> Result<Tensor> {
        match &self.removed {
            Some((b0, a0)) => Ok(y.sub(&through(x, a0, b0, self.scaling)?)?),
            None => Ok(y),
        }
    }

    /// What it adds to a call.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn change(&self, call: &Call<'_>) -> Result<Tensor> {
        let train = call.pass().train;
        if self.kind == Kind::Linear {
            let x = call.x()?;
            let y = self.through(&call.dropout(x, self.dropout)?, train)?;
            return self.without_removed(y, x);
        }
        let Factors { a, b, scaling } = self.factors(train)?;
        if self.kind == Kind::Head {
            return Ok(call.x()?.matmul(&b)?.scale(scaling)?.matmul(&a)?);
        }
        let rows = a.t()?.gather_rows(call.ids()?)?;
        Ok(rows.scale(scaling)?.matmul_t(&b)?)
    }
}

impl Adapter for Pair {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let Factors { a, b, scaling } = self.factors(false)?;
        if self.kind != Kind::Linear {
            // The table is [rows, dim], its change (B A)ᵀ.
            return Ok(Some(w.plus_matmul_t(&a.t()?, &b, scaling)?));
        }
        let mut changed = w.plus_matmul_t(&b, &a.t()?, scaling)?;
        if let Some((b0, a0)) = &self.removed {
            changed = changed.sub(&b0.matmul(a0)?.scale(scaling)?)?;
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
        if self.kind == Kind::Linear && self.bias.is_none() && self.removed.is_none() {
            // The usual case, without a pass over the output of its own.
            let train = call.pass().train;
            let Factors { a, b, scaling } = self.factors(train)?;
            if !train || self.dropout == 0.0 {
                return call.base_and_low_rank(&a, &b, scaling);
            }
            let low = call.dropout(call.x()?, self.dropout)?.matmul_t(&a)?;
            return Ok(call.base()?.plus_matmul_t(&low, &b, scaling)?);
        }
        Ok(call.base()?.add(&self.change(call)?)?)
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        self.change(call).map(Some)
    }

    fn by_rows(&self) -> bool {
        self.dropout == 0.0
    }
}
