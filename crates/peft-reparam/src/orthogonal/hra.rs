//! HRA: a chain of reflections of a weight's input side.
//!
//! # Paper
//! Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation, arXiv 2405.17484,
//! section 3.
//!
//! # Formula
//! `W' = W H_1 .. H_r` with `H_i = I - 2 u_i u_iᵀ` and u_i the columns of U, normalised; run as `y = W (x - x U Tᵀ Uᵀ) + b`
//! with the r x r matrix `T = (I / 2 + triu(UᵀU, 1))⁻¹`. With `apply_GS` the columns are made orthogonal first, one after
//! the other; then T = 2 I.
//!
//! # Saved keys
//! `<module>.hra_u [in, r]`.
//!
//! # Defaults and their source
//! r 8 without `apply_GS`; pairs of equal random columns, whose reflections undo each other: HF PEFT 0.21. The columns
//! count by their direction alone; a learning rate of 1e-3 to 5e-3 suits them.
//!
//! # Differences from HF
//! The input is reflected through two thin products; HF builds the in x in matrix in every pass. An odd rank cannot start
//! as the identity and is an error in a new adapter unless `init_weights` is false (HF warns). With `apply_GS` all columns
//! start random: equal ones leave nothing but rounding when made orthogonal, which HF takes for a direction. GPT-2's
//! layers work too.
//!
//! # Limits
//! No convolutions. With `apply_GS` a fresh adapter is never the identity.

use peft_core::serde_json::{Map, Value, json};
use peft_core::{
    Adapter, Attach, Call, Error, Init, Param, PeftMethod, Result, Site, Tensor,
    peft_tensor::concat, register,
};
use serde::{Deserialize, Serialize};

use crate::fields::rank_fits;
use crate::rotate::{identity, inverse};

/// HRA's fields of `adapter_config.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
#[allow(non_snake_case, reason = "HF's name of the field")]
pub struct Hra {
    /// Number of reflections.
    pub r: usize,
    /// Whether their directions are made orthogonal.
    pub apply_GS: bool,
    /// Whether a fresh adapter is the identity.
    pub init_weights: bool,
    /// HF's other fields, kept for the file.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for Hra {
    fn default() -> Self {
        let others = json!({
            "bias": "none", "exclude_modules": null, "layers_pattern": null, "layers_to_transform": null,
            "modules_to_save": null, "target_modules": null
        });
        Self {
            r: 8,
            apply_GS: false,
            init_weights: true,
            others: others.as_object().cloned().unwrap_or_default(),
        }
    }
}

register!(
    Hra,
    id = "hra",
    title = "HRA",
    family = Reparameterized,
    subfamily = "orthogonal",
    peft_type = "HRA",
    paper = "arXiv 2405.17484",
    example = r#"{"r": 4, "target_modules": ["q_proj", "v_proj"]}"#,
);

impl PeftMethod for Hra {
    fn attach(&self, site: &Site, cx: &mut Attach<'_>) -> Result<Box<dyn Adapter>> {
        let (r, inside) = (self.r, site.in_features);
        rank_fits("r", r, inside, site)?;
        let paired = self.init_weights && !self.apply_GS;
        let fresh = !cx.common().inference_mode;
        if paired && fresh && !r.is_multiple_of(2) {
            let detail = format!(
                "{r} reflections at `{}` cannot start as the identity; possible are even numbers up to {inside}, or any \
                 up to there with init_weights = false",
                site.path
            );
            return Err(Error::config("r", detail));
        }
        let start = if paired && r >= 2 {
            let bound = 1.0 / ((r / 2) as f32).sqrt();
            let half = [inside, r.div_ceil(2), 1];
            let half = Tensor::uniform(cx.key("hra_u"), -bound, bound, &half, &cx.device())?;
            let both = half.broadcast_to(&[inside, r.div_ceil(2), 2])?;
            let all = both.reshape(&[inside, 2 * r.div_ceil(2)])?;
            Init::Value(all.narrow(1, 0, r)?)
        } else {
            Init::LinearDefault { fan_in: r }
        };
        Ok(Box::new(At {
            u: cx.param("hra_u", &[inside, r], &start)?,
            orthogonal: self.apply_GS,
        }))
    }
}

struct At {
    /// `[in, r]`
    u: Param,
    orthogonal: bool,
}

