//! Scaled parallel adapters: a bottleneck beside the feed-forward sublayer, with a factor that is learned.
//!
//! # Paper
//! Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 4.6 (scaled parallel
//! form).
//!
//! # Formula
//! h the sublayer's output, x its residual, LN the model's norm there (none in pre-norm models):
//! `y = LN(h + s (U f(D x + d) + u) + x)`. D `[k, d]`, U `[d, k]`, k = d / reduction_factor,
//! s one number for each place, from 1.
//!
//! # Saved keys
//! `<place>.adapters.adapter_down.0.weight [k, d]`, `.adapter_down.0.bias [k]`, `<place>.adapters.adapter_up.weight [d,
//! k]`, `.adapter_up.bias [d]`, `.scaling [1]`, with AdapterHub's place names (`...layer.0.output`,
//! `...layers.0.output_adapters`).
//!
//! # Defaults and their source
//! AdapterHub's `scaled_par_bn`: as its `par_bn` (relu, reduction_factor 2, D uniform with bound `1 / sqrt(d)`, U and
//! biases zero) with `scaling = "learned"`. A learning rate of 5e-4 suits it.
//!
//! # Differences from HF
//! HF PEFT has no bottleneck adapters. As in AdapterHub it reads the residual, which in pre-norm models is not normed,
//! where the paper's code reads the sublayer's input; the paper sets s = 4 by hand.
//!
//! # Limits
//! Reads the residual, so it cannot sit where a model has none. `original_ln_before` and the residual fields say
//! nothing here.

use peft_core::register;

use crate::bottleneck::{Adapted, Bottleneck, Preset, Reduction, Scaling, Start, TrainedScaling};

/// AdapterHub's `scaled_par_bn`.
pub struct Scaled;

impl Preset for Scaled {
    fn fields() -> Bottleneck {
        Bottleneck {
            reduction_factor: Reduction::All(2.0),
            init_weights: Start::ZeroUp,
            is_parallel: true,
            scaling: Scaling::Trained(TrainedScaling::Learned),
            ..Bottleneck::default()
        }
    }
}

/// A scaled parallel adapter's fields of `adapter_config.json`.
pub type ScaledParallelAdapter = Adapted<Scaled>;

register!(
    ScaledParallelAdapter,
    id = "scaled_parallel_adapter",
    title = "Scaled parallel adapter",
    family = Additive,
    subfamily = "adapters",
    peft_type = "SCALED_PARALLEL_ADAPTER",
    paper = "arXiv 2110.04366",
    example = r#"{"reduction_factor": 4, "non_linearity": "silu"}"#,
    mergeable = false,
    hub = crate::hub::bottleneck(|config| crate::hub::is(crate::hub::Form::BesideTrained, config)),
);

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;

    use crate::try_out::{Place, one_wide};

    /// d = 2, k = 1, no norm: h = (1, 2), x = (3, -1): D x + d = 3 - 1 + 1 = 3; a = s ((3, 6) + (0, 1)), s = -2;
    /// y = h + a + x = (1 - 6 + 3, 2 - 14 - 1).
    #[test]
    fn by_hand() {
        let config = json!({"peft_type": "SCALED_PARALLEL_ADAPTER"});
        let more: [(&str, &[f32]); 2] = [("adapter_down.0.bias", &[1.0]), ("scaling", &[-2.0])];
        let y = one_wide(&config, Place::Output, &more);
        assert_eq!(y.expect("runs"), [-2.0, -13.0]);
    }
}
