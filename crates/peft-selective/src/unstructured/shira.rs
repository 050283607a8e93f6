//! SHiRA: sparse high-rank adapters: as many entries of a weight as a low-rank adapter has, trained in place.
//!
//! # Paper
//! Sparse High Rank Adapters, arXiv 2406.13175, section 3.
//!
//! # Formula
//! `W' = W + D` with `r (in + out)` entries of D trained. `mask_type` says which, module by module: `random`; `struct`, the
//! diagonal and evenly spread rows and columns; `weight_magnitude`, the largest |W|; `grad`, the largest |g| of the mean
//! gradient over some rows; `snip`, the largest |g W|.
//!
//! # Saved keys
//! `<module>.shira_weight [r (in + out)]` and `<module>.shira_indices [2, r (in + out)]` (rows, then columns), as in HF's
//! files.
//!
//! # Defaults and their source
//! `r` 32, `mask_type` random, zeros to start with: HF PEFT 0.21. `grad` and `snip` look at 64 rows. Learning rate: that of
//! LoRA, 2e-4 to 5e-4 in the paper; 1e-3 on small models.
//!
//! # Differences from HF
//! HF knows `random` and masks given as code; the other names are this library's, after the paper's. With a `random_seed`
//! the entries are HF's (`torch.randperm`); without one HF draws other ones each time, here the run's seed decides.
//!
//! # Limits
//! `grad` and `snip` start with random entries, which the first rows replace when training begins; a loop that cannot be
//! asked about its rows keeps them.

use std::sync::OnceLock;

use peft_core::peft_tensor::torch_rng::TorchRng;
use peft_core::serde_json::Value;
use peft_core::{
    Adapter, Attach, Error, Init, ModuleTree, PeftMethod, Result, Site, Targets, Tensors, TrainCx,
    TrainHooks, matcher, register,
};
use serde::{Deserialize, Serialize};

use crate::select::{select, spread};
use crate::sparse::{At, Difference, Differences, Names, check_pairs};

/// SHiRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Shira {
    /// As many entries are trained as a low-rank adapter of this rank has.
    pub r: usize,
    /// Which entries.
    pub mask_type: String,
    /// Seed of `random`.
    pub random_seed: Option<u64>,
    /// HF's note on weights stored transposed; the model says so itself.
    pub fan_in_fan_out: bool,
    /// Whether the entries start at 0.
    pub init_weights: bool,
    /// Modules to act on: names, a regular expression or `all-linear`.
    pub target_modules: Option<Value>,
    /// Modules trained and saved whole.
    pub modules_to_save: Option<Value>,
    #[serde(skip)]
    found: Differences,
    /// Set once entries were made up here instead of read from a file.
    #[serde(skip)]
    fresh: OnceLock<()>,
}

impl Default for Shira {
    fn default() -> Self {
        Self {
            r: 32,
            mask_type: "random".to_owned(),
            random_seed: None,
            fan_in_fan_out: false,
            init_weights: true,
            target_modules: None,
            modules_to_save: None,
            found: Differences::default(),
            fresh: OnceLock::new(),
        }
    }
}

register!(
    Shira,
    id = "shira",
    title = "SHiRA",
    family = Selective,
    subfamily = "unstructured",
    peft_type = "SHIRA",
    paper = "arXiv 2406.13175",
    example = r#"{"r": 2, "target_modules": ["q_proj", "v_proj"]}"#,
);

/// HF's names of the two tensors.
const NAMES: Names = Names {
    values: "shira_weight",
    indices: "shira_indices",
};
const MASKS: [&str; 5] = ["random", "struct", "weight_magnitude", "grad", "snip"];
/// Rows that masks by gradient look at.
const ROWS: usize = 64;

