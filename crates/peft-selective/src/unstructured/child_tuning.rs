//! Child-Tuning: train a child of the network: drawn anew at each step (F), or chosen for the task (D).
//!
//! # Paper
//! Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, arXiv 2109.05687, section 2.
//!
//! # Formula
//! F: at each step `g <- g M / p`, M drawn from Bernoulli(p) for every entry. D: before training, `F_i` is the mean of the
//! squared gradients of batches, each clipped per module first; only the p largest of all target weights together train.
//!
//! # Saved keys
//! `<module>.sparse_values [k]` and `<module>.sparse_indices [2, k]` (rows, then columns, of the weight as `[out, in]` or
//! `[rows, dim]`; a vector is one row) of every entry that is not zero.
//!
//! # Defaults and their source
//! `mode` D, which is ahead of F throughout the paper's table 1; `reserve_p` 0.3, as in the authors' script; Fisher
//! information over all training rows in batches of 16, clipped at 1. All linear layers but the head. Learning rate:
//! that of full fine-tuning, 4e-5 in the paper; up to 1e-4 on small models.
//!
//! # Differences from HF
//! HF PEFT has no such method. The authors' code trains embeddings and head whole (name them in `modules_to_save`), and
//! decays all weights towards 0; here the changes decay, towards the pretrained weights. Exactly the p largest are taken,
//! where a percentile takes all that are equal to the last.
//!
//! # Limits
//! Training needs the memory of full fine-tuning. With F every weight moves in the end, so that a file has the size of the
//! model several times over: merge it. Without rows to ask about, D takes the first step's gradient.

use peft_core::{
    Adapter, Attach, Error, PeftMethod, Result, Site, Tensor, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::fields::Places;
use crate::select::spread;
use crate::sparse::{At, Differences, SPARSE, sparse_method};

/// How the child is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Drawn at each step, without a look at the task.
    F,
    /// Once, by Fisher information on the task.
    #[default]
    D,
}

/// Child-Tuning's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ChildTuning {
    /// F or D.
    pub mode: Mode,
    /// Share of the target weights in the child.
    pub reserve_p: f64,
    /// Training rows D measures on; all if not given.
    pub num_samples: Option<usize>,
    /// Rows whose mean gradient is squared together.
    pub fisher_batch: usize,
    /// Norm each module's gradient is clipped at before it is squared; 0 is no limit.
    pub max_grad_norm: f64,
    /// Where it acts.
    #[serde(flatten)]
    pub places: Places,
    #[serde(skip)]
    found: Differences,
}

impl Default for ChildTuning {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            reserve_p: 0.3,
            num_samples: None,
            fisher_batch: 16,
            max_grad_norm: 1.0,
            places: Places::default(),
            found: Differences::default(),
        }
    }
}

register!(
    ChildTuning,
    id = "child_tuning",
    title = "Child-Tuning",
    family = Selective,
    subfamily = "unstructured",
    peft_type = "CHILD_TUNING",
    paper = "arXiv 2109.05687",
    example = r#"{"target_modules": ["q_proj", "up_proj"]}"#,
);

impl PeftMethod for ChildTuning {
    sparse_method!();

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        if !(self.reserve_p > 0.0 && self.reserve_p <= 1.0) {
            let detail = format!("has to be above 0 and at most 1; it is {}", self.reserve_p);
            return Err(Error::config("reserve_p", detail));
        }
        Ok(Box::new(At(self.found.make(site, cx, SPARSE, true)?)))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Hooks(self.clone()))
    }
}

struct Hooks(ChildTuning);

impl Hooks {
    fn waits(&self) -> bool {
        self.0.mode == Mode::D && self.0.found.is_dense()
    }

    fn choose(&self, fisher: &[Vec<f32>]) -> Result<()> {
        let budget = self.0.found.budget("reserve_p", self.0.reserve_p)?;
        self.0
            .found
            .choose(budget, true, true, |i, _| Ok(fisher[i].clone()))
    }

