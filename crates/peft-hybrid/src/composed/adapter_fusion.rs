//! AdapterFusion: several trained adapters, frozen, and attention over what each would add.
//!
//! # Paper
//! AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247, section 3.
//!
//! # Formula
//! At a junction with N members adding `a_1 .. a_N` to the sublayer's output h, residual x, z what the last member reads:
//! `p = softmax_n((Q z + q) . (K a_n + k) / T)`; `y = LN(h + sum_n p_n V a_n + x)`. Q, K, V `[d, d]`; T is 1 (with
//! `temperature`: from 50 down to 1 over the first 1000 steps of training).
//! Penalty: `0.01 sum |V - I|^2`.
//!
//! # Saved keys
//! `<junction>.adapter_fusion_layer.query.weight [d, d]`, `.query.bias [d]`, `.key.weight`, `.key.bias`, `.value.weight`
//! with AdapterHub's place names; member i's own keys, as they were trained, behind `members.<i>.`.
//!
//! # Defaults and their source
//! AdapterHub's `dynamic`: Q, K normal with deviation 0.02, biases zero, V the identity with 1e-6 off its diagonal,
//! regularised. `static` is `value = false, regularization = false`. A learning rate of 5e-5 (the paper's) to 2e-4 suits
//! long runs; 60 steps on MiniLM took 1e-3 (docs/comparison.md). Stage one trains each adapter on its own; stage two takes them by folder: `members = [{path = "runs/a"}, {path =
//! "runs/b"}]`. Heads of the members are left behind: stage two trains one of its own.
//!
//! # Differences from HF
//! HF PEFT has no AdapterFusion. AdapterHub's fusion folders are read and written beside those of their members.
//!
//! # Limits
//! Members have to add to sublayers' outputs (bottlenecks with the model's norm behind them), all at the same places.
//! Cannot be merged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use peft_core::hub::{self, Hub, HubModel};
use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Error, Init, Injector, ModuleKind, ModuleTree, Param, PeftMethod, Result,
    Site, Tensor, Tensors, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::fusion::{Hooks, Layer};
use crate::members::{self, Members, scope, taken};

/// AdapterFusion's fields of `adapter_config.json`, named as AdapterHub names them.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterFusion {
    /// Trained adapters: their configurations with their values among this one's, or `{"path": folder}` to take them from.
    pub members: Members,
    /// Whether queries are projected.
    pub query: bool,
    /// Whether keys are projected.
    pub key: bool,
    /// Whether values are projected.
    pub value: bool,
    /// Whether queries are the sublayer's output itself, before the model's norm.
    pub query_before_ln: bool,
    /// Whether V is drawn to the identity while training.
    pub regularization: bool,
    /// Whether each member's part has the sublayer's output added before V, and keys too.
    pub residual_before: bool,
    /// Whether training starts with a flat attention.
    pub temperature: bool,
    /// Whether V comes before the weighted sum; the result is the same.
    pub value_before_softmax: bool,
    /// Whether V starts at the identity.
    pub value_initialized: bool,
    /// Whether the junction's residual is added once more, as AdapterHub does with parallel members.
    pub residual_twice: bool,
    /// Dropout on scores.
    pub dropout_prob: Option<f32>,
    #[serde(skip)]
    shared: Shared,
}

/// What the adapters and the hooks of one attached fusion have in common.
#[derive(Default)]
struct Shared {
    values: std::sync::Mutex<Vec<Param>>,
    /// Bits of what is added to the temperature 1.
    heat: Arc<AtomicU32>,
    configs: std::sync::OnceLock<Vec<Value>>,
}

impl Default for AdapterFusion {
    fn default() -> Self {
        Self {
            members: Members::default(),
            query: true,
            key: true,
            value: true,
            query_before_ln: false,
            regularization: true,
            residual_before: false,
            temperature: false,
            value_before_softmax: true,
            value_initialized: true,
            residual_twice: false,
            dropout_prob: None,
            shared: Shared::default(),
        }
    }
}

register!(
    AdapterFusion,
    id = "adapter_fusion",
    title = "AdapterFusion",
    family = Hybrid,
    subfamily = "composed",
    peft_type = "ADAPTER_FUSION",
    paper = "arXiv 2005.00247",
    example = r#"{"members": [
        {"peft_type": "PFEIFFER", "reduction_factor": 4},
        {"peft_type": "PFEIFFER", "reduction_factor": 2}
    ]}"#,
    identity_at_init = false,
    mergeable = false,
    hub = Hub {
        claims: |config| config["architecture"] == "fusion",
        owns: |_, _| false,
        read: read_hub,
        write: write_hub,
    },
);

