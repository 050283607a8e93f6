//! LoRA+: LoRA whose two factors learn at different rates.
//!
//! # Paper
//! LoRA+: Efficient Low Rank Adaptation of Large Models, arXiv 2402.12354, section 4.
//!
//! # Formula
//! The adapter is whatever the other fields say (LoRA, also with `use_dora`). The learning rate of B is
//! `loraplus_lr_ratio` times the run's, which A keeps. Vectors (B's bias, lengths, biases, norms) learn at B's rate,
//! biases and norms without weight decay; a pair on an embedding learns at `loraplus_lr_embedding`.
//!
//! # Saved keys
//! Those of the adapter.
//!
//! # Defaults and their source
//! loraplus_lr_embedding 1e-6, loraplus_weight_decay 0: HF PEFT 0.21 (`peft.optimizers.create_loraplus_optimizer`). The
//! ratio has to be given, as there; the paper takes 16, with a rate about half of LoRA's.
//!
//! # Differences from HF
//! There it is an optimiser, here fields that other programs ignore: they read a LoRA. HF sorts vectors by their shape,
//! here their names tell. `loraplus_lr_embedding` holds at every step; HF's follows the schedule.
//!
//! # Limits
//! As those of the adapter.

use std::collections::HashMap;
use std::sync::OnceLock;

use peft_core::serde_json::{self, Map, Value, json};
use peft_core::{
    Adapter, Attach, Error, GroupRule, Injector, ModuleTree, Param, ParamGroups, PeftMethod,
    Result, Site, Tensor, Tensors, TrainCx, TrainHooks, entry_for, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::LowRank;

/// LoRA+'s fields of `adapter_config.json`: LoRA's, and the rates.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub struct LoraPlus {
    /// B's learning rate over A's, above 0.
    pub loraplus_lr_ratio: f64,
    /// Learning rate of pairs on embeddings.
    pub loraplus_lr_embedding: f64,
    /// Weight decay instead of the run's.
    pub loraplus_weight_decay: f64,
    /// The adapter's fields.
    #[serde(flatten)]
    pub factors: LowRank,
    #[serde(skip)]
    adapter: OnceLock<Box<dyn PeftMethod>>,
}

impl Default for LoraPlus {
    fn default() -> Self {
        Self {
            loraplus_lr_ratio: 16.0,
            loraplus_lr_embedding: 1e-6,
            loraplus_weight_decay: 0.0,
            factors: LowRank::default(),
            adapter: OnceLock::new(),
        }
    }
}

const PEFT_TYPE: &str = "LORA";

register!(
    LoraPlus,
    id = "lora_plus",
    title = "LoRA+",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "LORA",
    paper = "arXiv 2402.12354",
    example = r#"{"r": 2, "lora_alpha": 4, "loraplus_lr_ratio": 16, "target_modules": ["q_proj", "v_proj"]}"#,
    when = |c| !c["loraplus_lr_ratio"].is_null(),
);

impl LoraPlus {
    fn check(&self) -> Result<()> {
        let wrong = |field: &str, value: f64, range: &str| {
            Err(Error::config(field, format!("{value}: has to be {range}")))
        };
        if !(self.loraplus_lr_ratio > 0.0 && self.loraplus_lr_ratio.is_finite()) {
            return wrong("loraplus_lr_ratio", self.loraplus_lr_ratio, "above 0");
        }
        for (field, value) in [
            ("loraplus_lr_embedding", self.loraplus_lr_embedding),
            ("loraplus_weight_decay", self.loraplus_weight_decay),
        ] {
            if !(value >= 0.0 && value.is_finite()) {
                return wrong(field, value, "0 or more");
            }
        }
        Ok(())
    }

    /// The method that the other fields mean.
    fn adapter(&self) -> Result<&dyn PeftMethod> {
        if let Some(known) = self.adapter.get() {
            return Ok(&**known);
        }
        let mut config =
            serde_json::to_value(&self.factors).map_err(|e| Error::other(e.to_string()))?;
        config["peft_type"] = json!(PEFT_TYPE);
        let parsed = entry_for(&config).and_then(|entry| (entry.parse)(&config))?;
        Ok(&**self.adapter.get_or_init(|| parsed.method))
    }
}

impl PeftMethod for LoraPlus {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.check()?;
        self.adapter()?.inject(cx)
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        self.adapter()?.attach(site, cx)
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        let adapter = self.adapter.get().map(|method| method.trainer());
        Box::new(Rates {
            ratio: self.loraplus_lr_ratio,
            embedding: self.loraplus_lr_embedding,
            weight_decay: self.loraplus_weight_decay,
            before: HashMap::new(),
            adapter: adapter.unwrap_or_else(|| Box::new(())),
        })
    }

    fn save(&self, params: Tensors) -> Result<Tensors> {
        self.adapter()?.save(params)
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        self.adapter()?.load(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        if let Some(adapter) = self.adapter.get() {
            adapter.finish_config(config, tree);
        }
    }
}

/// The rates, around the adapter's own hooks.
struct Rates {
    ratio: f64,
    embedding: f64,
    weight_decay: f64,
    /// Parameters of embeddings as they were before the step, by key.
    before: HashMap<String, Tensor>,
    adapter: Box<dyn TrainHooks>,
}

/// Which module of an embedding's pair a key belongs to, if it does.
fn embedding(key: &str) -> Option<&str> {
    key.split_once(".lora_embedding_").map(|(module, _)| module)
}

