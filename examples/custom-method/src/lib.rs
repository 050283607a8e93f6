//! A method outside of the workspace: one file and its `mod` line. The method needs `peft-core` alone; the command,
//! the documentation and the law suite find it in the registry of whatever program links this crate.

pub mod output_scale;
