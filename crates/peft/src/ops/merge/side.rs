//! The files that travel with a checkpoint: tokenizer, chat template, generation defaults.

use peft_core::Result;
use peft_io::{SIDE_FILES, StreamWriter, read_bytes};

use crate::ops::Subject;

/// Adds the model's side files, copied from its folder.
pub(super) fn add(
    writer: &mut StreamWriter,
    subject: &Subject,
    notes: &mut Vec<String>,
) -> Result<Vec<String>> {
    if subject.checkpoint.gguf().is_some() {
        notes.push("the tokenizer of a GGUF is not written yet".to_owned());
        return Ok(Vec::new());
    }
    let folder = if subject.path.is_dir() {
        Some(subject.path.as_path())
    } else {
        subject.path.parent()
    };
    let mut added = Vec::new();
    for &name in SIDE_FILES {
        let Some(path) = folder.map(|f| f.join(name)).filter(|p| p.is_file()) else {
            continue;
        };
        writer.add_file(name, &read_bytes(&path)?)?;
        added.push(name.to_owned());
    }
    Ok(added)
}
