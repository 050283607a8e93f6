//! DoRA: length and direction of each output's weights apart; the direction changes by a pair of thin matrices.
//!
//! # Paper
//! DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, equation 5; the constant norm: section 4.3.
//!
//! # Formula
//! `W' = diag(m / n) (W + s B A)`, n the length of each output's row of `W + s B A`; `y = W' x + b`. While training
//! with dropout D, `y = W x + b + (m / n - 1) W D(x) + (m / n) s B A D(x)`. The gradient takes n as a constant. On an
//! embedding, n is the length of each column of the table.
//!
//! # Saved keys
//! LoRA's, and `<module>.lora_magnitude_vector [out]` (an embedding's `[dim]`).
//!
//! # Defaults and their source
//! HF PEFT 0.21 with `use_dora`: m starts as n, so that the function stays; the rest as LoRA's. The paper trains at
//! rates a little below LoRA's (1e-4 to 2e-4 for large models) and keeps its results at half of LoRA's rank.
//!
//! # Differences from HF
//! n comes from `|W|` and thin products; the changed weight is not made in a forward pass. A row that is zero
//! throughout stays zero, where HF divides 0 by 0. Several on one module: each acts on what is below it, so that the
//! merge is what runs; HF adds their outputs and merges in turn, which differs.
//!
//! # Limits
//! No `lora_bias`, as in HF. No `ensure_weight_tying`: the two sides of a tied pair have lengths of their own.

use std::sync::OnceLock;

use peft_core::peft_tensor::concat;
use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, Injector, ModuleKind, ModuleTree, Param, PeftMethod,
    Result, Site, Tensor, Tensors, register,
};
use serde::{Deserialize, Serialize};

use crate::factors::{Factors, LowRank, Pair};

/// DoRA's fields of `adapter_config.json`: LoRA's, `use_dora` set.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Dora(pub LowRank);

impl Default for Dora {
    fn default() -> Self {
        let mut fields = LowRank::default();
        fields.others.insert(FLAG.to_owned(), json!(true));
        Self(fields)
    }
}

const FLAG: &str = "use_dora";

register!(
    Dora,
    id = "dora",
    title = "DoRA",
    family = Reparameterized,
    subfamily = "low rank",
    peft_type = "LORA",
    paper = "arXiv 2402.09353",
    example =
        r#"{"r": 2, "lora_alpha": 4, "use_dora": true, "target_modules": ["q_proj", "v_proj"]}"#,
    // With a rate of its own for B another method reads the file, and comes back here for the adapter.
    when = |c| c[FLAG] == json!(true) && c["loraplus_lr_ratio"].is_null(),
);

impl PeftMethod for Dora {
    fn kinds(&self) -> &'static [ModuleKind] {
        LowRank::KINDS
    }

    fn inject(&self, cx: &mut Injector<'_>) -> Result<()> {
        self.0.check(&[FLAG])?;
        if self.0.lora_bias {
            let detail = "has to be false with use_dora: the lengths leave no room for it";
            return Err(Error::config("lora_bias", detail));
        }
        let sites = self.sites(cx.tree(), cx.common())?;
        if self.0.ensure_weight_tying
            && let Some((input, output)) = cx.tied_pair()
            && sites
                .iter()
                .any(|s| s.path == input.path || s.path == output.path)
        {
            let detail = format!(
                "has to be false with use_dora: `{}` and `{}` have lengths of their own",
                input.path, output.path
            );
            return Err(Error::config("ensure_weight_tying", detail));
        }
        cx.attach_all(sites, |site, cx| self.attach(site, cx))
    }

    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let pair = self.0.pair(site, cx)?;
        let directed = Directed {
            pair,
            along: usize::from(site.kind != ModuleKind::Embedding),
        };
        let base = cx.base_weight()?.to_dense()?;
        let length = directed.length(&base, &Tensor::detach)?;
        let magnitude = cx.param(
            "lora_magnitude_vector",
            &[site.out_features],
            &Init::Value(length),
        )?;
        Ok(Box::new(Decomposed {
            directed,
            magnitude,
        }))
    }

    /// Magnitudes come with `.weight` behind their key too: as peft 0.12 wrote them, or a second time where
    /// `save_embedding_layers` takes whatever is on an embedding.
    fn load(&self, mut params: Tensors) -> Result<Tensors> {
        let wrapped = |key: &&String| key.ends_with(".lora_magnitude_vector.weight");
        let keys: Vec<String> = params.keys().filter(wrapped).cloned().collect();
        for key in keys {
            let plain = key.trim_end_matches(".weight").to_owned();
            if let Some(value) = params.remove(&key) {
                params.entry(plain).or_insert(value);
            }
        }
        Ok(self.0.load(params))
    }

    fn finish_config(&self, config: &mut Map<String, Value>, tree: &ModuleTree) {
        self.0.finish_config(config, tree);
    }
}

