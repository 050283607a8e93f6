//! LoRA-drop: pairs of their own where they do much, one pair shared by the other layers.
//!
//! # Paper
//! LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation, arXiv 2402.07721, section 3.
//!
//! # Formula
//! LoRA, `y = W x + s B_i A_i x`, while the importance of layer i is measured as the mean of `|s B_i A_i x|²` over the
//! tokens of the first `sample_steps` steps. Then, for each type of matrix, the most important layers that together have
//! a share of `threshold` keep their pair; the others run `y = W x + s B A x` with one A and B for all of them, and
//! training goes on.
//!
//! # Saved keys
//! `<module>.lora_A.weight [r, in]`, `<module>.lora_B.weight [out, r]` of modules with a pair of their own;
//! `base_model.shared.<type>.lora_A.weight`, `.lora_B.weight` for each type with shared modules, the type being a
//! module's path within its layer (`self_attn.q_proj`). `shared_modules` in the configuration lists the modules that
//! share.
//!
//! # Defaults and their source
//! threshold 0.9: the paper. `sample_steps` a tenth of the run if not given, as the paper's sample is a tenth of the
//! data. The shared pair starts as a fresh one (A uniform, B zero); r, lora_alpha and starts as LoRA's.
//!
//! # Differences from HF
//! HF PEFT has no LoRA-drop, and there is no code by the authors. The importance is measured on the training steps
//! themselves instead of a run of its own.
//!
//! # Limits
//! Linear and Conv1D modules; modules of one type have to be of one size and rank. A type of which only one layer would
//! share keeps all pairs. Padding counts as tokens do.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Device, Error, Init, Injector, ModuleTree, PeftMethod, Result, Site, Tensor,
    Tensors, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::budget;
use crate::factors::{LowRank, Pair};
use crate::shared_pair::Layer;

/// LoRA-drop's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraDrop {
    /// Share of the importance that layers with a pair of their own have together.
    pub threshold: f64,
    /// Steps over which the importance is measured; a tenth of the run if null.
    pub sample_steps: Option<u64>,
    /// Paths of the modules that share a pair; null until that is decided.
    pub shared_modules: Option<Vec<String>>,
    /// LoRA's fields.
    #[serde(flatten)]
    pub factors: LowRank,
    #[serde(skip)]
    layers: Arc<Mutex<Vec<Layer>>>,
}

impl Default for LoraDrop {
    fn default() -> Self {
        Self {
            threshold: 0.9,
            sample_steps: None,
            shared_modules: None,
            factors: LowRank::default(),
            layers: Arc::default(),
        }
    }
}

