//! Houlsby adapters: two bottlenecks a layer, behind the attention and behind the feed-forward sublayer.
//!
//! # Paper
//! Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751, section 2.1. Layers left out: AdapterDrop, arXiv
//! 2010.11918.
//!
//! # Formula
//! h a sublayer's output, x its residual, LN the model's norm behind it (none in pre-norm models): `y = LN(h + s (U f(D
//! h + d) + u) + x)`. D `[k, d]`, U `[d, k]`, k = d / reduction_factor.
//!
//! # Saved keys
//! `<place>.adapters.adapter_down.0.weight [k, d]`, `.adapter_down.0.bias [k]`, `<place>.adapters.adapter_up.weight [d,
//! k]`, `.adapter_up.bias [d]`; where the fields ask for them `.scaling [1]` or `[d]`, `.gate.weight [1, d]`,
//! `.gate.bias [1]`, `.adapter_norm_after.weight [d]`, `.adapter_norm_after.bias [d]`, and a norm in front as
//! `.adapter_down.0` with the projection at `.adapter_down.1`. Places as AdapterHub names them: `...layer.0.output` and
//! `...layer.0.attention.output`, or `...layers.0.output_adapters` and `...layers.0.attention_adapters`.
//!
//! # Defaults and their source
//! AdapterHub's `double_seq_bn`: swish, reduction_factor 16, weights normal with deviation 0.02, biases zero. The paper
//! trains with a learning rate around 3e-4; 1e-3 suits small models.
//!
//! # Differences from HF
//! HF PEFT has no bottleneck adapters. AdapterHub trains the same fields; the paper trains the model's norms as well,
//! for which there is a method of its own to unite this one with.
//!
//! # Limits
//! A gate averages over all positions of a call, padding included, as AdapterHub's does: with one, generating token by
//! token is not the same as running the whole text. Activations with parameters of their own are refused.

use peft_core::register;

use crate::bottleneck::{Adapted, Bottleneck, Preset};

/// AdapterHub's `double_seq_bn`.
pub struct Double;

impl Preset for Double {
    fn fields() -> Bottleneck {
        Bottleneck {
            mh_adapter: true,
            non_linearity: "swish".to_owned(),
            ..Bottleneck::default()
        }
    }
}

/// Houlsby's fields of `adapter_config.json`.
pub type Houlsby = Adapted<Double>;

register!(
    Houlsby,
    id = "houlsby",
    title = "Houlsby adapter",
    family = Additive,
    subfamily = "adapters",
    peft_type = "HOULSBY",
    paper = "arXiv 1902.00751",
    example = r#"{"reduction_factor": 4}"#,
    identity_at_init = false,
    mergeable = false,
    hub = crate::hub::bottleneck(|config| crate::hub::is(crate::hub::Form::Double, config)),
);

#[cfg(test)]
mod tests {
    use peft_core::serde_json::{Value, json};

    use crate::try_out::{Place, one_wide};

    fn config(more: Value) -> Value {
        let mut config =
            json!({"peft_type": "HOULSBY", "reduction_factor": 2, "non_linearity": "relu"});
        for (field, value) in more.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        config
    }

    /// d = 2, k = 1, no norm: h = (1, 2), x = (3, -1): D h + d = 1 + 2 - 3 = 0, so with d = -2: 1; a = (1, 2) + (0, 1);
    /// y = h + a + x = (1 + 1 + 3, 2 + 3 - 1).
    #[test]
    fn by_hand_behind_both_sublayers() {
        for place in [Place::Attention, Place::Output] {
            let y = one_wide(
                &config(json!({})),
                place,
                &[("adapter_down.0.bias", &[-2.0])],
            );
            assert_eq!(y.expect("runs"), [5.0, 4.0]);
        }
    }

    /// The same with s = 4 learned and a gate of sigmoid(0) = 1/2: a = 4 (1, 3) / 2 = (2, 6).
    #[test]
    fn a_learned_scaling_and_a_gate() {
        let config = config(json!({"scaling": "learned", "use_gating": true}));
        let more: [(&str, &[f32]); 4] = [
            ("adapter_down.0.bias", &[-2.0]),
            ("scaling", &[4.0]),
            ("gate.weight", &[2.0, -1.0]),
            ("gate.bias", &[0.0]),
        ];
        let y = one_wide(&config, Place::Output, &more);
        assert_eq!(y.expect("runs"), [6.0, 7.0]);
    }

    #[test]
    fn wrong_fields_say_what_would_be_right() {
        let wrong = [
            (json!({"reduction_factor": 0}), "1/64"),
            (
                json!({"reduction_factor": {"default": "a"}}),
                "numbers by layer",
            ),
            (json!({"reduction_factor": {"1": 2}}), "no \"default\""),
            (json!({"leave_out": [7]}), "layers are [0]"),
            (json!({"leave_out": [0]}), "leaves out every layer"),
            (json!({"scaling": "leaned"}), "channel"),
            (json!({"original_ln_after": false}), "residual"),
            (
                json!({"residual_before_ln": "post_add"}),
                "original_ln_before",
            ),
            (json!({"init_weights": "xavier"}), "mam_adapter"),
            (json!({"inv_adapter": "glow"}), "nice"),
            (json!({"adapter_drop": "sometimes"}), "robust"),
            (
                json!({"mh_adapter": false, "output_adapter": false}),
                "where adapters go",
            ),
        ];
        for (more, part) in wrong {
            let error = one_wide(&config(more.clone()), Place::Output, &[]).expect_err("refused");
            let field = more
                .as_object()
                .and_then(|m| m.keys().next_back())
                .expect("a field");
            assert!(
                error.contains(field.as_str()) && error.contains(part),
                "{more}: {error}"
            );
        }
    }
}