/// `W + s B A` and its lengths.
struct Directed {
    pair: Pair,
    /// The axis a length is taken along: 1 for `[out, in]`, 0 for a table `[rows, dim]`.
    along: usize,
}

/// Keeps an all-zero row from dividing by zero; far below any weight's square.
const TINY: f32 = 1e-30;

impl Directed {
    /// n for the weight below, `[out]` or `[dim]`: `|w + s B A|² = |w|² + 2 s w·(B A) + s² |B A|²`, row by row.
    fn length(&self, w: &Tensor, stop: &dyn Fn(&Tensor) -> Tensor) -> Result<Tensor> {
        let Factors {
            mut a,
            mut b,
            scaling,
        } = self.pair.factors(false)?;
        if let Some((b0, a0)) = self.pair.removed() {
            a = concat(&[&a, a0], 0)?;
            b = concat(&[&b, &b0.neg()?], 1)?;
        }
        // The scaling on B, so that no square of it is rounded on its own.
        let (a, b, w) = (stop(&a), stop(&b.scale(scaling)?), stop(w));
        // [out, r]
        let wa = if self.along == 1 {
            w.matmul_t(&a)?
        } else {
            w.t_matmul(&a.t()?)?
        };
        let cross = wa.scale(2.0)?.add(&b.matmul(&a.matmul_t(&a)?)?)?;
        let thin = cross.mul(&b)?.sum_axis(1)?;
        let own = w.square()?.sum_axis(self.along)?;
        let out = [b.shape()[0]];
        let square = own.reshape(&out)?.add(&thin.reshape(&out)?)?;
        Ok(square.relu()?.affine(1.0, TINY)?.sqrt()?)
    }
}

/// What is below: the weight as it runs there.
#[derive(Default)]
struct Below(OnceLock<Tensor>);

impl Adapter for Below {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let _ = self.0.set(w);
        Ok(None)
    }
}

struct Decomposed {
    directed: Directed,
    /// `[out]`
    magnitude: Param,
}

impl Decomposed {
    /// The output below, and the output with this adapter.
    fn both(&self, call: &Call<'_>) -> Result<(Tensor, Tensor)> {
        let pair = &self.directed.pair;
        let below = Below::default();
        let base = call.through_weight(&below)?;
        let Some(w) = below.0.into_inner() else {
            return Err(Error::other("a length needs a weight"));
        };
        let length = self.directed.length(&w, &|t| call.stop(t))?;
        let ratio = self.magnitude.tensor().div(&length)?;
        let unbiased = |y: &Tensor| match call.bias() {
            Some(bias) => y.sub(bias),
            None => Ok(y.clone()),
        };
        if call.pass().train && pair.dropout > 0.0 && !pair.is_embedding() {
            let x = call.x()?;
            let dropped = call.dropout(x, pair.dropout)?;
            let kept = pair.without_removed(unbiased(&call.base_with(&dropped)?)?, &dropped)?;
            let turned = pair.through(&dropped, true)?;
            // W x + b stays undropped; its share in the change is of the dropped input.
            let moved = kept.add(&turned)?.mul(&ratio)?.sub(&kept)?;
            let y = pair.without_removed(base.clone(), x)?.add(&moved)?;
            return Ok((base, y));
        }
        let turned = pair.change(call)?;
        let y = unbiased(&base)?.add(&turned)?.mul(&ratio)?;
        let y = match call.bias() {
            Some(bias) => y.add(bias)?,
            None => y,
        };
        Ok((base, y))
    }
}

impl Adapter for Decomposed {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let Some(turned) = self.directed.pair.weight(w)? else {
            return Ok(None);
        };
        let along = self.directed.along;
        let length = turned
            .square()?
            .sum_axis(along)?
            .affine(1.0, TINY)?
            .sqrt()?;
        let magnitude = self.magnitude.tensor().reshape(length.shape())?;
        Ok(Some(turned.mul(&magnitude.div(&length)?)?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        self.both(call).map(|(_, y)| y)
    }

    fn added(&self, call: &Call<'_>) -> Result<Option<Tensor>> {
        let (base, y) = self.both(call)?;
        Ok(Some(y.sub(&base)?))
    }

    fn by_rows(&self) -> bool {
        self.directed.pair.by_rows()
    }
}

#[cfg(test)]
mod tests {
    use peft_core::ndarray::{Array1, Array2, array};
    use peft_core::serde_json::json;
    use peft_core::{Base, Network, Pass, RngKey, Tensor};

