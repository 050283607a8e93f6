//! AdaLoRA: a change in the form of a singular value decomposition, whose budget of ranks moves to where it counts.
//!
//! # Paper
//! AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512, sections 3.1 to 3.3.
//!
//! # Formula
//! `y = W x + s B (E ∘ A) x` with `s = lora_alpha / (init_r + 1e-5)`: the rows of A `[r, in]` and the columns of B
//! `[out, r]` are kept near orthonormal by a penalty, E `[r, 1]` holds the singular values. Each step every parameter w
//! with gradient g gets a sensitivity `|w g|`, its running mean I (`beta1`) and the running mean U of its distance from I
//! (`beta2`); a triplet's score is that of its value plus the means over its row and column of `I U`. The budget falls
//! from `init_r` to `target_r` per module along a cubic from step `tinit` to `tfinal` steps before the end, and every
//! `deltaT` steps the values of all triplets of the model that score lowest are set to zero: they may grow again until
//! the last allocation, which stays.
//!
//! # Saved keys
//! `<module>.lora_A [r, in]`, `<module>.lora_B [out, r]`, `<module>.lora_E [r, 1]` of the triplets that are left;
//! `rank_pattern` in the configuration says which those are, as `{"<module>.lora_E": [true, false, ..]}`.
//!
//! # Defaults and their source
//! target_r 8, init_r 12, lora_alpha 8, betas 0.85, orth_reg_weight 0.5, deltaT 1, tinit and tfinal 0, A and B normal
//! with standard deviation 0.02, E zero: HF PEFT 0.21. `total_step` is filled in from the run. The paper's runs set
//! lora_alpha 32, orth_reg_weight 0.1 and a learning rate of 5e-4 to 1e-3; with HF's defaults `train.learning_rate =
//! 2e-3` is a good start, with tinit a tenth and tfinal a third of the steps. A and B are small at first, so that short
//! runs want far more: 60 steps on MiniLM learned at 5e-2 (0.75) and not at 1e-2 (docs/comparison.md).
//!
//! # Differences from HF
//! The budget is updated by the training loop itself, after each step and with that step's number; nothing has to be
//! called. Of triplets with equal scores only as many are masked as the budget asks for. The penalty counts once per
//! step, however many batches it has.
//!
//! # Limits
//! Linear and Conv1D modules. `r` is ignored, as in HF; `use_dora` and `loftq_config` are refused.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Common, Device, Error, Init, Injector, ModuleTree, PeftMethod, Result, Site,
    Tensor, Tensors, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::budget::{self, Schedule, Sensitivity};
use crate::fields;
use crate::triplets::Triplets;

/// AdaLoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[allow(non_snake_case, reason = "the names of HF's fields")]
pub struct AdaLora {
    /// Mean rank at the end.
    pub target_r: usize,
    /// Rank at the start.
    pub init_r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Dropout on the input of A.
    pub lora_dropout: f32,
    /// Steps before the budget falls.
    pub tinit: u64,
    /// Steps after it has fallen.
    pub tfinal: u64,
    /// Steps from one allocation to the next.
    pub deltaT: u64,
    /// Decay of the sensitivity's mean.
    pub beta1: f64,
    /// Decay of the mean distance from it.
    pub beta2: f64,
    /// Weight of the penalty on factors that are not orthonormal.
    pub orth_reg_weight: f32,
    /// Steps in all; the run's if null.
    pub total_step: Option<u64>,
    /// Which triplets are left, by module.
    pub rank_pattern: Option<Value>,
    /// Whether E starts at zero; without, all three are normal, for tests.
    pub init_lora_weights: bool,
    /// Whether the weight is stored `[in, out]`; found out from the model, kept for the file.
    pub fan_in_fan_out: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    #[serde(skip)]
    state: Arc<Mutex<State>>,
}

impl Default for AdaLora {
    fn default() -> Self {
        let others = json!({
            "alpha_pattern": {}, "bias": "none", "exclude_modules": null, "layers_pattern": null,
            "layers_to_transform": null, "loftq_config": {}, "modules_to_save": null, "r": 8, "target_modules": null,
            "use_dora": false, "use_rslora": false
        });
        Self {
            target_r: 8,
            init_r: 12,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            tinit: 0,
            tfinal: 0,
            deltaT: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            rank_pattern: None,
            init_lora_weights: true,
            fan_in_fan_out: false,
            others: others.as_object().cloned().unwrap_or_default(),
            state: Arc::default(),
        }
    }
}

