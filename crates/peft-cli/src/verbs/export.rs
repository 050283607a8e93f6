//! `peft export`

use peft::ops;
use serde_json::json;

use crate::args::Export;
use crate::failure::Failure;
use crate::out::{Out, program, shell_word};

pub(crate) fn run(args: &Export, out: &Out) -> Result<(), Failure> {
    let folders = ops::export_adapterhub(
        &args.model,
        &args.adapter,
        &args.name,
        &args.output,
        args.overwrite,
    )?;
    if out.json {
        return out.value(&json!({ "format": args.format, "folders": folders }));
    }
    for folder in &folders {
        out.note(&format!("written: {}", folder.display()));
    }
    if let [folder] = &folders[..] {
        out.note(&format!(
            "next: model.load_adapter({}, use_safetensors=True), or {} inspect --model {} --adapter {}",
            json!(folder),
            program(),
            shell_word(&args.model),
            shell_word(&folder.display().to_string())
        ));
    }
    Ok(())
}