impl PeftMethod for Shira {
    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        let names = match tree.facts().model_type.as_str() {
            "phi" => &["q_proj", "v_proj"],
            other => matcher::default_targets(other)?,
        };
        Some(Targets::Names(
            names.iter().map(|&n| n.to_owned()).collect(),
        ))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (out, inside) = (site.out_features, site.in_features);
        let most = out * inside / (out + inside).max(1);
        if self.r == 0 || self.r > most {
            let detail = format!(
                "module `{}` of {out} x {inside} takes from 1 to {most}, so that r (in + out) entries are there; it is {}",
                site.path, self.r
            );
            return Err(Error::config("r", detail));
        }
        let at = self.found.make(site, cx, NAMES, false)?;
        if cx.common().inference_mode {
            // The file says which entries, also where HF was given a mask under another name.
            return Ok(Box::new(At(at)));
        }
        if !MASKS.contains(&self.mask_type.as_str()) {
            let detail = format!("{:?} is not one of {}", self.mask_type, MASKS.join(", "));
            return Err(Error::config("mask_type", detail));
        }
        let _ = self.fresh.set(());
        at.keep(&self.first(&at)?, true)?;
        if !self.init_weights {
            let start = Init::Normal { std: 1.0 };
            let start = start.tensor(&[self.entries(&at)], at.key(), &cx.device())?;
            at.values().set(start)?;
        }
        Ok(Box::new(At(at)))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Hooks(self.clone()))
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        let params = check_pairs(NAMES, params)?;
        for d in self.found.all() {
            let key = format!("base_model.model.{}.{}", d.path(), NAMES.values);
            let wanted = self.entries(&d);
            match params.get(&key).map(|values| values.numel()) {
                Some(n) if n != wanted => {
                    let detail = format!("{key} has {n} entries, r = {} means {wanted}", self.r);
                    return Err(Error::config("r", detail));
                }
                _ => {}
            }
        }
        Ok(params)
    }
}

impl Shira {
    fn entries(&self, at: &Difference) -> usize {
        let (out, inside) = at.dims();
        self.r * (out + inside)
    }

    /// The entries to start with, counted row by row, in order.
    fn first(&self, at: &Difference) -> Result<Vec<u32>> {
        let count = self.entries(at);
        Ok(match self.mask_type.as_str() {
            "struct" => structured(at.dims(), count),
            "weight_magnitude" => largest(count, at.base_magnitudes()?)?,
            _ => {
                let order = match self.random_seed {
                    Some(seed) => TorchRng::new(seed).permutation(at.size()),
                    None => at.key().permutation(at.size()),
                };
                let mut flat: Vec<u32> = order.iter().take(count).map(|&i| i as u32).collect();
                flat.sort_unstable();
                flat
            }
        })
    }
}

fn largest(count: usize, scores: Vec<f32>) -> Result<Vec<u32>> {
    let chosen = select(1, count, true, |_| Ok(scores.clone()))?;
    Ok(chosen.into_iter().flatten().collect())
}

/// The diagonal, then rows and columns in turn, evenly spread, until there are `count` entries.
fn structured((rows, cols): (usize, usize), count: usize) -> Vec<u32> {
    let mut taken = vec![false; rows * cols];
    let diagonal = (0..rows.min(cols)).map(|i| i * cols + i);
    // Halves, then quarters, then eighths: any number of them is spread.
    let lines = (0..usize::BITS - rows.max(cols).leading_zeros()).flat_map(|level| {
        let parts = 1usize << level;
        (0..parts).map(move |i| (2 * i + 1, 2 * parts))
    });
    let crosses = lines.flat_map(|(i, parts)| {
        let (row, col) = (rows * i / parts, cols * i / parts);
        (0..cols)
            .map(move |c| row * cols + c)
            .chain((0..rows).map(move |r| r * cols + col))
    });
    // What even the last level may leave out.
    let rest = 0..rows * cols;
    let mut left = count;
    for at in diagonal.chain(crosses).chain(rest) {
        if left == 0 {
            break;
        }
        if !std::mem::replace(&mut taken[at], true) {
            left -= 1;
        }
    }
    (0..taken.len() as u32)
        .filter(|&i| taken[i as usize])
        .collect()
}