impl At {
    /// Directions U `[in, r]` and T `[r, r]`: the chain is `I - U T Uᵀ`.
    fn chain(&self) -> Result<(Tensor, Tensor)> {
        let u = self.u.tensor();
        if self.orthogonal {
            let u = orthonormal(&u)?;
            let t = identity(&u.t_matmul(&u)?.detach())?.scale(2.0)?;
            return Ok((u, t));
        }
        let u = u.div(&u.square()?.sum_axis(0)?.sqrt()?)?;
        let gram = u.t_matmul(&u)?;
        let r = gram.last_dim();
        let above = (0..r * r).map(|at| if at / r < at % r { 1.0 } else { 0.0 });
        let above = Tensor::from_vec(above.collect(), &[r, r], u.device())?;
        let t = inverse(&gram.mul(&above)?.add(&identity(&gram)?.scale(0.5)?)?)?;
        Ok((u, t))
    }
}

/// The columns made orthonormal from the first to the last.
fn orthonormal(u: &Tensor) -> Result<Tensor> {
    let mut done: Vec<Tensor> = Vec::new();
    for i in 0..u.last_dim() {
        let mut column = u.narrow(1, i, 1)?;
        for before in &done {
            column = column.sub(&before.mul(&before.t_matmul(&column)?)?)?;
        }
        done.push(column.div(&column.square()?.sum_axis(0)?.sqrt()?)?);
    }
    Ok(concat(&done.iter().collect::<Vec<_>>(), 1)?)
}

impl Adapter for At {
    fn weight(&self, w: Tensor) -> Result<Option<Tensor>> {
        let (u, t) = self.chain()?;
        Ok(Some(w.sub(&w.matmul(&u)?.matmul(&t)?.matmul_t(&u)?)?))
    }

    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let (u, t) = self.chain()?;
        let x = call.x()?;
        call.base_with(&x.sub(&x.matmul(&u)?.matmul_t(&t)?.matmul_t(&u)?)?)
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

    fn network(fields: Value) -> Result<Network> {
        let base = Base::custom().linear("fc", Array2::eye(3), None)?;
        let mut config = json!({"peft_type": "HRA", "target_modules": ["fc"]});
        for (field, value) in fields.as_object().expect("fields") {
            config[field] = value.clone();
        }
        let mut network = Network::new(base);
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// `x = (1, 10, 100)` through columns u_1 = (2, 0, 0) and u_2 = (3, 4, 0), as it runs and merged.
    fn both(orthogonal: bool) -> [Vec<f32>; 2] {
        let mut network = network(json!({"r": 2, "apply_GS": orthogonal})).expect("attaches");
        let u = Tensor::from_vec(
            vec![2.0, 3.0, 0.0, 4.0, 0.0, 0.0],
            &[3, 2],
            network.device(),
        );
        network.parameters()[0]
            .set(u.expect("a tensor"))
            .expect("fits");
        let x = Tensor::from_vec(vec![1.0, 10.0, 100.0], &[1, 3], network.device());
        let x = x.expect("a tensor");
        let run = |network: &Network| {
            let y = network.run("fc", &x, &Pass::eval()).expect("runs");
            y.to_vec().expect("values")
        };
        let adapted = run(&network);
        network.merge().expect("merges");
        [adapted, run(&network)]
    }

    fn near(got: &[f32], want: [f32; 3]) {
        let far = got.iter().zip(want).any(|(g, w)| (g - w).abs() > 1e-4);
        assert!(!far, "{got:?} is not {want:?}");
    }

    /// `y = H_1 H_2 x`: H_2 takes 2 (0.6 + 8) = 17.2 times (0.6, 0.8, 0) from x and leaves (-9.32, -3.76, 100); H_1 turns
    /// the first sign.
    #[test]
    fn by_hand() {
        both(false)
            .iter()
            .for_each(|y| near(y, [9.32, -3.76, 100.0]));
    }

    /// Made orthogonal, the directions are the first two axes.
    #[test]
    fn orthogonal_by_hand() {
        both(true)
            .iter()
            .for_each(|y| near(y, [-1.0, -10.0, 100.0]));
    }

    #[test]
    fn ranks_that_cannot_be() {
        for (fields, part) in [
            (json!({"r": 4}), "1 to 3"),
            (json!({"r": 0}), "1 to 3"),
            (json!({"r": 3}), "identity"),
        ] {
            let Err(error) = network(fields) else {
                panic!("accepted");
            };
            assert!(error.to_string().contains(part), "{error}");
        }
        network(json!({"r": 3, "init_weights": false})).expect("attaches");
        network(json!({"r": 3, "inference_mode": true})).expect("attaches");
    }
}
