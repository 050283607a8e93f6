//! A change of a weight as a sum of triplets: a value times a column times a row, of which some may be dropped.

use peft_core::{Adapter, Call, Param, Result, Tensor, Tensors};

use crate::budget::{self, Sensitivity};

/// An adapter `y = W x + s B (E ∘ A) x`. Clones share the parameters.
#[derive(Clone, Debug)]
pub(crate) struct Triplets {
    /// The module's.
    pub(crate) path: String,
    /// `[r, in]`
    pub(crate) a: Param,
    /// `[out, r]`
    pub(crate) b: Param,
    /// `[r, 1]`
    pub(crate) e: Param,
    /// Which triplets the last choice left; None = all.
    pub(crate) kept: Option<Vec<bool>>,
    pub(crate) scaling: f32,
    /// On the input of A.
    pub(crate) dropout: f32,
}

impl Triplets {
    /// The triplets that are left, by number; None = all.
    fn rows(&self) -> Option<Vec<u32>> {
        let kept = self.kept.as_ref()?;
        let rows = kept.iter().zip(0..).filter(|(kept, _)| **kept);
        Some(rows.map(|(_, row)| row).collect())
    }

    /// Triplets there are, dropped ones included.
    pub(crate) fn rank(&self) -> usize {
        self.e.numel()
    }

    /// Zeroes the values of triplets that were masked.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn mask(&self) -> Result<()> {
        let Some(kept) = &self.kept else {
            return Ok(());
        };
        let value = self.e.tensor().detach();
        let mask = budget::mask(kept, value.shape(), value.device())?;
        self.e.set(value.mul(&mask)?)
    }

    /// Leaves the dropped triplets out of what is saved.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn prune(&self, params: &mut Tensors) -> Result<()> {
        let Some(rows) = self.rows() else {
            return Ok(());
        };
        for (name, by_column) in [("lora_A", false), ("lora_E", false), ("lora_B", true)] {
            let key = format!("base_model.model.{}.{name}", self.path);
            if let Some(value) = params.get_mut(&key) {
                *value = if by_column {
                    value.t()?.gather_rows(&rows)?.t()?
                } else {
                    value.gather_rows(&rows)?
                };
            }
        }
        Ok(())
    }

    /// Each triplet's score: that of its value, and the means over its row of A and its column of B.
    pub(crate) fn scores(&self, of: &Sensitivity) -> Vec<f64> {
        let rank = self.rank();
        let inside = self.a.numel() / rank.max(1);
        let out = self.b.numel() / rank.max(1);
        let score = |i: usize| {
            of.score(&self.e, i..i + 1)
                + of.score(&self.a, i * inside..(i + 1) * inside)
                + of.score(&self.b, (0..out).map(|j| j * rank + i))
        };
        (0..rank).map(score).collect()
    }

    /// How far the rows of A and the columns of B are from orthonormal: Frobenius norms of `A Aᵀ - I` and `Bᵀ B - I`.
    ///
    /// # Errors
    /// Whatever the device says.
    pub(crate) fn distances(&self) -> Result<Vec<Tensor>> {
        let n = self.rank();
        if n == 0 {
            return Ok(Vec::new());
        }
        let (a, b) = (self.a.tensor(), self.b.tensor());
        let diagonal: Vec<bool> = (0..n * n).map(|i| i % (n + 1) == 0).collect();
        let identity = budget::mask(&diagonal, &[n, n], a.device())?;
        let products = [a.matmul_t(&a)?, b.t_matmul(&b)?];
        let norm = |p: Tensor| Ok(p.sub(&identity)?.square()?.sum_all()?.sqrt()?);
        products.into_iter().map(norm).collect()
    }

    fn change(&self, call: &Call<'_>) -> Result<Tensor> {
        let x = call.dropout(call.x()?, self.dropout)?;
        let e = self.e.tensor().reshape(&[self.rank()])?;
        let inner = x.matmul_t(&self.a.tensor())?.mul(&e)?.scale(self.scaling)?;
        Ok(inner.matmul_t(&self.b.tensor())?)
    }
}

