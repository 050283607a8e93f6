//! AdapterDrop (arXiv 2010.11918): adapters of the first layers left out, some steps or always.

use peft_core::{Result, RngKey, TrainCx, TrainHooks};
use serde::{Deserialize, Serialize};

/// `adapter_drop`. Layers left out for good are `leave_out`; leaving layers out of a trained adapter is
/// [`peft_core::Network::set_skipped_layers`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterDrop {
    /// Each step draws how many.
    Robust,
}

/// Draws how many first layers a step goes without.
pub(crate) struct RandomDepth;

impl TrainHooks for RandomDepth {
    fn before_forward(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        let layers = cx.network.tree().iter().filter_map(|(_, m)| m.layer);
        let layers = layers.max().map_or(0, |last| last as u64 + 1);
        let skipped = RngKey::new(0).fork("adapter_drop").below(cx.step, layers);
        cx.network.set_skipped_layers(skipped as usize);
        Ok(())
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        cx.network.set_skipped_layers(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use peft_core::serde_json::json;
    use peft_core::{Base, Grads, Network, Pass, Tensor};

    /// Of three layers the first goes without its adapter in some steps, the last never, and none does after a step.
    #[test]
    fn first_layers_go_without_in_some_steps() {
        let path = |layer: usize| format!("layers.{layer}.output_adapters");
        let base = (0..3).fold(Base::custom(), |base, layer| base.junction(&path(layer), 2));
        let mut network = Network::new(base);
        let config =
            json!({"peft_type": "PFEIFFER", "non_linearity": "tanh", "adapter_drop": "robust"});
        network.attach("a", &config, 0).expect("attaches");
        let x = Tensor::full(1.0, &[1, 2], network.device()).expect("a tensor");
        let acts = |layer: usize| {
            let id = network.module(&path(layer)).expect("there");
            let y = network
                .junction(id, &x, &x, None, &Pass::eval())
                .expect("runs");
            y.to_vec().expect("values") != [2.0, 2.0]
        };
        let mut hooks = network.trainers();
        let mut first = 0;
        for step in 0..30 {
            let mut cx = TrainCx {
                step,
                total_steps: 30,
                network: &network,
                params: &[],
                grads: &mut Grads::default(),
                used: &[],
                learning_rate: 0.1,
                data: None,
                reset_optimizer: &Cell::new(false),
            };
            let (_, hook) = &mut hooks[0];
            hook.before_forward(&mut cx).expect("draws");
            first += usize::from(acts(0));
            assert!(acts(2) && (acts(1) || !acts(0)), "step {step}");
            hook.after_step(&mut cx).expect("ends");
            assert!((0..3).all(acts), "after step {step}");
        }
        assert!((4..18).contains(&first), "{first} of 30 steps");
    }
}