/// The parameters of pairs on embeddings, lengths included.
fn of_embeddings(params: &[Param]) -> Vec<&Param> {
    let modules: Vec<&str> = params.iter().filter_map(|p| embedding(p.key())).collect();
    let inside = |p: &&Param| {
        let module = p
            .key()
            .rsplit_once(".lora_")
            .map_or("", |(module, _)| module);
        modules.contains(&module)
    };
    params.iter().filter(inside).collect()
}

impl TrainHooks for Rates {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.adapter.prepare(cx)
    }

    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let now = of_embeddings(cx.params).into_iter();
        self.before = now
            .map(|p| (p.key().to_owned(), p.tensor().detach()))
            .collect();
        self.adapter.before_forward(cx)
    }

    fn param_groups(&self, groups: &mut ParamGroups) {
        self.adapter.param_groups(groups);
        let mut rule = |pattern: &str, learning_rate: f64, weight_decay: f64| {
            groups.rules.push(GroupRule {
                pattern: pattern.to_owned(),
                learning_rate,
                weight_decay: Some(weight_decay),
            });
        };
        rule("", 1.0, self.weight_decay);
        rule(
            r"\.lora_(B\.|magnitude_vector$)",
            self.ratio,
            self.weight_decay,
        );
        rule(r"\.bias$|(?i:norm|\.ln_\w+)\.weight$", self.ratio, 0.0);
        // Their step is set right behind the optimiser's.
        rule(r"\.lora_embedding_[AB]$", 1.0, self.weight_decay);
    }

    fn penalty(&self, cx: &TrainCx<'_>) -> Result<Option<Tensor>> {
        self.adapter.penalty(cx)
    }

    fn after_backward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.adapter.after_backward(cx)
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        for param in of_embeddings(cx.params) {
            let Some(before) = self.before.remove(param.key()) else {
                continue;
            };
            if cx.learning_rate > 0.0 {
                // A step is as long as its rate: it is taken back and made at the embedding's own.
                let ratio = if param.key().ends_with("_vector") {
                    self.ratio
                } else {
                    1.0
                };
                let share = (self.embedding / (cx.learning_rate * ratio)) as f32;
                let step = param.tensor().detach().sub(&before)?;
                param.set(before.add(&step.scale(share)?)?)?;
            }
        }
        self.adapter.after_step(cx)
    }

    fn state(&self) -> Result<Tensors> {
        self.adapter.state()
    }

    fn restore(&mut self, state: Tensors) -> Result<()> {
        self.adapter.restore(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::ndarray::array;
    use peft_core::{Base, Network};

    use crate::testing::{attached, fields};

    fn network(more: &[(&str, Value)]) -> Result<Network> {
        let base = Base::custom().linear("fc", array![[1.0, 2.0], [3.0, 4.0]], None)?;
        let config =
            json!({"peft_type": "LORA", "r": 1, "loraplus_lr_ratio": 4, "target_modules": ["fc"]});
        let network = attached(base, config, &fields(more))?;
        Ok(network)
    }

    /// Of the rules that match a key, the last counts.
    #[test]
    fn each_key_has_its_rate() {
        let network = network(&[("loraplus_weight_decay", json!(0.5))]).expect("attaches");
        let mut groups = ParamGroups::default();
        for (_, hooks) in network.trainers() {
            hooks.param_groups(&mut groups);
        }
        let of = |key: &str| {
            let matching = |pattern: &str| match pattern {
                "" => true,
                r"\.lora_(B\.|magnitude_vector$)" => {
                    key.contains(".lora_B.") || key.ends_with(".lora_magnitude_vector")
                }
                r"\.lora_embedding_[AB]$" => key.contains(".lora_embedding_"),
                _ => key.ends_with(".bias") || key.ends_with("norm.weight"),
            };
            let last = groups.rules.iter().rev().find(|r| matching(&r.pattern));
            last.map(|r| (r.learning_rate, r.weight_decay))
        };
        assert_eq!(
            of("base_model.model.fc.lora_A.weight"),
            Some((1.0, Some(0.5)))
        );
        assert_eq!(
            of("base_model.model.fc.lora_B.weight"),
            Some((4.0, Some(0.5)))
        );
        assert_eq!(
            of("base_model.model.fc.lora_B.bias"),
            Some((4.0, Some(0.0)))
        );
        assert_eq!(
            of("base_model.model.fc.lora_magnitude_vector"),
            Some((4.0, Some(0.5)))
        );
        assert_eq!(of("base_model.model.score.weight"), Some((1.0, Some(0.5))));
        assert_eq!(
            of("base_model.model.ln.norm.weight"),
            Some((4.0, Some(0.0)))
        );
    }

    /// The other fields decide what is trained.
    #[test]
    fn the_adapter_is_what_the_fields_say() {
        let keys = |more: &[(&str, Value)]| {
            let network = network(more).expect("attaches");
            assert_eq!(network.method_of("a").expect("attached").id, "lora_plus");
            network.parameters().len()
        };
        assert_eq!(keys(&[]), 2);
        assert_eq!(keys(&[("use_dora", json!(true))]), 3);
        let error = network(&[("loraplus_lr_ratio", json!(-1))])
            .map(|_| ())
            .expect_err("refused");
        assert!(error.to_string().contains("loraplus_lr_ratio"), "{error}");
    }
}
