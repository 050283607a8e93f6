//! FourierFT: a weight's change from a few of its frequencies.
//!
//! # Paper
//! Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, arXiv 2405.03003, section 3.
//!
//! # Formula
//! `W' = W + scaling Re(ifft2(F))` with F `[out, in]` zero but for n coefficients, at places drawn once from a seed and the
//! same for all layers of one shape.
//!
//! # Saved keys
//! `<module>.fourierft_spectrum [n]`. The places are not saved: they are the first n of `torch.randperm(out in)` after
//! `manual_seed(random_loc_seed)`, row = place / in, which is repeated here bit for bit.
//!
//! # Defaults and their source
//! 1000 frequencies, scaling 150, seed 777, coefficients normal (zero with `init_weights`, which is false): HF PEFT 0.21.
//! A fresh adapter so changes the model a little; each coefficient moves it by `150 / (out in)`, and learning rates of 1e-2
//! to 1e-1 suit it, as in the paper.
//!
//! # Differences from HF
//! The transform is four small matrix products instead of an FFT, with the same values.
//!
//! # Limits
//! Refused are sides that are no product of two factors up to 2048 (some vocabularies; hidden sizes are), and layers of
//! 214 748 363 weights or more, for which PyTorch draws places in another way. The change is made anew in each pass: merge
//! to generate long texts.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Error, Init, Injector, ModuleTree, Param, PeftMethod, Result, Site, Targets,
    Tensor, matcher, register,
};
use serde::{Deserialize, Serialize};

use crate::change::{Change, Plus};
use crate::fields::{fan_in_fan_out, finite, kept_for_hf, rank_fits};
use crate::fourier::{MOST_PLACES, Plan, first_of_permutation, fits};

/// FourierFT's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct FourierFt {
    /// Coefficients of a layer; `n_frequency_pattern` may set others.
    pub n_frequency: usize,
    /// Factor on the change.
    pub scaling: f64,
    /// Decides the places of the coefficients.
    pub random_loc_seed: i64,
    /// Numbers of coefficients that differ, by pattern.
    pub n_frequency_pattern: Map<String, Value>,
    /// Whether a fresh adapter is the identity.
    pub init_weights: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    #[serde(skip)]
    plans: Plans,
}

impl Default for FourierFt {
    fn default() -> Self {
        Self {
            n_frequency: 1000,
            scaling: 150.0,
            random_loc_seed: 777,
            n_frequency_pattern: Map::new(),
            init_weights: false,
            others: kept_for_hf(&json!({"bias": "none", "fan_in_fan_out": false})),
            plans: Plans::default(),
        }
    }
}

register!(
    FourierFt,
    id = "fourierft",
    title = "FourierFT",
    family = Reparameterized,
    subfamily = "structured",
    peft_type = "FOURIERFT",
    paper = "arXiv 2405.03003",
    example = r#"{"n_frequency": 12, "target_modules": ["q_proj", "v_proj"]}"#,
    identity_at_init = false,
);

const PATTERN: &str = "n_frequency_pattern";

impl FourierFt {
    fn patterns(&self) -> Result<Vec<(String, usize)>> {
        let read = |(key, value): (&String, &Value)| match value.as_u64() {
            Some(n) => Ok((key.clone(), n as usize)),
            None => Err(Error::config(
                format!("{PATTERN}.{key}"),
                format!("{value} is no number of coefficients"),
            )),
        };
        self.n_frequency_pattern.iter().map(read).collect()
    }

    /// The coefficients that the first matching pattern gives a module. HF asks another way here than for ranks:
    /// `re.match(rf".*\.{pattern}$", path)`, or the whole path as it stands.
    fn of_pattern(patterns: &[(String, usize)], path: &str) -> Result<Option<usize>> {
        for (key, n) in patterns {
            if matcher::compile(PATTERN, &format!(r"(?:.*\.{key}$).*"))?.is_match(path) {
                return Ok(Some(*n));
            }
        }
        let whole = patterns.iter().find(|(key, _)| key == path);
        Ok(whole.map(|(_, n)| *n))
    }
}

