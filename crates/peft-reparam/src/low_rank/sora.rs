//! SoRA: a pair of thin matrices with a gate on each direction, which training drives to zero where it can.
//!
//! # Paper
//! Sparse Low-rank Adaptation of Pre-trained Language Models, arXiv 2311.11696, sections 3.1 and 3.2.
//!
//! # Formula
//! `y = W x + b + s B (g * A dropout(x))`, g `[r]`; merged, `W' = W + s B diag(g) A`. Each step moves g as every other
//! parameter and then takes the proximal step `g <- sign(g) max(|g| - eta lambda, 0)`, eta the step's learning rate.
//!
//! # Saved keys
//! LoRA's, and `<module>.lora_gate [r]`. With `prune_on_save` the directions whose gate is zero are left out (one stays
//! where all are), and loading puts zeros in their places.
//!
//! # Defaults and their source
//! g normal with deviation 1 (the reference code, TsinghuaC3I/SoRA). `sparse_lambda = 0.375`: the reference scripts'
//! threshold of 3e-4 at their learning rate of 8e-4. `lambda_schedule = "linear"` goes from `sparse_lambda` to
//! `max_lambda` in `lambda_num` equal stages over the run; the scripts have 0 to 7e-4 in 7 stages at 1.2e-3, so
//! `max_lambda` 0.583. They take lora_alpha 16 at rank 8, weight decay 0.1 and clip gradients at 0.1. Gates have no
//! weight decay.
//!
//! # Differences from HF
//! HF PEFT has no SoRA. The reference code's threshold leaves eta out and zeroes every gate in `(lambda, 2 lambda)`,
//! because it compares again after it has subtracted; its gates have an optimiser of their own.
//!
//! # Limits
//! The starts `pissa`, `olora` and `orthogonal` count on the bare product B A and are refused. eta is the run's rate
//! also where a rule of the run gives the gates another.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Error, GroupRule, Init, Injector, ModuleKind, ModuleTree, Param, ParamGroups,
    PeftMethod, Result, Site, Tensor, Tensors, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::{Factors, LowRank, Pair};

/// SoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct SoRa {
    /// Strength of the pull towards zero, at least 0; the start of a schedule.
    pub sparse_lambda: f64,
    /// `linear`, or none: `sparse_lambda` throughout.
    pub lambda_schedule: Option<String>,
    /// The end of the schedule.
    pub max_lambda: f64,
    /// Stages of the schedule, at least 1.
    pub lambda_num: u64,
    /// Whether a file leaves out the directions whose gate is zero.
    pub prune_on_save: bool,
    /// LoRA's fields.
    #[serde(flatten)]
    pub factors: LowRank,
    #[serde(skip)]
    gates: Arc<Mutex<Vec<Gate>>>,
}

/// One module's gate.
#[derive(Clone, Debug)]
struct Gate {
    param: Param,
    /// In front of the names of the module's parameters on disk.
    prefix: String,
    rank: usize,
}

impl Default for SoRa {
    fn default() -> Self {
        Self {
            sparse_lambda: 0.375,
            lambda_schedule: None,
            max_lambda: 0.583,
            lambda_num: 7,
            prune_on_save: false,
            factors: LowRank::default(),
            gates: Arc::default(),
        }
    }
}

