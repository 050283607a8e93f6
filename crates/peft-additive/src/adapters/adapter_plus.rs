//! AdapterPlus: one bottleneck a layer behind its last sum, with a learned factor for each feature.
//!
//! # Paper
//! Adapters Strike Back, arXiv 2406.06820, section 3.3 (the post-adapter, channel-wise scaling, initial values).
//!
//! # Formula
//! h the feed-forward sublayer's output, x its residual, LN the model's norm there (none in pre-norm models):
//! `z = LN(h + x)`; `y = z + s * (U f(D z + d) + u)`, s `[d]`. In training the second term is left out for a row of
//! the batch with probability stochastic_depth, and otherwise divided by what is left.
//!
//! # Saved keys
//! `<place>.adapters.adapter_down.0.weight [k, d]`, `.adapter_down.0.bias [k]`, `<place>.adapters.adapter_up.weight [d,
//! k]`, `.adapter_up.bias [d]`, `.scaling [d]`, with AdapterHub's place names (`...layer.0.output`,
//! `...layers.0.output_adapters`).
//!
//! # Defaults and their source
//! AdapterHub's AdapterPlusConfig: gelu, reduction_factor 96 (width 8 at 768), stochastic_depth 0.1, weights normal
//! with deviation 0.01 cut off at two of it, biases zero, s 1. The paper's learning rate is 1e-3; 3e-3 suits small
//! language models.
//!
//! # Differences from HF
//! HF PEFT has no bottleneck adapters.
//!
//! # Limits
//! Made for vision transformers: on language models a smaller reduction_factor and no stochastic_depth may be better.

use peft_core::register;

use crate::bottleneck::{
    Adapted, Bottleneck, Preset, Reduction, ResidualFrom, Scaling, Start, TrainedScaling,
};

/// AdapterHub's AdapterPlusConfig.
pub struct Channels;

impl Preset for Channels {
    fn fields() -> Bottleneck {
        Bottleneck {
            original_ln_before: true,
            original_ln_after: false,
            residual_before_ln: ResidualFrom::Norm(false),
            reduction_factor: Reduction::All(96.0),
            non_linearity: "gelu".to_owned(),
            init_weights: Start::Truncated,
            scaling: Scaling::Trained(TrainedScaling::Channel),
            stochastic_depth: 0.1,
            ..Bottleneck::default()
        }
    }
}

/// AdapterPlus's fields of `adapter_config.json`.
pub type AdapterPlus = Adapted<Channels>;

register!(
    AdapterPlus,
    id = "adapter_plus",
    title = "AdapterPlus",
    family = Additive,
    subfamily = "adapters",
    peft_type = "ADAPTER_PLUS",
    paper = "arXiv 2406.06820",
    example = r#"{"reduction_factor": 4}"#,
    identity_at_init = false,
    mergeable = false,
    hub = crate::hub::bottleneck(|config| crate::hub::is(crate::hub::Form::Channel, config)),
);

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;

    use crate::try_out::{Place, one_wide, started};

    /// d = 2, k = 1, no norm: h = (1, 2), x = (3, -1): z = (4, 1); D z + d = 2; a = (2, 4) + (0, 1);
    /// y = z + s a = (4 + 3 * 2, 1 - 5).
    #[test]
    fn by_hand() {
        let config =
            json!({"peft_type": "ADAPTER_PLUS", "reduction_factor": 2, "non_linearity": "relu"});
        let more: [(&str, &[f32]); 2] =
            [("adapter_down.0.bias", &[-3.0]), ("scaling", &[3.0, -1.0])];
        let y = one_wide(&config, Place::Output, &more);
        assert_eq!(y.expect("runs"), [10.0, -4.0]);
    }

    /// Initial weights are spread by 0.01 (0.0088 once cut off) and none is beyond two of it; a seed of their own makes
    /// all places alike.
    #[test]
    fn initial_weights_are_cut_off() {
        let config = json!({"peft_type": "ADAPTER_PLUS", "reduction_factor": 1, "init_weights_seed": 3,
            "mh_adapter": true});
        let values = started(&config, 64);
        let of = |place: &str| {
            &values[&format!("base_model.model.layers.0.{place}.adapters.adapter_up.weight")]
        };
        let (one, other) = (of("output_adapters"), of("attention_adapters"));
        assert_eq!(one, other);
        assert!(one.iter().all(|v| v.abs() <= 0.02));
        let spread = (one.iter().map(|v| v * v).sum::<f32>() / one.len() as f32).sqrt();
        assert!((0.0080..0.0096).contains(&spread), "{spread}");
    }
}
