//! Devices: handles to backends, and the list of those that are linked in.

use std::sync::{Arc, OnceLock};

use crate::{Backend, Keep, Precision, Result, TensorError};

/// A handle to a backend. Tensors carry one; a method never mentions it.
#[derive(Clone)]
pub struct Device(Arc<dyn Backend>);

/// A device that a name was resolved to, and what a user should know of the choice.
#[derive(Clone, Debug)]
pub struct Chosen {
    /// The device.
    pub device: Device,
    /// Why it is not the one that was hoped for, or what it is; None = nothing to say.
    pub note: Option<String>,
}

impl Device {
    /// Wraps a backend.
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self(Arc::new(backend))
    }

    /// The processor, in single precision.
    pub fn cpu() -> Self {
        Self::cpu_in(Precision::F32)
    }

    /// The processor, with activations kept in the precision's own form.
    pub fn cpu_in(precision: Precision) -> Self {
        Self::cpu_keeping(precision, precision.into())
    }

    /// The processor. Tensors of different precisions go together; an operation follows its first one.
    pub fn cpu_keeping(precision: Precision, keep: Keep) -> Self {
        static DEVICES: [OnceLock<Device>; 6] = [const { OnceLock::new() }; 6];
        let at = precision as usize * Keep::NAMES.len() + keep as usize;
        DEVICES[at]
            .get_or_init(|| Self::new(crate::cpu::CpuBackend::new(precision, keep)))
            .clone()
    }

    /// Plain loops in f64: slow, obviously right, for tests.
    #[cfg(feature = "reference")]
    pub fn reference() -> Self {
        static REFERENCE: OnceLock<Device> = OnceLock::new();
        REFERENCE
            .get_or_init(|| Self::new(crate::reference::ReferenceBackend))
            .clone()
    }

    /// The names of the devices that are linked in, sorted.
    pub fn names() -> Vec<&'static str> {
        let mut names: Vec<_> = entries().map(|entry| entry.name).collect();
        names.sort_unstable();
        names
    }

    /// What there is on this machine of every kind that is linked in, the processor first.
    pub fn present() -> Vec<DeviceFacts> {
        let mut entries: Vec<_> = entries().collect();
        entries.sort_by_key(|entry| (entry.name != CPU, entry.name));
        entries.iter().flat_map(|entry| (entry.present)()).collect()
    }

    /// The device of that name among those linked in, in single precision.
    ///
    /// # Errors
    /// Lists the names there are if there is none of that one.
    pub fn by_name(name: &str) -> Result<Self> {
        Self::by_name_in(name, Precision::F32, Keep::F32)
    }

    /// As [`Device::by_name`], in either precision, with activations kept in any form it has.
    ///
    /// # Errors
    /// As there.
    pub fn by_name_in(name: &str, precision: Precision, keep: Keep) -> Result<Self> {
        match entries().find(|e| e.name == name) {
            Some(entry) => (entry.open)(precision, keep),
            None => Err(TensorError::Unsupported(format!(
                "device {name:?} is not in this build; it has {}",
                Self::names().join(", ")
            ))),
        }
    }

    /// The device a user's word means: a name, or `auto` for the first that is made for such work, else the processor.
    ///
    /// # Errors
    /// If there is none of that name, or it does not open.
    pub fn choose(name: &str, precision: Precision, keep: Keep) -> Result<Chosen> {
        let chosen = |device, note| Ok(Chosen { device, note });
        if name != AUTO {
            return chosen(Self::by_name_in(name, precision, keep)?, None);
        }
        let mut others: Vec<_> = entries().filter(|e| e.name != CPU).collect();
        others.sort_by_key(|entry| entry.name);
        let mut notes = Vec::new();
        for entry in &others {
            let present = (entry.present)();
            let Some(fast) = present.iter().find(|facts| facts.fast) else {
                notes.push(match present.first() {
                    Some(slow) => format!("{} has only {}", entry.name, slow.name),
                    None => format!("{} finds nothing", entry.name),
                });
                continue;
            };
            match (entry.open)(precision, keep) {
                Ok(device) => return chosen(device, Some(format!("the device is {}", fast.name))),
                Err(why) => notes.push(why.to_string()),
            }
        }
        let note =
            (!notes.is_empty()).then(|| format!("the device is cpu, as {}", notes.join("; ")));
        chosen(Self::cpu_keeping(precision, keep), note)
    }

    /// The backend.
    pub fn backend(&self) -> &dyn Backend {
        &*self.0
    }

    /// Whether tensors of both go together: the same backend, in whatever precision.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.name() == other.0.name()
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.0.name())
    }
}

/// The name of the processor.
const CPU: &str = "cpu";

/// The word for the best there is.
pub const AUTO: &str = "auto";

/// What is known of a device without opening it.
#[derive(Clone, Debug)]
pub struct DeviceFacts {
    /// What `--device` takes.
    pub device: &'static str,
    /// What it is called.
    pub name: String,
    /// What it is: `processor`, `discrete`, `integrated`, `software`, ...
    pub kind: String,
    /// How it is reached, with versions.
    pub driver: String,
    /// Bytes of its largest tensor; None = whatever memory there is.
    pub largest: Option<u64>,
    /// Whether `auto` takes it.
    pub fast: bool,
    /// What else there is to say.
    pub notes: Vec<String>,
}

/// What a backend submits to be found by name.
pub struct BackendEntry {
    /// Its name, as in `--device NAME`.
    pub name: &'static str,
    /// Opens it; an error says why there is none on this machine.
    pub open: fn(Precision, Keep) -> Result<Device>,
    /// What there is of it on this machine.
    pub present: fn() -> Vec<DeviceFacts>,
}

inventory::collect!(BackendEntry);
inventory::submit!(BackendEntry {
    name: CPU,
    open: |precision, keep| Ok(Device::cpu_keeping(precision, keep)),
    present: || {
        vec![DeviceFacts {
            device: CPU,
            name: std::env::consts::ARCH.to_owned(),
            kind: "processor".to_owned(),
            driver: vectors().to_owned(),
            largest: None,
            fast: true,
            notes: vec![format!("{} threads", rayon::current_num_threads())],
        }]
    },
});

/// The vector instructions that the kernels use here.
fn vectors() -> &'static str {
    use crate::cpu::simd::{Level, level};
    match level() {
        Level::Base => "the target's vectors",
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => "AVX2",
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => "AVX-512",
    }
}

fn entries() -> impl Iterator<Item = &'static BackendEntry> {
    inventory::iter::<BackendEntry>.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_resolved() {
        assert_eq!(Device::by_name("cpu").unwrap().backend().name(), "cpu");
        let error = Device::by_name("tpu").unwrap_err().to_string();
        assert!(error.contains("tpu") && error.contains("cpu"), "{error}");
        let chosen = Device::choose(AUTO, Precision::Bf16, Keep::Int8).unwrap();
        assert_eq!(chosen.device.backend().precision(), Precision::Bf16);
        assert!(chosen.note.is_none(), "nothing else is linked in");
        assert!(Device::choose("tpu", Precision::F32, Keep::F32).is_err());
        assert_eq!(Device::present()[0].device, "cpu");
    }
}
