//! Parallel adapters: a bottleneck beside the feed-forward sublayer, with a fixed factor.
//!
//! # Paper
//! Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 4.6 (parallel form).
//!
//! # Formula
//! h the sublayer's output, x its residual, LN the model's norm there (none in pre-norm models):
//! `y = LN(h + s (U f(D x + d) + u) + x)`. D `[k, d]`, U `[d, k]`, k = d / reduction_factor,
//! s constant.
//!
//! # Saved keys
//! `<place>.adapters.adapter_down.0.weight [k, d]`, `.adapter_down.0.bias [k]`, `<place>.adapters.adapter_up.weight [d,
//! k]`, `.adapter_up.bias [d]`, with AdapterHub's place names (`...layer.0.output`, `...layers.0.output_adapters`).
//!
//! # Defaults and their source
//! AdapterHub's `par_bn`: relu, reduction_factor 2, s 4, D uniform with bound `1 / sqrt(d)`, U and biases zero: a fresh
//! one changes nothing. The paper's learning rate for it is 5e-5 with a width of 512; 5e-4 suits small models.
//!
//! # Differences from HF
//! HF PEFT has no bottleneck adapters. As in AdapterHub it reads the residual, which in pre-norm models is not normed,
//! where the paper's code reads the sublayer's input.
//!
//! # Limits
//! Reads the residual, so it cannot sit where a model has none. `original_ln_before` and the residual fields say
//! nothing here.

use peft_core::register;

use crate::bottleneck::{Adapted, Bottleneck, Preset, Reduction, Scaling, Start};

/// AdapterHub's `par_bn`.
pub struct Beside;

impl Preset for Beside {
    fn fields() -> Bottleneck {
        Bottleneck {
            reduction_factor: Reduction::All(2.0),
            init_weights: Start::ZeroUp,
            is_parallel: true,
            scaling: Scaling::Factor(4.0),
            ..Bottleneck::default()
        }
    }
}

/// A parallel adapter's fields of `adapter_config.json`.
pub type ParallelAdapter = Adapted<Beside>;

register!(
    ParallelAdapter,
    id = "parallel_adapter",
    title = "Parallel adapter",
    family = Additive,
    subfamily = "adapters",
    peft_type = "PARALLEL_ADAPTER",
    paper = "arXiv 2110.04366",
    example = r#"{"reduction_factor": 4, "non_linearity": "tanh"}"#,
    mergeable = false,
    hub = crate::hub::bottleneck(|config| crate::hub::is(crate::hub::Form::Beside, config)),
);

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;

    use crate::try_out::{Place, one_wide};

    /// d = 2, k = 1, no norm: h = (1, 2), x = (3, -1): D x + d = 3 - 1 + 1 = 3; a = 4 ((3, 6) + (0, 1));
    /// y = h + a + x = (1 + 12 + 3, 2 + 28 - 1).
    #[test]
    fn by_hand() {
        let config = json!({"peft_type": "PARALLEL_ADAPTER"});
        let y = one_wide(&config, Place::Output, &[("adapter_down.0.bias", &[1.0])]);
        assert_eq!(y.expect("runs"), [16.0, 29.0]);
    }

    #[test]
    fn without_the_last_sum_the_residual_would_be_lost() {
        let config = json!({"peft_type": "PARALLEL_ADAPTER", "original_ln_before": true,
            "original_ln_after": false});
        let error = one_wide(&config, Place::Output, &[]).expect_err("refused");
        assert!(error.contains("original_ln_after"), "{error}");
    }
}
