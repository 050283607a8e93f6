//! Pfeiffer adapters: one bottleneck a layer, behind the feed-forward sublayer.
//!
//! # Paper
//! AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247, section 3.2 (the reduced
//! architecture); bottlenecks: arXiv 1902.00751.
//!
//! # Formula
//! h the sublayer's output, x its residual, LN the model's norm there (none in pre-norm models):
//! `z = LN(h + x)`; `a = s U f(D z + d) + s u`; `y = LN(a + h + x)`. D `[k, d]`, U `[d, k]`, k = d / reduction_factor.
//! `original_ln_before = false` feeds h itself to D; `original_ln_after = false` leaves out the last sum and norm;
//! `residual_before_ln = false` adds z instead of h.
//!
//! # Saved keys
//! `<place>.adapters.adapter_down.0.weight [k, d]`, `.adapter_down.0.bias [k]`, `<place>.adapters.adapter_up.weight
//! [d, k]`, `.adapter_up.bias [d]`, with AdapterHub's place names (`...layer.0.output`, `...layers.0.output_adapters`).
//!
//! # Defaults and their source
//! AdapterHub's `seq_bn`: relu, reduction_factor 16, both norms, weights normal with deviation 0.02, biases zero.
//!
//! # Differences from HF
//! HF PEFT has no bottleneck adapters.
//!
//! # Limits
//! AdapterHub's own folders are not read yet.

use peft_core::{
    Adapter, Attach, Call, Error, Init, ModuleKind, ModuleTree, Param, PeftMethod, Result, Site,
    Targets, Tensor, register,
};
use serde::{Deserialize, Serialize};

/// The fields of a bottleneck, named as AdapterHub names them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Pfeiffer {
    /// Places; the output of every feed-forward sublayer if not given.
    pub target_modules: Option<peft_core::serde_json::Value>,
    /// Width of the model over the width of the bottleneck.
    pub reduction_factor: f64,
    /// relu, gelu, gelu_new, silu (or swish), tanh, sigmoid.
    pub non_linearity: String,
    /// Whether the model's norm comes before the bottleneck.
    pub original_ln_before: bool,
    /// Whether the residual is added and the model's norm comes after the bottleneck.
    pub original_ln_after: bool,
    /// Whether the bottleneck's own residual is taken before the norm.
    pub residual_before_ln: bool,
    /// Factor on the bottleneck's output.
    pub scaling: f32,
    /// Dropout on the bottleneck's input.
    pub dropout: f32,
}

impl Default for Pfeiffer {
    fn default() -> Self {
        Self {
            target_modules: None,
            reduction_factor: 16.0,
            non_linearity: "relu".to_owned(),
            original_ln_before: true,
            original_ln_after: true,
            residual_before_ln: true,
            scaling: 1.0,
            dropout: 0.0,
        }
    }
}

register!(
    Pfeiffer,
    id = "pfeiffer",
    title = "Pfeiffer adapter",
    family = Additive,
    subfamily = "adapters",
    peft_type = "PFEIFFER",
    paper = "arXiv 2005.00247",
    example = r#"{"reduction_factor": 4, "non_linearity": "gelu"}"#,
    identity_at_init = false,
    mergeable = false,
);

impl PeftMethod for Pfeiffer {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Junction]
    }

    /// A layer's own output, not its attention's.
    fn default_targets(&self, _tree: &ModuleTree) -> Option<Targets> {
        Some(Targets::Pattern(
            r".*\.\d+\.(output|output_adapters)".to_owned(),
        ))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let dim = site.out_features;
        if self.reduction_factor.is_nan()
            || self.reduction_factor <= 0.0
            || self.reduction_factor > dim as f64
        {
            let detail = format!(
                "{} at `{}`: has to be above 0 and at most {dim}",
                self.reduction_factor, site.path
            );
            return Err(Error::config("reduction_factor", detail));
        }
        let width = ((dim as f64 / self.reduction_factor) as usize).max(1);
        let normal = Init::Normal { std: 0.02 };
        let mut param = |name: &str, shape: &[usize], init: &Init| {
            cx.param(&format!("adapters.{name}"), shape, init)
        };
        Ok(Box::new(Bottleneck {
            down: (
                param("adapter_down.0.weight", &[width, dim], &normal)?,
                param("adapter_down.0.bias", &[width], &Init::Zeros)?,
            ),
            up: (
                param("adapter_up.weight", &[dim, width], &normal)?,
                param("adapter_up.bias", &[dim], &Init::Zeros)?,
            ),
            activation: activation(&self.non_linearity)?,
            config: self.clone(),
        }))
    }
}

