//! An opened adapter: its queue, limits, faults and compiled kernels.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use peft_tensor::{Result, TensorError};

use crate::features::Abilities;
use crate::kept::Kept;
use crate::memory::Pool;
use crate::open::Options;
use crate::record::Recorder;

/// Bytes of parameters a kernel may take: what every Vulkan driver has.
const IMMEDIATE_BYTES: u32 = 128;

/// Storage buffers of the kernel that has most of them.
const BINDINGS: u32 = 9;

/// Threads of the largest group that a kernel uses.
const GROUP: u32 = 256;

/// An opened adapter.
pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) name: String,
    /// Tells this opened device from others, for copies of weights.
    pub(crate) id: u64,
    /// Bytes that one binding may span, a multiple of [`Gpu::ALIGN`] bytes.
    pub(crate) max_binding: u64,
    /// Bytes of the largest buffer.
    pub(crate) max_buffer: u64,
    /// Bytes of all buffers together; None = as many as the driver gives.
    pub(crate) max_memory: Option<u64>,
    /// From how many of them on products are made of large tiles.
    pub(crate) large_tiles: usize,
    pub(crate) has: Abilities,
    /// Whether the matrix units were tried, and whether they multiply right.
    pub(crate) units: OnceLock<bool>,
    pub(crate) pool: Arc<Pool>,
    pub(crate) recorder: Mutex<Recorder>,
    pipelines: Mutex<HashMap<(&'static str, String), Arc<Pipeline>>>,
    pub(crate) kept: Option<Kept>,
    faults: Arc<Mutex<Option<String>>>,
    /// Why the device is gone, once it is.
    lost: Arc<OnceLock<String>>,
    pub(crate) shared: crate::memory::Shared,
}

/// A compiled kernel.
pub(crate) struct Pipeline {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) layout: wgpu::BindGroupLayout,
}

/// A kernel by its source; `header` is put in front of it and may differ from one variant to the next.
pub(crate) struct Kernel {
    /// The entry point; no two files have the same.
    pub(crate) entry: &'static str,
    pub(crate) sources: &'static [&'static str],
    pub(crate) header: Cow<'static, str>,
    /// Rounds of the loops that are written out; see [`crate::unroll`]. What differs here has to differ in the header.
    pub(crate) rounds: Vec<(&'static str, usize)>,
    /// Bindings that are read; they come first.
    pub(crate) reads: u32,
    /// Bindings that are written.
    pub(crate) writes: u32,
}

