//! LoRA-FA: LoRA whose first factor stays as it was drawn.
//!
//! # Paper
//! LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning, arXiv 2308.03303, section 3.
//!
//! # Formula
//! LoRA's, `y = W x + b + s B A dropout(x)`, with A constant: only B learns, and of a module's input only `A x` is kept
//! for the backward pass. `lora_fa = "projected"` turns B's gradient G into `G (A Aᵀ + 1e-8)⁺ / s²` before the
//! optimiser takes it, which brings the change of `s B A` as near as A allows to the full weight's gradient.
//!
//! # Saved keys
//! LoRA's; A is in the file though it never changes, so that other programs can use it.
//!
//! # Defaults and their source
//! LoRA's. `"frozen"` is the paper's; `"projected"` is HF PEFT 0.21's optimiser
//! (`peft.optimizers.create_lorafa_optimizer`). A constant A wants a higher learning rate, three to ten times LoRA's:
//! 1e-2 to 3e-2 where LoRA takes 3e-3 on a MiniLM.
//!
//! # Differences from HF
//! There it is an optimiser, here a field, `lora_fa`, that other programs ignore: they read a LoRA. In HF the gradient
//! is clipped before it is projected, here after; HF multiplies by the inverse in bfloat16 where the processor has it.
//! An embedding's A starts as zero, so that HF's optimiser trains nothing there; here embeddings are refused.
//!
//! # Limits
//! Linear and Conv1D modules. No `ensure_weight_tying`.

use std::sync::{Arc, Mutex, PoisonError};

use peft_core::ndarray::{Array2, Axis, Ix2};
use peft_core::peft_tensor::linalg;
use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Error, Injector, ModuleTree, Param, PeftMethod, Result, Site, Tensor, TrainCx,
    TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::{LowRank, Pair};

/// LoRA-FA's fields of `adapter_config.json`: LoRA's, and the switch.
#[derive(Serialize, Deserialize)]
#[serde(default)]
pub struct LoraFa {
    /// `frozen` (the paper) or `projected` (HF's optimiser).
    pub lora_fa: String,
    /// LoRA's fields.
    #[serde(flatten)]
    pub factors: LowRank,
    #[serde(skip)]
    pairs: Arc<Mutex<Vec<Pair>>>,
}

impl Default for LoraFa {
    fn default() -> Self {
        Self {
            lora_fa: "frozen".to_owned(),
            factors: LowRank::default(),
            pairs: Arc::default(),
        }
    }
}

register!(
    LoraFa,
    id = "lora_fa",
    title = "LoRA-FA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "LORA",
    paper = "arXiv 2308.03303",
    example =
        r#"{"r": 2, "lora_alpha": 4, "lora_fa": "frozen", "target_modules": ["q_proj", "v_proj"]}"#,
    when = |c| !c["lora_fa"].is_null() && c["loraplus_lr_ratio"].is_null(),
);

impl LoraFa {
    fn projects(&self) -> bool {
        self.lora_fa == "projected"
    }

    fn check(&self) -> Result<()> {
        self.factors.check(&[])?;
        if !["frozen", "projected"].contains(&self.lora_fa.as_str()) {
            let detail = format!("{:?} is not one of frozen, projected", self.lora_fa);
            return Err(Error::config("lora_fa", detail));
        }
        if self.projects() && self.factors.lora_alpha == 0.0 {
            return Err(Error::config(
                "lora_alpha",
                "0: the projection divides by it",
            ));
        }
        if self.factors.ensure_weight_tying {
            let detail = "has to be false: an embedding's A starts as zero and would stay so";
            return Err(Error::config("ensure_weight_tying", detail));
        }
        Ok(())
    }
}

impl PeftMethod for LoraFa {
    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.check()?;
        let sites = self.sites(cx.tree(), cx.common())?;
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let pair = self.factors.half_pair(site, cx)?;
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        pairs.push(pair.clone());
        Ok(Box::new(pair))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        if !self.projects() {
            return Box::new(());
        }
        let pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = pairs.iter().map(|p| (p.clone(), None)).collect();
        Box::new(Projecting(pairs))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.factors.finish_config(config, tree);
    }
}

