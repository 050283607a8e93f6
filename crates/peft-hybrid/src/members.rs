//! What all compositions share: members given by their configurations, each with its keys behind a scope of its own.

use std::sync::OnceLock;

use peft_core::hub::{self, HubModel};
use peft_core::serde_json::{Map, Value};
use peft_core::{
    Error, Injector, ParamGroups, PeftMethod, Result, Tensor, Tensors, TrainCx, TrainHooks,
};
use serde::{Deserialize, Serialize};

/// A composition's members.
#[derive(Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Members {
    /// Their configurations, each with its `peft_type`.
    pub configs: Vec<Value>,
    #[serde(skip)]
    attached: OnceLock<Vec<Box<dyn PeftMethod>>>,
}

/// In front of the keys of one member.
pub(crate) fn scope(member: usize) -> String {
    format!("members.{member}.")
}

/// Takes the keys behind `scope` out, as the member knows them.
pub(crate) fn taken(all: &mut Tensors, scope: &str) -> Tensors {
    let keys: Vec<String> = all
        .keys()
        .filter(|k| k.starts_with(scope))
        .cloned()
        .collect();
    keys.into_iter()
        .filter_map(|k| Some((k[scope.len()..].to_owned(), all.remove(&k)?)))
        .collect()
}

impl Members {
    /// From a JSON list.
    pub(crate) fn parse(json: &str) -> Self {
        Self {
            configs: peft_core::serde_json::from_str(json).unwrap_or_default(),
            attached: OnceLock::new(),
        }
    }

    /// Members with `defaults` under them: where an entry names no method, its fields go over those of the default in
    /// the same place.
    ///
    /// # Errors
    /// If there are none, or one names no method and has no default.
    pub(crate) fn over(&self, defaults: &Self) -> Result<Vec<Value>> {
        if self.configs.is_empty() {
            return Err(Error::config(
                "members",
                "has to list at least one method's configuration",
            ));
        }
        let filled = self.configs.iter().enumerate().map(|(i, given)| {
            let Value::Object(fields) = given else {
                let detail = format!("entry {i} has to be a table of fields");
                return Err(Error::config("members", detail));
            };
            match defaults.configs.get(i).and_then(Value::as_object) {
                Some(default) if !fields.contains_key("peft_type") => {
                    let mut all: Map<String, Value> = default.clone();
                    all.extend(fields.clone());
                    Ok(Value::Object(all))
                }
                _ => Ok(given.clone()),
            }
        });
        filled.collect()
    }

    /// Attaches every member from these configurations.
    ///
    /// # Errors
    /// If there is none, or one cannot be attached.
    pub(crate) fn inject(&self, configs: &[Value], cx: &mut Injector<'_>) -> Result<()> {
        if configs.is_empty() {
            return Err(Error::config(
                "members",
                "has to list at least one method's configuration",
            ));
        }
        let attached = configs.iter().enumerate().map(|(i, config)| {
            let config = as_saved(config, cx);
            cx.member(&config, &scope(i))
        });
        self.set(attached.collect::<Result<Vec<_>>>()?);
        Ok(())
    }

    /// Remembers the members' methods.
    pub(crate) fn set(&self, methods: Vec<Box<dyn PeftMethod>>) {
        let _ = self.attached.set(methods);
    }

    /// What [`PeftMethod::members`] says of them, of which `defaults` are the method's own.
    pub(crate) fn named(&self, defaults: &Self) -> Vec<(String, String)> {
        let configs = self.over(defaults).unwrap_or_default();
        let peft_type = |config: &Value| config["peft_type"].as_str().unwrap_or("?").to_owned();
        let all = configs.iter().enumerate();
        all.map(|(i, config)| (scope(i), peft_type(config)))
            .collect()
    }

    pub(crate) fn methods(&self) -> &[Box<dyn PeftMethod>] {
        self.attached.get().map_or(&[], Vec::as_slice)
    }

    /// Applies each member's `f` to its own keys, as it knows them. What is left is the composition's own.
    fn each(
        &self,
        mut all: Tensors,
        f: impl Fn(&dyn PeftMethod, Tensors) -> Result<Tensors>,
    ) -> Result<Tensors> {
        let mut out = Tensors::new();
        for (i, method) in self.methods().iter().enumerate() {
            let scope = scope(i);
            let own = taken(&mut all, &scope);
            let own = f(&**method, own)?;
            out.extend(own.into_iter().map(|(k, v)| (format!("{scope}{k}"), v)));
        }
        out.extend(all);
        Ok(out)
    }

    pub(crate) fn save(&self, params: Tensors) -> Result<Tensors> {
        self.each(params, |method, own| method.save(own))
    }

    pub(crate) fn load(&self, params: Tensors) -> Result<Tensors> {
        self.each(params, |method, own| method.load(own))
    }

    /// The members' hooks.
    pub(crate) fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(All(self.methods().iter().map(|m| m.trainer()).collect()))
    }
}

/// A member of a saved composition is a saved member.
pub(crate) fn as_saved(config: &Value, cx: &Injector<'_>) -> Value {
    let mut config = config.clone();
    if cx.common().inference_mode
        && let Value::Object(fields) = &mut config
    {
        fields.insert("inference_mode".to_owned(), Value::Bool(true));
    }
    config
}

