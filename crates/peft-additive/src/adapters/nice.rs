//! NICE invertible adapters: a coupling behind the embeddings, undone in front of the language-model head.
//!
//! # Paper
//! MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer, arXiv 2005.00052, section 3.2; couplings:
//! NICE, arXiv 1410.8516.
//!
//! # Formula
//! x1 and x2 the halves of an embedding, d wide together: `y1 = x1 + F(x2)`, `y2 = x2 + G(y1)`, with F and G `U f(D x +
//! b) + c` of width `d / (2 inv_adapter_reduction_factor)`. In front of the head: `x2 = y2 - G(y1)`, `x1 = y1 - F(x2)`.
//!
//! # Saved keys
//! `<model>.invertible_adapters.F.0.weight`, `.F.0.bias`, `.F.2.weight`, `.F.2.bias`, the same for `G`.
//!
//! # Defaults and their source
//! AdapterHub's `seq_bn_inv`: relu, inv_adapter_reduction_factor 2, weights normal with deviation 0.02, biases zero.
//! The paper's learning rate is 1e-4; 5e-3 suits small models, to which it alone brings less than a bottleneck does.
//!
//! # Differences from HF
//! HF PEFT has no such adapters. AdapterHub has them only as part of a bottleneck's configuration, where the fields are
//! called the same; here they are a method of their own as well.
//!
//! # Limits
//! A model without a language-model head has the forward half alone. AdapterHub's `glow` does not run there and is
//! refused.

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Common, Error, Injector, ModuleKind, ModuleTree, PeftMethod, Result, Site,
    Targets, register,
};
use serde::{Deserialize, Serialize};

use crate::coupling::{Form, PLACE};

/// The fields of `adapter_config.json`, named as a bottleneck's are.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Nice {
    /// The place; behind the model's embeddings if not given.
    pub target_modules: Option<Value>,
    /// `nice`
    pub inv_adapter: String,
    /// Width of half a hidden state over that of the bottleneck.
    pub inv_adapter_reduction_factor: f64,
    /// Activation inside.
    pub non_linearity: String,
}

impl Default for Nice {
    fn default() -> Self {
        Self {
            target_modules: None,
            inv_adapter: "nice".to_owned(),
            inv_adapter_reduction_factor: 2.0,
            non_linearity: "relu".to_owned(),
        }
    }
}

register!(
    Nice,
    id = "nice",
    title = "NICE invertible adapter",
    family = Additive,
    subfamily = "adapters",
    peft_type = "NICE",
    paper = "arXiv 2005.00052",
    example = r#"{"non_linearity": "gelu"}"#,
    identity_at_init = false,
    mergeable = false,
    hub = crate::hub::coupling(|config| crate::hub::is(crate::hub::Form::Coupling, config)),
);

impl PeftMethod for Nice {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Stream]
    }

    fn default_targets(&self, _tree: &ModuleTree) -> Option<Targets> {
        Some(Targets::Names(vec![PLACE.to_owned()]))
    }

    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        let sites = tree.matching(common, self.kinds(), self.default_targets(tree))?;
        match sites.iter().find(|s| !s.path.ends_with(PLACE)) {
            Some(other) => Err(Error::module(
                &other.path,
                format!("is not where an embedding passes: `{PLACE}` is"),
            )),
            None => Ok(sites),
        }
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        self.form()?.forth(site, cx)
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        for site in self.sites(cx.tree(), cx.common())? {
            self.form()?.attach(site, cx)?;
        }
        Ok(())
    }
}

impl Nice {
    fn form(&self) -> Result<Form> {
        let factor = Some(self.inv_adapter_reduction_factor);
        Form::new(&self.inv_adapter, factor, &self.non_linearity)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::json;
    use peft_core::{
        Base, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Pass, Tensor, Tensors,
    };

    const KEY: &str = "base_model.model.model.invertible_adapters";

    fn network(dim: usize) -> Network {
        let mut tree = ModuleTree::new(ModelFacts::default());
        tree.push(ModuleInfo::stream("model.invertible_adapters", dim));
        tree.push(ModuleInfo::stream("model.invertible_adapters_rev", dim));
        Network::new(Base::new(tree, &Device::cpu()))
    }

    fn run(network: &Network, place: &str, x: &Tensor) -> Vec<f32> {
        let id = network.module(place).expect("there");
        let y = network.stream(id, x, &Pass::eval()).expect("runs");
        y.to_vec().expect("values")
    }

    /// d = 3: x1 = (1), x2 = (2, -1). F(x2) = 2 relu(x2 . (1, 1) + 1) + 0 relu(x2 . (5, 5)) + 1 = 5: y1 = 6.
    /// G(y1) = (1, 2) relu(y1) + (0, -1) = (6, 11): y2 = (8, 10).
    #[test]
    fn by_hand_and_back() {
        let mut network = network(3);
        let device = network.device().clone();
        let tensor = |values: &[f32], shape: &[usize]| {
            Tensor::from_vec(values.to_vec(), shape, &device).expect("a tensor")
        };
        let tensors: Tensors = [
            ("F.0.weight", tensor(&[1.0, 1.0, 5.0, 5.0], &[2, 2])),
            ("F.0.bias", tensor(&[1.0, 0.0], &[2])),
            ("F.2.weight", tensor(&[2.0, 0.0], &[1, 2])),
            ("F.2.bias", tensor(&[1.0], &[1])),
            ("G.0.weight", tensor(&[1.0], &[1, 1])),
            ("G.0.bias", tensor(&[0.0], &[1])),
            ("G.2.weight", tensor(&[1.0, 2.0], &[2, 1])),
            ("G.2.bias", tensor(&[0.0, -1.0], &[2])),
        ]
        .into_iter()
        .map(|(name, value)| (format!("{KEY}.{name}"), value))
        .collect();
        let config = json!({"peft_type": "NICE", "inv_adapter_reduction_factor": 1.0});
        network.load("a", &config, tensors, true).expect("loads");
        let x = tensor(&[1.0, 2.0, -1.0], &[1, 1, 3]);
        let y = run(&network, "model.invertible_adapters", &x);
        assert_eq!(y, [6.0, 8.0, 10.0]);
        let back = run(
            &network,
            "model.invertible_adapters_rev",
            &tensor(&y, &[1, 1, 3]),
        );
        assert_eq!(back, [1.0, 2.0, -1.0]);
    }

    #[test]
    fn a_factor_that_leaves_no_width_is_refused() {
        let config = json!({"peft_type": "NICE", "inv_adapter_reduction_factor": 9});
        let error = network(8)
            .attach("a", &config, 0)
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("inv_adapter_reduction_factor") && error.contains("between 1/64 and 4"),
            "{error}"
        );
    }

    #[test]
    fn a_model_without_the_place_is_refused() {
        let mut network = Network::new(Base::custom().junction("layers.0.output_adapters", 4));
        let error = network
            .attach("a", &json!({"peft_type": "NICE"}), 0)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("invertible_adapters"), "{error}");
    }
}
