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
        let layers = cx.network.tree().facts().num_layers as u64;
        let skipped = RngKey::new(0).fork("adapter_drop").below(cx.step, layers);
        cx.network.set_skipped_layers(skipped as usize);
        Ok(())
    }

    fn after_step(&mut self, cx: &mut TrainCx<'_>) -> Result<()> {
        cx.network.set_skipped_layers(0);
        Ok(())
    }
}