    fn network(dropout: f32) -> Network {
        let base = Base::custom()
            .linear(
                "fc",
                array![[3.0, 4.0], [0.0, 2.0]],
                Some(array![0.5, -1.0]),
            )
            .expect("a base");
        let mut network = Network::new(base);
        let config = json!({"peft_type": "LORA", "use_dora": true, "r": 1, "lora_alpha": 2, "lora_dropout": dropout,
            "target_modules": ["fc"]});
        network.attach("a", &config, 0).expect("attaches");
        network
    }

    fn set(network: &Network, suffix: &str, value: Tensor) {
        let params = network.parameters();
        let param = params
            .iter()
            .find(|p| p.key().ends_with(suffix))
            .expect("the parameter");
        param.set(value).expect("the shape fits");
    }

    fn filled(network: &Network) {
        let to = |m: Array2<f32>| Tensor::from_array(m, network.device()).expect("a tensor");
        set(network, "lora_A.weight", to(array![[1.0, 0.0]]));
        set(network, "lora_B.weight", to(array![[1.0], [0.0]]));
        let m: Array1<f32> = array![10.0, 3.0];
        set(
            network,
            "lora_magnitude_vector",
            Tensor::from_array(m, network.device()).expect("a tensor"),
        );
    }

    fn run(network: &Network, pass: &Pass) -> Vec<f32> {
        let x = Tensor::from_vec(vec![1.0, 1.0], &[1, 2], network.device()).expect("a tensor");
        network
            .run("fc", &x, pass)
            .expect("runs")
            .to_vec()
            .expect("values")
    }

    /// The rows of W are 5 and 2 long; s = 2, so that s B A = [[2, 0], [0, 0]] turns them to (5, 4) and (0, 2). With
    /// m = (10, 3), y = (10 / sqrt 41 * 9 + 0.5, 3 / 2 * 2 - 1).
    #[test]
    fn by_hand() {
        let mut network = network(0.0);
        let start = network
            .parameters()
            .into_iter()
            .find(|p| p.key().ends_with("vector"));
        let start = start.expect("the magnitude");
        assert_eq!(start.key(), "base_model.model.fc.lora_magnitude_vector");
        assert_eq!(start.tensor().to_vec().expect("values"), [5.0, 2.0]);
        filled(&network);
        let want = [90.0 / 41f32.sqrt() + 0.5, 2.0];
        let near = |y: &[f32]| y.iter().zip(want).all(|(y, w)| (y - w).abs() < 1e-5);
        let y = run(&network, &Pass::eval());
        assert!(near(&y), "{y:?}, not {want:?}");
        network.merge().expect("merges");
        let y = run(&network, &Pass::eval());
        assert!(near(&y), "merged: {y:?}, not {want:?}");
    }

    /// Where dropout takes everything away, what is left is the base's own output: W x + b = (7.5, 1). Where it takes
    /// nothing (and doubles what it keeps), the change is twice that of the undropped input.
    #[test]
    fn dropout_leaves_the_base_alone() {
        let network = network(0.5);
        filled(&network);
        let ratio = [10.0 / 41f32.sqrt(), 1.5];
        let (kept, turned) = ([[3.0, 4.0], [0.0, 2.0]], [[5.0, 4.0], [0.0, 2.0]]);
        let base = [7.5, 1.0];
        let mut seen = std::collections::BTreeSet::new();
        for step in 0..40 {
            let y = run(&network, &Pass::train(RngKey::new(step)));
            let mask = (0..4u8).find(|mask| {
                let x = [f32::from(mask & 1) * 2.0, f32::from(mask >> 1) * 2.0];
                (0..2).all(|i| {
                    let at = |w: [[f32; 2]; 2]| w[i][0] * x[0] + w[i][1] * x[1];
                    (base[i] + ratio[i] * at(turned) - at(kept) - y[i]).abs() < 1e-4
                })
            });
            seen.insert(mask.unwrap_or_else(|| panic!("{y:?} is of no mask")));
        }
        assert_eq!(seen.len(), 4, "the masks seen: {seen:?}");
    }
}