register!(
    LoraDrop,
    id = "lora_drop",
    title = "LoRA-drop",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "LORA_DROP",
    paper = "arXiv 2402.07721",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

/// A module's path within its layer; the whole path of one that is in none.
fn type_of(site: &Site) -> String {
    let number = site.layer.map(|n| n.to_string());
    let mut parts = site.path.split('.');
    match number.filter(|n| parts.any(|part| part == n)) {
        Some(_) => parts.collect::<Vec<_>>().join("."),
        None => site.path.clone(),
    }
}

impl LoraDrop {
    fn layers(&self) -> MutexGuard<'_, Vec<Layer>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pair that the modules of a type share, made for the first of them.
    fn shared(&self, kind: &str, site: &Site, cx: &mut Attach<'_>) -> Result<Pair> {
        let (rank, scaling) = self.factors.scaling_at(site, cx)?;
        let shapes = [vec![rank, site.in_features], vec![site.out_features, rank]];
        let layers = self.layers();
        let first = layers.iter().filter(|l| l.kind == kind);
        let [a, b] = match first.filter_map(Layer::shared).next() {
            Some(pair) => [pair.a.clone(), pair.b.clone()],
            None => {
                let uniform = Init::LinearDefault {
                    fan_in: site.in_features,
                };
                // In no file before it is decided that there is such a pair.
                let mut make = |name: &str, shape: &[usize], init: &Init| {
                    if self.shared_modules.is_some() {
                        return cx.shared(&file_key(kind, name), shape, init);
                    }
                    let param = cx.transient(&live_key(kind, name), shape, init)?;
                    param.set_trainable(false);
                    Ok(param)
                };
                [
                    make("lora_A", &shapes[0], &uniform)?,
                    make("lora_B", &shapes[1], &Init::Zeros)?,
                ]
            }
        };
        if [a.shape(), b.shape()] != shapes {
            let detail = format!(
                "its pair has shapes {shapes:?}, that of another {kind:?} {:?} and {:?}: they cannot share one",
                a.shape(),
                b.shape()
            );
            return Err(Error::module(&site.path, detail));
        }
        Ok(Pair::of(a, b, scaling, self.factors.lora_dropout))
    }
}

/// Key of a shared factor behind `base_model.` in a file.
fn file_key(kind: &str, name: &str) -> String {
    format!("shared.{kind}.{name}.weight")
}

fn live_key(kind: &str, name: &str) -> String {
    format!("shared.{kind}.{name}")
}

impl PeftMethod for LoraDrop {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.factors.check(&[])?;
        self.factors.check_start()?;
        if !(self.threshold > 0.0 && self.threshold <= 1.0) {
            return Err(Error::config("threshold", "has to be above 0, at most 1"));
        }
        if self.sample_steps == Some(0) {
            return Err(Error::config("sample_steps", "has to be at least 1"));
        }
        let sites = self.sites(cx.tree(), cx.common())?;
        let paths = self.shared_modules.iter().flatten();
        if let Some(path) = paths
            .into_iter()
            .find(|p| sites.iter().all(|s| s.path != **p))
        {
            let detail = format!("{path:?} is not one of the adapted modules");
            return Err(Error::config("shared_modules", detail));
        }
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let kind = type_of(site);
        let decided = self.shared_modules.as_ref();
        let shares = decided.is_some_and(|paths| paths.contains(&site.path));
        let shared = if shares || decided.is_none() {
            Some(self.shared(&kind, site, cx)?)
        } else {
            None
        };
        let own = if shares {
            None
        } else {
            Some(self.factors.pair(site, cx)?)
        };
        let layer = Layer::new(&site.path, kind, own, shared);
        self.layers().push(layer.clone());
        Ok(Box::new(layer))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Dropping(self.clone()))
    }

    /// Leaves out the pairs that are shared now, and brings in the shared ones.
    fn save(&self, mut params: Tensors) -> Result<Tensors> {
        if self.shared_modules.is_some() {
            return Ok(params);
        }
        for layer in self.layers().iter().filter(|l| l.shares()) {
            for name in ["lora_A", "lora_B"] {
                params.remove(&format!("base_model.model.{}.{name}.weight", layer.path));
                if let Some(value) = params.get(&live_key(&layer.kind, name)).cloned() {
                    params.insert(format!("base_model.{}", file_key(&layer.kind, name)), value);
                }
            }
            params.remove(&format!("base_model.model.{}.lora_B.bias", layer.path));
        }
        Ok(params)
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.factors.finish_config(config, tree);
        let layers = self.layers();
        if layers.iter().any(|l| l.measured().is_none()) {
            let shared = layers.iter().filter(|l| l.shares()).map(|l| &l.path);
            config.insert(
                "shared_modules".to_owned(),
                json!(shared.collect::<Vec<_>>()),
            );
        }
    }
}

/// Decides who shares.
struct Dropping(LoraDrop);

impl Dropping {
    fn sample_steps(&self, total: u64) -> u64 {
        self.0.sample_steps.unwrap_or((total / 10).max(1))
    }

    fn drop(&self) {
        let layers = self.0.layers();
        let mut types: BTreeMap<&str, Vec<&Layer>> = BTreeMap::new();
        for layer in layers.iter() {
            types.entry(&layer.kind).or_default().push(layer);
        }
        for layers in types.values_mut() {
            layers.sort_by(|x, y| y.importance().total_cmp(&x.importance()));
            let all: Vec<f32> = layers.iter().map(|l| l.importance()).collect();
            let kept = budget::leading_share(&all, self.0.threshold);
            let sharing = layers.len() - kept > 1;
            for (at, layer) in layers.iter().enumerate() {
                layer.decide(sharing && at >= kept);
            }
        }
    }
}

impl TrainHooks for Dropping {
    fn prepare(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        match self.0.sample_steps {
            Some(steps) if steps >= cx.total_steps && self.0.shared_modules.is_none() => {
                let most = cx.total_steps.saturating_sub(1);
                let detail = format!("{steps}: the run has {} steps, 1 to {most}", cx.total_steps);
                Err(Error::config("sample_steps", detail))
            }
            _ => Ok(()),
        }
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let open = self.0.layers().iter().any(|l| l.measured().is_some());
        if open && cx.step >= self.sample_steps(cx.total_steps) {
            self.drop();
        }
        Ok(())
    }

