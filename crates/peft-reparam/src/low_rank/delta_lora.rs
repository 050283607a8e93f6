//! Delta-LoRA: the base weight moves along with the steps of a low-rank pair.
//!
//! # Paper
//! Delta-LoRA: Fine-Tuning High-Rank Parameters with the Delta of Low-Rank Matrices, arXiv 2309.02411, section 4.
//!
//! # Formula
//! `y = W_t x + s B_t A_t x` with `s = lora_alpha / r`. From step K on, each step of the optimiser moves the weight too:
//! `W_{t+1} = W_t + λ s (B_{t+1} A_{t+1} - B_t A_t)`. The sum telescopes, so that
//! `W_t = W + λ s (B_t A_t - B_K A_K)`: the pair at step K is all there is to remember, and the base is never written.
//! W has no gradient of its own: the part with λ is a constant for A and B.
//!
//! # Saved keys
//! LoRA's `<module>.lora_A.weight [r, in]` and `<module>.lora_B.weight [out, r]`, and the pair at step K,
//! `<module>.lora_A_start.weight`, `<module>.lora_B_start.weight` of the same shapes.
//!
//! # Defaults and their source
//! `update_ratio` λ = 2: the paper. `start_steps` K: a tenth of the run if not given (the paper has 500 for GPT-2); r,
//! lora_alpha and starts as LoRA's. The whole change is up to 1 + λ times LoRA's, so a smaller learning rate than
//! LoRA's can be better.
//!
//! # Differences from HF
//! HF PEFT has no Delta-LoRA. The authors' code moves W itself, which needs it in full precision and in the file; here it
//! may be stored in any format.
//!
//! # Limits
//! No dropout, as in the paper: with it the pair's gradient would not be W's. Linear and Conv1D modules; starts that
//! come out of the base weight are refused.

use std::sync::{Arc, Mutex, PoisonError};

use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Call, Error, Init, Injector, ModuleTree, Param, PeftMethod, Result, Site,
    Tensor, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::{LowRank, Pair};

/// Delta-LoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct DeltaLora {
    /// λ: how far the weight moves for a step of the pair.
    pub update_ratio: f64,
    /// K: steps before the weight moves; a tenth of the run if null.
    pub start_steps: Option<u64>,
    /// LoRA's fields.
    #[serde(flatten)]
    pub factors: LowRank,
    /// The live pairs, for the hooks.
    #[serde(skip)]
    pairs: Arc<Mutex<Vec<Moving>>>,
}

impl Default for DeltaLora {
    fn default() -> Self {
        Self {
            update_ratio: 2.0,
            start_steps: None,
            factors: LowRank::default(),
            pairs: Arc::default(),
        }
    }
}

register!(
    DeltaLora,
    id = "delta_lora",
    title = "Delta-LoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "DELTA_LORA",
    paper = "arXiv 2309.02411",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl DeltaLora {
    fn at(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Moving> {
        let pair = self.factors.pair(site, cx)?;
        let mut start = |name: &str, of: &Param| {
            let value = Init::Value(of.tensor().detach());
            cx.frozen(name, &of.shape(), &value)
        };
        let moving = Moving {
            a0: start("lora_A_start.weight", &pair.a)?,
            b0: start("lora_B_start.weight", &pair.b)?,
            ratio: self.update_ratio as f32,
            pair,
        };
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        pairs.push(moving.clone());
        Ok(moving)
    }
}

impl PeftMethod for DeltaLora {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.factors.check(&[])?;
        self.factors.check_start()?;
        if self.factors.lora_dropout != 0.0 {
            let detail = "has to be 0: the step of the weight is that of the pair without dropout";
            return Err(Error::config("lora_dropout", detail));
        }
        if !(self.update_ratio >= 0.0 && self.update_ratio.is_finite()) {
            return Err(Error::config("update_ratio", "has to be at least 0"));
        }
        let sites = self.sites(cx.tree(), cx.common())?;
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(self.at(site, cx)?))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Start {
            steps: self.start_steps,
            pairs: self.pairs.clone(),
        })
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.factors.finish_config(config, tree);
    }
}

/// A pair with what it was when the weight began to move.
#[derive(Clone)]
struct Moving {
    pair: Pair,
    /// `[r, in]`
    a0: Param,
    /// `[out, r]`
    b0: Param,
    ratio: f32,
}

impl std::fmt::Debug for Moving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Moving({})", self.a0.key())
    }
}

impl Moving {
    fn scaling(&self) -> f32 {
        self.ratio * self.pair.scaling
    }