/// AdapterHub's `configs` and plain tensors as members and tensors of ours.
///
/// # Errors
/// If no method takes one, or a tensor belongs to none.
pub(crate) fn from_hub(configs: &Value, mut tensors: Tensors) -> Result<(Vec<Value>, Tensors)> {
    let (mut members, mut out) = (Vec::new(), Tensors::new());
    let configs = configs
        .as_array()
        .ok_or_else(|| Error::config("config.configs", "has to be a list of configurations"))?;
    for (i, config) in configs.iter().enumerate() {
        let (_, form) = hub::entry(config)?;
        let (own, rest) = tensors
            .into_iter()
            .partition(|(key, _)| (form.owns)(config, key));
        tensors = rest;
        let (member, own) = hub::read(config, own)?;
        members.push(member);
        let scope = scope(i);
        out.extend(own.into_iter().map(|(k, v)| (format!("{scope}{k}"), v)));
    }
    match tensors.into_keys().next() {
        Some(key) => Err(Error::config(
            "config.configs",
            format!("`{key}` belongs to none of them"),
        )),
        None => Ok((members, out)),
    }
}

/// The inverse of [`from_hub`]: a union of theirs.
///
/// # Errors
/// If a member has no form there, or two would be in one place.
pub(crate) fn to_hub(
    model: &HubModel,
    members: &[Value],
    mut tensors: Tensors,
) -> Result<(Value, Tensors)> {
    let (mut configs, mut out) = (Vec::new(), Tensors::new());
    for (i, member) in members.iter().enumerate() {
        let own = taken(&mut tensors, &scope(i));
        let (config, own) = hub::write(model, member, own)?;
        configs.push(config);
        for (key, value) in own {
            if out.insert(key.clone(), value).is_some() {
                let detail = format!(
                    "two of them would be saved as `{key}`; AdapterHub holds one in a place"
                );
                return Err(Error::config("members", detail));
            }
        }
    }
    match tensors.into_keys().next() {
        Some(key) => Err(Error::config(
            "members",
            format!("`{key}` has no place in AdapterHub's folders"),
        )),
        None => Ok((crate::union_of(configs), out)),
    }
}

/// The members of a configuration, `defaults` under them.
///
/// # Errors
/// As [`Members::over`].
pub(crate) fn listed(config: &Value, defaults: &Members) -> Result<Vec<Value>> {
    let given = config["members"].as_array().cloned().unwrap_or_default();
    let given = Members {
        configs: given,
        attached: OnceLock::new(),
    };
    given.over(defaults)
}

/// [`PeftMethod::keep_members`]: the kept are numbered anew, their configurations written out with the defaults of the
/// places they had.
///
/// # Errors
/// If there is no such member.
pub(crate) fn kept(
    keep: &[usize],
    mut config: Value,
    mut tensors: Tensors,
    defaults: &Members,
) -> Result<(Value, Tensors)> {
    let all = listed(&config, defaults)?;
    let mut owned: Vec<Tensors> = (0..all.len())
        .map(|i| taken(&mut tensors, &scope(i)))
        .collect();
    let mut members = Vec::new();
    for (new, &old) in keep.iter().enumerate() {
        let (Some(member), Some(own)) = (all.get(old), owned.get_mut(old)) else {
            let detail = format!("there is no member {old}; there are {}", all.len());
            return Err(Error::config("members", detail));
        };
        members.push(member.clone());
        let own = std::mem::take(own).into_iter();
        tensors.extend(own.map(|(k, v)| (format!("{}{k}", scope(new)), v)));
    }
    config["members"] = Value::Array(members);
    Ok((config, tensors))
}

/// The parts of a [`PeftMethod`] that every composition of `self.members` over `$defaults` has.
macro_rules! composition {
    ($defaults:expr) => {
        fn attach(
            &self,
            site: &peft_core::Site,
            _cx: &mut peft_core::Attach<'_>,
        ) -> peft_core::Result<Box<dyn peft_core::Adapter>> {
            let detail = "its members have the adapters";
            Err(peft_core::Error::module(&site.path, detail))
        }

        fn trainer(&self) -> Box<dyn peft_core::TrainHooks> {
            self.members.trainer()
        }

        fn save(&self, params: peft_core::Tensors) -> peft_core::Result<peft_core::Tensors> {
            self.members.save(params)
        }

        fn load(&self, params: peft_core::Tensors) -> peft_core::Result<peft_core::Tensors> {
            self.members.load(params)
        }

        fn members(&self) -> Vec<(String, String)> {
            self.members.named(&$defaults)
        }

        fn keep_members(
            &self,
            keep: &[usize],
            config: peft_core::serde_json::Value,
            params: peft_core::Tensors,
        ) -> peft_core::Result<(peft_core::serde_json::Value, peft_core::Tensors)> {
            $crate::members::kept(keep, config, params, &$defaults)
        }
    };
}
pub(crate) use composition;

/// Every member's hooks, in order.
struct All(Vec<Box<dyn TrainHooks>>);

impl TrainHooks for All {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|h| h.prepare(cx))
    }

    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|h| h.before_forward(cx))
    }

    fn reads_used(&self) -> bool {
        self.0.iter().any(|h| h.reads_used())
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
            let own = hooks.state()?.into_iter();
            all.extend(own.map(|(k, v)| (format!("{}{k}", scope(i)), v)));
        }
        Ok(all)
    }

    fn restore(&mut self, mut state: Tensors) -> Result<()> {
        for (i, hooks) in self.0.iter_mut().enumerate() {
            let own = taken(&mut state, &scope(i));
            hooks.restore(own)?;
        }
        Ok(())
    }
}
