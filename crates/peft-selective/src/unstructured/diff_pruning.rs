//! Diff pruning: learn a change of the weights together with which of it to keep.
//!
//! # Paper
//! Parameter-Efficient Transfer Learning with Diff Pruning, arXiv 2012.07463, section 3.
//!
//! # Formula
//! `W' = W + z z_g D`. Gates are hard-concrete: `z = min(1, max(0, s (r - l) + l))`,
//! `s = sigmoid((log u - log(1 - u) + alpha) / beta)` with u uniform while training and `s = sigmoid(alpha)` otherwise; each
//! weight has one, and with `structured` each module's weight has one more, z_g. The penalty is the expected number of
//! open gates, `l0_penalty sum_i sigma(alpha_i - c) sigma(alpha_g - c)`, `c = beta log(-l / r)`. After `prune_at` of the steps
//! the `sparsity` largest of `|z z_g D|` of all target weights together are kept as they are and trained on without gates.
//!
//! # Saved keys
//! `<module>.sparse_values [k]` and `<module>.sparse_indices [2, k]` (rows, then columns, of the weight as `[out, in]` or
//! `[rows, dim]`; a vector is one row). Before the pruning: whatever of `z z_g D` is not zero.
//!
//! # Defaults and their source
//! `sparsity` 0.005, `l0_penalty` 1.25e-7, `alpha_init` 5, l = -1.5, r = 1.5, beta = 1, structured: the paper's. `prune_at`
//! 0.3, so that the kept entries have most of a learning rate that falls. The gates' learning rate is `gate_lr_factor` 30
//! times the run's and they do not decay: the authors give gates 0.1 and D 5e-5 or less with BERT-large. All linear
//! layers. Learning rate: 3e-3 on small models; at 1e-3 what is pruned away is not made up for. It wants
//! a few hundred steps: 60 end near the head alone (docs/comparison.md).
//!
//! # Differences from HF
//! HF PEFT has no such method. The authors' code adds `sum_g sigma(alpha_g - c)` to the penalty instead of multiplying; the
//! product is the paper's. Their gradient, written by hand, is the gates' true one, as here. One run does all three
//! stages, with one schedule of the learning rate.
//!
//! # Limits
//! Until the pruning three numbers of the weight's size are held for each; the gates' memory is freed when the run ends.
//! Weight decay pulls the changes to 0, not the weights.

use std::sync::Arc;

use peft_core::{
    Adapter, Attach, Call, Error, GroupRule, Init, ModuleKind, ModuleTree, Param, ParamGroups,
    PeftMethod, Result, RngKey, Site, Targets, Tensor, Tensors, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::fields::Places;
use crate::gates::HardConcrete;
use crate::select::phase_end;
use crate::sparse::{At, Difference, Differences, KINDS, SPARSE, Shared, check_pairs};

/// Diff pruning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct DiffPruning {
    /// Share of the target weights that is changed in the end.
    pub sparsity: f64,
    /// Share of the steps after which the gates are replaced by a fixed mask.
    pub prune_at: f64,
    /// Weight of the expected number of open gates in the loss.
    pub l0_penalty: f64,
    /// Whether each module has a gate of its own besides.
    pub structured: bool,
    /// Start of the gates' logits.
    pub alpha_init: f64,
    /// l and r, the ends the gates are stretched to: below 0 and above 1.
    pub stretch: [f64; 2],
    /// Temperature of the gates.
    pub beta: f64,
    /// Factor on the run's learning rate for the gates' logits.
    pub gate_lr_factor: f64,
    /// Where it acts.
    #[serde(flatten)]
    pub places: Places,
    #[serde(skip)]
    found: Differences,
    #[serde(skip)]
    gates: Shared<Gated>,
}

impl Default for DiffPruning {
    fn default() -> Self {
        Self {
            sparsity: 0.005,
            prune_at: 0.3,
            l0_penalty: 1.25e-7,
            structured: true,
            alpha_init: 5.0,
            stretch: [-1.5, 1.5],
            beta: 1.0,
            gate_lr_factor: 30.0,
            places: Places::default(),
            found: Differences::default(),
            gates: Shared::default(),
        }
    }
}

