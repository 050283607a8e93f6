//! BitFit: train the biases and nothing else.
//!
//! # Paper
//! BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, arXiv 2106.10199,
//! section 3.
//!
//! # Formula
//! `y = W x + b'` with b' trained from b; W and everything else frozen.
//!
//! # Saved keys
//! `<module>.bias [out]`: the trained bias itself, under the base model's name for it.
//!
//! # Defaults and their source
//! All biases of the model, as in the paper; `bias_kinds` keeps to some kinds, as the paper does with half of them
//! (`["query", "intermediate"]` on BERT), and `target_modules` names modules. Learning rate: 1e-3, the authors' upper end.
//!
//! # Differences from HF
//! HF PEFT has no BitFit of its own; its `bias` option beside a tuner is the nearest.
//!
//! # Limits
//! A model without biases (Llama and most of its kin) is refused.

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Common, Error, ModuleKind, ModuleTree, PeftMethod, Result, Selected, Site,
    Slot, register,
};
use serde::{Deserialize, Serialize};

/// BitFit's fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct BitFit {
    /// Kinds of biases: dotted parts of the modules' paths, such as `query` or `attention.output.dense`; all if not
    /// given.
    pub bias_kinds: Option<Vec<String>>,
    /// Modules whose biases are trained; all that have one if not given.
    pub target_modules: Option<Value>,
    /// Modules left alone.
    pub exclude_modules: Option<Value>,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Value>,
}

register!(
    BitFit,
    id = "bitfit",
    title = "BitFit",
    family = Selective,
    subfamily = "structured",
    peft_type = "BITFIT",
    paper = "arXiv 2106.10199",
    example = r#"{"target_modules": ["q_proj", "v_proj"]}"#,
);

impl PeftMethod for BitFit {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[ModuleKind::Linear, ModuleKind::Conv1d, ModuleKind::Norm]
    }

    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        let mut sites = if common.target_modules.is_some() {
            tree.matching(common, self.kinds(), None)?
        } else {
            let saved = tree.subtree("modules_to_save", &common.modules_to_save)?;
            let with_bias = tree
                .iter()
                .filter(|(id, m)| m.bias.is_some() && !saved.contains(id));
            let sites: Vec<Site> = with_bias.map(|(id, _)| tree.site(id)).collect();
            if sites.is_empty() {
                let detail = format!(
                    "BitFit trains biases, and this {} model has none",
                    tree.facts().model_type
                );
                return Err(Error::config("peft_type", detail));
            }
            sites
        };
        if let Some(kinds) = &self.bias_kinds {
            for kind in kinds {
                if !sites.iter().any(|s| is_of(&s.path, kind)) {
                    return Err(Error::NoMatch {
                        field: "bias_kinds".to_owned(),
                        name: kind.clone(),
                        nearest: peft_core::nearest(
                            kind,
                            sites.iter().flat_map(|s| s.path.split('.')),
                        ),
                    });
                }
            }
            if kinds.is_empty() {
                return Err(Error::config("bias_kinds", "has to name a kind"));
            }
            sites.retain(|s| kinds.iter().any(|kind| is_of(&s.path, kind)));
        }
        Ok(sites)
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        if !cx.has(Slot::Bias) {
            return Err(Error::module(
                &site.path,
                "has no bias to train; name modules that have one",
            ));
        }
        cx.select(Slot::Bias, "bias")?;
        Ok(Box::new(Selected))
    }
}

/// Whether `kind` is made of dotted parts of `path`.
fn is_of(path: &str, kind: &str) -> bool {
    !kind.is_empty() && format!(".{path}.").contains(&format!(".{kind}."))
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Pass, Tensor};

    #[test]
    fn only_the_bias_moves() {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0]], Some(array![0.5]))
            .expect("a base");
        let mut network = Network::new(base);
        network
            .attach("a", &json!({"peft_type": "BITFIT"}), 0)
            .expect("attaches");
        let params = network.parameters();
        assert_eq!(
            params.iter().map(peft_core::Param::key).collect::<Vec<_>>(),
            ["base_model.model.fc.bias"]
        );
        params[0]
            .set(Tensor::from_vec(vec![2.0], &[1], network.device()).expect("a tensor"))
            .expect("fits");
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        assert_eq!(
            network
                .run("fc", &x, &Pass::eval())
                .expect("runs")
                .to_vec()
                .expect("values"),
            [5.0]
        );
        network.set_active(&[]).expect("disables");
        assert_eq!(
            network
                .run("fc", &x, &Pass::eval())
                .expect("runs")
                .to_vec()
                .expect("values"),
            [3.5]
        );
    }

    #[test]
    fn a_model_without_biases_is_refused() {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0]], None)
            .expect("a base");
        let error = Network::new(base)
            .attach("a", &json!({"peft_type": "BITFIT"}), 0)
            .expect_err("refused");
        assert!(error.to_string().contains("has none"), "{error}");
    }

    /// BERT's `query` and `intermediate`, and a norm of the attention by two parts of its path.
    #[test]
    fn kinds_of_biases() {
        let names = [
            "layer.0.attention.self.query",
            "layer.0.attention.self.key",
            "layer.0.intermediate.dense",
            "layer.0.output.dense",
        ];
        let base = names.iter().fold(Base::custom(), |base, path| {
            base.linear(path, array![[1.0, 2.0]], Some(array![0.5]))
                .expect("a layer")
        });
        let kinds = |kinds: peft_core::serde_json::Value| {
            let mut network = Network::new(base.clone());
            let config = json!({"peft_type": "BITFIT", "bias_kinds": kinds});
            network.attach("a", &config, 0).map(|()| {
                let keys = network.parameters();
                keys.iter().map(|p| p.key().to_owned()).collect::<Vec<_>>()
            })
        };
        assert_eq!(
            kinds(json!(["query", "intermediate"])).expect("attaches"),
            [
                "base_model.model.layer.0.attention.self.query.bias",
                "base_model.model.layer.0.intermediate.dense.bias"
            ]
        );
        assert_eq!(
            kinds(json!(["0.output.dense"])).expect("attaches"),
            ["base_model.model.layer.0.output.dense.bias"]
        );
        let error = kinds(json!(["queri"])).expect_err("refused").to_string();
        assert!(
            error.contains("bias_kinds") && error.contains("query"),
            "{error}"
        );
    }
}
