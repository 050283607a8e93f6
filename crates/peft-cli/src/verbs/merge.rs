//! `peft merge`

use std::time::Instant;

use peft::ops::{self, MergeOptions, Onto};
use serde_json::json;

use crate::args::Merge;
use crate::failure::Failure;
use crate::out::{Out, bytes, program, seconds, shell_word};
use crate::progress::Progress;

pub(crate) fn run(args: &Merge, out: &Out) -> Result<(), Failure> {
    let begun = Instant::now();
    let onto = match (args.onto.as_deref(), &args.base) {
        (Some("original"), Some(base)) => Onto::Original(base.clone()),
        (Some("dequantized"), None) => Onto::Dequantized,
        (None, None) => Onto::AsIs,
        _ => {
            let detail = "goes with `--onto original`, which needs it";
            return Err(peft::core::Error::config("base", detail).into());
        }
    };
    let options = MergeOptions {
        onto,
        dtype: args.dtype,
        max_shard_size: args.max_shard_size,
        overwrite: args.overwrite,
        rest: args.rest.clone(),
    };
    let mut bar: Option<Progress> = None;
    let report = ops::merge(
        &args.model,
        &args.adapter,
        &args.output,
        &options,
        |done, total| {
            bar.get_or_insert_with(|| Progress::new(out, "tensors", 0, total as u64))
                .set(done as u64, "");
        },
    )?;
    drop(bar);
    for note in &report.notes {
        out.note(&format!("note: {note}"));
    }
    if report.untied {
        out.note("note: the embeddings were tied and are not any more: config.json says `tie_word_embeddings: false`");
    }
    if out.json {
        return out.value(&json!({
            "output": report.folder, "tensors": report.tensors, "changed_modules": report.changed,
            "bytes": report.bytes, "files": report.files, "untied": report.untied, "rest": report.rest, "notes": report.notes,
            "seconds": begun.elapsed().as_secs_f64(),
        }));
    }
    out.note(&format!(
        "merged {} into {}: {} tensors, {} modules changed, {}, {}",
        args.adapter.join(" + "),
        report.folder.display(),
        report.tensors,
        report.changed,
        bytes(report.bytes),
        seconds(begun.elapsed().as_secs_f64()),
    ));
    if let Some(rest) = &report.rest {
        out.note(&format!(
            "what could not be merged is an adapter for it: {}",
            rest.display()
        ));
    }
    out.note(&format!(
        "next: {} inspect --model {}",
        program(),
        shell_word(&report.folder.display().to_string())
    ));
    Ok(())
}
