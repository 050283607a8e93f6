//! `peft logits`

use peft::models::LoadOptions;
use peft::ops::{self, Compose, LogitsInput};
use peft::tensor::Precision;
use serde_json::json;

use crate::args::Logits;
use crate::failure::Failure;
use crate::out::Out;
use crate::progress::Progress;

pub(crate) fn run(args: &Logits, out: &Out) -> Result<(), Failure> {
    let input = LogitsInput::read(&args.input)?;
    let waiting = Progress::spinner(out, "running the model");
    let (model, adapters) = ops::open_composed(
        &args.subject.model,
        &args.subject.adapter,
        args.combine.compose,
        &LoadOptions {
            device: super::device(&args.subject.device, Precision::F32, out)?,
            ..LoadOptions::default()
        },
    )?;
    let input = match args.combine.compose {
        Compose::Parallel => {
            let names: Vec<&str> = adapters.iter().map(|a| a.name.as_str()).collect();
            input.through_each(&names)?
        }
        _ => input,
    };
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
