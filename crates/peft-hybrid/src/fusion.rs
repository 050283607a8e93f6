//! Attention over what several adapters would add: AdapterFusion's layer, and what it does between steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use peft_core::{Adapter, Call, Error, Param, Result, Tensor, TrainCx, TrainHooks};

/// The fusion at one junction.
pub(crate) struct Layer {
    pub(crate) members: Vec<Arc<dyn Adapter>>,
    /// `[d, d]`, `[d]`
    pub(crate) query: Option<(Param, Param)>,
    /// `[d, d]`, `[d]`
    pub(crate) key: Option<(Param, Param)>,
    /// `[d, d]`
    pub(crate) value: Option<Param>,
    pub(crate) before: bool,
    pub(crate) residual_before: bool,
    pub(crate) twice: bool,
    pub(crate) dropout: f32,
    pub(crate) heat: Arc<AtomicU32>,
    pub(crate) path: String,
}

fn project(x: &Tensor, by: Option<&(Param, Param)>) -> Result<Tensor> {
    match by {
        Some((weight, bias)) => Ok(x.matmul_t(&weight.tensor())?.add(&bias.tensor())?),
        None => Ok(x.clone()),
    }
}

impl Layer {
    /// `sum_n p_n V a_n`
    fn mixed(&self, call: &Call<'_>) -> Result<Tensor> {
        let h = call.x()?;
        let mut parts = Vec::with_capacity(self.members.len());
        for member in &self.members {
            let Some(part) = member.added(call)? else {
                let detail = "a member does not work by adding before the model's norm there";
                return Err(Error::module(&self.path, detail));
            };
            parts.push(if self.residual_before {
                part.add(h)?
            } else {
                part
            });
        }
        let query = match self.members.last() {
            Some(last) if !self.before => last.reads(call)?,
            _ => h.clone(),
        };
        let query = project(&query, self.query.as_ref())?;
        let axis = query.rank() - 1;
        let temperature = 1.0 + f32::from_bits(self.heat.load(Ordering::Relaxed));
        let scores = parts.iter().map(|part| {
            let key = project(part, self.key.as_ref())?;
            Ok(query.mul(&key)?.sum_axis(axis)?)
        });
        let scores = scores.collect::<Result<Vec<_>>>()?;
        let scores = peft_core::peft_tensor::concat(&scores.iter().collect::<Vec<_>>(), axis)?;
        let scores = call.dropout(&scores, self.dropout)?;
        let p = scores.scale(1.0 / temperature)?.softmax()?;
        let mut sum: Option<Tensor> = None;
        for (n, part) in parts.iter().enumerate() {
            let weighed = part.mul(&p.narrow(axis, n, 1)?)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&weighed)?,
                None => weighed,
            });
        }
        let sum = sum.ok_or_else(|| Error::module(&self.path, "the fusion has no members"))?;
        // V is linear and without a bias: after the sum it costs 1/N.
        match &self.value {
            Some(value) => Ok(sum.matmul_t(&value.tensor())?),
            None => Ok(sum),
        }
    }
}

impl Adapter for Layer {
    fn forward(&self, call: &Call<'_>) -> Result<Tensor> {
        let mut out = self.mixed(call)?;
        if !self.residual_before {
            out = out.add(call.x()?)?;
        }
        if self.twice {
            out = out.add(call.residual()?)?;
        }
        call.base_with(&out)
    }
}

/// Draws V to the identity and cools the attention down.
pub(crate) struct Hooks {
    pub(crate) values: Vec<Param>,
    pub(crate) heat: Option<Arc<AtomicU32>>,
}

/// Weight of the penalty, and steps from the highest temperature, 50, down to 1, as in AdapterHub.
const PENALTY: f32 = 0.01;
const COOLING: u64 = 980;

impl TrainHooks for Hooks {
    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        if let Some(heat) = &self.heat {
            let left = COOLING.saturating_sub(cx.step) as f32 * 0.05;
            heat.store(left.to_bits(), Ordering::Relaxed);
        }
        Ok(())
    }

    fn penalty(&self, _cx: &TrainCx<'_>) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for value in self.values.iter().filter(|v| v.is_trainable()) {
            let value = value.tensor();
            let d = value.last_dim();
            let mut eye = vec![0.0; d * d];
            eye.iter_mut().step_by(d + 1).for_each(|v| *v = 1.0);
            let off = value.sub(&Tensor::from_vec(eye, &[d, d], value.device())?)?;
            let one = off.mul(&off)?.sum_all()?.scale(PENALTY)?;
            sum = Some(match sum {
                Some(sum) => sum.add(&one)?,
                None => one,
            });
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use peft_core::serde_json::{Value, json};
    use peft_core::{Base, Network, Pass, Tensor};

    fn attached(more: &Value) -> peft_core::Result<Network> {
        let base = Base::custom().junction("layers.0.output_adapters", 2);
        let mut network = Network::new(base);
        let mut config = json!({"peft_type": "ADAPTER_FUSION", "query": false, "key": false, "members": [
            {"peft_type": "ADDS_FOR_TESTS", "c": 1.0}, {"peft_type": "ADDS_FOR_TESTS", "c": -1.0}
        ]});
        for (field, value) in more.as_object().into_iter().flatten() {
            config[field] = value.clone();
        }
        network.attach("a", &config, 0)?;
        Ok(network)
    }

    /// h = (0, ln 3 / 2) asks: scores with (1, 1) and (-1, -1) are ln 3 / 2 and -ln 3 / 2, p = 3/4 and 1/4: what is added is
    /// (1, 1) / 2, V being near the identity.
    #[test]
    fn attention_by_hand() {
        let network = attached(&json!({})).expect("attaches");
        let tensor = |v: [f32; 2]| {
            Tensor::from_vec(v.to_vec(), &[1, 1, 2], network.device()).expect("a tensor")
        };
        let ask = 3f32.ln() / 2.0;
        let at = network.module("layers.0.output_adapters").expect("there");
        let y = network
            .junction(
                at,
                &tensor([0.0, ask]),
                &tensor([10.0, 20.0]),
                None,
                &Pass::eval(),
            )
            .expect("runs")
            .to_vec()
            .expect("values");
        assert!(
            (y[0] - 10.5).abs() < 1e-5 && (y[1] - 20.5 - ask).abs() < 1e-5,
            "{y:?}"
        );
    }

    #[test]
    fn members_are_frozen_and_v_is_regularised() {
        let network = attached(&json!({})).expect("attaches");
        let params = network.parameters();
        let keys: Vec<&str> = params.iter().map(peft_core::Param::key).collect();
        assert_eq!(
            keys,
            ["base_model.model.layers.0.output_adapters.adapter_fusion_layer.value.weight"]
        );
        assert_eq!(network.adapter_parameters("a").expect("there").len(), 3);
    }

    #[test]
    fn one_member_is_no_fusion() {
        let error = attached(&json!({"members": [{"peft_type": "ADDS_FOR_TESTS"}]}))
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("members") && error.contains("at least 2"),
            "{error}"
        );
    }
}
