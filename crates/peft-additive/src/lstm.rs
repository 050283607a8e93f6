//! A bidirectional LSTM with the weights and gate order of `torch.nn.LSTM`.

use peft_core::peft_tensor::concat;
use peft_core::{Result, Tensor};

/// Sizes and the path its weights are found under.
pub(crate) struct BiLstm {
    /// In front of the weights' names.
    pub(crate) path: String,
    /// Width of its input.
    pub(crate) inputs: usize,
    /// Width of its state, each way.
    pub(crate) hidden: usize,
    /// Layers.
    pub(crate) layers: usize,
    /// Length of the sequence.
    pub(crate) steps: usize,
}

const DIRECTIONS: [&str; 2] = ["", "_reverse"];

impl BiLstm {
    /// Names and shapes of its weights. A sequence of one step hands nothing on and has no recurrent weights.
    pub(crate) fn shapes(&self) -> Vec<(String, Vec<usize>)> {
        let gates = 4 * self.hidden;
        let mut all = Vec::new();
        for layer in 0..self.layers {
            let inputs = if layer == 0 {
                self.inputs
            } else {
                2 * self.hidden
            };
            for way in DIRECTIONS {
                let mut push = |kind: &str, shape: &[usize]| {
                    all.push((self.name(kind, layer, way), shape.to_vec()));
                };
                push("weight_ih", &[gates, inputs]);
                if self.steps > 1 {
                    push("weight_hh", &[gates, self.hidden]);
                }
                push("bias_ih", &[gates]);
                push("bias_hh", &[gates]);
            }
        }
        all
    }

    fn name(&self, kind: &str, layer: usize, way: &str) -> String {
        format!("{}.{kind}_l{layer}{way}", self.path)
    }

    /// `[steps, inputs] -> [steps, 2 hidden]`; `between` is put between layers (dropout).
    pub(crate) fn run(
        &self,
        x: &Tensor,
        get: &dyn Fn(&str) -> Result<Tensor>,
        between: &dyn Fn(usize, Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = x.clone();
        for layer in 0..self.layers {
            if layer > 0 {
                x = between(layer, x)?;
            }
            let there = self.one_way(&x, layer, false, get)?;
            let back = self.one_way(&x, layer, true, get)?;
            x = concat(&[&there, &back], 1)?;
        }
        Ok(x)
    }

    fn one_way(
        &self,
        x: &Tensor,
        layer: usize,
        reverse: bool,
        get: &dyn Fn(&str) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let weight = |kind: &str| get(&self.name(kind, layer, DIRECTIONS[usize::from(reverse)]));
        let fixed = x
            .matmul_t(&weight("weight_ih")?)?
            .add(&weight("bias_ih")?)?
            .add(&weight("bias_hh")?)?;
        let mut state: Option<(Tensor, Tensor)> = None;
        let mut rows = Vec::with_capacity(self.steps);
        for step in 0..self.steps {
            let at = if reverse { self.steps - 1 - step } else { step };
            let mut gates = fixed.narrow(0, at, 1)?;
            if let Some((h, _)) = &state {
                gates = gates.add(&h.matmul_t(&weight("weight_hh")?)?)?;
            }
            let gate = |i: usize| gates.narrow(1, i * self.hidden, self.hidden);
            let mut cell = gate(0)?.sigmoid()?.mul(&gate(2)?.tanh()?)?;
            if let Some((_, before)) = &state {
                cell = cell.add(&gate(1)?.sigmoid()?.mul(before)?)?;
            }
            let h = gate(3)?.sigmoid()?.mul(&cell.tanh()?)?;
            rows.push(h.clone());
            state = Some((h, cell));
        }
        if reverse {
            rows.reverse();
        }
        let rows: Vec<&Tensor> = rows.iter().collect();
        Ok(concat(&rows, 0)?)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::{Device, Result, Tensor};

    use super::BiLstm;

    /// One unit, two steps. `weight_ih` takes x to the candidate gate alone, `weight_hh` h; the other gates stand at
    /// `sigmoid(0) = 1/2`. Forward: c1 = tanh(1)/2, h1 = tanh(c1)/2, c2 = c1/2 + tanh(-2 + h1)/2.
    #[test]
    fn two_steps_by_hand() {
        let device = Device::cpu();
        let lstm = BiLstm {
            path: "x".to_owned(),
            inputs: 1,
            hidden: 1,
            layers: 1,
            steps: 2,
        };
        let get = |name: &str| -> Result<Tensor> {
            let candidate = [0.0, 0.0, 1.0, 0.0];
            let (values, shape) = if name.contains("weight") {
                (candidate.to_vec(), vec![4, 1])
            } else {
                (vec![0.0; 4], vec![4])
            };
            Ok(Tensor::from_vec(values, &shape, &device)?)
        };
        let x = Tensor::from_vec(vec![1.0, -2.0], &[2, 1], &device).expect("a tensor");
        let out = lstm.run(&x, &get, &|_, x| Ok(x)).expect("runs");
        let step = |x: f32, state: Option<(f32, f32)>| {
            let (h, c) = state.unwrap_or_default();
            let c = (x + h).tanh() / 2.0 + c / 2.0;
            (c.tanh() / 2.0, c)
        };
        let first = step(1.0, None);
        let there = [first, step(-2.0, Some(first))];
        let last = step(-2.0, None);
        let back = [step(1.0, Some(last)), last];
        let wanted = [there[0].0, back[0].0, there[1].0, back[1].0];
        for (got, wanted) in out.to_vec().expect("values").iter().zip(wanted) {
            assert!((got - wanted).abs() < 1e-6, "{got} {wanted}");
        }
    }
}
