//! BOFT: a rotation of a weight's input side as a product of sparse ones, in the order of a butterfly.
//!
//! # Paper
//! Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243, section 4.
//!
//! # Formula
//! `y = s ⊙ W (x B_m .. B_1) + b` with `B_i = P_i diag(R_1 .. R_n) P_iᵀ`, `R = (I - S)(I + S)⁻¹` and `S = (P - Pᵀ) / 2`
//! of each stored matrix P; merged, `W' = s W (B_m .. B_1)ᵀ`. P_i brings half-blocks together that are `2^(i - 1)`
//! half-blocks apart, so that m factors mix runs of `2^(m - 1)` blocks.
//!
//! # Saved keys
//! `<module>.boft_R [m, n, b, b]` (whole matrices, of which the skew part counts), `<module>.boft_s [out, 1]`.
//!
//! # Defaults and their source
//! Blocks of 4, one factor, no dropout, R zero and s one: HF PEFT 0.21. A learning rate of 5e-3 to 2e-2 suits a small
//! model.
//!
//! # Differences from HF
//! Several factors work here; HF 0.21 falls back to one without a word where it cannot compile its CUDA extension, and
//! then cannot load a file that has more. The permutations are reshapes, not dense matrices. GPT-2's layers work too.
//!
//! # Limits
//! No convolutions.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, ModuleTree, Param, PeftMethod, Result, Site, Tensor,
    register,
};
use serde::{Deserialize, Serialize};

use crate::fields::{blocks, fan_in_fan_out, kept_for_hf, probability};
use crate::rotate::{cayley, drop_blocks, rotate};

/// BOFT's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct Boft {
    /// Width of a block; 0 where `boft_block_num` is given.
    pub boft_block_size: usize,
    /// Blocks of a layer; 0 where `boft_block_size` is given.
    pub boft_block_num: usize,
    /// Sparse factors.
    pub boft_n_butterfly_factor: usize,
    /// Share of the blocks of one factor that do not turn, both drawn anew in each training step.
    pub boft_dropout: f32,
    /// Whether a fresh adapter is the identity.
    pub init_weights: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for Boft {
    fn default() -> Self {
        Self {
            boft_block_size: 4,
            boft_block_num: 0,
            boft_n_butterfly_factor: 1,
            boft_dropout: 0.0,
            init_weights: true,
            others: kept_for_hf(&json!({"bias": "none", "fan_in_fan_out": false})),
        }
    }
}

register!(
    Boft,
    id = "boft",
    title = "BOFT",
    family = Reparameterized,
    subfamily = "orthogonal",
    peft_type = "BOFT",
    paper = "arXiv 2311.06243",
    example = r#"{"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl Boft {
    /// Number and width of the blocks.
    fn blocks(&self, site: &Site) -> Result<(usize, usize)> {
        let number = ("boft_block_num", self.boft_block_num);
        let size = ("boft_block_size", self.boft_block_size);
        let (count, width) = blocks(number, size, site.in_features, site)?;
        // A factor more needs twice as many blocks to bring together, and blocks that have halves.
        let most = if width.is_multiple_of(2) {
            1 + count.trailing_zeros() as usize
        } else {
            1
        };
        if !(1..=most).contains(&self.boft_n_butterfly_factor) {
            let detail = format!(
                "{} is out of range at `{}` with {count} blocks of {width}; possible are 1 to {most}",
                self.boft_n_butterfly_factor, site.path
            );
            return Err(Error::config("boft_n_butterfly_factor", detail));
        }
        Ok((count, width))
    }
}

impl PeftMethod for Boft {
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        probability("boft_dropout", self.boft_dropout)?;
        let (count, width) = self.blocks(site)?;
        let factors = self.boft_n_butterfly_factor;
        let out = site.out_features;
        let (turn, scale) = if self.init_weights {
            (Init::Zeros, Init::Constant(1.0))
        } else {
            let key = cx.key("boft_s");
            let scale = Tensor::normal(key, 1.0, 0.1, &[out, 1], &cx.device())?;
            (Init::Normal { std: 0.1 }, Init::Value(scale))
        };
        Ok(Box::new(At {
            turn: cx.param("boft_R", &[factors, count, width, width], &turn)?,
            scale: cx.param("boft_s", &[out, 1], &scale)?,
            factors,
            count,
            width,
            dropout: self.boft_dropout,
            path: site.path.clone(),
        }))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        fan_in_fan_out(config, tree);
    }
}

struct At {
    /// `[m, n, b, b]`
    turn: Param,
    /// `[out, 1]`
    scale: Param,
    factors: usize,
    count: usize,
    width: usize,
    dropout: f32,
    path: String,
}

impl At {
    /// The rotations of each factor, `[n, b, b]`.
    fn rotations(&self) -> Result<Vec<Tensor>> {
        let (n, b) = (self.count, self.width);
        let all = self.turn.tensor().reshape(&[self.factors * n, b, b])?;
        let all = cayley(&all.sub(&all.t()?)?.scale(0.5)?)?;
        (0..self.factors)
            .map(|i| Ok(all.narrow(0, i * n, n)?))
            .collect()
    }

