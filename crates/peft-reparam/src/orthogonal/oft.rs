//! OFT: a block-diagonal rotation of a weight's input side.
//!
//! # Paper
//! Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280, section 3; in the form that turns the
//! input instead of the weight, Orthogonal Finetuning Made Scalable, arXiv 2506.19847.
//!
//! # Formula
//! `y = W (x R) + b` with `R = diag(R_1 .. R_r)`; merged, `W' = W Rᵀ`. From a skew-symmetric `Q_i` with the parameters
//! in its upper triangle, `R_i = (I - Q_i)(I + Q_i)⁻¹` exactly or, with `use_cayley_neumann`, the first terms of
//! `(I + Q_i)(I - Q_i)⁻¹`: `I + 2 Q + 2 Q² + .. + Qᵏ`. The two turn opposite ways. With `coft`, Q_i of a larger norm
//! than `eps / sqrt(r)` is brought back to it. On an embedding, `y = E[id] R`.
//!
//! # Saved keys
//! `<module>.oft_R.weight [r, b (b - 1) / 2]`, upper triangles row by row, with `block_share` `[1, ..]`; embeddings
//! `<module>.oft_embedding_R.weight`.
//!
//! # Defaults and their source
//! Blocks of 32, five Neumann terms, zero start, no constraint: HF PEFT 0.21. The angles want a higher learning rate than
//! LoRA's factors: 1e-3 to 4e-3.
//!
//! # Differences from HF
//! A block size that does not divide a layer is an error in a new adapter; for one that was saved the size HF falls back
//! on is taken. `module_dropout` acts as HF documents it (HF 0.21 makes the layer and never calls it). With `coft` the
//! parameters are brought back before each step, not in each forward pass. GPT-2's layers work too.
//!
//! # Limits
//! Files of HF PEFT before 0.16 have another form and are refused by their keys; those of 0.16 and 0.17 mean one Neumann
//! term less than the same configuration means now.

use std::sync::{Arc, Mutex, PoisonError};

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, ModuleKind, ModuleTree, Param, PeftMethod, Result, Site,
    Tensor, TrainCx, TrainHooks, register,
};
use serde::{Deserialize, Serialize};

use crate::fields::{blocks, fan_in_fan_out, finite, kept_for_hf, nearest_divisor, probability};
use crate::rotate::{bring_back, cayley, drop_blocks, neumann, rotate, skew};

/// OFT's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Oft {
    /// Blocks of a layer; 0 where `oft_block_size` is given.
    pub r: usize,
    /// Width of a block; 0 where `r` is given.
    pub oft_block_size: usize,
    /// Share of the blocks that do not turn, drawn anew in each training step.
    pub module_dropout: f32,
    /// Whether the rotation is held near the identity.
    pub coft: bool,
    /// How near.
    pub eps: f64,
    /// Whether all blocks of a layer turn alike.
    pub block_share: bool,
    /// Whether the rotation is a sum of powers instead of exact.
    pub use_cayley_neumann: bool,
    /// Terms of that sum.
    pub num_cayley_neumann_terms: usize,
    /// Whether a fresh adapter is the identity.
    pub init_weights: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
    #[serde(skip)]
    bounded: Bounded,
}

impl Default for Oft {
    fn default() -> Self {
        Self {
            r: 0,
            oft_block_size: 32,
            module_dropout: 0.0,
            coft: false,
            eps: 6e-5,
            block_share: false,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
            init_weights: true,
            others: kept_for_hf(&json!({"bias": "none", "fan_in_fan_out": false})),
            bounded: Bounded::default(),
        }
    }
}