/// Fields of a member's configuration that make it train or bring more than itself.
const BESIDES: [&str; 5] = [
    "bias",
    "modules_to_save",
    "path",
    "task_type",
    "trainable_token_indices",
];

impl AdapterFusion {
    /// A member's configuration, and its tensors where it is another adapter's folder.
    fn resolved(member: &Value, cx: &Injector<'_>) -> Result<(Value, Option<Tensors>)> {
        let (mut config, tensors) = match member["path"].as_str() {
            None => (member.clone(), None),
            Some(path) => {
                let (config, mut tensors) = cx.adapter(path)?;
                let heads = config["modules_to_save"].as_array().cloned();
                let heads = heads.unwrap_or_default();
                let trains_head = config["task_type"] == "SEQ_CLS";
                tensors.retain(|key, _| {
                    let module = key.rsplit('.').nth(1).unwrap_or_default();
                    let head = trains_head && ["classifier", "score"].contains(&module);
                    let saved = |name: &Value| {
                        let name = name.as_str().unwrap_or_default();
                        key.contains(&format!(".{name}."))
                    };
                    !head && !heads.iter().any(saved)
                });
                (config, Some(tensors))
            }
        };
        let Some(fields) = config.as_object_mut() else {
            return Err(Error::config("members", "has to be a list of tables"));
        };
        fields.retain(|field, _| !BESIDES.contains(&field.as_str()));
        fields.insert("inference_mode".to_owned(), json!(true));
        Ok((config, tensors))
    }

    fn layer(
        &self,
        site: &Site,
        members: Vec<Arc<dyn Adapter>>,
        cx: &mut Attach<'_>,
    ) -> Result<Layer> {
        let d = site.out_features;
        let normal = Init::Normal { std: 0.02 };
        let mut projection = |name: &str, wanted: bool| -> Result<Option<(Param, Param)>> {
            if !wanted {
                return Ok(None);
            }
            let name = format!("adapter_fusion_layer.{name}");
            let weight = cx.param(&format!("{name}.weight"), &[d, d], &normal)?;
            let bias = cx.param(&format!("{name}.bias"), &[d], &Init::Zeros)?;
            Ok(Some((weight, bias)))
        };
        let (query, key) = (
            projection("query", self.query)?,
            projection("key", self.key)?,
        );
        let start = if self.value_initialized {
            let mut near = vec![1e-6; d * d];
            near.iter_mut().step_by(d + 1).for_each(|v| *v = 1.0);
            Init::Value(Tensor::from_vec(near, &[d, d], &cx.device())?)
        } else {
            normal
        };
        let value = match self.value {
            true => Some(cx.param("adapter_fusion_layer.value.weight", &[d, d], &start)?),
            false => None,
        };
        if let (Some(value), Ok(mut all)) = (&value, self.shared.values.lock()) {
            all.push(value.clone());
        }
        Ok(Layer {
            members,
            query,
            key,
            value,
            before: self.query_before_ln,
            residual_before: self.residual_before,
            twice: self.residual_twice,
            dropout: self.dropout_prob.unwrap_or(0.0),
            heat: self.shared.heat.clone(),
            path: site.path.clone(),
        })
    }
}