type Activation = fn(&Tensor) -> peft_core::peft_tensor::Result<Tensor>;

fn activation(name: &str) -> Result<Activation> {
    Ok(match name.to_ascii_lowercase().as_str() {
        "relu" => Tensor::relu,
        "gelu" => Tensor::gelu,
        "gelu_new" | "gelu_orig" => Tensor::gelu_tanh,
        "silu" | "swish" => Tensor::silu,
        "tanh" => Tensor::tanh,
        "sigmoid" => Tensor::sigmoid,
        _ => {
            let detail =
                format!("{name:?} is not one of relu, gelu, gelu_new, silu, swish, tanh, sigmoid");
            return Err(Error::config("non_linearity", detail));
        }
    })
}

struct Bottleneck {
    /// `[k, d]`, `[k]`
    down: (Param, Param),
    /// `[d, k]`, `[d]`
    up: (Param, Param),
    activation: Activation,
    config: Pfeiffer,
}

impl Adapter for Bottleneck {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let (h, x) = (call.x()?, call.residual()?);
        let or_same = |sum: Tensor| Ok::<_, Error>(call.norm(&sum)?.unwrap_or(sum));
        let z = if self.config.original_ln_before {
            or_same(h.add(x)?)?
        } else {
            h.clone()
        };
        let inside = call
            .dropout(&z, self.config.dropout)?
            .matmul_t(&self.down.0.tensor())?
            .add(&self.down.1.tensor())?;
        let out = (self.activation)(&inside)?
            .matmul_t(&self.up.0.tensor())?
            .add(&self.up.1.tensor())?;
        let out = out
            .scale(self.config.scaling)?
            .add(if self.config.residual_before_ln {
                h
            } else {
                &z
            })?;
        if self.config.original_ln_after {
            call.base_with(&out)
        } else {
            Ok(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Pass, Tensor, Tensors};

    /// d = 2, k = 1, no norm: h = (1, 2), x = (3, -1): z = (4, 1); D z + d = 4 + 1 - 3 = 2; a = (2, 4) + (0, 1);
    /// y = a + h + x = (2 + 4, 5 + 1).
    #[test]
    fn by_hand() {
        let mut network = Network::new(Base::custom().junction("layers.0.output_adapters", 2));
        let device = network.device().clone();
        let tensor = |values: &[f32], shape: &[usize]| {
            Tensor::from_vec(values.to_vec(), shape, &device).expect("a tensor")
        };
        let key = |name: &str| format!("base_model.model.layers.0.output_adapters.adapters.{name}");
        let tensors: Tensors = [
            (key("adapter_down.0.weight"), tensor(&[1.0, 1.0], &[1, 2])),
            (key("adapter_down.0.bias"), tensor(&[-3.0], &[1])),
            (key("adapter_up.weight"), tensor(&[1.0, 2.0], &[2, 1])),
            (key("adapter_up.bias"), tensor(&[0.0, 1.0], &[2])),
        ]
        .into_iter()
        .collect();
        let config = json!({"peft_type": "PFEIFFER", "reduction_factor": 2});
        network.load("a", &config, tensors, true).expect("loads");
        let id = network.module("layers.0.output_adapters").expect("there");
        let (h, x) = (tensor(&[1.0, 2.0], &[1, 2]), tensor(&[3.0, -1.0], &[1, 2]));
        let y = network
            .junction(id, &h, &x, None, &Pass::eval())
            .expect("runs");
        assert_eq!(y.to_vec().expect("values"), [6.0, 6.0]);
    }

    #[test]
    fn an_unknown_activation_names_the_known() {
        let mut network = Network::new(Base::custom().junction("layers.0.output_adapters", 2));
        let config =
            json!({"peft_type": "PFEIFFER", "reduction_factor": 2, "non_linearity": "rulu"});
        let error = network
            .attach("a", &config, 0)
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("non_linearity") && error.contains("relu"),
            "{error}"
        );
    }
}
