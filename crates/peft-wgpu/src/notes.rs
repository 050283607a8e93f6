//! What a user should hear once.

use std::collections::HashSet;
use std::sync::Mutex;

use peft_tensor::WeightFormat;

use crate::gpu::locked;

/// Formats that stay as they are stored; the kernels decode them.
const PACKED: [WeightFormat; 9] = [
    WeightFormat::F32,
    WeightFormat::BF16,
    WeightFormat::F16,
    WeightFormat::NF4,
    WeightFormat::FP4,
    WeightFormat::INT8,
    WeightFormat::Q4_0,
    WeightFormat::Q4_1,
    WeightFormat::Q8_0,
];

/// Says that weights of a format are decoded on their way to the device, where they take `bits` a value; nothing where
/// they are not, or it has been said.
pub(crate) fn decoded(format: WeightFormat, bits: usize) {
    if let Some(note) = note(format, bits) {
        tracing::warn!("{note}");
    }
}

fn note(format: WeightFormat, bits: usize) -> Option<String> {
    static SAID: Mutex<Option<HashSet<&'static str>>> = Mutex::new(None);
    let new = || {
        let mut said = locked(&SAID);
        said.get_or_insert_default().insert(format.name())
    };
    (!PACKED.contains(&format) && new()).then(|| {
        let packed: Vec<&str> = PACKED.iter().map(|format| format.name()).collect();
        format!(
            "device \"wgpu\" decodes {} weights as it takes them up: {bits} bits a value there. As they are stored it \
             keeps {}",
            format.name(),
            packed.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_once_for_each_format() {
        assert!(PACKED.iter().all(|&format| note(format, 32).is_none()));
        let said = note(WeightFormat::Q5_1, 32).unwrap_or_default();
        assert!(
            said.contains(WeightFormat::Q5_1.name()) && said.contains("32 bits"),
            "{said}"
        );
        assert!(note(WeightFormat::Q5_1, 32).is_none());
        assert!(note(WeightFormat::Q5_0, 16).is_some());
    }
}
