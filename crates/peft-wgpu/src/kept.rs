//! Compiled kernels, kept from one process to the next where the driver allows that (Vulkan).
//!
//! The driver's bytes go through a [`KernelStore`] with their length and a checksum in front. What does not fit them, or
//! is another driver's by its own header, is as if it were not there.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use peft_tensor::KernelStore;

use crate::gpu::locked;

/// In front of what is stored.
const MARK: &[u8; 8] = b"peftkrn1";

/// A driver's cache of compiled kernels.
pub(crate) struct Kept {
    pub(crate) cache: wgpu::PipelineCache,
    name: String,
    store: KernelStore,
    /// Whether a kernel was compiled since the last look.
    pub(crate) changed: AtomicBool,
    /// The checksum of what is stored.
    stored: Mutex<u64>,
}

impl Kept {
    /// The cache of an adapter, with what an earlier process left; None where driver or program has nowhere to keep it.
    pub(crate) fn open(
        device: &wgpu::Device,
        info: &wgpu::AdapterInfo,
        store: Option<KernelStore>,
    ) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let (store, name) = store.zip(wgpu::util::pipeline_cache_key(info))?;
        let bytes = (store.load)(&name);
        let data = bytes.as_deref().and_then(unsealed);
        let descriptor = wgpu::PipelineCacheDescriptor {
            label: Some("peft"),
            data,
            fallback: true,
        };
        #[allow(unsafe_code, reason = "wgpu cannot check where the bytes are from")]
        // SAFETY: the bytes are those that `get_data` gave: their checksum is that which `save` wrote beside them. `wgpu`
        // and the driver compare their own headers with the adapter and the driver's version.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(Self {
            cache,
            name,
            store,
            changed: AtomicBool::new(false),
            stored: Mutex::new(data.map_or(0, checksum)),
        })
    }

    /// Stores what is there if it is other than what is stored. That it cannot be stored costs the next process time and
    /// nothing else.
    pub(crate) fn save(&self) {
        if !self.changed.swap(false, Ordering::AcqRel) {
            return;
        }
        let Some(data) = self.cache.get_data() else {
            return;
        };
        let sum = checksum(&data);
        let mut stored = locked(&self.stored);
        if *stored != sum && (self.store.save)(&self.name, &sealed(&data)) {
            *stored = sum;
        }
    }
}

/// 64-bit FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    let mix = |sum: u64, &byte: &u8| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, mix)
}

fn sealed(data: &[u8]) -> Vec<u8> {
    let mut bytes = MARK.to_vec();
    bytes.extend((data.len() as u64).to_le_bytes());
    bytes.extend(checksum(data).to_le_bytes());
    bytes.extend(data);
    bytes
}

fn unsealed(bytes: &[u8]) -> Option<&[u8]> {
    let rest = bytes.strip_prefix(MARK)?;
    let (len, rest) = rest.split_first_chunk::<8>()?;
    let (sum, data) = rest.split_first_chunk::<8>()?;
    let whole = data.len() as u64 == u64::from_le_bytes(*len);
    (whole && checksum(data) == u64::from_le_bytes(*sum)).then_some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_spoiled_is_not_there() {
        let whole = sealed(b"kernels");
        assert_eq!(unsealed(&whole), Some(&b"kernels"[..]));
        for at in 0..whole.len() {
            let mut spoiled = whole.clone();
            spoiled[at] ^= 4;
            assert_eq!(unsealed(&spoiled), None, "byte {at}");
            assert_eq!(unsealed(&whole[..at]), None, "up to {at}");
        }
        assert_eq!(unsealed(&[&whole[..], &[0]].concat()), None);
        // Published: FNV-1a of "foobar".
        assert_eq!(checksum(b"foobar"), 0x8594_4171_f739_67e8);
    }
}