    /// Adds the square of the gradient, shortened to the limit.
    fn fold(&self) -> impl Fn(&mut [f32], &[f32]) + use<> {
        let limit = self.0.max_grad_norm;
        move |sum, grad| {
            let norm = grad
                .iter()
                .map(|g| f64::from(*g) * f64::from(*g))
                .sum::<f64>()
                .sqrt();
            let factor = if limit > 0.0 {
                (limit / (norm + 1e-6)).min(1.0) as f32
            } else {
                1.0
            };
            for (sum, grad) in sum.iter_mut().zip(grad) {
                let clipped = grad * factor;
                *sum += clipped * clipped;
            }
        }
    }
}

impl TrainHooks for Hooks {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        if !self.waits() {
            return Ok(());
        }
        self.0.found.budget("reserve_p", self.0.reserve_p)?;
        let Some(data) = cx.data else { return Ok(()) };
        let batches = spread(data.rows(), self.0.num_samples, self.0.fisher_batch);
        self.choose(&self.0.found.over_gradients(data, &batches, self.fold())?)
    }

    fn after_backward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let found = &self.0.found;
        if self.waits() {
            return found.choose_from_step(cx.grads, self.fold(), |fisher| self.choose(fisher));
        }
        if self.0.mode == Mode::D {
            return Ok(());
        }
        let p = self.0.reserve_p as f32;
        for d in found.all() {
            let leaf = d.values().tensor();
            let Some(grad) = cx.grads.take(&leaf) else {
                continue;
            };
            let mut drawn = vec![0.0; grad.numel()];
            d.key().fork_n(cx.step).fill_uniform(0.0, 1.0, &mut drawn);
            for u in &mut drawn {
                *u = if *u < p { 1.0 / p } else { 0.0 };
            }
            let mask = Tensor::from_vec(drawn, grad.shape(), grad.device())?;
            cx.grads.set(&leaf, grad.mul(&mask)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::json;

    use crate::testing::{Rows, descend, network};

    /// Of 400 entries with gradient 1, about a quarter moves at the first step, by four times the rate, and others at the
    /// next.
    #[test]
    fn another_child_at_each_step() {
        let config = json!({"peft_type": "CHILD_TUNING", "mode": "F", "reserve_p": 0.25});
        let network = network(Array2::zeros((20, 20)), &config);
        let rows = Rows {
            network: &network,
            inputs: vec![vec![1.0; 20]],
        };
        let value = || network.parameters()[0].tensor().to_vec().expect("values");
        let mut seen = Vec::new();
        descend(&rows, 3, 0.5, false, |_| seen.push(value())).expect("trains");
        let moved: Vec<usize> = (0..400).filter(|&i| seen[1][i] != 0.0).collect();
        assert!((70..130).contains(&moved.len()), "{}", moved.len());
        assert!(moved.iter().all(|&i| seen[1][i] == -2.0));
        assert!((0..400).any(|i| seen[1][i] == 0.0 && seen[2][i] == -2.0));
    }

    /// The mean gradient (0, 1) of the two rows together counts, not each row's (3, 1) and (-3, 1).
    #[test]
    fn the_child_of_the_task() {
        let config = json!({"peft_type": "CHILD_TUNING", "reserve_p": 0.5, "fisher_batch": 2});
        let network = network(array![[1.0, 2.0]], &config);
        let rows = Rows {
            network: &network,
            inputs: vec![vec![3.0, 1.0], vec![-3.0, 1.0]],
        };
        descend(&rows, 2, 0.5, true, |_| ()).expect("trains");
        let params = network.adapter_parameters("a").expect("there");
        assert_eq!(params[0].tensor().to_vec().expect("values"), [-1.0]);
        assert_eq!(params[1].tensor().to_vec().expect("values"), [0.0, 1.0]);
    }
}
