//! Finding adapters and opening one.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use peft_tensor::{Device, DeviceFacts, Keep, KernelStore, Precision, Result, TensorError};

use crate::WgpuBackend;
use crate::features::Abilities;
use crate::gpu::{Gpu, locked};
use crate::memory::MemoryUse;

/// The variable that chooses among several adapters, by a part of the name.
const CHOICE: &str = "PEFT_WGPU_ADAPTER";

/// Set to 1, it opens every device with the plain kernels alone: a way out where a driver breaks on the others.
const PLAIN: &str = "PEFT_WGPU_PLAIN";
/// The variable that limits the memory of a device, in MiB: what is to be left to others, a desktop say.
const MEMORY: &str = "PEFT_WGPU_MEMORY";

/// What is known of an adapter without opening it.
#[derive(Clone, Debug)]
pub struct AdapterFacts {
    /// Its name, as the driver gives it.
    pub name: String,
    /// `discrete`, `integrated`, `virtual`, `software` or `other`.
    pub kind: &'static str,
    /// The interface it is reached by: `vulkan`, `metal`, `dx12`.
    pub api: String,
    /// The driver and its version.
    pub driver: String,
    /// Bytes of the largest buffer.
    pub max_buffer: u64,
    /// Bytes of a buffer that a kernel sees at once; larger tensors are worked on in parts.
    pub max_binding: u64,
    /// Whether kernels may use 16-bit floats.
    pub f16: bool,
    /// Whether it has units for products of small matrices, f16 added up in f32, that `wgpu` can reach.
    pub matrix_units: bool,
}

/// How to open an adapter.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// A part of the adapter's name; None = `PEFT_WGPU_ADAPTER` from the environment, else the fastest kind there is.
    pub name: Option<String>,
    /// A binding limit below the adapter's, in bytes: how tests reach the paths of large tensors.
    pub max_binding: Option<u64>,
    /// Only kernels that every adapter takes: no subgroups, no matrix units, no forms for software drivers. How tests reach
    /// what a driver that has more would not use. `PEFT_WGPU_PLAIN=1` in the environment does the same.
    pub plain: bool,
    /// Bytes that all tensors together may take; None = `PEFT_WGPU_MEMORY` (MiB) from the environment, else as many as the
    /// driver gives.
    pub max_memory: Option<u64>,
    /// Where compiled kernels are kept between processes; None = the store that is linked in.
    pub store: Option<KernelStore>,
    /// What it keeps large values in.
    pub precision: Precision,
    /// The form in which activations wait for the backward pass, f32 or bfloat16.
    pub keep: Keep,
}

impl Options {
    pub(crate) fn store(&self) -> Option<KernelStore> {
        self.store.or_else(KernelStore::linked)
    }
}

/// What an opened device has done and holds.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Bytes.
    pub memory: MemoryUse,
    /// Batches of work handed over.
    pub submits: u64,
    /// Times somebody waited for it.
    pub waits: u64,
}

/// Devices that are open in this process.
static OPEN: Mutex<Vec<Weak<Gpu>>> = Mutex::new(Vec::new());

fn opened() -> Vec<Arc<Gpu>> {
    let mut open = locked(&OPEN);
    open.retain(|gpu| gpu.strong_count() > 0);
    open.iter().filter_map(Weak::upgrade).collect()
}

/// The usage of every device that is open in this process, in the order they were opened.
pub fn usage() -> Vec<Usage> {
    let of = |gpu: &Arc<Gpu>| Usage {
        memory: gpu.pool.usage(),
        submits: gpu.pool.submits.load(Ordering::Relaxed),
        waits: gpu.pool.waits.load(Ordering::Relaxed),
    };
    opened().iter().map(of).collect()
}

/// Takes every device of this process away, as a driver does that resets: how tests see what becomes of a run.
pub fn destroy_all() {
    opened().iter().for_each(|gpu| gpu.device.destroy());
}

impl AdapterFacts {
    /// As an entry of the list of devices.
    pub(crate) fn to_device(&self) -> DeviceFacts {
        let mut notes = vec![format!(
            "{} MiB in one binding, larger tensors in parts",
            self.max_binding >> 20
        )];
        if self.matrix_units {
            notes.push("matrix units, used with precision = \"bf16\"".to_owned());
        }
        DeviceFacts {
            device: "wgpu",
            name: self.name.clone(),
            kind: self.kind.to_owned(),
            driver: format!("{}, {}", self.api, self.driver),
            largest: Some(self.max_buffer),
            // A software driver is the processor again, slower; one that was asked for by name is wanted all the same.
            fast: self.kind != "software" || wanted(None).is_some_and(|w| has_name(&self.name, &w)),
            notes,
        }
    }
}

