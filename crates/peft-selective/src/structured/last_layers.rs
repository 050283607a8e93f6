//! Last layers: train the last layers of the model whole.
//!
//! # Paper
//! What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning, arXiv 1911.03090: the last quarter of the layers
//! keeps nine tenths of full fine-tuning's quality.
//!
//! # Formula
//! Every parameter inside of layers `L - num_trained_layers` to `L - 1` is trained from its own value; the rest frozen.
//!
//! # Saved keys
//! `<module>.weight`, `<module>.bias`: the trained parameters themselves, under the base model's names for them.
//!
//! # Defaults and their source
//! `num_trained_layers` 1. Learning rate: that of full fine-tuning, 2e-5 to 1e-4.
//!
//! # Differences from HF
//! HF PEFT has no such method; `modules_to_save` with the layers' names is the nearest.
//!
//! # Limits
//! A final norm or pooler behind the layers is trained only if `modules_to_save` names it.

use peft_core::{
    Adapter, Attach, Common, Error, ModuleKind, ModuleTree, PeftMethod, Result, Site, register,
};
use serde::{Deserialize, Serialize};

use crate::fields::{Places, WITH_PARAMETERS, sites_of, train_whole};

/// Its fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LastLayers {
    /// Layers to train, counted from the last.
    pub num_trained_layers: usize,
    /// Modules left alone; `target_modules` keeps to some of those layers' modules.
    #[serde(flatten)]
    pub places: Places,
}

impl Default for LastLayers {
    fn default() -> Self {
        Self {
            num_trained_layers: 1,
            places: Places::default(),
        }
    }
}

register!(
    LastLayers,
    id = "last_layers",
    title = "Last layers",
    family = Selective,
    subfamily = "structured",
    peft_type = "LAST_LAYERS",
    paper = "arXiv 1911.03090",
    example = r#"{"num_trained_layers": 1}"#,
);

impl PeftMethod for LastLayers {
    fn kinds(&self) -> &'static [ModuleKind] {
        WITH_PARAMETERS
    }

    fn sites(&self, tree: &ModuleTree, common: &Common) -> Result<Vec<Site>> {
        let layers = tree.iter().filter_map(|(_, m)| m.layer).max();
        let layers = layers.map_or(0, |last| last + 1);
        if self.num_trained_layers == 0 || self.num_trained_layers > layers {
            let detail = match layers {
                0 => "the model has no layers".to_owned(),
                _ => format!(
                    "has to be from 1 to {layers}, the layers there are; it is {}",
                    self.num_trained_layers
                ),
            };
            return Err(Error::config("num_trained_layers", detail));
        }
        let first = layers - self.num_trained_layers;
        let targets = match &common.target_modules {
            Some(_) => Some(tree.matching(common, self.kinds(), None)?),
            None => None,
        };
        let sites = sites_of(tree, common, |id| {
            let targeted = targets
                .as_ref()
                .is_none_or(|sites| sites.iter().any(|s| s.id == Some(id)));
            targeted && tree.info(id).layer.is_some_and(|layer| layer >= first)
        })?;
        if sites.is_empty() {
            let detail = format!("names nothing in layers {first} to {}", layers - 1);
            return Err(Error::config("target_modules", detail));
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
    use peft_core::{Base, Network, Param};

    fn network() -> Network {
        let base = (0..3).fold(Base::custom(), |base, layer| {
            base.linear(&format!("layers.{layer}.fc"), array![[1.0, 2.0]], None)
                .expect("a layer")
        });
        Network::new(base.norm("norm", array![1.0, 1.0], None).expect("a norm"))
    }

    #[test]
    fn the_last_two_of_three() {
        let mut network = network();
        let config = json!({"peft_type": "LAST_LAYERS", "num_trained_layers": 2});
        network.attach("a", &config, 0).expect("attaches");
        let params = network.parameters();
        let keys: Vec<_> = params.iter().map(Param::key).collect();
        assert_eq!(
            keys,
            [
                "base_model.model.layers.1.fc.weight",
                "base_model.model.layers.2.fc.weight"
            ]
        );
    }

    #[test]
    fn more_layers_than_there_are() {
        for n in [0, 4] {
            let config = json!({"peft_type": "LAST_LAYERS", "num_trained_layers": n});
            let error = network().attach("a", &config, 0).expect_err("refused");
            let error = error.to_string();
            assert!(
                error.contains("num_trained_layers") && error.contains("1 to 3"),
                "{error}"
            );
        }
    }
}
