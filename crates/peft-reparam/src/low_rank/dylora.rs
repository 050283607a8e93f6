//! DyLoRA: one training run whose pair can be served at any rank up to its own.
//!
//! # Paper
//! DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank Adaptation, arXiv
//! 2210.07558, algorithm 1.
//!
//! # Formula
//! Each step draws one rank b from 1..r for the whole model and runs `y = W x + (lora_alpha / b) B[:, :b] A[:b, :] x`.
//! With `frozen` only row b of A and column b of B learn in that step. Served and merged at `rank_to_serve`, r if not
//! given.
//!
//! # Saved keys
//! LoRA's, at the full rank.
//!
//! # Defaults and their source
//! The scaling by `lora_alpha / b` in training and in service: the reference code (KD-NLP/DyLoRA); the rest as LoRA's.
//! The reference trains with `frozen`, which needs long runs, as a direction learns in one step of r: with rank 8, a
//! hundred steps on a MiniLM teach it next to nothing at the rate at which `frozen = false`, the default here, learns
//! as LoRA does. The paper's runs on GLUE: r 8, lora_alpha 16, learning rate 5e-4, weight decay 0.1, 30 epochs.
//!
//! # Differences from HF
//! HF PEFT has no DyLoRA. With `use_rslora` the scaling is `lora_alpha / sqrt(b)`. A module whose rank (`rank_pattern`)
//! is below the drawn one runs at its own.
//!
//! # Limits
//! The starts `pissa`, `olora` and `orthogonal` count on the whole product B A and are refused.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use peft_core::peft_tensor::concat;
use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Error, Injector, ModuleKind, ModuleTree, PeftMethod, Result, RngKey, Site,
    Tensor, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::{Factors, LowRank, Pair};

/// DyLoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DyLora {
    /// Whether a step trains the last row and column of the drawn rank alone.
    pub frozen: bool,
    /// Rank it runs and merges at outside of training, 1 to r; the whole if not given.
    pub rank_to_serve: Option<usize>,
    /// LoRA's fields.
    #[serde(flatten)]
    pub factors: LowRank,
    #[serde(skip)]
    draw: Arc<Draw>,
}

register!(
    DyLora,
    id = "dylora",
    title = "DyLoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "DYLORA",
    paper = "arXiv 2210.07558",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

/// The rank of the step, shared by all modules.
#[derive(Debug, Default)]
struct Draw {
    /// 0 before the first step.
    rank: AtomicUsize,
    /// Largest rank of a module.
    largest: AtomicUsize,
    key: OnceLock<RngKey>,
}

impl DyLora {
    fn at(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Pair> {
        let pair = self.factors.pair(site, cx)?;
        let full = pair.rank();
        let draw = self.draw.clone();
        draw.largest.fetch_max(full, Ordering::Relaxed);
        draw.key.get_or_init(|| cx.key("rank"));
        let served = self.rank_to_serve.map_or(full, |b| b.min(full));
        let (frozen, root) = (self.frozen, self.factors.use_rslora);
        Ok(pair.acting(Arc::new(move |kept, train| {
            let drawn = draw.rank.load(Ordering::Relaxed);
            let stepping = train && drawn > 0;
            let rank = if stepping { drawn.min(full) } else { served };
            let more = full as f32 / rank as f32;
            Ok(Factors {
                a: leading(&kept.a, 0, rank, frozen && stepping)?,
                b: leading(&kept.b, 1, rank, frozen && stepping)?,
                scaling: kept.scaling * if root { more.sqrt() } else { more },
            })
        })))
    }
}

/// The first `rank` of a factor's directions; with `last`, all but the last of them as constants.
fn leading(factor: &Tensor, axis: usize, rank: usize, last: bool) -> Result<Tensor> {
    if last && rank > 1 {
        let known = factor.detach().narrow(axis, 0, rank - 1)?;
        return Ok(concat(&[&known, &factor.narrow(axis, rank - 1, 1)?], axis)?);
    }
    if factor.shape()[axis] == rank {
        return Ok(factor.clone());
    }
    Ok(factor.narrow(axis, 0, rank)?)
}

impl PeftMethod for DyLora {
    fn kinds(&self) -> &'static [ModuleKind] {
        LowRank::KINDS
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.factors.check(&[])?;
        self.factors.check_start()?;
        let sites = self.sites(cx.tree(), cx.common())?;
        if self.rank_to_serve == Some(0) {
            return Err(Error::config("rank_to_serve", "0: has to be at least 1"));
        }
        self.factors
            .inject(sites, cx, |site, cx| self.at(site, cx))?;
        let largest = self.draw.largest.load(Ordering::Relaxed);
        match self.rank_to_serve {
            Some(rank) if rank > largest => {
                let detail = format!("{rank}: has to be 1 to {largest}, the rank that is trained");
                Err(Error::config("rank_to_serve", detail))
            }
            _ => Ok(()),
        }
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(self.at(site, cx)?))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(Drawing(self.draw.clone()))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.factors.finish_config(config, tree);
    }
}