fn found() -> Vec<wgpu::Adapter> {
    let mut desc = wgpu::InstanceDescriptor::new_without_display_handle();
    desc.backends = wgpu::Backends::PRIMARY;
    let instance = wgpu::Instance::new(desc);
    let mut found = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::PRIMARY));
    // Stable: drivers list their cards in a fixed order.
    found.sort_by_key(|a| rank(a.get_info().device_type));
    found
}

fn rank(kind: wgpu::DeviceType) -> u8 {
    match kind {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

fn facts(adapter: &wgpu::Adapter) -> AdapterFacts {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    AdapterFacts {
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "other",
        },
        api: info.backend.to_string(),
        driver: format!("{} {}", info.driver, info.driver_info)
            .trim()
            .to_owned(),
        name: info.name,
        max_buffer: limits.max_buffer_size,
        max_binding: limits.max_storage_buffer_binding_size,
        f16: adapter.features().contains(wgpu::Features::SHADER_F16),
        matrix_units: Abilities::of(adapter).block.is_some(),
    }
}

/// A part of the name of the adapter that is wanted, if one is.
fn wanted(name: Option<&str>) -> Option<String> {
    let from_environment = || std::env::var(CHOICE).ok().filter(|n| !n.is_empty());
    name.map(str::to_owned).or_else(from_environment)
}

fn has_name(name: &str, part: &str) -> bool {
    name.to_lowercase().contains(&part.to_lowercase())
}

/// An opened device with the name it was asked by and the forms of its values.
type Opened = ((Option<String>, Precision, Keep), Device);

/// Every adapter there is, the one that is opened by default first.
pub fn adapters() -> Vec<AdapterFacts> {
    found().iter().map(facts).collect()
}

/// The device whose name contains `name` (whatever the case), or the fastest kind there is. Opened once: a second call
/// gives the same device.
///
/// # Errors
/// If there is none, or the driver refuses; the message lists what there is.
pub fn open(name: Option<&str>, precision: Precision, keep: Keep) -> Result<Device> {
    static OPENED: OnceLock<Mutex<Vec<Opened>>> = OnceLock::new();
    let opened = OPENED.get_or_init(Mutex::default);
    let mut opened = opened.lock().unwrap_or_else(|e| e.into_inner());
    let key = (name.map(str::to_owned), precision, keep);
    if let Some((_, device)) = opened.iter().find(|(known, _)| *known == key) {
        return Ok(device.clone());
    }
    let device = open_with(&Options {
        name: key.0.clone(),
        precision,
        keep,
        ..Options::default()
    })?;
    opened.push((key, device.clone()));
    Ok(device)
}

/// Bytes, by the environment.
fn memory_limit() -> Result<Option<u64>> {
    let Some(text) = std::env::var(MEMORY).ok().filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    match text.trim().parse::<u64>() {
        Ok(mib) if mib > 0 => Ok(Some(mib.saturating_mul(1 << 20))),
        _ => Err(TensorError::Unsupported(format!(
            "{MEMORY}={text:?} is no number of MiB above 0"
        ))),
    }
}

/// A device of its own.
///
/// # Errors
/// As [`open`].
pub fn open_with(options: &Options) -> Result<Device> {
    let wanted = wanted(options.name.as_deref());
    let found = found();
    let names: Vec<String> = found.iter().map(|a| a.get_info().name).collect();
    let chosen = found.into_iter().find(|a| match &wanted {
        None => true,
        Some(part) => has_name(&a.get_info().name, part),
    });
    let Some(adapter) = chosen else {
        return Err(TensorError::Unsupported(match wanted {
            Some(part) if !names.is_empty() => format!(
                "no graphics adapter has {part:?} in its name; there are {}",
                names.join(", ")
            ),
            _ => "no graphics adapter was found: a driver for Vulkan, Metal or DX12 is needed \
                  (Mesa's software driver also serves: mesa-vulkan-drivers); use device \"cpu\""
                .to_owned(),
        }));
    };
    if options.keep == Keep::Int8 {
        return Err(TensorError::Unsupported(
            "device \"wgpu\" keeps activations as f32 or bf16, not as int8".to_owned(),
        ));
    }
    let mut options = options.clone();
    options.plain |= std::env::var(PLAIN).is_ok_and(|v| v == "1");
    if options.max_memory.is_none() {
        options.max_memory = memory_limit()?;
    }
    let gpu = Arc::new(Gpu::open(&adapter, &options)?);
    locked(&OPEN).push(Arc::downgrade(&gpu));
    Ok(Device::new(WgpuBackend::new(
        gpu,
        options.precision,
        options.keep,
    )))
}
