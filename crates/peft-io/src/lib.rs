//! Reads and writes everything on disk: checkpoints (safetensors and GGUF, by memory map), adapter
//! folders in Hugging Face PEFT's layout and in AdapterHub's, merged checkpoints (streamed tensor by tensor), training
//! state, data files, and the Hugging Face cache.
//!
//! It is the only crate of the workspace that touches files, and keeps two promises:
//!
//! * **Whatever the bytes, no panic and no memory out of proportion.** Every length and offset a file
//!   states is checked against the file before it is used; an error names the file and the tensor or key.
//! * **Nothing half-written.** Every write goes to a temporary name in the target folder, is synced, then
//!   renamed; when a write fails, the temporaries and the folders made for it are removed.
//!
//! ```
//! use peft_io::{Checkpoint, DType, PlanEntry, ShardPlan, StreamWriter};
//!
//! let folder = tempfile::tempdir().unwrap();
//! let entry = PlanEntry { name: "w".into(), shape: vec![2, 2], dtype: DType::F32 };
//! let plan = ShardPlan::new(vec![entry], 5_000_000_000)?;
//! let writer = StreamWriter::create(folder.path(), &plan, &Default::default(), false)?;
//! writer.write("w", bytemuck::cast_slice(&[1f32, 2.0, 3.0, 4.0]))?;
//! writer.finish()?;
//!
//! let checkpoint = Checkpoint::open(folder.path())?;
//! assert_eq!(checkpoint.weight("w")?.to_f32(), [1.0, 2.0, 3.0, 4.0]);
//! # Ok::<(), peft_io::Error>(())
//! ```
//!
//! Mapped files must not be changed in place while a [`Checkpoint`] on them is open; this crate itself
//! only ever replaces files by renaming, which leaves open maps intact.

mod adapter;
mod adapterhub;
mod cache;
mod checkpoint;
mod error;
mod files;
mod gguf;
mod header;
mod hub;
mod memory;
mod pending;
mod scratch;
mod stage;
mod state;
mod stream;
mod tensors;

pub use adapter::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFiles, is_adapter_folder, read_adapter, write_adapter,
    write_adapter_with,
};
pub use adapterhub::{
    ADAPTERHUB_WEIGHTS, fusion_members, is_adapterhub_folder, is_fusion_folder, read_adapterhub,
    read_fusion, write_adapterhub,
};
pub use checkpoint::{Checkpoint, StoredFormat, TensorMeta};
pub use error::{Error, Result};
pub use files::{
    LineLog, Lines, SIDE_FILES, atomic_write, copy_side_files, create_folder, read_bytes,
    read_json, read_lines, read_text, write_json,
};
pub use gguf::{Gguf, GgufBuilder, MetaArray, MetaValue};
pub use hub::{HubCache, resolve_adapter, resolve_model};
pub use memory::{Resident, resident_memory};
pub use pending::abandon_writes;
/// Element types as a safetensors header names them.
pub use safetensors::Dtype as DType;
pub use scratch::Scratch;
pub use state::{StateWriter, list_states, open_state, read_state, remove_state, write_state};
pub use stream::{PlanEntry, ShardPlan, StreamWriter, parse_size};
pub use tensors::{NamedTensors, check_finite, read_tensors, write_tensors};
