//! Compacter: two bottlenecks a layer whose matrices are sums of Kronecker products with shared first factors.
//!
//! # Paper
//! Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647, section 3.
//!
//! # Formula
//! A bottleneck `y = LN(h + U f(D z + d) + u + x)` whose matrices are `sum_i A_i (x) (s_i t_i)`, n = phm_dim terms: A_i
//! `[n, n]` shared by all places of the model, `s_i [in / n, rank]` and `t_i [rank, out / n]` for each projection. z =
//! h, behind attention and feed-forward sublayers alike.
//!
//! # Saved keys
//! `base_model.shared_parameters.phm_rule [n, n, n]`; `<place>.adapters.adapter_down.0.W_left [n, d/n, rank]`,
//! `.adapter_down.0.W_right [n, rank, k/n]`, `.adapter_down.0.b [k]`, `.adapter_up.W_left [n, k/n, rank]`,
//! `.adapter_up.W_right [n, rank, d/n]`, `.adapter_up.b [d]`. Not shared, the rule is `.adapter_down.0.phm_rule`;
//! factorised, `phm_rule_left [n, n, 1]`, `phm_rule_right [n, 1, n]`; unfactorised, W is `W [n, in/n, out/n]`; shared,
//! W is `shared_parameters.W_down_left` and so on.
//!
//! # Defaults and their source
//! AdapterHub's `compacter`: gelu, reduction_factor 32, phm_dim 4, rank 1, A normal with deviation 1e-4, biases zero.
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

/// AdapterHub's `compacter`.
pub struct DoublePhm;

impl Preset for DoublePhm {
    fn fields() -> Bottleneck {
        Bottleneck {
            mh_adapter: true,
            phm_layer: true,
            reduction_factor: Reduction::All(32.0),
            non_linearity: "gelu".to_owned(),
            ..Bottleneck::default()
        }
    }
}

/// Compacter's fields of `adapter_config.json`.
pub type Compacter = Adapted<DoublePhm>;

register!(
    Compacter,
    id = "compacter",
    title = "Compacter",
    family = Additive,
    subfamily = "adapters",
    peft_type = "COMPACTER",
    paper = "arXiv 2106.04647",
    example = r#"{"reduction_factor": 2, "phm_dim": 2}"#,
    identity_at_init = false,
    mergeable = false,
    hub = crate::hub::bottleneck(|config| crate::hub::is(crate::hub::Form::DoubleProducts, config)),
);

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;

    use crate::try_out::{Place, wide};

    /// d = 4, k = 2, n = 2, no activation. A_0 = [[1, 0], [0, 2]], A_1 = [[0, 1], [0, 0]]. Down: W_0 = (1, 2)^T (3),
    /// W_1 = (1, -1)^T (1), so H = [[3, 1], [6, -1], [0, 6], [0, 12]]; h = (1, 0, 2, 1) gives (3, 1 + 12 + 12) + b =
    /// (3, 25) + (0, -20) = (3, 5). Up: W_0 = (1)(1, 1), W_1 = (2)(0, 1), so H = [[1, 1, 0, 2], [0, 0, 2, 2]]:
    /// (3, 3, 10, 6 + 10). y = h + a + x, x = 0.
    #[test]
    fn by_hand() {
        let config = json!({"peft_type": "COMPACTER", "phm_dim": 2, "reduction_factor": 2, "non_linearity": "linear"});
        let params: [(&str, &[usize], &[f32]); 7] = [
            (
                "shared_parameters.phm_rule",
                &[2, 2, 2],
                &[1.0, 0.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0],
            ),
            ("adapter_down.0.W_left", &[2, 2, 1], &[1.0, 2.0, 1.0, -1.0]),
            ("adapter_down.0.W_right", &[2, 1, 1], &[3.0, 1.0]),
            ("adapter_down.0.b", &[2], &[0.0, -20.0]),
            ("adapter_up.W_left", &[2, 1, 1], &[1.0, 2.0]),
            ("adapter_up.W_right", &[2, 1, 2], &[1.0, 1.0, 0.0, 1.0]),
            ("adapter_up.b", &[4], &[0.0, 0.0, 0.0, 1.0]),
        ];
        let y = wide(
            &config,
            Place::Attention,
            &params,
            &[1.0, 0.0, 2.0, 1.0],
            &[0.0; 4],
        );
        assert_eq!(y.expect("runs"), [4.0, 3.0, 12.0, 18.0]);
    }

    #[test]
    fn what_does_not_divide_is_refused() {
        let config = json!({"peft_type": "COMPACTER", "phm_dim": 4, "reduction_factor": 2});
        let error =
            wide(&config, Place::Attention, &[], &[0.0; 4], &[0.0; 4]).expect_err("refused");
        assert!(
            error.contains("phm_dim") && error.contains("4 and 2"),
            "{error}"
        );
    }
}
