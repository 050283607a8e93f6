//! Whole modules: train some modules of the model as they are.
//!
//! # Paper
//! None of its own: partial fine-tuning, as HF PEFT's `modules_to_save` does it beside another method.
//!
//! # Formula
//! `y = W' x + b'` with W' and b' trained from W and b of the named modules and of everything inside of them; the rest
//! frozen.
//!
//! # Saved keys
//! `<module>.weight`, `<module>.bias`: the trained parameters themselves, under the base model's names for them.
//!
//! # Defaults and their source
//! None: `target_modules` has to be given. A name may be that of a part that holds modules (`layers.11`, `pooler`).
//! Learning rate: that of full fine-tuning, 2e-5 to 1e-4.
//!
//! # Differences from HF
//! HF has it as a field of other methods only.
//!
//! # Limits
//! Of a tied pair of embeddings the named side alone is trained; `ensure_weight_tying` with `modules_to_save` trains both.

use peft_core::{
    Adapter, Attach, Common, Error, ModuleKind, ModuleTree, PeftMethod, Result, Site, Targets,
    register,
};
use serde::{Deserialize, Serialize};

use crate::fields::{Places, WITH_PARAMETERS, sites_of, train_whole};

/// Its fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WholeModules {
    /// Where it acts.
    #[serde(flatten)]
    pub places: Places,
}

register!(
    WholeModules,
    id = "whole_modules",
    title = "Whole modules",
    family = Selective,
    subfamily = "structured",
    peft_type = "WHOLE_MODULES",
    paper = "-",
    example = r#"{"target_modules": ["q_proj", "input_layernorm"]}"#,
);

impl PeftMethod for WholeModules {
    fn kinds(&self) -> &'static [ModuleKind] {
        WITH_PARAMETERS
    }

    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        let names = match &common.target_modules {
            None => {
                return Err(Error::config(
                    "target_modules",
                    "has to be given: the modules to train",
                ));
            }
            Some(Targets::Names(names)) => names,
            Some(_) => return tree.matching(common, self.kinds(), None),
        };
        let inside = tree.subtree("target_modules", names)?;
        // A classification task trains its head whole by itself: asking for nothing else is the head alone.
        let heads = &tree.facts().task_heads;
        if common.trains_head() && inside.iter().all(|&id| heads.contains(&tree.info(id).path)) {
            return Ok(Vec::new());
        }
        let sites = sites_of(tree, common, |id| inside.contains(&id))?;
        if sites.is_empty() {
            return Err(Error::config(
                "target_modules",
                "names only modules without parameters",
            ));
        }
        Ok(sites)
    }

    fn attach(&self, _site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        train_whole(cx)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{
        Base, BaseWeight, Device, ModelFacts, ModuleInfo, ModuleTree, Network, Param, Tensor,
    };

    fn network() -> Network {
        let linear = |base: Base, path: &str| {
            base.linear(path, array![[1.0, 2.0]], Some(array![0.5]))
                .expect("a layer")
        };
        Network::new(linear(
            linear(linear(Base::custom(), "block.up"), "block.down"),
            "head",
        ))
    }

    /// With a classification task the head is trained already: nothing else is asked for, nothing else is trained.
    #[test]
    fn the_head_alone() {
        let facts = ModelFacts {
            task_heads: vec!["score".to_owned()],
            ..ModelFacts::default()
        };
        let mut tree = ModuleTree::new(facts);
        let mut weights = Vec::new();
        for path in ["layer", "score"] {
            tree.push(ModuleInfo::linear(path, 2, 1, false));
            let values = Tensor::from_vec(vec![1.0, 2.0], &[1, 2], &Device::cpu()).expect("values");
            weights.push((format!("{path}.weight"), BaseWeight::dense(values, false)));
        }
        let mut base = Base::new(tree, &Device::cpu());
        for (name, weight) in weights {
            base.insert(name, weight);
        }
        let mut network = Network::new(base);
        let mut config = json!({"peft_type": "WHOLE_MODULES", "target_modules": ["score"], "task_type": "SEQ_CLS"});
        network.attach("a", &config, 0).expect("attaches");
        let keys: Vec<_> = network
            .parameters()
            .iter()
            .map(|p| p.key().to_owned())
            .collect();
        assert_eq!(keys, ["base_model.model.score.weight"]);
        config["target_modules"] = json!(["layer"]);
        network.attach("b", &config, 0).expect("attaches");
        let both = network.adapter_parameters("b").expect("attached").len();
        assert_eq!(both, 2);
    }

    /// A name that holds modules means all inside of it.
    #[test]
    fn a_part_of_the_model() {
        let mut network = network();
        network
            .attach(
                "a",
                &json!({"peft_type": "WHOLE_MODULES", "target_modules": ["block"], "exclude_modules": ["down"]}),
                0,
            )
            .expect("attaches");
        let params = network.parameters();
        let keys: Vec<_> = params.iter().map(Param::key).collect();
        assert_eq!(
            keys,
            [
                "base_model.model.block.up.weight",
                "base_model.model.block.up.bias"
            ]
        );
        assert_eq!(params[0].tensor().to_vec().expect("values"), [1.0, 2.0]);
    }

    #[test]
    fn targets_have_to_be_given() {
        let none = network().attach("a", &json!({"peft_type": "WHOLE_MODULES"}), 0);
        let error = none.expect_err("refused").to_string();
        assert!(error.contains("target_modules"), "{error}");
    }
}
