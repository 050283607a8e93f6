//! What the tests of this crate share.

use peft_tensor::{Device, RngKey, Tensor, tested};
use peft_wgpu::{Options, open_with};

/// A device; None, said aloud, where there is no adapter.
pub(crate) fn open(options: &Options) -> Option<Device> {
    tested("wgpu", open_with(options))
}

/// Values between -1 and 1.
pub(crate) fn random(seed: u64, shape: &[usize], device: &Device) -> Tensor {
    Tensor::uniform(RngKey::new(seed), -1.0, 1.0, shape, device).unwrap()
}