/// Draws a rank before each step; a resumed run draws what the first would have.
struct Drawing(Arc<Draw>);

impl TrainHooks for Drawing {
    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let largest = self.0.largest.load(Ordering::Relaxed).max(1) as u64;
        let key = self.0.key.get().copied().unwrap_or(RngKey::new(0));
        let rank = 1 + key.below(cx.step, largest) as usize;
        self.0.rank.store(rank, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Pass};

    use crate::testing::{attached, fields};

    fn network(more: &[(&str, Value)]) -> Result<Network> {
        let base = Base::custom().linear("fc", array![[1.0, 2.0], [3.0, 4.0]], None)?;
        let config =
            json!({"peft_type": "DYLORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]});
        let network = attached(base, config, &fields(more))?;
        let set = |suffix: &str, values: Array2<f32>| {
            let mut all = network.parameters().into_iter();
            let param = all
                .find(|p| p.key().ends_with(suffix))
                .expect("the parameter");
            param.set(Tensor::from_array(values, network.device())?)
        };
        set("lora_A.weight", array![[1.0, 0.0], [1.0, 1.0]])?;
        set("lora_B.weight", array![[1.0, 0.0], [0.0, 1.0]])?;
        Ok(network)
    }

    fn run(network: &Network, pass: &Pass) -> Tensor {
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        network.run("fc", &x, pass).expect("runs")
    }

    /// x = (1, 1): W x = (3, 7); A x = (1, 2). At rank 2, s = 4 / 2 and B A x = (1, 2); at rank 1, s = 4 and the product
    /// is (1, 0).
    #[test]
    fn each_rank_has_its_own_scaling() {
        let served = |rank: Option<usize>| {
            let network = network(&[("rank_to_serve", json!(rank))]).expect("attaches");
            run(&network, &Pass::eval()).to_vec().expect("values")
        };
        assert_eq!(served(None), [5.0, 11.0]);
        assert_eq!(served(Some(2)), [5.0, 11.0]);
        assert_eq!(served(Some(1)), [7.0, 7.0]);
        for rank in [0, 3] {
            let error = network(&[("rank_to_serve", json!(rank))])
                .map(|_| ())
                .expect_err("refused")
                .to_string();
            assert!(error.contains("rank_to_serve"), "{error}");
        }
    }

    /// Drawn at rank 2, the frozen mode gives a gradient to the second row of A and column of B alone.
    #[test]
    fn a_step_trains_its_last_direction() {
        let grads = |frozen: bool, rank: usize| {
            let config =
                json!({"peft_type": "DYLORA", "r": 2, "frozen": frozen, "target_modules": ["fc"]});
            let parsed = peft_core::parse_fields::<DyLora>(&config)
                .expect("parses")
                .0;
            parsed.draw.rank.store(rank, Ordering::Relaxed);
            let ones = Tensor::from_array(Array2::<f32>::ones((2, 2)), &peft_core::Device::cpu())
                .expect("a tensor")
                .leaf();
            let sum = leading(&ones, 0, rank, frozen)
                .and_then(|t| Ok(t.sum_all()?))
                .expect("a sum");
            sum.backward()
                .expect("gradients")
                .get(&ones)
                .expect("a gradient")
                .to_vec()
                .expect("values")
        };
        assert_eq!(grads(true, 2), [0.0, 0.0, 1.0, 1.0]);
        assert_eq!(grads(false, 2), [1.0, 1.0, 1.0, 1.0]);
        assert_eq!(grads(true, 1), [1.0, 1.0, 0.0, 0.0]);
    }
}
