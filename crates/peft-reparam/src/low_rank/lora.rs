//! LoRA: a weight's change as the product of two thin matrices.
//!
//! # Paper
//! LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1. rsLoRA: arXiv 2312.03732.
//!
//! # Formula
//! `y = W x + b + s B A dropout(x)` with `s = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`; merged,
//! `W' = W + s B A`. On an embedding, `y = E[id] + s B A[:, id]`. With `lora_bias`, `y` gains `s b_B`.
//!
//! # Saved keys
//! `<module>.lora_A.weight [r, in]`, `<module>.lora_B.weight [out, r]`, with `lora_bias` `<module>.lora_B.bias [out]`;
//! embeddings `<module>.lora_embedding_A [r, rows]`, `<module>.lora_embedding_B [dim, r]`.
//!
//! # Defaults and their source
//! r 8, lora_alpha 8, dropout 0, A uniform with bound `1 / sqrt(in)`, B zero: HF PEFT 0.21. Starts from the weight:
//! PiSSA arXiv 2404.02948, OLoRA arXiv 2406.01775, LoftQ arXiv 2310.08659.
//!
//! # Differences from HF
//! PiSSA and OLoRA leave the base weight as it is and subtract the initial product beside it: the same function, but
//! the base can be shared, quantised and restored. `lora_bias` merges into a base bias only where there is one.
//! LoftQ keeps the base as well: a quantised weight stands in for it while the adapter acts, and is made again when the
//! adapter is loaded, so the model to give is the one from before the quantisation (with `model.quantize` in training,
//! which one round shares); the pair is divided by the scaling, HF's is not, which is the same for `lora_alpha = r`.
//! A tied embedding adapted on one side merges into that side alone; `ensure_weight_tying` adapts both by one pair.
//! HF takes a start out of the one weight of a tied pair, so that the other side changes as well; here it does not.
//!
//! # Limits
//! The starts `eva` (but for a finished adapter), `corda`, `lora_ga` and `mica` are refused by name, and so are HF's
//! variants of LoRA that have no method of their own here.

use peft_core::serde_json::{Map, Value};
use peft_core::{
    Adapter, Attach, Injector, ModuleKind, ModuleTree, PeftMethod, Result, Site, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::LowRank;

/// LoRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lora(pub LowRank);

register!(
    Lora,
    id = "lora",
    title = "LoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "LORA",
    paper = "arXiv 2106.09685",
    example = r#"{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}"#,
    hub = crate::hub::LOW_RANK,
);

impl PeftMethod for Lora {
    fn kinds(&self) -> &'static [ModuleKind] {
        LowRank::KINDS
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.0.check(&[])?;
        let sites = self.sites(cx.tree(), cx.common())?;
        self.0.inject(sites, cx, |site, cx| self.0.pair(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        Ok(Box::new(self.0.pair(site, cx)?))
    }

    fn save(&self, params: Tensors) -> Result<Tensors> {
        self.0.save(params)
    }

    fn load(&self, params: Tensors) -> Result<Tensors> {
        Ok(self.0.load(params))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.0.finish_config(config, tree);
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Tensor};

    fn network(config: Value) -> Network {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0], [3.0, 4.0]], None)
            .expect("a base");
        let mut network = Network::new(base);
        network.attach("a", &config, 0).expect("attaches");
        network
    }

    fn set(network: &Network, suffix: &str, values: Array2<f32>) {
        let params = network.parameters();
        let param = params
            .iter()
            .find(|p| p.key().ends_with(suffix))
            .expect("the parameter");
        param
            .set(Tensor::from_array(values, network.device()).expect("a tensor"))
            .expect("the shape fits");
    }

    /// x = (1, 1): W x = (3, 7); A x = 3; B A x = (3, 6); s = 4 / 1.
    #[test]
    fn by_hand() {
        let config =
            json!({"peft_type": "LORA", "r": 1, "lora_alpha": 4, "target_modules": ["fc"]});
        let network = network(config);
        set(&network, "lora_A.weight", array![[1.0, 2.0]]);
        set(&network, "lora_B.weight", array![[1.0], [2.0]]);
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        let y = network.run("fc", &x, &Pass::eval()).expect("runs");
        assert_eq!(
            y.to_vec().expect("values"),
            [3.0 + 4.0 * 3.0, 7.0 + 4.0 * 6.0]
        );
    }

    /// rsLoRA at rank 4 scales by alpha / 2, LoRA by alpha / 4.
    #[test]
    fn rslora_scales_by_the_root() {
        let run = |rslora: bool| {
            let network = network(
                json!({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_rslora": rslora, "target_modules": ["fc"]}),
            );
            set(&network, "lora_A.weight", Array2::ones((4, 2)));
            set(&network, "lora_B.weight", Array2::ones((2, 4)));
            let x = Tensor::from_vec(vec![1.0, 0.0], &[1, 2], network.device()).expect("a tensor");
            network
                .run("fc", &x, &Pass::eval())
                .expect("runs")
                .to_vec()
                .expect("values")
        };
        // W x = (1, 3); B A x = (4, 4).
        assert_eq!(run(false), [5.0, 7.0]);
        assert_eq!(run(true), [9.0, 11.0]);
    }

    #[test]
    fn a_variant_is_refused_by_name() {
        let base = Base::custom()
            .linear("fc", array![[1.0, 2.0]], None)
            .expect("a base");
        let config = json!({"peft_type": "LORA", "use_qalora": true, "target_modules": ["fc"]});
        let error = Network::new(base)
            .attach("a", &config, 0)
            .expect_err("refused")
            .to_string();
        assert!(error.contains("use_qalora"), "{error}");
    }
}