register!(
    SoRa,
    id = "sora",
    title = "SoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "SORA",
    paper = "arXiv 2311.11696",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

const GATE: &str = "lora_gate";

impl SoRa {
    fn check(&self) -> Result<()> {
        self.factors.check(&[])?;
        self.factors.check_start()?;
        let lambdas = [self.sparse_lambda, self.max_lambda];
        for (field, value) in ["sparse_lambda", "max_lambda"].into_iter().zip(lambdas) {
            if !(value >= 0.0 && value.is_finite()) {
                let detail = format!("{value}: has to be 0 or more");
                return Err(Error::config(field, detail));
            }
        }
        if self.lambda_num == 0 {
            return Err(Error::config("lambda_num", "0: has to be at least 1"));
        }
        match self.lambda_schedule.as_deref() {
            None | Some("linear") => Ok(()),
            Some(other) => {
                let detail = format!("{other:?} is not one of null, linear");
                Err(Error::config("lambda_schedule", detail))
            }
        }
    }

    fn gated(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Pair> {
        let pair = self.factors.pair(site, cx)?;
        let rank = pair.rank();
        let gate = cx.param(GATE, &[rank], &Init::Normal { std: 1.0 })?;
        self.all().push(Gate {
            param: gate.clone(),
            prefix: format!("base_model.model.{}.", site.path),
            rank,
        });
        Ok(pair.acting(Arc::new(move |Factors { a, b, scaling }, _| {
            // A gate for each column of B is one for each row of A.
            let b = b.mul(&gate.tensor())?;
            Ok(Factors { a, b, scaling })
        })))
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Gate>> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// lambda in the stage of the run that `step` is in.
    fn lambda(&self, step: u64, total: u64) -> f64 {
        if self.lambda_schedule.is_none() || self.lambda_num < 2 {
            return self.sparse_lambda;
        }
        let last = self.lambda_num - 1;
        let stage = (step * self.lambda_num / total.max(1)).min(last);
        self.sparse_lambda + (self.max_lambda - self.sparse_lambda) * stage as f64 / last as f64
    }
}

/// What has a place for each direction, and along which axis.
const BY_DIRECTION: [(&str, usize); 5] = [
    (GATE, 0),
    ("lora_A.weight", 0),
    ("lora_embedding_A", 0),
    ("lora_B.weight", 1),
    ("lora_embedding_B", 1),
];

/// `f` of a value with its directions as rows.
fn rows(value: &Tensor, axis: usize, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    if value.rank() == 1 {
        let y = f(&value.reshape(&[value.numel(), 1])?)?;
        return Ok(y.reshape(&[y.numel()])?);
    }
    if axis == 0 {
        f(value)
    } else {
        Ok(f(&value.t()?)?.t()?)
    }
}

impl PeftMethod for SoRa {
    fn kinds(&self) -> &'static [ModuleKind] {
        LowRank::KINDS
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.check()?;
        let sites = self.sites(cx.tree(), cx.common())?;
        self.factors
            .inject(sites, cx, |site, cx| self.gated(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(self.gated(site, cx)?))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Proximal(self.clone()))
    }

    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        for Gate { prefix, .. } in self.all().iter().filter(|_| self.prune_on_save) {
            let Some(gate) = params.get(&format!("{prefix}{GATE}")) else {
                continue;
            };
            let gates = gate.to_vec()?;
            let mut kept: Vec<u32> = (0..gates.len() as u32).collect();
            kept.retain(|&i| gates[i as usize] != 0.0);
            if kept.is_empty() {
                kept.push(0);
            }
            for (name, axis) in BY_DIRECTION {
                if let Some(value) = params.get_mut(&format!("{prefix}{name}")) {
                    *value = rows(value, axis, |v| Ok(v.gather_rows(&kept)?))?;
                }
            }
        }
        Ok(params)
    }

    fn load(&self, mut params: Tensors) -> Result<Tensors> {
        for Gate { prefix, rank, .. } in self.all().iter() {
            let places = BY_DIRECTION.map(|(name, axis)| (format!("{prefix}{name}"), axis));
            let held = places
                .iter()
                .filter_map(|(key, axis)| Some(params.get(key)?.shape().get(*axis).copied()));
            let held: BTreeSet<Option<usize>> = held.collect();
            // A file that does not agree with itself is left as it is: its shapes will be refused.
            let Some(n) = held.first().copied().flatten() else {
                continue;
            };
            if held.len() > 1 || !(1..*rank).contains(&n) {
                continue;
            }
            let kept: Vec<u32> = (0..n as u32).collect();
            for (key, axis) in places {
                if let Some(value) = params.get_mut(&key) {
                    *value = rows(value, axis, |v| Ok(v.scatter_rows(&kept, *rank)?))?;
                }
            }
        }
        Ok(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.factors.finish_config(config, tree);
    }
}

/// The proximal step behind each of the optimiser's.
struct Proximal(SoRa);

/// `sign(v) max(|v| - by, 0)`
fn soft_threshold(v: &Tensor, by: f32) -> Result<Tensor> {
    Ok(v.affine(1.0, -by)?
        .relu()?
        .sub(&v.affine(-1.0, -by)?.relu()?)?)
}

impl TrainHooks for Proximal {
    fn param_groups(&self, groups: &mut ParamGroups) {
        groups.rules.push(GroupRule {
            pattern: format!(r"\.{GATE}$"),
            learning_rate: 1.0,
            weight_decay: Some(0.0),
        });
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let by = (cx.learning_rate * self.0.lambda(cx.step, cx.total_steps)) as f32;
        for Gate { param, .. } in self.0.all().iter() {
            if param.is_trainable() && by > 0.0 {
                param.set(soft_threshold(&param.tensor().detach(), by)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::ndarray::{Array1, array};
    use peft_core::serde_json::json;
    use peft_core::{Base, Device, Network, Pass};

    fn base() -> Network {
        let w = array![[1.0, 2.0], [3.0, 4.0]];
        Network::new(Base::custom().linear("fc", w, None).expect("a base"))
    }

    fn network(prune: bool) -> Network {
        let mut network = base();
        let config = json!({"peft_type": "SORA", "r": 3, "lora_alpha": 3, "prune_on_save": prune,
            "target_modules": ["fc"]});
        network.attach("a", &config, 3).expect("attaches");
        network
    }

    fn filled(network: &Network) {
        let array = |suffix: &str, value: peft_core::ndarray::ArrayD<f32>| {
            let mut all = network.parameters().into_iter();
            let param = all
                .find(|p| p.key().ends_with(suffix))
                .expect("the parameter");
            param
                .set(Tensor::from_array(value, network.device()).expect("a tensor"))
                .expect("the shape fits");
        };
        array(
            "lora_A.weight",
            array![[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]].into_dyn(),
        );
        array(
            "lora_B.weight",
            array![[1.0, 5.0, 0.0], [0.0, 5.0, 1.0]].into_dyn(),
        );
        array("lora_gate", array![2.0, 0.0, -1.0].into_dyn());
    }

    fn run(network: &Network) -> Vec<f32> {
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        network
            .run("fc", &x, &Pass::eval())
            .expect("runs")
            .to_vec()
            .expect("values")
    }

    /// x = (1, 1): W x = (3, 7); A x = (1, 2, 2); gated (2, 0, -2); B of that (2, -2); s = 1.
    #[test]
    fn by_hand() {
        let network = network(false);
        filled(&network);
        assert_eq!(run(&network), [5.0, 5.0]);
    }

    /// At threshold 1; the reference code gives 0 for 1.2 and 1.9, and leaves 1 as it is.
    #[test]
    fn the_proximal_step_is_the_soft_threshold() {
        let v: Array1<f32> = array![0.5, 1.0, 1.25, 1.75, -2.5, -0.25, 3.0];
        let v = Tensor::from_array(v, &Device::cpu()).expect("a tensor");
        let got = soft_threshold(&v, 1.0)
            .expect("a tensor")
            .to_vec()
            .expect("values");
        assert_eq!(got, [0.0, 0.0, 0.25, 0.75, -1.5, 0.0, 2.0]);
    }

    #[test]
    fn the_schedule_has_equal_stages() {
        let method = SoRa {
            lambda_schedule: Some("linear".to_owned()),
            sparse_lambda: 0.0,
            max_lambda: 1.0,
            lambda_num: 5,
            ..SoRa::default()
        };
        let at = |step| method.lambda(step, 100);
        assert_eq!(
            [0, 19, 20, 59, 80, 99, 100].map(at),
            [0.0, 0.0, 0.25, 0.5, 1.0, 1.0, 1.0]
        );
    }

    /// The file of a pruned adapter has two directions; loaded, it does the same.
    #[test]
    fn a_pruned_file_does_the_same() {
        let network = network(true);
        filled(&network);
        let (config, tensors) = network.export("a").expect("exports");
        assert_eq!(tensors["base_model.model.fc.lora_A.weight"].shape(), [2, 2]);
        assert_eq!(
            tensors["base_model.model.fc.lora_B.weight"]
                .to_vec()
                .expect("values"),
            [1.0, 0.0, 0.0, 1.0]
        );
        assert_eq!(
            tensors["base_model.model.fc.lora_gate"]
                .to_vec()
                .expect("values"),
            [2.0, -1.0]
        );
        let mut other = base();
        other
            .load("a", &config, tensors.clone(), true)
            .expect("loads");
        assert_eq!(run(&other), [5.0, 5.0]);
        let again = other.export("a").expect("exports").1;
        assert_eq!(
            again["base_model.model.fc.lora_gate"]
                .to_vec()
                .expect("values"),
            [2.0, -1.0]
        );
    }
}
