//! The graphics card: a [`Backend`](peft_tensor::Backend) of hand-written WGSL over `wgpu`, which reaches Vulkan, Metal and DX12.
//!
//! Linking this crate registers the device `wgpu`; [`adapters`] lists what it finds and [`open`] opens one by name. Work is
//! recorded and handed over in batches; nothing is read back before somebody asks for values. Frozen weights stay packed
//! in the card's memory.

mod adamw;
mod attention;
mod backend;
mod bench;
mod coop;
mod elementwise;
mod features;
mod few;
mod frozen;
mod gpu;
mod kept;
mod layers;
mod loss;
mod matmul;
mod memory;
mod notes;
mod open;
mod record;
mod reduce;
mod shape;
mod unroll;

pub use backend::WgpuBackend;
pub use memory::MemoryUse;
pub use open::{AdapterFacts, Options, Usage, adapters, destroy_all, open, open_with, usage};

peft_tensor::inventory::submit!(peft_tensor::BackendEntry {
    name: "wgpu",
    open: |precision, keep| open(None, precision, keep),
    present: || adapters().iter().map(AdapterFacts::to_device).collect(),
});