impl PeftMethod for FourierFt {
    fn default_targets(&self, tree: &ModuleTree) -> Option<Targets> {
        let names = match tree.facts().model_type.as_str() {
            "gpt2" | "gpt_bigcode" => &["mlp.c_proj"],
            other => matcher::default_targets(other)?,
        };
        let names = names.iter().map(|&name| name.to_owned());
        Some(Targets::Names(names.collect()))
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        finite("scaling", self.scaling)?;
        let sites = self.sites(cx.tree(), cx.common())?;
        for pattern in self.patterns()? {
            let one = [pattern];
            let mut used = false;
            for site in &sites {
                used |= Self::of_pattern(&one, &site.path)?.is_some();
            }
            if !used {
                let [(name, _)] = one;
                let nearest = peft_core::nearest(&name, sites.iter().map(|s| s.path.as_str()));
                cx.common().unused(Error::NoMatch {
                    field: PATTERN.to_owned(),
                    name,
                    nearest,
                })?;
            }
        }
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (out, inside) = (site.out_features, site.in_features);
        let patterns = self.patterns()?;
        let (field, n) = match Self::of_pattern(&patterns, &site.path)? {
            Some(n) => (PATTERN, n),
            None => ("n_frequency", self.n_frequency),
        };
        rank_fits(field, n, out * inside, site)?;
        if !fits(out) || !fits(inside) || out * inside >= MOST_PLACES {
            let detail = format!(
                "{out} x {inside} has a side without two factors up to 2048, or {MOST_PLACES} places or more"
            );
            return Err(Error::module(&site.path, detail));
        }
        let start = if self.init_weights {
            Init::Zeros
        } else {
            Init::Normal { std: 1.0 }
        };
        let places = first_of_permutation(out * inside, n, self.random_loc_seed);
        Ok(Box::new(Plus(At {
            spectrum: cx.param("fourierft_spectrum", &[n], &start)?,
            places: places.into_iter().map(|place| place as u32).collect(),
            plan: self.plans.of(out, inside, cx)?,
            shape: [out, inside],
            scaling: self.scaling as f32,
        })))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        fan_in_fan_out(config, tree);
    }
}

/// The tables of each shape, made once.
#[derive(Clone, Default)]
struct Plans(Arc<Mutex<HashMap<[usize; 2], Arc<Plan>>>>);

impl std::fmt::Debug for Plans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Plans")
    }
}

impl Plans {
    fn of(&self, out: usize, inside: usize, cx: &Attach<'_>) -> Result<Arc<Plan>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = all.get(&[out, inside]) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(Plan::new(out, inside, &cx.device())?);
        all.insert([out, inside], plan.clone());
        Ok(plan)
    }
}

struct At {
    /// `[n]`
    spectrum: Param,
    places: Vec<u32>,
    plan: Arc<Plan>,
    shape: [usize; 2],
    scaling: f32,
}

impl Change for At {
    fn dense(&self) -> Result<Tensor> {
        let all = self.shape.iter().product();
        let coefficients = self.spectrum.tensor().reshape(&[self.places.len(), 1])?;
        let spread = coefficients.scatter_rows(&self.places, all)?;
        Ok(self
            .plan
            .inverse(&spread.reshape(&self.shape)?)?
            .scale(self.scaling)?)
    }

    fn by_rows(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Result, Tensor};

    use crate::testing::attached;

    fn network(fields: Value) -> Result<Network> {
        let base = Base::custom().linear("layers.0.fc", Array2::zeros((2, 4)), None)?;
        let config = json!({"peft_type": "FOURIERFT", "target_modules": ["fc"]});
        attached(base, config, &fields)
    }

    /// torch.randperm(8) from 777 starts 7, 0: coefficients 8 at (1, 3) and 16 at (0, 0). In row a and column b of the
    /// change these are cos(pi a + 3 pi b / 2) + 2: 3 2 1 2 and 1 2 3 2, times 0.5.
    #[test]
    fn by_hand() {
        let network = network(json!({"n_frequency": 2, "scaling": 0.5})).expect("attaches");
        let spectrum = Tensor::from_vec(vec![8.0, 16.0], &[2], network.device());
        network.parameters()[0]
            .set(spectrum.expect("a tensor"))
            .expect("fits");
        let x = Tensor::from_vec(vec![1.0, 10.0, 100.0, 1000.0], &[1, 4], network.device());
        let y = network.run("layers.0.fc", &x.expect("a tensor"), &Pass::eval());
        let y = y.expect("runs").to_vec().expect("values");
        for (got, want) in y.iter().zip([1061.5, 1160.5]) {
            assert!((got - want).abs() < 1e-3, "{y:?}");
        }
    }

    #[test]
    fn patterns_set_the_number_and_are_checked() {
        let pattern = json!({"n_frequency": 2, "n_frequency_pattern": {"fc": 5}});
        let params = network(pattern).expect("attaches").parameters();
        assert_eq!(params[0].shape(), [5]);
        for (fields, part) in [
            (json!({"n_frequency": 9}), "1 to 8"),
            (
                json!({"n_frequency": 2, "n_frequency_pattern": {"nothing": 5}}),
                "nothing",
            ),
            (
                json!({"n_frequency": 2, "n_frequency_pattern": {"fc": "5"}}),
                "n_frequency_pattern.fc",
            ),
        ] {
            let Err(error) = network(fields) else {
                panic!("accepted");
            };
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
