//! Union: several methods on one model from one configuration.
//!
//! # Paper
//! Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 4.5 (combining methods
//! that act at different places).
//!
//! # Formula
//! Every member acts where its own configuration says; where several meet, later ones wrap earlier ones.
//!
//! # Saved keys
//! Member i's keys behind `members.<i>.`.
//!
//! # Defaults and their source
//! Each member's own.
//!
//! # Differences from HF
//! HF's mixed models cannot be saved; this is one folder like any other.
//!
//! # Limits
//! Merges if all members can be merged.

use std::sync::OnceLock;

use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Error, Injector, ParamGroups, PeftMethod, Result, Site, Tensor, Tensors,
    TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

/// A union's fields of `adapter_config.json`.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Union {
    /// Configurations of the members, each with its `peft_type`.
    pub members: Vec<Value>,
    #[serde(skip)]
    attached: OnceLock<Vec<Box<dyn PeftMethod>>>,
}

register!(
    Union,
    id = "union",
    title = "Union",
    family = Hybrid,
    subfamily = "composed",
    peft_type = "UNION",
    paper = "arXiv 2110.04366",
    example = r#"{"members": [
        {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]},
        {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]}
    ]}"#,
);

fn scope(member: usize) -> String {
    format!("members.{member}.")
}

/// Takes the keys behind `scope` out, as the member knows them.
fn taken(all: &mut Tensors, scope: &str) -> Tensors {
    let keys: Vec<String> = all
        .keys()
        .filter(|k| k.starts_with(scope))
        .cloned()
        .collect();
    keys.into_iter()
        .filter_map(|k| Some((k[scope.len()..].to_owned(), all.remove(&k)?)))
        .collect()
}

impl Union {
    fn methods(&self) -> &[Box<dyn PeftMethod>] {
        self.attached.get().map_or(&[], Vec::as_slice)
    }

    /// Applies each member's `f` to its own keys, as it knows them.
    fn each(
        &self,
        mut all: Tensors,
        f: impl Fn(&dyn PeftMethod, Tensors) -> Result<Tensors>,
    ) -> Result<Tensors> {
        let mut out = Tensors::new();
        for (i, method) in self.methods().iter().enumerate() {
            let scope = scope(i);
            let own = taken(&mut all, &scope);
            out.extend(
                f(&**method, own)?
                    .into_iter()
                    .map(|(k, v)| (format!("{scope}{k}"), v)),
            );
        }
        // What is left is the union's own: modules_to_save and the like.
        out.extend(all);
        Ok(out)
    }
}

impl PeftMethod for Union {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        if self.members.is_empty() {
            return Err(Error::config(
                "members",
                "has to list at least one method's configuration",
            ));
        }
        let attached = self.members.iter().enumerate().map(|(i, config)| {
            // A member of a saved union is a saved member.
            let mut config = config.clone();
            if cx.common().inference_mode
                && let Value::Object(fields) = &mut config
            {
                fields.insert("inference_mode".to_owned(), Value::Bool(true));
            }
            cx.member(&config, &scope(i))
        });
        let attached = attached.collect::<Result<Vec<_>>>()?;
        let _ = self.attached.set(attached);
        Ok(())
    }

    fn attach(&self, site: &Site, _cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Err(Error::module(
            &site.path,
            "a union has no adapter of its own",
        ))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(All(self.methods().iter().map(|m| m.trainer()).collect()))
    }

    fn save(&self, params: Tensors) -> Result<Tensors> {
        self.each(params, |method, own| method.save(own))
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        self.each(params, |method, own| method.load(own))
    }
}

/// Every member's hooks, in order.
struct All(Vec<Box<dyn TrainHooks>>);

impl TrainHooks for All {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|h| h.prepare(cx))
    }

    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|h| h.before_forward(cx))
    }

    fn param_groups(&self, groups: &mut ParamGroups) {
        self.0.iter().for_each(|h| h.param_groups(groups));
    }

    fn penalty(&self, cx: &TrainCx<'_>) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for hooks in &self.0 {
            sum = match (sum, hooks.penalty(cx)?) {
                (Some(sum), Some(one)) => Some(sum.add(&one)?),
                (sum, one) => sum.or(one),
            };
        }
        Ok(sum)
    }

    fn after_backward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|h| h.after_backward(cx))
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|h| h.after_step(cx))
    }

    fn state(&self) -> Result<Tensors> {
        let mut all = Tensors::new();
        for (i, hooks) in self.0.iter().enumerate() {
            all.extend(
                hooks
                    .state()?
                    .into_iter()
                    .map(|(k, v)| (format!("{}{k}", scope(i)), v)),
            );
        }
        Ok(all)
    }

    fn restore(&mut self, mut state: Tensors) -> Result<()> {
        for (i, hooks) in self.0.iter_mut().enumerate() {
            let scope = scope(i);
            let own = taken(&mut state, &scope);
            hooks.restore(own)?;
        }
        Ok(())
    }
}
