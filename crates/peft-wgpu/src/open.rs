//! Finding adapters and opening one.

use std::sync::{Arc, Mutex, OnceLock};

use peft_tensor::{Device, DeviceFacts, Keep, Precision, Result, TensorError};

use crate::WgpuBackend;
use crate::features::Abilities;
use crate::gpu::Gpu;

/// The variable that chooses among several adapters, by a part of the name.
const CHOICE: &str = "PEFT_WGPU_ADAPTER";

/// Set to 1, it opens every device with the plain kernels alone: a way out where a driver breaks on the others.
const PLAIN: &str = "PEFT_WGPU_PLAIN";

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
    /// What it keeps large values in.
    pub precision: Precision,
    /// The form in which activations wait for the backward pass, f32 or bfloat16.
    pub keep: Keep,
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
            // A software driver is the processor again, slower.
            fast: self.kind != "software",
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

/// A device of its own.
///
/// # Errors
/// As [`open`].
pub fn open_with(options: &Options) -> Result<Device> {
    let from_environment = || std::env::var(CHOICE).ok().filter(|n| !n.is_empty());
    let wanted = options.name.clone().or_else(from_environment);
    let found = found();
    let names: Vec<String> = found.iter().map(|a| a.get_info().name).collect();
    let chosen = found.into_iter().find(|a| match &wanted {
        None => true,
        Some(part) => {
            let name = a.get_info().name.to_lowercase();
            name.contains(&part.to_lowercase())
        }
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
    let plain = options.plain || std::env::var(PLAIN).is_ok_and(|v| v == "1");
    let gpu = Gpu::open(&adapter, options.max_binding, plain)?;
    Ok(Device::new(WgpuBackend::new(
        Arc::new(gpu),
        options.precision,
        options.keep,
    )))
}