register!(
    Oft,
    id = "oft",
    title = "OFT",
    family = Reparameterized,
    subfamily = "orthogonal",
    peft_type = "OFT",
    paper = "arXiv 2306.07280",
    example = r#"{"oft_block_size": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl Oft {
    fn check(&self) -> Result<()> {
        probability("module_dropout", self.module_dropout)?;
        finite("eps", self.eps)?;
        if self.eps <= 0.0 {
            return Err(Error::config("eps", "has to be above 0"));
        }
        if self.num_cayley_neumann_terms < 2 {
            let detail = "has to be at least 2: one term is the identity";
            return Err(Error::config("num_cayley_neumann_terms", detail));
        }
        Ok(())
    }

    /// Number and width of the blocks that `size` columns are cut into.
    fn blocks(&self, size: usize, saved: bool, site: &Site) -> Result<(usize, usize)> {
        // What HF makes of a number that does not divide; a file may state one.
        let fitted = |value: usize| match value {
            0 => 0,
            value if saved => nearest_divisor(size, value),
            value => value,
        };
        let count = ("r", fitted(self.r));
        blocks(
            count,
            ("oft_block_size", fitted(self.oft_block_size)),
            size,
            site,
        )
    }
}

impl PeftMethod for Oft {
    fn kinds(&self) -> &'static [ModuleKind] {
        &[
            ModuleKind::Linear,
            ModuleKind::Conv1d,
            ModuleKind::Embedding,
        ]
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        self.check()?;
        let embedding = site.kind == ModuleKind::Embedding;
        let (name, size) = if embedding {
            ("oft_embedding_R.weight", site.out_features)
        } else {
            ("oft_R.weight", site.in_features)
        };
        let (count, width) = self.blocks(size, cx.common().inference_mode, site)?;
        let stored = if self.block_share { 1 } else { count };
        let start = if self.init_weights {
            Init::Zeros
        } else {
            Init::Normal { std: 0.1 }
        };
        let param = cx.param(name, &[stored, width * (width - 1) / 2], &start)?;
        let bound = self.coft.then(|| self.eps / (stored as f64).sqrt());
        if let Some(bound) = bound {
            self.bounded.push(&param, bound);
        }
        Ok(Box::new(At {
            param,
            width,
            embedding,
            bound,
            terms: self
                .use_cayley_neumann
                .then_some(self.num_cayley_neumann_terms),
            dropout: self.module_dropout,
            path: site.path.clone(),
        }))
    }

    fn trainer(&self) -> Box<dyn TrainHooks> {
        Box::new(self.bounded.clone())
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        fan_in_fan_out(config, tree);
    }
}

/// The parameters held near zero, with their bounds.
#[derive(Clone, Debug, Default)]
struct Bounded(Arc<Mutex<Vec<(Param, f64)>>>);

impl Bounded {
    fn push(&self, param: &Param, bound: f64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push((param.clone(), bound));
    }
}

impl TrainHooks for Bounded {
    fn before_forward(&mut self, _cx: &mut TrainCx<'_>) -> Result<()> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (param, bound) in all.iter() {
            param.set(bring_back(&param.tensor().detach(), *bound)?)?;
        }
        Ok(())
    }
}

struct At {
    /// `[r or 1, b (b - 1) / 2]`
    param: Param,
    /// b
    width: usize,
    embedding: bool,
    /// Largest norm of a block's skew-symmetric matrix.
    bound: Option<f64>,
    /// Of the Neumann series; None for the exact map.
    terms: Option<usize>,
    dropout: f32,
    path: String,
}

impl At {
    /// `[r or 1, b, b]`
    fn rotations(&self) -> Result<Tensor> {
        let mut rows = self.param.tensor();
        if let Some(bound) = self.bound {
            rows = bring_back(&rows, bound)?;
        }
        let q = skew(&rows, self.width)?;
        match self.terms {
            Some(terms) => neumann(&q, terms),
            None => cayley(&q),
        }
    }
}