impl Kernel {
    /// A kernel without variants.
    pub(crate) const fn new(
        entry: &'static str,
        sources: &'static [&'static str],
        reads: u32,
        writes: u32,
    ) -> Self {
        Self {
            entry,
            sources,
            header: Cow::Borrowed(""),
            rounds: Vec::new(),
            reads,
            writes,
        }
    }

    /// The variant of a header.
    pub(crate) fn with(mut self, header: String) -> Self {
        self.header = Cow::Owned(header);
        self
    }

    /// With loops of these rounds.
    pub(crate) fn rounds(mut self, rounds: &[(&'static str, usize)]) -> Self {
        self.rounds = rounds.to_vec();
        self
    }
}

/// The lock of a mutex, whatever became of those who held it: what is inside is valid between any two statements.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

pub(crate) fn fail<T>(detail: impl Into<String>) -> Result<T> {
    Err(TensorError::Device(detail.into()))
}

impl Gpu {
    /// Bytes that the start of every binding is a multiple of.
    pub(crate) const ALIGN: u64 = 256;

    /// Opens an adapter with everything it has.
    pub(crate) fn open(adapter: &wgpu::Adapter, options: &Options) -> Result<Self> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let (info, has) = (adapter.get_info(), adapter.limits());
        let name = info.name;
        if !adapter.features().contains(wgpu::Features::IMMEDIATES)
            || has.max_immediate_size < IMMEDIATE_BYTES
            || has.max_compute_invocations_per_workgroup < GROUP
            || has.max_storage_buffers_per_shader_stage < BINDINGS
        {
            return fail(format!(
                "{name} lacks what the kernels need: {IMMEDIATE_BYTES} bytes of immediates, {BINDINGS} storage buffers, groups of {GROUP}"
            ));
        }
        // A device gets the limits it asks for; the defaults are those of the weakest.
        let open = |abilities: Abilities| {
            pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
                label: Some("peft"),
                required_features: abilities.features()
                    | (adapter.features() & wgpu::Features::PIPELINE_CACHE),
                required_limits: has.clone(),
                memory_hints: wgpu::MemoryHints::Performance,
                experimental_features: abilities.leave(),
                ..Default::default()
            }))
        };
        let mut abilities = if options.plain {
            Abilities::default()
        } else {
            Abilities::of(adapter)
        };
        let mut opened = open(abilities);
        if opened.is_err() {
            // What is only faster must not keep a device from opening.
            abilities.block = None;
            opened = open(abilities);
        }
        let (device, queue) =
            opened.map_err(|e| TensorError::Device(format!("{name} does not open: {e}")))?;
        let faults = Arc::new(Mutex::new(None));
        let note = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            locked(&note).get_or_insert(explained(&error));
        }));
        let kept = Kept::open(&device, &adapter.get_info(), options.store());
        let lost = Arc::new(OnceLock::new());
        let note = lost.clone();
        device.set_device_lost_callback(move |_, detail| {
            note.get_or_init(|| detail);
        });
        let largest = has.max_storage_buffer_binding_size;
        let max_binding = options.max_binding.map_or(largest, |n| n.min(largest));
        Ok(Self {
            device,
            queue,
            name,
            id: IDS.fetch_add(1, Ordering::Relaxed),
            max_binding: (max_binding / Self::ALIGN * Self::ALIGN).max(Self::ALIGN),
            max_buffer: has.max_buffer_size,
            max_memory: options.max_memory,
            // A software driver has as many threads as the processor, and reads shared memory slowly.
            large_tiles: if info.device_type == wgpu::DeviceType::Cpu {
                1
            } else {
                128
            },
            has: abilities,
            units: OnceLock::new(),
            pool: Arc::default(),
            recorder: Mutex::new(Recorder::new(
                adapter.get_info().device_type != wgpu::DeviceType::Cpu,
            )),
            pipelines: Mutex::default(),
            kept,
            faults,
            lost,
            shared: crate::memory::Shared::default(),
        })
    }

    /// What went wrong on the device since the last look; for ever, if it is gone.
    pub(crate) fn check(&self) -> Result<()> {
        if let Some(why) = self.lost.get() {
            return fail(format!("{}: {LOST} ({})", self.name, why.trim()));
        }
        let Some(fault) = locked(&self.faults).take() else {
            return Ok(());
        };
        // A device that is gone says so only when it is asked; until then what one does with it is called invalid.
        let _ = self.device.poll(wgpu::PollType::Poll);
        match self.is_lost() {
            true => self.check(),
            false => fail(format!("{}: {fault}", self.name)),
        }
    }

    /// Whether the device is gone.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.get().is_some()
    }

    /// The compiled form of a kernel, made at its first use.
    pub(crate) fn pipeline(&self, kernel: &Kernel) -> Result<Arc<Pipeline>> {
        let mut pipelines = locked(&self.pipelines);
        // The borrowed key would need a type of its own; a header is short.
        let key = (kernel.entry, kernel.header.to_string());
        if let Some(made) = pipelines.get(&key) {
            return Ok(made.clone());
        }
        let made = Arc::new(self.compile(kernel)?);
        pipelines.insert(key, made.clone());
        Ok(made)
    }

    fn compile(&self, kernel: &Kernel) -> Result<Pipeline> {
        let label = Some(kernel.entry);
        let mut source = kernel.header.to_string();
        source.extend(
            kernel
                .sources
                .iter()
                .map(|s| crate::unroll::unrolled(s, &kernel.rounds)),
        );
        let module = self
            .device
            .create_shader_module(wgpu::ShaderModuleDescriptor {
                label,
                source: wgpu::ShaderSource::Wgsl(source.into()),
            });
        let entries: Vec<_> = (0..kernel.reads + kernel.writes)
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage {
                        read_only: binding < kernel.reads,
                    },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout = self
            .device
            .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label,
                entries: &entries,
            });
        let pipeline_layout = self
            .device
            .create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label,
                bind_group_layouts: &[Some(&layout)],
                immediate_size: IMMEDIATE_BYTES,
            });
        let pipeline = self
            .device
            .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label,
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some(kernel.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    // Every kernel writes its shared arrays before it reads them.
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: self.kept.as_ref().map(|kept| &kept.cache),
            });
        self.check()?;
        if let Some(kept) = &self.kept {
            kept.changed.store(true, Ordering::Release);
        }
        Ok(Pipeline { pipeline, layout })
    }
}

fn explained(error: &wgpu::Error) -> String {
    match error {
        wgpu::Error::OutOfMemory { .. } => OUT_OF_MEMORY.to_owned(),
        other => other.to_string(),
    }
}

/// What has happened when a driver gives up on a device.
const LOST: &str = "the device was lost: its driver was reset or updated, it was unplugged, or one batch of work took too \
     long; whatever was on it is gone";

/// What a user can do about it.
pub(crate) const OUT_OF_MEMORY: &str = "out of memory on the device; smaller batches (train.batch_size), shorter texts (data.max_length) or \
     train.gradient_checkpointing need less";
