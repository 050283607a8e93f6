//! What all bottleneck adapters share: AdapterHub's fields, its arithmetic and its names for parameters.

use std::marker::PhantomData;

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Error, Injector, ModuleKind, ModuleTree, PeftMethod, Result, Site, Targets,
    Tensors, TrainHooks,
};
use serde::{Deserialize, Serialize};

use crate::adapter_drop::{AdapterDrop, RandomDepth};
use crate::coupling;
pub use crate::fields::{PostAdd, Reduction, ResidualFrom, Scaling, Start, TrainedScaling};
use crate::inserted::Inserted;

/// The fields of a bottleneck, named as AdapterHub names them; `Default` is AdapterHub's bare `BnConfig`, a method's own
/// defaults are its [`Preset`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Bottleneck {
    /// Places; those of `mh_adapter` and `output_adapter` if not given.
    pub target_modules: Option<Value>,
    /// Behind every attention sublayer.
    pub mh_adapter: bool,
    /// Behind every feed-forward sublayer.
    pub output_adapter: bool,
    /// Behind every cross-attention sublayer; no model here has one.
    pub cross_adapter: bool,
    /// Width of the model over the width of the bottleneck (which is at least 1), for all layers or by layer.
    pub reduction_factor: Reduction,
    /// Activation inside.
    pub non_linearity: String,
    /// Whether the residual is added and the model's norm comes before the bottleneck.
    pub original_ln_before: bool,
    /// Whether the residual is added and the model's norm comes after the bottleneck.
    pub original_ln_after: bool,
    /// Whether a norm of its own comes before the projections.
    pub ln_before: bool,
    /// Whether a norm of its own comes after the projections.
    pub ln_after: bool,
    /// Initial values: `bert`, `mam_adapter` or `houlsby`.
    pub init_weights: Start,
    /// Seed of its initial values, the same at every place; the run's if not given.
    pub init_weights_seed: Option<u64>,
    /// Whether it reads the sublayer's residual and is added to the sublayer's output.
    pub is_parallel: bool,
    /// Factor on what it adds: a number, `learned` or `channel` (learned, one for each feature).
    pub scaling: Scaling,
    /// Whether what it adds is weighed by a learned gate, one value a row.
    pub use_gating: bool,
    /// Where its own residual comes from: the sublayer's output, its input, or the sum before the norm (`post_add`).
    pub residual_before_ln: ResidualFrom,
    /// Whether its residual is added before its own norm.
    pub adapter_residual_before_ln: bool,
    /// An invertible adapter behind the embeddings besides: `nice`.
    pub inv_adapter: Option<String>,
    /// Width of half a hidden state over that of the invertible adapter's bottleneck; 2 if not given.
    pub inv_adapter_reduction_factor: Option<f64>,
    /// Layers without an adapter.
    pub leave_out: Vec<usize>,
    /// `robust`: each step of training leaves the adapters of a random number of first layers out (AdapterDrop).
    pub adapter_drop: Option<AdapterDrop>,
    /// Dropout on what is added.
    pub dropout: f32,
    /// Probability of leaving an adapter out for a row of the batch in training.
    pub stochastic_depth: f32,
    /// Whether its projections are sums of Kronecker products.
    pub phm_layer: bool,
    /// Terms of such a sum; divides the widths of model and bottleneck.
    pub phm_dim: usize,
    /// Whether the second factors are of low rank.
    #[serde(rename = "factorized_phm_W")]
    pub factorized_phm_w: bool,
    /// Whether all places share the second factors.
    #[serde(rename = "shared_W_phm")]
    pub shared_w_phm: bool,
    /// Whether all places share the first factors.
    pub shared_phm_rule: bool,
    /// Whether the first factors are of rank 1.
    pub factorized_phm_rule: bool,
    /// Initial first factors: `normal` or `uniform`.
    pub phm_c_init: String,
    /// Standard deviation of initial first factors.
    pub phm_init_range: f32,
    /// Whether the first factors are trained.
    pub learn_phm: bool,
    /// Initial second factors: `glorot-uniform`, `glorot-normal`, `normal`.
    pub hypercomplex_nonlinearity: String,
    /// Rank of the second factors.
    pub phm_rank: usize,
    /// Whether such a projection has a bias.
    pub phm_bias: bool,
}

