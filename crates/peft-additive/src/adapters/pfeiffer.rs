//! Pfeiffer adapters: one bottleneck a layer, behind the feed-forward sublayer.
//!
//! # Paper
//! AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247, section 3.2 (the reduced
//! architecture); bottlenecks: arXiv 1902.00751. Layers left out: AdapterDrop, arXiv 2010.11918.
//!
//! # Formula
//! h the sublayer's output, x its residual, LN the model's norm there (none in pre-norm models): `z = LN(h + x)`; `a =
//! s (U f(D z + d) + u)`; `y = LN(a + h + x)`. D `[k, d]`, U `[d, k]`, k = d / reduction_factor. `original_ln_before =
//! false` feeds h itself to D; `original_ln_after = false` leaves out the last sum and norm; `residual_before_ln =
//! false` adds z instead of h, `"post_add"` h + x.
//!
//! # Saved keys
//! `<place>.adapters.adapter_down.0.weight [k, d]`, `.adapter_down.0.bias [k]`, `<place>.adapters.adapter_up.weight [d,
//! k]`, `.adapter_up.bias [d]`, with AdapterHub's place names (`...layer.0.output`, `...layers.0.output_adapters`);
//! where the fields ask for them `.scaling`, `.gate.weight`, `.gate.bias`, `.adapter_norm_after.weight`, `.bias`.
//!
//! # Defaults and their source
//! AdapterHub's `seq_bn`: relu, reduction_factor 16, both norms, weights normal with deviation 0.02, biases zero. A
//! learning rate of 1e-3 suits it.
//!
//! # Differences from HF
//! HF PEFT has no bottleneck adapters.
//!
//! # Limits
//! Activations with parameters of their own are refused. A bottleneck is at least 1 wide, however large the
//! reduction_factor.

use peft_core::register;

use crate::bottleneck::{Adapted, Bottleneck, Preset};

/// AdapterHub's `seq_bn`.
pub struct Single;

impl Preset for Single {
    fn fields() -> Bottleneck {
        Bottleneck {
            original_ln_before: true,
            ..Bottleneck::default()
        }
    }
}

/// Pfeiffer's fields of `adapter_config.json`.
pub type Pfeiffer = Adapted<Single>;

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
    hub = crate::hub::bottleneck(|config| crate::hub::is(crate::hub::Form::Single, config)),
);

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;

    use crate::try_out::{Place, one_wide};

    /// d = 2, k = 1, no norm: h = (1, 2), x = (3, -1): z = (4, 1); D z + d = 4 + 1 - 3 = 2; a = (2, 4) + (0, 1);
    /// y = a + h + x = (2 + 4, 5 + 1).
    #[test]
    fn by_hand() {
        let config = json!({"peft_type": "PFEIFFER", "reduction_factor": 2});
        let y = one_wide(&config, Place::Output, &[("adapter_down.0.bias", &[-3.0])]);
        assert_eq!(y.expect("runs"), [6.0, 6.0]);
    }

    /// The same by layer and with z as the residual: y = a + z + x = (2 + 4 + 3, 5 + 1 - 1).
    #[test]
    fn the_residual_may_be_what_is_read() {
        let config = json!({"peft_type": "PFEIFFER", "reduction_factor": {"0": 2, "default": 1},
            "residual_before_ln": false});
        let y = one_wide(&config, Place::Output, &[("adapter_down.0.bias", &[-3.0])]);
        assert_eq!(y.expect("runs"), [9.0, 5.0]);
    }

    #[test]
    fn an_unknown_activation_names_the_known() {
        let config =
            json!({"peft_type": "PFEIFFER", "reduction_factor": 2, "non_linearity": "rulu"});
        let error = one_wide(&config, Place::Output, &[]).expect_err("refused");
        assert!(
            error.contains("non_linearity") && error.contains("relu"),
            "{error}"
        );
    }
}