struct Hooks(Shira);

impl TrainHooks for Hooks {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let Shira {
            mask_type, found, ..
        } = &self.0;
        let (all, snip) = (found.all(), mask_type == "snip");
        let ours = self.0.fresh.get().is_some() && all.iter().any(|d| d.values().is_trainable());
        let (Some(data), true) = (cx.data, ours && (snip || mask_type == "grad")) else {
            return Ok(());
        };
        all.iter().try_for_each(|d| d.widen())?;
        let rows = spread(data.rows(), Some(ROWS), 1);
        let sums = found.over_gradients(data, &rows, |sum, grad| {
            sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
        })?;
        for (d, mut scores) in all.iter().zip(sums) {
            scores.iter_mut().for_each(|s| *s = s.abs());
            if snip {
                let weights = d.base_magnitudes()?;
                scores.iter_mut().zip(weights).for_each(|(s, w)| *s *= w);
            }
            d.keep(&largest(self.0.entries(d), scores)?, true)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};

    use super::structured;
    use crate::testing::{Rows, descend, network};

    fn config(mask: &str) -> Value {
        json!({"peft_type": "SHIRA", "r": 1, "mask_type": mask, "random_seed": 7, "target_modules": ["fc"]})
    }

    fn places(network: &peft_core::Network) -> Vec<usize> {
        let (_, tensors) = network.export("a").expect("exports");
        let all = tensors["base_model.model.fc.shira_indices"].to_vec();
        let all = all.expect("values");
        let (rows, cols) = all.split_at(all.len() / 2);
        let flat = rows.iter().zip(cols);
        flat.map(|(r, c)| *r as usize * 4 + *c as usize).collect()
    }

    fn weights() -> Array2<f32> {
        Array2::from_shape_fn((5, 4), |(i, j)| ((i * 4 + j) as f32 - 9.5) * 0.1)
    }

    /// `torch.randperm(20, generator=torch.Generator().manual_seed(7))[:9]`, sorted.
    #[test]
    fn random_entries_are_those_of_torch() {
        assert_eq!(
            places(&network(weights(), &config("random"))),
            [1, 3, 4, 7, 9, 12, 15, 17, 19]
        );
    }

    /// The gradient of each row of W is the mean input (1, -8, 0.5, 4); W is largest at both ends, the first of equals taken.
    #[test]
    fn by_weight_gradient_and_both() {
        let inputs = vec![vec![1.0, -8.0, 0.5, 2.0], vec![1.0, -8.0, 0.5, 6.0]];
        for (mask, want) in [
            ("weight_magnitude", [0, 1, 2, 3, 4, 16, 17, 18, 19]),
            ("grad", [1, 3, 5, 7, 9, 11, 13, 15, 17]),
            ("snip", [0, 1, 3, 5, 7, 13, 15, 17, 19]),
        ] {
            let network = network(weights(), &config(mask));
            let rows = Rows {
                network: &network,
                inputs: inputs.clone(),
            };
            descend(&rows, 1, 0.1, true, |_| ()).expect("trains");
            assert_eq!(places(&network), want, "{mask}");
        }
    }

    #[test]
    fn structured_entries_hold_the_diagonal_and_lines() {
        assert_eq!(structured((3, 3), 3), [0, 4, 8]);
        assert_eq!(structured((4, 3), 7), [0, 1, 4, 6, 7, 8, 10]);
        assert_eq!(structured((4, 3), 12), (0..12).collect::<Vec<u32>>());
    }

    #[test]
    fn ranks_and_masks_that_cannot_be() {
        for (field, value) in [
            ("r", json!(3)),
            ("r", json!(0)),
            ("mask_type", json!("fisher")),
        ] {
            let mut config = config("random");
            config[field] = value;
            let mut network = peft_core::Network::new(
                peft_core::Base::custom()
                    .linear("fc", weights(), None)
                    .expect("a layer"),
            );
            let error = network.attach("a", &config, 0).expect_err("refused");
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
