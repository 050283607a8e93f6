//! FISH mask: train the weights that the Fisher information says matter most.
//!
//! # Paper
//! Training Neural Networks with Fixed Sparse Masks, arXiv 2111.09839, section 3.
//!
//! # Formula
//! `F_i = 1/N sum_n (d log p(y_n | x_n) / d W_i)^2` over N rows, one at a time, with their true labels (the empirical
//! Fisher), at the pretrained weights. `W' = W + D` with D nonzero only where F is among the `keep_ratio` largest of all
//! target weights together; the mask stays as it is.
//!
//! # Saved keys
//! `<module>.sparse_values [k]` and `<module>.sparse_indices [2, k]` (rows, then columns, of the weight as `[out, in]` or
//! `[rows, dim]`; a vector is one row). Before training, when no mask is chosen yet: whatever is not zero.
//!
//! # Defaults and their source
//! `keep_ratio` 0.005, the paper's on GLUE; `num_samples` 256, the paper's for images (1024 on GLUE, which gives nearly
//! the same mask at four times the cost); all linear layers. Learning rate: 1e-3.
//!
//! # Differences from HF
//! HF PEFT has no such method.
//!
//! # Limits
//! Choosing the mask costs `num_samples` backward passes of one row, and memory for the gradient of every target weight. A
//! loop of one's own that has no rows to ask about takes the first step's gradient, squared, as one row. Weight decay
//! pulls the changes to 0, not the weights. A head that is trained along is whole.

use peft_core::{Adapter, Attach, PeftMethod, Result, Site, TrainCx, TrainHooks, register};
use serde::{Deserialize, Serialize};

use crate::fields::Places;
use crate::select::spread;
use crate::sparse::{At, Differences, SPARSE, sparse_method};

/// FISH mask's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct FishMask {
    /// Share of the target weights to train.
    pub keep_ratio: f64,
    /// Training rows the Fisher information is measured on; all of them if there are fewer.
    pub num_samples: usize,
    /// Where it acts.
    #[serde(flatten)]
    pub places: Places,
    #[serde(skip)]
    found: Differences,
}

impl Default for FishMask {
    fn default() -> Self {
        Self {
            keep_ratio: 0.005,
            num_samples: 256,
            places: Places::default(),
            found: Differences::default(),
        }
    }
}

register!(
    FishMask,
    id = "fish_mask",
    title = "FISH mask",
    family = Selective,
    subfamily = "unstructured",
    peft_type = "FISH_MASK",
    paper = "arXiv 2111.09839",
    example = r#"{"keep_ratio": 0.2, "num_samples": 4, "target_modules": ["q_proj", "down_proj"]}"#,
);

impl PeftMethod for FishMask {
    sparse_method!();

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(At(self.found.make(site, cx, SPARSE, true)?)))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Hooks(self.clone()))
    }
}

struct Hooks(FishMask);

fn square(sum: &mut [f32], grad: &[f32]) {
    sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g * g);
}

impl Hooks {
    fn choose(&self, fisher: &[Vec<f32>]) -> Result<()> {
        let budget = self.0.found.budget("keep_ratio", self.0.keep_ratio)?;
        self.0
            .found
            .choose(budget, true, true, |i, _| Ok(fisher[i].clone()))
    }
}

impl TrainHooks for Hooks {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let found = &self.0.found;
        if !found.is_dense() {
            return Ok(());
        }
        found.budget("keep_ratio", self.0.keep_ratio)?;
        let Some(data) = cx.data else { return Ok(()) };
        let rows = spread(data.rows(), Some(self.0.num_samples.max(1)), 1);
        self.choose(&found.over_gradients(data, &rows, square)?)
    }

    fn after_backward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let found = &self.0.found;
        if !found.is_dense() {
            return Ok(());
        }
        found.choose_from_step(cx.grads, square, |fisher| self.choose(fisher))
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;

    use crate::testing::{Rows, descend, network};

    /// The rows' gradients are (3, 1) and (-3, 1): their mean says the second weight, their squares say the first.
    #[test]
    fn squares_of_each_row_not_of_their_mean() {
        let config = json!({"peft_type": "FISH_MASK", "keep_ratio": 0.5});
        let network = network(array![[1.0, 2.0]], &config);
        assert_eq!(network.parameters()[0].numel(), 2);
        let inputs = vec![vec![3.0, 1.0], vec![-3.0, 1.0], vec![6.0, 1.0]];
        let rows = Rows {
            network: &network,
            inputs,
        };
        descend(&rows, 2, 0.5, true, |_| ()).expect("trains");
        let (_, tensors) = network.export("a").expect("exports");
        let key = |name: &str| format!("base_model.model.fc.{name}");
        let values = |name: &str| tensors[&key(name)].to_vec().expect("values");
        assert_eq!(values("sparse_indices"), [0.0, 0.0]);
        // Two steps of 0.5 against a mean gradient of 2.
        assert_eq!(values("sparse_values"), [-2.0]);
    }

    /// Without rows to ask about, the first step's gradient decides, and that step already moves the chosen weight alone.
    #[test]
    fn the_first_step_where_there_is_no_data() {
        let config = json!({"peft_type": "FISH_MASK", "keep_ratio": 0.5});
        let network = network(array![[1.0, 2.0]], &config);
        let rows = Rows {
            network: &network,
            inputs: vec![vec![1.0, -4.0]],
        };
        descend(&rows, 1, 0.5, false, |_| ()).expect("trains");
        let params = network.adapter_parameters("a").expect("there");
        assert_eq!(params[0].tensor().to_vec().expect("values"), [2.0]);
        assert_eq!(params[1].tensor().to_vec().expect("values"), [0.0, 1.0]);
    }
}