impl PeftMethod for AdapterFusion {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        let count = self.members.configs.len();
        if count < 2 {
            let detail = format!("lists {count}; a fusion needs at least 2 trained adapters");
            return Err(Error::config("members", detail));
        }
        if self.dropout_prob.is_some_and(|p| !(0.0..1.0).contains(&p)) {
            return Err(Error::config("dropout_prob", "has to be in [0, 1)"));
        }
        let (mut methods, mut configs) = (Vec::new(), Vec::new());
        let mut places: BTreeMap<String, (Site, Vec<Arc<dyn Adapter>>)> = BTreeMap::new();
        for (i, member) in self.members.configs.iter().enumerate() {
            let (config, tensors) = Self::resolved(member, cx)?;
            let scope = scope(i);
            let placed = cx.capture(|cx| {
                let method = cx.frozen_member(&config, &scope)?;
                if let Some(tensors) = tensors {
                    cx.fill(&*method, &scope, tensors)?;
                }
                methods.push(method);
                Ok(())
            })?;
            for (site, adapter) in placed {
                if site.kind != ModuleKind::Junction {
                    let detail = format!(
                        "entry {i} acts on `{}`, of kind {}; a fusion takes adapters behind sublayers",
                        site.path,
                        site.kind.name()
                    );
                    return Err(Error::config("members", detail));
                }
                let at = places
                    .entry(site.path.clone())
                    .or_insert_with(|| (site, Vec::new()));
                at.1.push(adapter);
            }
            // What was read from elsewhere is kept here; what was given stays as it is.
            configs.push(match member["path"].is_string() {
                true => config,
                false => member.clone(),
            });
        }
        if let Some((path, (_, there))) = places.iter().find(|(_, (_, a))| a.len() != count) {
            let detail = format!(
                "`{path}` has an adapter of {} of the {count} members; a fusion needs all of them in each place",
                there.len()
            );
            return Err(Error::config("members", detail));
        }
        for (site, adapters) in places.into_values() {
            let layer = self.layer(&site, adapters, &mut cx.at(&site))?;
            cx.place(site, Arc::new(layer), false);
        }
        self.members.set(methods);
        let _ = self.shared.configs.set(configs);
        Ok(())
    }

    fn attach(&self, site: &Site, _cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Err(Error::module(&site.path, "a fusion is made from members"))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        let values = self.shared.values.lock();
        Box::new(Hooks {
            values: match (self.regularization, values) {
                (true, Ok(values)) => values.clone(),
                _ => Vec::new(),
            },
            heat: self.temperature.then(|| self.shared.heat.clone()),
        })
    }

    fn save(&self, params: Tensors) -> Result<Tensors> {
        self.members.save(params)
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        self.members.load(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, _tree: &ModuleTree) {
        if let Some(configs) = self.shared.configs.get() {
            config.insert("members".to_owned(), Value::Array(configs.clone()));
        }
    }
}

/// `{"architecture": "fusion", "config": theirs, "members": [their configurations]}` and plain keys, those of members behind
/// `members.<i>.`.
fn read_hub(config: &Value, mut tensors: Tensors) -> Result<(Value, Tensors)> {
    let (mut members, mut out) = (Vec::new(), Tensors::new());
    let mut parallel = false;
    for (i, member) in config["members"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let scope = scope(i);
        let (ours, own) = hub::read(member, taken(&mut tensors, &scope))?;
        parallel = member["is_parallel"] == true;
        members.push(ours);
        out.extend(own.into_iter().map(|(k, v)| (format!("{scope}{k}"), v)));
    }
    out.extend(hub::our_keys(tensors));
    let mut ours = config["config"].clone();
    if let Some(fields) = ours.as_object_mut() {
        fields.insert("members".to_owned(), Value::Array(members));
        // Their parallel adapters bring the residual along, and always ask with it.
        fields.insert(
            "residual_twice".to_owned(),
            json!(parallel && config["config"]["residual_before"] != true),
        );
        if parallel {
            fields.insert("query_before_ln".to_owned(), json!(false));
        }
    }
    Ok((ours, out))
}

fn write_hub(model: &HubModel, config: &Value, mut tensors: Tensors) -> Result<(Value, Tensors)> {
    let (mut members, mut out) = (Vec::new(), Tensors::new());
    for (i, member) in members::listed(config, &Members::default())?
        .iter()
        .enumerate()
    {
        let scope = scope(i);
        let (theirs, own) = hub::write(model, member, taken(&mut tensors, &scope))?;
        out.extend(own.into_iter().map(|(k, v)| (format!("{scope}{k}"), v)));
        members.push(theirs);
    }
    let parallel = members.last().is_some_and(|m| m["is_parallel"] == true);
    if (config["residual_twice"] == true) != (parallel && config["residual_before"] != true) {
        let detail = "AdapterHub adds the residual twice with parallel members, and only with them: this fusion would \
            compute something else there";
        return Err(Error::config("residual_twice", detail));
    }
    out.extend(hub::plain_keys(model, tensors)?);
    const THEIRS: [&str; 10] = [
        "query",
        "key",
        "value",
        "query_before_ln",
        "regularization",
        "residual_before",
        "temperature",
        "value_before_softmax",
        "value_initialized",
        "dropout_prob",
    ];
    let fields: Map<String, Value> = THEIRS
        .iter()
        .map(|f| ((*f).to_owned(), config[*f].clone()))
        .collect();
    Ok((
        json!({"architecture": "fusion", "config": fields, "members": members}),
        out,
    ))
}
