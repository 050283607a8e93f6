//! `peft quantize`

use std::time::Instant;

use peft::ops::{self, QuantizeOptions};
use serde_json::json;

use crate::args::Quantize;
use crate::failure::Failure;
use crate::out::{Out, bytes, program, seconds, shell_word};
use crate::progress::Progress;

pub(crate) fn run(args: &Quantize, out: &Out) -> Result<(), Failure> {
    let begun = Instant::now();
    let options = QuantizeOptions {
        quantize: args.format,
        max_shard_size: args.max_shard_size,
        overwrite: args.overwrite,
    };
    let mut bar: Option<Progress> = None;
    let report = ops::quantize(&args.model, &args.out, &options, |done, total| {
        bar.get_or_insert_with(|| Progress::new(out, "tensors", 0, total as u64))
            .set(done as u64, "");
    })?;
    drop(bar);
    for note in &report.notes {
        out.note(&format!("note: {note}"));
    }
    if out.json {
        return out.value(&json!({
            "output": report.folder, "quantised": report.quantised, "bytes_before": report.before,
            "bytes": report.bytes, "files": report.files, "notes": report.notes,
            "seconds": begun.elapsed().as_secs_f64(),
        }));
    }
    out.note(&format!(
        "quantised {} into {}: {} weights, {} -> {}, {}",
        args.model,
        report.folder.display(),
        report.quantised,
        bytes(report.before),
        bytes(report.bytes),
        seconds(begun.elapsed().as_secs_f64()),
    ));
    out.note(&format!(
        "next: {} inspect --model {}",
        program(),
        shell_word(&report.folder.display().to_string())
    ));
    Ok(())
}