register!(
    AdaLora,
    id = "adalora",
    title = "AdaLoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "ADALORA",
    paper = "arXiv 2303.10512",
    example = r#"{"init_r": 3, "target_r": 2, "target_modules": ["q_proj", "v_proj"]}"#,
);

/// What training finds out, shared by the method, which saves it, and its hooks.
#[derive(Debug, Default)]
struct State {
    modules: Vec<Triplets>,
    total_step: Option<u64>,
}

impl AdaLora {
    fn check(&self, common: &Common) -> Result<()> {
        let wrong = |field: &str, detail: &str| Err(Error::config(field, detail));
        fields::probability("lora_dropout", self.lora_dropout)?;
        fields::finite("lora_alpha", self.lora_alpha)?;
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return wrong(field, "has to be between 0 and 1");
            }
        }
        if !(self.orth_reg_weight >= 0.0 && self.orth_reg_weight.is_finite()) {
            return wrong("orth_reg_weight", "has to be at least 0");
        }
        if self.init_r == 0 {
            return wrong("init_r", "has to be at least 1");
        }
        if self.target_r > self.init_r {
            let detail = format!("{} is above init_r; 0 to {}", self.target_r, self.init_r);
            // HF's own default of `target_r` is above many a rank; training goes on with the first then.
            common.unused(Error::config("target_r", detail))?;
        }
        if self.deltaT == 0 {
            return wrong("deltaT", "has to be at least 1");
        }
        let set = |field: &&str| {
            let value = self.others.get(*field);
            value.is_some_and(|v| ![json!(null), json!(false), json!({})].contains(v))
        };
        match ["use_dora", "loftq_config"].iter().find(|f| set(f)) {
            Some(field) => wrong(field, "does not go with this method"),
            None => Ok(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The rank at a module: what a saved pattern leaves of it.
    fn rank_at(&self, path: &str) -> Result<usize> {
        let wrong = |detail: String| Err(Error::config("rank_pattern", detail));
        let Some(pattern) = &self.rank_pattern else {
            return Ok(self.init_r);
        };
        let Value::Object(pattern) = pattern else {
            return wrong(format!("expected a table, got {pattern}"));
        };
        let key = format!("{path}.lora_E");
        // HF's live pattern has the adapter's name behind the key.
        let named = |k: &str| k == key || k.strip_prefix(&key).is_some_and(|k| k.starts_with('.'));
        let Some((_, mask)) = pattern.iter().find(|(k, _)| named(k)) else {
            return wrong(format!("has no entry {key:?}"));
        };
        let mask = mask.as_array().map(|m| m.iter().map(Value::as_bool));
        match mask.and_then(|mut m| m.try_fold(0, |sum, kept| Some(sum + usize::from(kept?)))) {
            Some(rank) => Ok(rank),
            None => wrong(format!("{key:?} has to be a list of true and false")),
        }
    }
}

impl PeftMethod for AdaLora {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.check(cx.common())?;
        let sites = self.sites(cx.tree(), cx.common())?;
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let rank = self.rank_at(&site.path)?;
        let (normal, e) = if self.init_lora_weights {
            (Init::Normal { std: 0.02 }, Init::Zeros)
        } else {
            (Init::Normal { std: 1.0 }, Init::Normal { std: 1.0 })
        };
        // HF scales by the first rank for good; an alpha of 0 means the rank itself.
        let alpha = if self.lora_alpha > 0.0 {
            self.lora_alpha
        } else {
            self.init_r as f64
        };
        let triplets = Triplets {
            path: site.path.clone(),
            a: cx.param("lora_A", &[rank, site.in_features], &normal)?,
            b: cx.param("lora_B", &[site.out_features, rank], &normal)?,
            e: cx.param("lora_E", &[rank, 1], &e)?,
            kept: None,
            scaling: alpha as f32 / (self.init_r as f32 + 1e-5),
            dropout: self.lora_dropout,
        };
        self.state().modules.push(triplets.clone());
        Ok(Box::new(triplets))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Allocator {
            config: self.clone(),
            sensitivity: Sensitivity::default(),
        })
    }

    /// Leaves out the triplets that were masked.
    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        let state = self.state();
        state
            .modules
            .iter()
            .try_for_each(|m| m.prune(&mut params))?;
        Ok(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        fields::fan_in_fan_out(config, tree);
        fields::whole(config, "lora_alpha");
        let state = self.state();
        if let (None, Some(total)) = (self.total_step, state.total_step) {
            config.insert("total_step".to_owned(), json!(total));
        }
        let masks = state
            .modules
            .iter()
            .filter_map(|m| Some((m, m.kept.as_ref()?)));
        let pattern: Map<String, Value> = masks
            .map(|(m, kept)| (format!("{}.lora_E", m.path), json!(kept)))
            .collect();
        if !pattern.is_empty() {
            config.insert("rank_pattern".to_owned(), Value::Object(pattern));
        }
    }
}