impl Default for Bottleneck {
    fn default() -> Self {
        Self {
            target_modules: None,
            mh_adapter: false,
            output_adapter: true,
            cross_adapter: false,
            reduction_factor: Reduction::All(16.0),
            non_linearity: "relu".to_owned(),
            original_ln_before: false,
            original_ln_after: true,
            ln_before: false,
            ln_after: false,
            init_weights: Start::Bert,
            init_weights_seed: None,
            is_parallel: false,
            scaling: Scaling::Factor(1.0),
            use_gating: false,
            residual_before_ln: ResidualFrom::Norm(true),
            adapter_residual_before_ln: false,
            inv_adapter: None,
            inv_adapter_reduction_factor: None,
            leave_out: Vec::new(),
            adapter_drop: None,
            dropout: 0.0,
            stochastic_depth: 0.0,
            phm_layer: false,
            phm_dim: 4,
            factorized_phm_w: true,
            shared_w_phm: false,
            shared_phm_rule: true,
            factorized_phm_rule: false,
            phm_c_init: "normal".to_owned(),
            phm_init_range: 1e-4,
            learn_phm: true,
            hypercomplex_nonlinearity: "glorot-uniform".to_owned(),
            phm_rank: 1,
            phm_bias: true,
        }
    }
}

/// Widest a bottleneck may be, over the width of the model.
const WIDEST: f64 = 64.0;

impl Bottleneck {
    /// What no place decides.
    fn check(&self) -> Result<()> {
        let wrong = |field: &str, detail: &str| Err(Error::config(field, detail));
        let keeps_residual =
            self.original_ln_after || (self.original_ln_before && !self.is_parallel);
        if self.cross_adapter {
            return wrong("cross_adapter", "the model has no cross-attention");
        }
        if !keeps_residual {
            return wrong(
                "original_ln_after",
                "has to be true here: nothing else adds the sublayer's residual",
            );
        }
        if matches!(self.residual_before_ln, ResidualFrom::Sum(_)) && !self.original_ln_before {
            return wrong(
                "residual_before_ln",
                "\"post_add\" needs original_ln_before",
            );
        }
        for (field, p) in [
            ("dropout", self.dropout),
            ("stochastic_depth", self.stochastic_depth),
        ] {
            if !(0.0..1.0).contains(&p) {
                return wrong(field, "has to be in [0, 1)");
            }
        }
        if self.phm_layer && self.init_weights != Start::Bert {
            return wrong(
                "init_weights",
                "has to be \"bert\" with phm_layer, whose factors have initial values of their own",
            );
        }
        match self.scaling {
            Scaling::Factor(s) if !s.is_finite() => wrong("scaling", "has to be finite"),
            _ => Ok(()),
        }
    }

    /// Width of the bottleneck at a site: Python's `int(dim // reduction_factor)`, at least 1.
    pub(crate) fn width(&self, site: &Site) -> Result<usize> {
        let wrong = |detail: String| Err(Error::config("reduction_factor", detail));
        let factor = match &self.reduction_factor {
            Reduction::All(factor) => Some(*factor),
            Reduction::ByLayer(by) => {
                let named = |key: &&String| key.parse::<usize>().is_ok() || *key == "default";
                if let Some(key) = by.keys().find(|key| !named(key)) {
                    return wrong(format!(
                        "{key:?} is neither a layer's index nor \"default\""
                    ));
                }
                let own = site.layer.and_then(|layer| by.get(&layer.to_string()));
                own.or_else(|| by.get("default")).copied()
            }
        };
        match factor {
            Some(f) if f.is_finite() && f >= 1.0 / WIDEST => {
                let dim = site.out_features as f64;
                // Rounding up a quotient that is just short of a whole number would differ from Python.
                let floor = ((dim - dim % f) / f).round();
                Ok((floor as usize).max(1))
            }
            Some(f) => wrong(format!(
                "{f} at `{}`: has to be at least 1/{WIDEST}; {} is the narrowest bottleneck, of width 1",
                site.path, site.out_features
            )),
            None => wrong(format!(
                "says nothing of `{}`, and has no \"default\"",
                site.path
            )),
        }
    }
}