/// Projects the gradients of B; each inverse is made once, at the first step, when A has its final values.
struct Projecting(Vec<(Pair, Option<Tensor>)>);

impl TrainHooks for Projecting {
    fn after_backward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        for (pair, inverse) in &mut self.0 {
            let b = pair.b.tensor();
            let Some(grad) = cx.grads.get(&b) else {
                continue;
            };
            let inverse = match inverse {
                Some(known) => known,
                None => inverse.insert(projection(&pair.a, pair.scaling)?),
            };
            let grad = grad.matmul(inverse)?;
            cx.grads.set(&b, grad);
        }
        Ok(())
    }
}

/// `(A Aᵀ + 1e-8)⁺ / s²`, `[r, r]`; directions that A does not have count as zero, as in torch's `pinv`.
fn projection(a: &Param, scaling: f32) -> Result<Tensor> {
    let a = a.tensor().detach();
    let square: Array2<f32> = a
        .matmul_t(&a)?
        .to_array()?
        .into_dimensionality::<Ix2>()
        .map_err(|e| Error::other(e.to_string()))?;
    let (values, vectors) = linalg::eigh(&square)?;
    let values = values.mapv(|v| v + 1e-8);
    let least =
        values.iter().fold(0f32, |m, v| m.max(v.abs())) * f32::EPSILON * values.len() as f32;
    let inverse = values.mapv(|v| {
        if v.abs() > least {
            1.0 / (v * scaling * scaling)
        } else {
            0.0
        }
    });
    let inverse = (&vectors * &inverse.insert_axis(Axis(0))).dot(&vectors.t());
    Ok(Tensor::from_array(inverse, a.device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peft_core::ndarray::array;
    use peft_core::serde_json::json;
    use peft_core::{Base, Device, Network};

    /// A = [[1, 0], [1, 1]]: A Aᵀ = [[1, 1], [1, 2]], whose inverse is [[2, -1], [-1, 1]]; s = 2 divides by 4.
    #[test]
    fn the_projection_is_the_scaled_inverse() {
        let a: Array2<f32> = array![[1.0, 0.0], [1.0, 1.0]];
        let a = Param::new(
            "a",
            &Tensor::from_array(a, &Device::cpu()).expect("a tensor"),
            true,
        );
        let got = projection(&a, 2.0)
            .expect("a projection")
            .to_vec()
            .expect("values");
        let off = got
            .iter()
            .zip([0.5, -0.25, -0.25, 0.25])
            .map(|(g, w)| (g - w).abs());
        assert!(off.fold(0.0, f32::max) < 1e-5, "{got:?}");
    }

    /// A is saved, but nothing trains it.
    #[test]
    fn only_b_is_trained() {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0], [3.0, 4.0]], None)
            .expect("a base");
        let mut network = Network::new(base);
        let config =
            json!({"peft_type": "LORA", "r": 1, "lora_fa": "frozen", "target_modules": ["fc"]});
        network.attach("a", &config, 0).expect("attaches");
        let keys: Vec<String> = network
            .parameters()
            .iter()
            .map(|p| p.key().to_owned())
            .collect();
        assert_eq!(keys, ["base_model.model.fc.lora_B.weight"]);
        let saved = network.export("a").expect("exports").1;
        assert!(saved.contains_key("base_model.model.fc.lora_A.weight"));
    }

    #[test]
    fn another_word_is_refused() {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0]], None)
            .expect("a base");
        let config =
            json!({"peft_type": "LORA", "r": 1, "lora_fa": "melted", "target_modules": ["fc"]});
        let error = Network::new(base)
            .attach("a", &config, 0)
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("lora_fa") && error.contains("projected"),
            "{error}"
        );
    }
}