    /// How far the weight moved, from the factors as they are: `λ s (B A - B_K A_K)`.
    fn moved(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let start = self.b0.tensor().matmul(&self.a0.tensor())?;
        Ok(b.matmul(a)?.sub(&start)?.scale(self.scaling())?)
    }

    fn change(&self, call: &Call<'_>) -> Result<Tensor> {
        let x = call.x()?;
        let (a, b) = (self.pair.a.tensor(), self.pair.b.tensor());
        let through = |a: &Tensor, b: &Tensor| x.matmul_t(a)?.scale(self.scaling())?.matmul_t(b);
        let moved = through(&call.stop(&a), &call.stop(&b))?
            .sub(&through(&self.a0.tensor(), &self.b0.tensor())?)?;
        Ok(self.pair.change(call)?.add(&moved)?)
    }
}

impl Adapter for Moving {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let (a, b) = (self.pair.a.tensor(), self.pair.b.tensor());
        let moved = w.plus(&self.moved(&a.detach(), &b.detach())?)?;
        self.pair.weight(moved)
    }

    fn bias(&self, b: Option<Tensor>) -> Result<Option<Tensor>> {
        self.pair.bias(b)
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        Ok(call.base()?.add(&self.change(call)?)?)
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        self.change(call).map(Some)
    }
}

/// Keeps the pair of step K.
struct Start {
    steps: Option<u64>,
    pairs: Arc<Mutex<Vec<Moving>>>,
}

impl TrainHooks for Start {
    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        if cx.step > self.steps.unwrap_or(cx.total_steps / 10) {
            return Ok(());
        }
        let pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        pairs.iter().try_for_each(|p| {
            p.a0.set(p.pair.a.tensor().detach())?;
            p.b0.set(p.pair.b.tensor().detach())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{Base, Grads, Network, Param, Pass, Tensor, TrainCx};

    fn network() -> Network {
        let base = Base::custom()
            .linear("fc", array![[1.0]], None)
            .expect("a base");
        let mut network = Network::new(base);
        let config = json!({"peft_type": "DELTA_LORA", "r": 1, "lora_alpha": 1, "update_ratio": 2.0,
            "start_steps": 1, "target_modules": ["fc"]});
        network.attach("a", &config, 0).expect("attaches");
        network
    }

    fn set(params: &[Param], a: f32, b: f32) {
        for (param, value) in params.iter().zip([a, b]) {
            let value = Tensor::from_vec(vec![value], &[1, 1], param.tensor().device());
            param.set(value.expect("a tensor")).expect("fits");
        }
    }

    fn run(network: &Network) -> f32 {
        let x = Tensor::from_vec(vec![1.0], &[1, 1], network.device()).expect("a tensor");
        let y = network.run("fc", &x, &Pass::eval()).expect("runs");
        y.item().expect("a value")
    }

    /// The weight as the paper moves it, step by step, against the telescoped sum: W = 1, λ = 2, K = 1.
    #[test]
    fn the_steps_add_up() {
        let network = network();
        let params = network.parameters();
        assert_eq!(params.len(), 2, "the pair at the start is not trained");
        let mut hooks = network.trainers();
        let mut weight = 1.0;
        let mut before = 0.0;
        for (step, (a, b)) in [(0.5, 1.0), (1.0, 3.0), (2.0, -1.0)]
            .into_iter()
            .enumerate()
        {
            set(&params, a, b);
            let mut cx = TrainCx {
                step: step as u64 + 1,
                total_steps: 3,
                network: &network,
                params: &params,
                grads: &mut Grads::default(),
                used: &[],
                learning_rate: 0.1,
                data: None,
                reset_optimizer: &Cell::new(false),
            };
            hooks[0].1.after_step(&mut cx).expect("keeps the pair");
            if step >= 1 {
                weight += 2.0 * (a * b - before);
            }
            before = a * b;
            assert_eq!(run(&network), weight + a * b, "after step {}", step + 1);
        }
    }

    /// d/da of (1 + b a) x at a = 3, b = 2 is 2, not the 6 of the function with the moved weight.
    #[test]
    fn the_moved_weight_is_a_constant() {
        let network = network();
        let params = network.parameters();
        set(&params, 3.0, 2.0);
        let slope = |exact: bool| {
            let pass = Pass {
                exact,
                ..Pass::eval()
            };
            let x = Tensor::from_vec(vec![1.0], &[1, 1], network.device()).expect("a tensor");
            let y = network.run("fc", &x, &pass).expect("runs");
            let grads = y.sum_all().and_then(Tensor::backward).expect("a gradient");
            let grad = grads.get(&params[0].tensor()).expect("A's");
            grad.item().expect("a value")
        };
        assert_eq!((slope(false), slope(true)), (2.0, 6.0));
    }
}