/// The defaults that make a bottleneck a method of its own.
pub trait Preset: Send + Sync + 'static {
    /// Its fields where a configuration says nothing.
    fn fields() -> Bottleneck;
}

/// A method that is a bottleneck with other defaults.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent, bound = "")]
pub struct Adapted<P: Preset> {
    /// The fields.
    pub fields: Bottleneck,
    #[serde(skip)]
    preset: PhantomData<fn() -> P>,
}

impl<P: Preset> Default for Adapted<P> {
    fn default() -> Self {
        Self {
            fields: P::fields(),
            preset: PhantomData,
        }
    }
}

/// Where the model's own names for the two junctions of a layer end.
const ATTENTION: &str = r"attention\.output|attention_adapters";
const OUTPUT: &str = "output|output_adapters";

impl<P: Preset> PeftMethod for Adapted<P> {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Junction]
    }

    fn default_targets(&self, _tree: &ModuleTree) -> Option<Targets> {
        let wanted = [
            (self.fields.mh_adapter, ATTENTION),
            (self.fields.output_adapter, OUTPUT),
        ];
        let ends: Vec<_> = wanted
            .iter()
            .filter(|(wanted, _)| *wanted)
            .map(|(_, ends)| *ends)
            .collect();
        (!ends.is_empty()).then(|| Targets::Pattern(format!(r".*\.\d+\.({})", ends.join("|"))))
    }

    fn sites(&self, tree: &ModuleTree, common: &peft_core::Common) -> Result<Vec<Site>> {
        let fields = &self.fields;
        fields.check()?;
        if fields.target_modules.is_none() && !fields.mh_adapter && !fields.output_adapter {
            return match fields.inv_adapter {
                Some(_) => Ok(Vec::new()),
                None => Err(Error::config(
                    "output_adapter",
                    "mh_adapter, output_adapter, target_modules or inv_adapter has to say where adapters go",
                )),
            };
        }
        let mut sites = tree.matching(common, self.kinds(), self.default_targets(tree))?;
        let mut layers: Vec<usize> = sites.iter().filter_map(|s| s.layer).collect();
        layers.dedup();
        // A saved adapter lists its places, without those that were left out.
        if !common.inference_mode
            && let Some(layer) = fields
                .leave_out
                .iter()
                .find(|layer| !layers.contains(layer))
        {
            let detail =
                format!("there is no adapter to leave out in layer {layer}; layers are {layers:?}");
            return Err(Error::config("leave_out", detail));
        }
        sites.retain(|s| {
            s.layer
                .is_none_or(|layer| !fields.leave_out.contains(&layer))
        });
        if sites.is_empty() && fields.inv_adapter.is_none() {
            return Err(Error::config("leave_out", "leaves out every layer"));
        }
        Ok(sites)
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(Inserted::new(&self.fields, site, cx)?))
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        let sites = self.sites(cx.tree(), cx.common())?;
        if let Some(kind) = &self.fields.inv_adapter {
            let factor = self.fields.inv_adapter_reduction_factor;
            let form = coupling::Form::new(kind, factor, &self.fields.non_linearity)?;
            form.attach(coupling::place(cx.tree())?, cx)?;
        }
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        match self.fields.adapter_drop {
            Some(AdapterDrop::Robust) => Box::new(RandomDepth),
            None => Box::new(()),
        }
    }

    /// AdapterHub writes a norm in front under two names.
    fn load(&self, mut params: Tensors) -> Result<Tensors> {
        params.retain(|key, _| !key.contains(".adapters.adapter_norm_before."));
        Ok(params)
    }
}