struct Allocator {
    config: AdaLora,
    sensitivity: Sensitivity,
}

impl Allocator {
    fn total(&self, cx: &TrainCx<'_>) -> u64 {
        self.config.total_step.unwrap_or(cx.total_steps)
    }

    fn observe(&mut self, cx: &TrainCx<'_>, modules: &[Triplets]) -> Result<()> {
        let own = || modules.iter().flat_map(|m| [&m.a, &m.b, &m.e]);
        let betas = (self.config.beta1 as f32, self.config.beta2 as f32);
        for (param, grad) in cx.params.iter().zip(cx.used) {
            let Some(grad) = grad else { continue };
            if own().any(|p| p.key() == param.key()) {
                self.sensitivity.observe(param, grad, betas)?;
            }
        }
        Ok(())
    }
}

impl TrainHooks for Allocator {
    fn reads_used(&self) -> bool {
        true
    }

    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let total = self.total(cx);
        let (tinit, tfinal) = (self.config.tinit, self.config.tfinal);
        if tinit.saturating_add(tfinal) < total {
            return Ok(());
        }
        let detail = format!(
            "{tinit}, and tfinal {tfinal}, leave none of the {total} steps for the budget to fall: together at most {}",
            total.saturating_sub(1)
        );
        Err(Error::config("tinit", detail))
    }

    fn penalty(&self, _cx: &TrainCx<'_>) -> Result<Option<Tensor>> {
        let state = self.config.state();
        let mut norms = Vec::new();
        for module in &state.modules {
            norms.extend(module.distances()?);
        }
        // Modules that no triplet is left of count along, as in HF.
        let factors = 2 * state.modules.len();
        let weight = self.config.orth_reg_weight / factors.max(1) as f32;
        let mut sum: Option<Tensor> = None;
        for norm in norms.into_iter().filter(|_| weight > 0.0) {
            let norm = norm.scale(weight)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&norm)?,
                None => norm,
            });
        }
        Ok(sum)
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let total = self.total(cx);
        let schedule = Schedule {
            start: self.config.tinit,
            end: total.saturating_sub(self.config.tfinal),
            every: self.config.deltaT,
        };
        let shared = self.config.state.clone();
        let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
        state.total_step = Some(total);
        if cx.step < schedule.end {
            self.observe(cx, &state.modules)?;
        }
        let first: usize = state.modules.iter().map(Triplets::rank).sum();
        let last = (self.config.target_r * state.modules.len()).min(first);
        let (budget, now) = schedule.at(cx.step, first, last);
        if now {
            let scores: Vec<_> = state
                .modules
                .iter()
                .map(|m| m.scores(&self.sensitivity))
                .collect();
            let kept = budget::keep_best(&scores, budget);
            for (module, kept) in state.modules.iter_mut().zip(kept) {
                module.kept = Some(kept);
            }
        }
        // After the last choice it stands, against whatever the optimiser's moments still move.
        if now || cx.step > schedule.end {
            state.modules.iter().try_for_each(Triplets::mask)?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Tensors> {
        let mut all = Tensors::new();
        for (key, value) in self.sensitivity.state()? {
            all.insert(format!("sensitivity/{key}"), value);
        }
        for module in &self.config.state().modules {
            if let Some(kept) = &module.kept {
                let kept = budget::mask(kept, &[kept.len()], &Device::cpu())?;
                all.insert(format!("kept/{}", module.e.key()), kept);
            }
        }
        Ok(all)
    }

    fn restore(&mut self, state: Tensors) -> Result<()> {
        for (key, value) in state {
            match key.split_once('/') {
                Some(("sensitivity", key)) => self.sensitivity.restore(key, &value)?,
                Some(("kept", key)) => {
                    let values = value.to_vec()?;
                    let mut state = self.config.state();
                    let module = state.modules.iter_mut().find(|m| m.e.key() == key);
                    if let Some(module) = module.filter(|m| m.rank() == values.len()) {
                        module.kept = Some(values.iter().map(|v| *v != 0.0).collect());
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}
