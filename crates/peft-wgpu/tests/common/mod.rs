//! What the tests of this crate share.

use peft_tensor::{Device, RngKey, Tensor};
use peft_wgpu::{Options, open_with};

/// A device; None, said aloud, where there is no adapter.
pub(crate) fn open(options: &Options) -> Option<Device> {
    match open_with(options) {
        Ok(device) => Some(device),
        Err(why) => {
            let required = std::env::var("PEFT_REQUIRE_GPU").is_ok_and(|v| v == "1");
            assert!(
                !required,
                "PEFT_REQUIRE_GPU=1, and wgpu does not open: {why}"
            );
            eprintln!("NOTHING IS TESTED ON wgpu: {why}");
            None
        }
    }
}

/// Values between -1 and 1.
pub(crate) fn random(seed: u64, shape: &[usize], device: &Device) -> Tensor {
    Tensor::uniform(RngKey::new(seed), -1.0, 1.0, shape, device).unwrap()
}