impl Adapter for At {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        // A row of the table is turned as it is read; a linear layer's weight undoes the turn of its input.
        rotate(&w, &self.rotations()?, !self.embedding).map(Some)
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let mut blocks = self.rotations()?;
        let shared = blocks.dims3()?.0 == 1;
        if call.pass().train && self.dropout > 0.0 && !shared {
            let key = call.pass().key.fork(&self.path).fork("module_dropout");
            blocks = drop_blocks(&blocks, self.dropout, key)?;
        }
        if self.embedding && call.is_embedding() {
            return rotate(&call.base()?, &blocks, false);
        }
        call.base_with(&rotate(call.x()?, &blocks, false)?)
    }

    fn by_rows(&self) -> bool {
        // What is dropped are blocks of the rotation, for all rows.
        true
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::Array2;
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Device, Network, Pass, Result, Tensor};

    use crate::testing::attached;

    fn network(fields: Value) -> Result<Network> {
        let base = Base::custom().linear("fc", Array2::eye(4), None)?;
        let config = json!({"peft_type": "OFT", "target_modules": ["fc"]});
        attached(base, config, &fields)
    }

    /// Blocks of two, Q = [[0, t], [-t, 0]] with t = 0.5 and 0: exactly, x R = (x0 c + x1 s, -x0 s + x1 c) with c = 0.6
    /// and s = 0.8; by five terms, the other way round, c = 1 - 2 t² + t⁴ and s = 2 t - 2 t³.
    #[test]
    fn by_hand() {
        for (exact, want) in [
            (true, [0.6 + 0.8 * 10.0, -0.8 + 0.6 * 10.0, 3.0, 4.0]),
            (false, [0.5625 - 7.5, 0.75 + 5.625, 3.0, 4.0]),
        ] {
            let fields = json!({"oft_block_size": 2, "use_cayley_neumann": !exact});
            let mut network = network(fields).expect("attaches");
            let values = Tensor::from_vec(vec![0.5, 0.0], &[2, 1], network.device());
            network.parameters()[0]
                .set(values.expect("a tensor"))
                .expect("fits");
            let x = Tensor::from_vec(vec![1.0, 10.0, 3.0, 4.0], &[1, 4], network.device());
            let x = x.expect("a tensor");
            let adapted = network.run("fc", &x, &Pass::eval()).expect("runs");
            network.merge().expect("merges");
            let merged = network.run("fc", &x, &Pass::eval()).expect("runs");
            for y in [adapted, merged] {
                let y = y.to_vec().expect("values");
                for (got, want) in y.iter().zip(want) {
                    assert!((got - want).abs() < 1e-5, "exact {exact}: {y:?}");
                }
            }
        }
    }

    fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_vec(values.to_vec(), shape, &Device::cpu()).expect("a tensor")
    }

    /// Rows of a table turn as they are read, and merge into the turned table.
    #[test]
    fn an_embedding_by_hand() {
        let base = Base::custom()
            .embedding("emb", Array2::eye(2))
            .expect("a base");
        let config = json!({
            "peft_type": "OFT", "target_modules": ["emb"], "oft_block_size": 2, "use_cayley_neumann": false
        });
        let mut network = Network::new(base);
        network.attach("a", &config, 0).expect("attaches");
        let params = network.parameters();
        assert!(params[0].key().ends_with("emb.oft_embedding_R.weight"));
        params[0].set(tensor(&[0.5], &[1, 1])).expect("fits");
        let id = network.module("emb").expect("the table");
        for merged in [false, true] {
            if merged {
                network.merge().expect("merges");
            }
            let rows = network.embed(id, &[1, 0], &Pass::eval()).expect("runs");
            let rows = rows.to_vec().expect("values");
            for (got, want) in rows.iter().zip([0.8, 0.6, 0.6, -0.8]) {
                assert!((got - want).abs() < 1e-6, "{rows:?}");
            }
        }
    }

    #[test]
    fn a_block_that_does_not_divide() {
        for fields in [
            json!({"oft_block_size": 3}),
            json!({"r": 3, "oft_block_size": 0}),
        ] {
            let Err(error) = network(fields) else {
                panic!("accepted");
            };
            let error = error.to_string();
            assert!(
                error.contains("`fc`") && error.contains("1, 2, 4"),
                "{error}"
            );
        }
        let saved = json!({"oft_block_size": 3, "inference_mode": true});
        let network = network(saved).expect("attaches");
        assert_eq!(
            network.adapter_parameters("a").expect("there")[0].shape(),
            [2, 1]
        );
    }
}
