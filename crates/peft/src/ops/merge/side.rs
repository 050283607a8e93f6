//! The files that travel with a checkpoint: tokenizer, chat template, generation defaults.

use peft_core::Result;
use peft_io::{SIDE_FILES, StreamWriter, read_bytes};
use peft_models::Tokenizer;

use crate::ops::Subject;

/// Adds the model's side files, copied from its folder.
pub(super) fn add(
    writer: &StreamWriter,
    subject: &Subject,
    notes: &mut Vec<String>,
) -> Result<Vec<String>> {
    let mut added = Vec::new();
    if let Some(gguf) = subject.checkpoint.gguf() {
        // A model whose tokenizer we do not know can still be merged.
        match Tokenizer::from_gguf(gguf).and_then(|t| t.files()) {
            Ok(files) => {
                for (name, bytes) in files {
                    writer.add_file(name, &bytes)?;
                    added.push(name.to_owned());
                }
            }
            Err(e) => notes.push(format!("no tokenizer is written: {e}")),
        }
        return Ok(added);
    }
    let folder = if subject.path.is_dir() {
        Some(subject.path.as_path())
    } else {
        subject.path.parent()
    };
    for &name in SIDE_FILES {
        let Some(path) = folder.map(|f| f.join(name)).filter(|p| p.is_file()) else {
            continue;
        };
        writer.add_file(name, &read_bytes(&path)?)?;
        added.push(name.to_owned());
    }
    Ok(added)
}
