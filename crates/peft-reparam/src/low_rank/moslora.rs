//! MoSLoRA: LoRA with a trained mixer between its factors.
//!
//! # Paper
//! Mixture-of-Subspaces in Low-Rank Adaptation, arXiv 2406.11909, section 3.3.
//!
//! # Formula
//! `y = W x + b + s B M A dropout(x)` with M `[r, r]`, s as LoRA's; merged, `W' = W + s B M A`. With M = 1 it is LoRA.
//!
//! # Saved keys
//! LoRA's, and `<module>.lora_AB.weight [r, r]`, the mixer, as the reference code names it.
//!
//! # Defaults and their source
//! LoRA's; M uniform with bound `1 / sqrt(r)` (`kaiming`, the reference code's); `orthogonal` is the paper's other
//! start. B starts as zero, so that the function stays.
//!
//! # Differences from HF
//! HF PEFT has no MoSLoRA. The reference code is a copy of HF's LoRA with the switch `lora_use_mixer`; here the mixer
//! goes with the `peft_type`.
//!
//! # Limits
//! The starts `pissa`, `olora` and `orthogonal` of A and B count on the bare product B A and are refused.

use std::sync::Arc;

use peft_core::ndarray::Array2;
use peft_core::peft_tensor::linalg;
use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Error, Init, Injector, ModuleKind, ModuleTree, PeftMethod, Result, Site,
    Tensor, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::{Factors, LowRank, Pair};

/// MoSLoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct MosLora {
    /// Start of the mixer: `kaiming` or `orthogonal`.
    pub mixer_init: String,
    /// LoRA's fields.
    #[serde(flatten)]
    pub factors: LowRank,
}

impl Default for MosLora {
    fn default() -> Self {
        Self {
            mixer_init: "kaiming".to_owned(),
            factors: LowRank::default(),
        }
    }
}

register!(
    MosLora,
    id = "moslora",
    title = "MoSLoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "MOSLORA",
    paper = "arXiv 2406.11909",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl MosLora {
    fn mixer(&self, rank: usize, cx: &Attach<'_>) -> Result<Init> {
        match self.mixer_init.as_str() {
            "kaiming" => Ok(Init::LinearDefault { fan_in: rank }),
            "orthogonal" => {
                let mut values = vec![0.0; rank * rank];
                cx.key("mixer").fill_normal(0.0, 1.0, &mut values);
                let random = Array2::from_shape_vec((rank, rank), values)
                    .map_err(|e| Error::other(e.to_string()))?;
                let (mut q, r) = linalg::qr(&random)?;
                // With R's diagonal positive, Q is spread evenly over all rotations.
                for (mut column, &sign) in q.columns_mut().into_iter().zip(r.diag()) {
                    column *= sign.signum();
                }
                Ok(Init::Value(Tensor::from_array(q, &cx.device())?))
            }
            other => {
                let detail = format!("{other:?} is not one of kaiming, orthogonal");
                Err(Error::config("mixer_init", detail))
            }
        }
    }

    fn mixed(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Pair> {
        let pair = self.factors.pair(site, cx)?;
        let rank = pair.rank();
        let start = self.mixer(rank, cx)?;
        let mixer = cx.param("lora_AB.weight", &[rank, rank], &start)?;
        // Mixed into B: the narrow side also where the other is a vocabulary.
        Ok(pair.acting(Arc::new(move |Factors { a, b, scaling }, _| {
            let b = b.matmul(&mixer.tensor())?;
            Ok(Factors { a, b, scaling })
        })))
    }
}

impl PeftMethod for MosLora {
    fn kinds(&self) -> &'static [ModuleKind] {
        LowRank::KINDS
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.factors.check(&[])?;
        self.factors.check_start()?;
        let sites = self.sites(cx.tree(), cx.common())?;
        self.factors
            .inject(sites, cx, |site, cx| self.mixed(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(self.mixed(site, cx)?))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.factors.finish_config(config, tree);
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Param, Pass, Tensor};

    use crate::testing::{attached, fields};

    fn network(more: &[(&str, Value)]) -> Network {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0], [3.0, 4.0]], None)
            .expect("a base");
        let config =
            json!({"peft_type": "MOSLORA", "r": 2, "lora_alpha": 4, "target_modules": ["fc"]});
        attached(base, config, &fields(more)).expect("attaches")
    }

    fn param(network: &Network, suffix: &str) -> Param {
        let mut all = network.parameters().into_iter();
        all.find(|p| p.key().ends_with(suffix))
            .expect("the parameter")
    }

    /// x = (1, 1): W x = (3, 7); A x = (1, 2); M A x = (2, 1); B M A x = (2, 3); s = 4 / 2.
    #[test]
    fn by_hand() {
        let network = network(&[]);
        let set = |suffix: &str, values: Array2<f32>| {
            let value = Tensor::from_array(values, network.device()).expect("a tensor");
            param(&network, suffix).set(value).expect("the shape fits");
        };
        set("lora_A.weight", array![[1.0, 0.0], [1.0, 1.0]]);
        set("lora_AB.weight", array![[0.0, 1.0], [1.0, 0.0]]);
        set("lora_B.weight", array![[1.0, 0.0], [1.0, 1.0]]);
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        let y = network.run("fc", &x, &Pass::eval()).expect("runs");
        assert_eq!(y.to_vec().expect("values"), [7.0, 13.0]);
    }

    #[test]
    fn the_orthogonal_mixer_is_orthogonal() {
        let mixer = param(
            &network(&[("mixer_init", json!("orthogonal"))]),
            "AB.weight",
        )
        .tensor();
        let square = mixer
            .matmul_t(&mixer)
            .expect("a product")
            .to_vec()
            .expect("values");
        let off = square
            .iter()
            .zip([1.0, 0.0, 0.0, 1.0])
            .map(|(v, w)| (v - w).abs());
        assert!(off.fold(0.0, f32::max) < 1e-6, "{square:?}");
    }
}
