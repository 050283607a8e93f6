//! `peft init`

use peft::models::{LoadOptions, Task};
use peft::ops::{self, Subject};
use serde_json::json;

use crate::args::Init;
use crate::failure::Failure;
use crate::out::{Out, bytes, count};

/// The adapter's name on the network; no file holds it.
const NAME: &str = "default";

pub(crate) fn run(args: &Init, out: &Out) -> Result<(), Failure> {
    let config = crate::config::read_adapter(&args.config, &args.set)?;
    let classifier = config["task_type"] == "SEQ_CLS";
    let task = match args.num_labels {
        Some(num_labels) if classifier => Some(Task::SequenceClassification { num_labels }),
        Some(_) => {
            return Err(Failure::Usage(
                "--num-labels goes with task_type SEQ_CLS".to_owned(),
            ));
        }
        None => None,
    };
    let options = LoadOptions {
        task,
        seed: args.seed,
        ..LoadOptions::default()
    };
    let mut subject = Subject::open(&args.model, &[super::inspect::planned(&config)], &options)?;
    subject.network_mut()?.attach(NAME, &config, args.seed)?;
    let network = subject.network();
    ops::write_adapter(network, NAME, &args.model, &args.output, args.overwrite)?;
    let params = network.adapter_parameters(NAME)?;
    let trainable: usize = params.iter().map(peft::core::Param::numel).sum();
    let saved: usize = params
        .iter()
        .filter(|p| p.is_saved())
        .map(peft::core::Param::numel)
        .sum();
    if out.json {
        return out.value(&json!({
            "output": args.output, "method": network.method_of(NAME)?.id, "trainable": trainable,
            "tensors": params.iter().filter(|p| p.is_saved()).count(), "bytes": saved * 4,
        }));
    }
    out.note(&format!(
        "{}: {}, {} trainable parameters, {}",
        args.output.display(),
        network.method_of(NAME)?.title,
        count(trainable),
        bytes(saved as u64 * 4)
    ));
    Ok(())
}