    /// `x B_i`, or `x B_iᵀ`. Within runs of `2^i` blocks, P puts the half-blocks of even places in front of the odd.
    fn factor(&self, x: &Tensor, i: usize, blocks: &Tensor, transposed: bool) -> Result<Tensor> {
        if i == 0 {
            return rotate(x, blocks, transposed);
        }
        let (pairs, half) = (1 << i, self.width / 2);
        let runs = x.numel() / (pairs * 2 * half);
        let shuffle = |x: &Tensor, halves: [usize; 2]| -> Result<Tensor> {
            let apart = x.reshape(&[runs, halves[0], halves[1], half])?;
            Ok(apart.permute(&[0, 2, 1, 3])?.reshape(x.shape())?)
        };
        let turned = rotate(&shuffle(x, [2, pairs])?, blocks, transposed)?;
        shuffle(&turned, [pairs, 2])
    }
}

impl Adapter for At {
    fn weight(&self, mut w: Tensor) -> Result<Option<Tensor>> {
        for (i, blocks) in self.rotations()?.iter().enumerate() {
            w = self.factor(&w, i, blocks, true)?;
        }
        Ok(Some(w.mul(&self.scale.tensor())?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let mut rotations = self.rotations()?;
        if call.pass().train && self.dropout > 0.0 {
            let key = call.pass().key.fork(&self.path).fork("boft_dropout");
            let drawn = key.below(0, self.factors as u64) as usize;
            if let Some(blocks) = rotations.get_mut(drawn) {
                *blocks = drop_blocks(blocks, self.dropout, key.fork("blocks"))?;
            }
        }
        let mut x = call.x()?.clone();
        for (i, blocks) in rotations.iter().enumerate().rev() {
            x = self.factor(&x, i, blocks, false)?;
        }
        let scale = self.scale.tensor().reshape(&[self.scale.numel()])?;
        let y = call.base_with(&x)?;
        Ok(match call.bias() {
            // The scale is the weight's alone.
            Some(bias) => y.sub(bias)?.mul(&scale)?.add(bias)?,
            None => y.mul(&scale)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array2, array};
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Result, Tensor};

    use crate::testing::attached;

    fn network(size: usize, fields: Value) -> Result<Network> {
        let bias = Some(peft_core::ndarray::Array1::from_elem(size, 0.5));
        let base = Base::custom().linear("fc", Array2::eye(size), bias)?;
        let config = json!({"peft_type": "BOFT", "target_modules": ["fc"]});
        attached(base, config, &fields)
    }

    /// Quarter turns: S = [[0, 1], [-1, 0]] (half of the stored difference) gives R = [[0, -1], [1, 0]], so that
    /// x R = (x1, -x0). With eight inputs in blocks of two, the third factor's permutation puts 0, 2, 4, 6, 1, 3, 5, 7
    /// beside each other; x B_3 = P (x P -> turned). Only its first block turns: places 0 and 4 of `x P`.
    #[test]
    fn by_hand() {
        let fields = json!({"boft_block_size": 2, "boft_n_butterfly_factor": 3});
        let mut network = network(8, fields).expect("attaches");
        let mut turn = vec![0.0; 3 * 4 * 4];
        turn[2 * 16 + 1] = 2.0;
        let device = network.device().clone();
        let params = network.parameters();
        let turn = Tensor::from_vec(turn, &[3, 4, 2, 2], &device).expect("a tensor");
        params[0].set(turn).expect("fits");
        params[1]
            .set(Tensor::full(3.0, &[8, 1], &device).expect("a tensor"))
            .expect("fits");
        let x = Tensor::from_vec((1..=8).map(|i| i as f32).collect(), &[1, 8], &device);
        let x = x.expect("a tensor");
        let adapted = network.run("fc", &x, &Pass::eval()).expect("runs");
        let adapted = adapted.to_vec().expect("values");
        // 1 and 5 are four apart: they become 5 and -1.
        let want = array![5.0, 2.0, 3.0, 4.0, -1.0, 6.0, 7.0, 8.0].mapv(|v| 3.0 * v + 0.5);
        for (got, want) in adapted.iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{adapted:?}");
        }
        network.merge().expect("merges");
        let merged = network.run("fc", &x, &Pass::eval()).expect("runs");
        for (got, want) in merged.to_vec().expect("values").iter().zip(&want) {
            assert!((got - want).abs() < 1e-5, "{merged:?}");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        for (fields, names) in [
            (
                json!({"boft_block_size": 5}),
                ["boft_block_size", "1, 2, 3, 4, 6, 12"],
            ),
            (
                json!({"boft_block_size": 0}),
                ["boft_block_size", "boft_block_num"],
            ),
            (
                json!({"boft_block_num": 2}),
                ["boft_block_num", "boft_block_size"],
            ),
            (
                json!({"boft_n_butterfly_factor": 2}),
                ["boft_n_butterfly_factor", "1 to 1"],
            ),
            (
                json!({"boft_n_butterfly_factor": 0}),
                ["boft_n_butterfly_factor", "`fc`"],
            ),
            (
                json!({"boft_block_size": 1}),
                [
                    "boft_block_size",
                    "`fc` into blocks of one, which cannot turn; possible are 2, 3, 4, 6, 12",
                ],
            ),
            (
                json!({"boft_block_size": 0, "boft_block_num": 12}),
                ["boft_block_num", "possible are 1, 2, 3, 4, 6"],
            ),
        ] {
            let Err(error) = network(12, fields) else {
                panic!("accepted");
            };
            let error = error.to_string();
            assert!(names.iter().all(|name| error.contains(name)), "{error}");
        }
    }
}
