//! Compacter++: one bottleneck a layer whose matrices are sums of Kronecker products with shared first factors.
//!
//! # Paper
//! Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647, sections 3 and 4 (Compacter++).
//!
//! # Formula
//! A bottleneck `y = LN(h + U f(D z + d) + u + x)` whose matrices are `sum_i A_i (x) (s_i t_i)`, n = phm_dim terms: A_i
//! `[n, n]` shared by all places of the model, `s_i [in / n, rank]` and `t_i [rank, out / n]` for each projection. z =
//! LN(h + x), behind the feed-forward sublayer.
//!
//! # Saved keys
//! `base_model.shared_parameters.phm_rule [n, n, n]`; `<place>.adapters.adapter_down.0.W_left [n, d/n, rank]`,
//! `.adapter_down.0.W_right [n, rank, k/n]`, `.adapter_down.0.b [k]`, `.adapter_up.W_left [n, k/n, rank]`,
//! `.adapter_up.W_right [n, rank, d/n]`, `.adapter_up.b [d]`. Not shared, the rule is `.adapter_down.0.phm_rule`;
//! factorised, `phm_rule_left [n, n, 1]`, `phm_rule_right [n, 1, n]`; unfactorised, W is `W [n, in/n, out/n]`; shared,
//! W is `shared_parameters.W_down_left` and so on.
//!
//! # Defaults and their source
//! AdapterHub's `compacter++`: gelu, reduction_factor 32, phm_dim 4, rank 1, A normal with deviation 1e-4, biases zero.
//! With A that small a fresh one changes next to nothing and starts slowly: a learning rate of 1e-2 suits small models,
//! where the paper's is 3e-3.
//!
//! # Differences from HF
//! HF PEFT has no bottleneck adapters. `hypercomplex_nonlinearity` is the distribution W starts with, as it says;
//! AdapterHub starts from a normal one whatever it says.
//!
//! # Limits
//! phm_dim has to divide the widths of the model and of the bottleneck. The paper trains the model's norms as well:
//! unite it with a method that does.

use peft_core::register;

use crate::bottleneck::{Adapted, Bottleneck, Preset, Reduction};

/// AdapterHub's `compacter++`.
pub struct SinglePhm;

impl Preset for SinglePhm {
    fn fields() -> Bottleneck {
        Bottleneck {
            original_ln_before: true,
            phm_layer: true,
            reduction_factor: Reduction::All(32.0),
            non_linearity: "gelu".to_owned(),
            ..Bottleneck::default()
        }
    }
}

/// Compacter++'s fields of `adapter_config.json`.
pub type CompacterPlus = Adapted<SinglePhm>;

register!(
    CompacterPlus,
    id = "compacter_plus",
    title = "Compacter++",
    family = Additive,
    subfamily = "adapters",
    peft_type = "COMPACTER_PLUS",
    paper = "arXiv 2106.04647",
    example = r#"{"reduction_factor": 2, "phm_dim": 2, "phm_rank": 2}"#,
    identity_at_init = false,
    mergeable = false,
    hub = crate::hub::bottleneck(|config| crate::hub::is(crate::hub::Form::SingleProducts, config)),
);

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;

    use crate::try_out::{Place, wide};

    /// d = k = 2, n = 2: A_0 = [[1, 2], [0, 0]] = (1, 0)^T (1, 2), A_1 = 0, so H_down = w [[1, 2], [0, 0]]; w = 3 for
    /// every place. h = (1, 2), x = (3, -1): z = (4, 1): 3 (4, 8) = (12, 24). Up the same with w = 1: (12, 24).
    /// y = a + h + x = (12 + 4, 24 + 1).
    #[test]
    fn by_hand_with_shared_second_factors() {
        let config = json!({"peft_type": "COMPACTER_PLUS", "phm_dim": 2, "reduction_factor": 1, "phm_bias": false,
            "non_linearity": "linear", "shared_W_phm": true, "factorized_phm_W": false, "factorized_phm_rule": true});
        let params: [(&str, &[usize], &[f32]); 4] = [
            (
                "shared_parameters.phm_rule_left",
                &[2, 2, 1],
                &[1.0, 0.0, 0.0, 0.0],
            ),
            (
                "shared_parameters.phm_rule_right",
                &[2, 1, 2],
                &[1.0, 2.0, 0.0, 0.0],
            ),
            ("shared_parameters.W_down", &[2, 1, 1], &[3.0, 5.0]),
            ("shared_parameters.W_up", &[2, 1, 1], &[1.0, 5.0]),
        ];
        let y = wide(&config, Place::Output, &params, &[1.0, 2.0], &[3.0, -1.0]);
        assert_eq!(y.expect("runs"), [16.0, 25.0]);
    }
}