register!(
    DiffPruning,
    id = "diff_pruning",
    title = "Diff pruning",
    family = Selective,
    subfamily = "unstructured",
    peft_type = "DIFF_PRUNING",
    paper = "arXiv 2012.07463",
    example = r#"{"sparsity": 0.3, "alpha_init": 0.5, "target_modules": ["v_proj", "up_proj"]}"#,
);

const ALPHA: &str = "gate_alpha";
const GROUP: &str = "gate_group";

impl PeftMethod for DiffPruning {
    fn kinds(&self) -> &'static [ModuleKind] {
        KINDS
    }

    fn default_targets(&self, _tree: &ModuleTree) -> Option<Targets> {
        Some(Targets::AllLinear)
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let [l, r] = self.stretch;
        if !(l < 0.0 && r > 1.0) {
            let detail = format!("has to be [below 0, above 1]; it is [{l}, {r}]");
            return Err(Error::config("stretch", detail));
        }
        for (field, value) in [("beta", self.beta), ("gate_lr_factor", self.gate_lr_factor)] {
            if !(value > 0.0 && value.is_finite()) {
                let detail = format!("has to be above 0; it is {value}");
                return Err(Error::config(field, detail));
            }
        }
        let at = self.found.make(site, cx, SPARSE, true)?;
        // A file holds what was kept, and no gates.
        if cx.common().inference_mode {
            return Ok(Box::new(At(at)));
        }
        let key = |name: &str| format!("base_model.model.{}.{name}", site.path);
        let (rows, cols) = at.dims();
        let start = Init::Constant(self.alpha_init as f32);
        let alpha = cx.transient(&key(ALPHA), &[rows, cols], &start)?;
        let group = match self.structured {
            true => Some(cx.transient(&key(GROUP), &[1, 1], &start)?),
            false => None,
        };
        let gate = HardConcrete {
            l: l as f32,
            r: r as f32,
            beta: self.beta as f32,
        };
        let gated = Gated {
            at,
            alpha,
            group,
            gate,
        };
        Ok(Box::new(Pruned(self.gates.add(gated))))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Hooks(self.clone()))
    }

    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        for gated in self.gates.all().iter().filter(|g| g.at.is_dense()) {
            let values = format!("base_model.model.{}.{}", gated.at.path(), SPARSE.values);
            if let Some(d) = params.get_mut(&values) {
                let change = gated.change(None)?.detach();
                *d = change.reshape(&[change.numel()])?;
            }
        }
        self.found.save(params)
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        check_pairs(SPARSE, params)
    }
}

/// A module's change with its gates.
struct Gated {
    /// D, all of it until the pruning.
    at: Arc<Difference>,
    /// Logits of z, `[rows, cols]`.
    alpha: Param,
    /// The logit of z_g.
    group: Option<Param>,
    gate: HardConcrete,
}

impl Gated {
    /// `z z_g D`, with gates drawn by `key`; without one they are as they stand outside of training.
    fn change(&self, key: Option<RngKey>) -> Result<Tensor> {
        let (rows, cols) = self.at.dims();
        let gates = |logits: &Param, label: &str| {
            let key = key.map(|k| k.fork(label));
            self.gate.sample(&logits.tensor(), key)
        };
        let all = self.at.values().tensor().reshape(&[rows, cols])?;
        let change = all.mul(&gates(&self.alpha, ALPHA)?)?;
        match &self.group {
            Some(group) => Ok(change.mul(&gates(group, GROUP)?)?),
            None => Ok(change),
        }
    }

    /// `W + z z_g D`.
    fn on(&self, w: Tensor, key: Option<RngKey>) -> Result<Tensor> {
        let change = self.change(key)?.reshape(w.shape())?;
        Ok(w.plus(&change)?)
    }
}

/// The gated change as an adapter, until the mask is fixed.
struct Pruned(Arc<Gated>);