    fn state(&self) -> Result<Tensors> {
        let mut all = Tensors::new();
        for layer in self.0.layers().iter() {
            let (name, values) = match *layer.measured() {
                Some(measured) => ("measured", measured.to_vec()),
                None => ("shares", vec![f32::from(u8::from(layer.shares()))]),
            };
            let n = values.len();
            let value = Tensor::from_vec(values, &[n], &Device::cpu())?;
            all.insert(format!("{name}/{}", layer.path), value);
        }
        Ok(all)
    }

    fn restore(&mut self, state: Tensors) -> Result<()> {
        for layer in self.0.layers().iter() {
            let value = |name: &str| state.get(&format!("{name}/{}", layer.path));
            if let Some(shares) = value("shares") {
                layer.decide(shares.item()? != 0.0);
            }
            if let Some(measured) = value("measured")
                && let [sum, count] = measured.to_vec()?[..]
            {
                *layer.measured() = Some([sum, count]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Grads, Network, Pass, RngKey, Tensor, TrainCx};

    fn network(config: &Value) -> Network {
        let mut base = Base::custom();
        for layer in 0..4 {
            let path = format!("layers.{layer}.q");
            base = base
                .linear(&path, Array2::zeros((2, 2)), None)
                .expect("a base");
        }
        let mut network = Network::new(base);
        network.attach("a", config, 0).expect("attaches");
        network
    }

    fn run(network: &Network, layer: usize, pass: &Pass) -> Vec<f32> {
        let x = Tensor::from_vec(vec![1.0, 0.5], &[1, 2], network.device()).expect("a tensor");
        let y = network.run(&format!("layers.{layer}.q"), &x, pass);
        y.expect("runs").to_vec().expect("values")
    }

    /// Outputs 3 : 1 : 1 : 4 long, squares 9 : 1 : 1 : 16 of 27: 16 and 9 have a share above 0.9, the others share.
    #[test]
    fn the_least_important_layers_share() {
        let config = json!({"peft_type": "LORA_DROP", "r": 1, "lora_alpha": 1, "sample_steps": 1,
            "target_modules": ["q"]});
        let mut network = network(&config);
        let params = network.parameters();
        assert_eq!(params.len(), 8, "shared pairs are not trained yet");
        for (layer, size) in [3.0, 1.0, 1.0, 4.0].into_iter().enumerate() {
            for (name, values, shape) in [("A", [1.0, 0.0], [1, 2]), ("B", [size, 0.0], [2, 1])] {
                let key = format!("layers.{layer}.q.lora_{name}.weight");
                let param = params.iter().find(|p| p.key().ends_with(&key));
                let value = Tensor::from_vec(values.to_vec(), &shape, network.device());
                param
                    .expect("there")
                    .set(value.expect("a tensor"))
                    .expect("fits");
            }
            run(&network, layer, &Pass::train(RngKey::new(0)));
        }
        let mut hooks = network.trainers();
        let mut cx = TrainCx {
            step: 1,
            total_steps: 3,
            network: &network,
            params: &params,
            grads: &mut Grads::default(),
            used: &[],
            learning_rate: 0.1,
            data: None,
            reset_optimizer: &Cell::new(false),
        };
        hooks[0].1.after_step(&mut cx).expect("decides");
        let live = network.parameters();
        let keys: Vec<&str> = live.iter().map(|p| p.key()).collect();
        assert_eq!(
            live.len(),
            6,
            "two pairs of their own, one shared: {keys:?}"
        );
        for param in live.iter().filter(|p| p.key().starts_with("shared")) {
            let shape = param.shape();
            let value = Tensor::full(1.0, &shape, network.device()).expect("a tensor");
            param.set(value).expect("fits");
        }
        let outputs = |network: &Network| [0, 1, 2, 3].map(|l| run(network, l, &Pass::eval()));
        let trained = outputs(&network);
        assert_eq!(trained[1], [1.5, 1.5]);
        assert_eq!(trained[1], trained[2]);
        assert_eq!(trained[0], [3.0, 0.0]);
        // The file holds three pairs, and loads as the same function.
        let (config, tensors) = network.export("a").expect("exports");
        assert_eq!(
            config["shared_modules"],
            json!(["layers.1.q", "layers.2.q"])
        );
        assert_eq!(tensors.len(), 6);
        assert!(tensors.contains_key("base_model.shared.q.lora_A.weight"));
        network.delete("a").expect("deletes");
        network.load("b", &config, tensors, true).expect("loads");
        assert_eq!(outputs(&network), trained);
        assert_eq!(network.parameters().len(), 6);
    }
}