impl Adapter for Triplets {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        if self.rank() == 0 {
            return Ok(Some(w));
        }
        let values = self.a.tensor().mul(&self.e.tensor())?;
        let change = self.b.tensor().matmul(&values)?.scale(self.scaling)?;
        Ok(Some(w.plus(&change)?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        if self.rank() == 0 {
            return call.base();
        }
        Ok(call.base()?.add(&self.change(call)?)?)
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        if self.rank() == 0 {
            return Ok(None);
        }
        self.change(call).map(Some)
    }

    fn by_rows(&self) -> bool {
        self.dropout == 0.0
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Grads, Network, Pass, TrainCx};

    use super::*;

    fn param(key: &str, values: &[f32], shape: &[usize]) -> Param {
        let value = Tensor::from_vec(values.to_vec(), shape, &peft_core::Device::cpu());
        Param::new(key, &value.expect("a tensor"), true)
    }

    fn triplets() -> Triplets {
        Triplets {
            path: "fc".to_owned(),
            a: param("a", &[1.0, 0.0, 1.0, 2.0], &[2, 2]),
            b: param("b", &[3.0, 0.0], &[1, 2]),
            e: param("e", &[2.0, -1.0], &[2, 1]),
            kept: None,
            scaling: 0.5,
            dropout: 0.0,
        }
    }

    /// A Aᵀ - I = (0 1; 1 4), of norm sqrt 18; Bᵀ B - I = (8 0; 0 -1), of norm sqrt 65.
    #[test]
    fn distances_by_hand() {
        let distances = triplets().distances().expect("runs");
        let values = distances.iter().map(|d| d.item().expect("a value").powi(2));
        let values: Vec<f32> = values.collect();
        assert!((values[0] - 18.0).abs() < 1e-4 && (values[1] - 65.0).abs() < 1e-4);
    }

    /// 0.5 (3 * 2 * (1 0) + 0) on top of (1 1).
    #[test]
    fn the_change_by_hand() {
        let w = param("w", &[1.0, 1.0], &[1, 2]).tensor().detach();
        let changed = triplets().weight(w).expect("runs").expect("changes");
        assert_eq!(changed.to_vec().expect("values"), [4.0, 1.0]);
    }

    /// One step with betas 0.5: sensitivity |w g| = 2, 6 of the values; mean 1, 3, distance from it 1, 3, spread 0.5, 1.5.
    #[test]
    fn scores_by_hand() {
        let (triplets, mut of) = (triplets(), Sensitivity::default());
        let grad = |values: &[f32], shape: &[usize]| param("", values, shape).tensor().detach();
        let e = grad(&[1.0, -6.0], &[2, 1]);
        of.observe(&triplets.e, &e, (0.5, 0.5)).expect("runs");
        assert_eq!(triplets.scores(&of), [0.5, 4.5]);
        // Row 1 of A: |1 * 4| and |2 * 0|: the mean of 2 * 1 and 0.
        let a = grad(&[0.0, 0.0, 4.0, 0.0], &[2, 2]);
        of.observe(&triplets.a, &a, (0.5, 0.5)).expect("runs");
        assert_eq!(triplets.scores(&of), [0.5, 5.5]);
        // Column 0 of B: |3 * 2| is 3 * 1.5.
        let b = grad(&[2.0, 0.0], &[1, 2]);
        of.observe(&triplets.b, &b, (0.5, 0.5)).expect("runs");
        assert_eq!(triplets.scores(&of), [5.0, 5.5]);
    }

    fn network(more: Value) -> Network {
        let layer = |i: usize| Array2::from_shape_fn((4, 3), |(r, c)| ((r + i * c) % 3) as f32);
        let base = Base::custom().linear("fc1", layer(1), None);
        let base = base.and_then(|b| b.linear("fc2", layer(2), None));
        let mut config = json!({"peft_type": "ADALORA", "init_r": 3, "target_r": 1, "tinit": 1, "tfinal": 2,
            "init_lora_weights": false, "target_modules": ["fc1", "fc2"]});
        for (key, value) in more.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        let mut network = Network::new(base.expect("a base"));
        network.attach("a", &config, 5).expect("attaches");
        network
    }

    fn outputs(network: &Network) -> Vec<f32> {
        let x = Tensor::from_vec(vec![1.0, -1.0, 0.5], &[1, 3], network.device());
        let x = x.expect("a tensor");
        let run = |path| network.run(path, &x, &Pass::eval()).expect("runs").to_vec();
        [run("fc1"), run("fc2")]
            .map(|y| y.expect("values"))
            .concat()
    }

    /// Triplets that are not zeroed, of 6.
    fn left(network: &Network) -> usize {
        let values = network.parameters().into_iter();
        let values = values.filter(|p| p.key().ends_with("lora_E"));
        let values = values.flat_map(|p| p.tensor().to_vec().expect("values"));
        values.filter(|v| *v != 0.0).count()
    }

    /// Ten steps: 6 triplets up to step 1, then 2 + 4 ((8 - t) / 7)^3 rounded down, 2 from step 8 on.
    #[test]
    fn the_ranks_fall_to_the_budget_and_stay() {
        let mut network = network(json!({}));
        let mut hooks = network.trainers();
        let mut seen = Vec::new();
        for step in 1..=10 {
            let params = network.parameters();
            let mut used = Vec::new();
            for (i, param) in params.iter().enumerate() {
                let shape = param.shape();
                let key = peft_core::RngKey::new(step).fork_n(i as u64);
                let grad = Tensor::normal(key, 0.0, 1.0, &shape, network.device());
                let grad = grad.expect("a gradient");
                let moved = grad
                    .scale(-0.1)
                    .and_then(|g| param.tensor().detach().add(&g));
                param.set(moved.expect("a step")).expect("fits");
                used.push(Some(grad));
            }
            let mut cx = TrainCx {
                step,
                total_steps: 10,
                network: &network,
                params: &params,
                grads: &mut Grads::default(),
                used: &used,
                learning_rate: 0.1,
                data: None,
                reset_optimizer: &Cell::new(false),
            };
            hooks[0].1.after_step(&mut cx).expect("allocates");
            seen.push(left(&network));
        }
        assert_eq!(seen, [6, 4, 3, 2, 2, 2, 2, 2, 2, 2]);
        // The file holds those two, and is the same function with nothing masked.
        let trained = outputs(&network);
        let (config, tensors) = network.export("a").expect("exports");
        assert_eq!(config["total_step"], 10);
        let rank: usize = ["fc1", "fc2"]
            .map(|m| tensors[&format!("base_model.model.{m}.lora_E")].numel())
            .iter()
            .sum();
        assert_eq!(rank, 2);
        network.delete("a").expect("deletes");
        network.load("b", &config, tensors, true).expect("loads");
        let close = |(a, b): (&f32, &f32)| (a - b).abs() < 1e-5;
        assert!(outputs(&network).iter().zip(&trained).all(close));
        assert_eq!(left(&network), 2);
    }
}