impl Adapter for Pruned {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        match self.0.at.is_dense() {
            true => self.0.on(w, None).map(Some),
            false => At(self.0.at.clone()).weight(w),
        }
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let gated = &self.0;
        if !gated.at.is_dense() {
            return At(gated.at.clone()).forward(call);
        }
        let key = call.pass().train.then_some(call.pass().key);
        call.through_weight(&Sampled {
            gated,
            key: key.map(|k| k.fork(gated.at.path())),
        })
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        if !self.0.at.is_dense() {
            return At(self.0.at.clone()).added(call);
        }
        if self.0.at.is_vector() || call.is_embedding() {
            return Ok(None);
        }
        Ok(Some(call.x()?.matmul_t(&self.0.change(None)?)?))
    }
}

/// The weight with one pass's sample of the gates.
struct Sampled<'a> {
    gated: &'a Gated,
    key: Option<RngKey>,
}

impl Adapter for Sampled<'_> {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        self.gated.on(w, self.key).map(Some)
    }
}

struct Hooks(DiffPruning);

impl TrainHooks for Hooks {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        if self.0.found.is_dense() {
            self.0.found.budget("sparsity", self.0.sparsity)?;
            phase_end("prune_at", self.0.prune_at, cx.total_steps)?;
        }
        Ok(())
    }

    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let (found, gates) = (&self.0.found, self.0.gates.all());
        if found.is_dense() {
            if cx.step < phase_end("prune_at", self.0.prune_at, cx.total_steps)? {
                return Ok(());
            }
            let budget = found.budget("sparsity", self.0.sparsity)?;
            for gated in &gates {
                let change = gated.change(None)?.detach();
                gated.at.values().set(change.reshape(&[change.numel()])?)?;
            }
            found.choose(budget, true, false, |_, d| d.magnitudes())?;
        }
        // Also after a restart from a checkpoint.
        for gated in gates {
            gated.alpha.set_trainable(false);
            gated.group.iter().for_each(|g| g.set_trainable(false));
        }
        Ok(())
    }

    fn param_groups(&self, groups: &mut ParamGroups) {
        groups.rules.push(GroupRule {
            pattern: format!(r"\.({ALPHA}|{GROUP})$"),
            learning_rate: self.0.gate_lr_factor,
            weight_decay: Some(0.0),
        });
    }

    fn penalty(&self, _cx: &TrainCx<'_>) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for gated in self.0.gates.all().iter().filter(|g| g.at.is_dense()) {
            let mut open = gated.gate.open(&gated.alpha.tensor())?.sum_all()?;
            if let Some(group) = &gated.group {
                open = open.mul(&gated.gate.open(&group.tensor())?.sum_all()?)?;
            }
            sum = Some(match sum {
                Some(sum) => sum.add(&open)?,
                None => open,
            });
        }
        Ok(match sum {
            Some(sum) => Some(sum.scale(self.0.l0_penalty as f32)?),
            None => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;

    use crate::testing::{Rows, descend, network};

    /// Open gates, gradients of (1, -4): after two steps of 0.5 the change is (-1, 4); the larger half stays and trains on.
    #[test]
    fn pruned_to_the_largest_change() {
        let config = json!({"peft_type": "DIFF_PRUNING", "sparsity": 0.5, "alpha_init": 50.0});
        let network = network(array![[1.0, 2.0]], &config);
        assert_eq!(network.parameters().len(), 3);
        let rows = Rows {
            network: &network,
            inputs: vec![vec![1.0, -4.0]],
        };
        descend(&rows, 4, 0.5, false, |_| ()).expect("trains");
        let (_, tensors) = network.export("a").expect("exports");
        let key = |name: &str| format!("base_model.model.fc.{name}");
        let values = |name: &str| tensors[&key(name)].to_vec().expect("values");
        assert_eq!(values("sparse_indices"), [0.0, 1.0]);
        assert_eq!(values("sparse_values"), [8.0]);
        assert_eq!(network.parameters().len(), 1);
        assert_eq!(tensors.len(), 2);
    }
}
