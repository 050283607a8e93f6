//! `peft logits`

use peft::models::LoadOptions;
use peft::ops::{self, LogitsInput};
use serde_json::json;

use crate::args::Logits;
use crate::failure::Failure;
use crate::out::Out;
use crate::progress::Progress;

pub(crate) fn run(args: &Logits, out: &Out) -> Result<(), Failure> {
    let input = LogitsInput::read(&args.input)?;
    let waiting = Progress::spinner(out, "running the model");
    let (model, _) = ops::open(
        &args.subject.model,
        &args.subject.adapter,
        &LoadOptions::default(),
    )?;
    let report = ops::write_logits(&model, &input, &args.output)?;
    drop(waiting);
    if out.json {
        return out.value(
            &json!({ "output": args.output, "tensor": report.name, "shape": report.shape }),
        );
    }
    out.note(&format!(
        "{} {:?} written to {}",
        report.name,
        report.shape,
        args.output.display()
    ));
    Ok(())
}
