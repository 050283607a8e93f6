//! One file a verb: reads its arguments, calls the library, prints the result.

pub(crate) mod devices;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod merge;
pub(crate) mod methods;
pub(crate) mod quantize;
pub(crate) mod train;

use peft::tensor::{Device, Precision};

use crate::failure::Failure;
use crate::out::Out;

/// The device a user named, with a line about the choice where there is something to say.
pub(crate) fn device(name: &str, precision: Precision, out: &Out) -> Result<Device, Failure> {
    named_by("--device", name, precision, out)
}

/// The same, where it was named by another option.
pub(crate) fn named_by(
    option: &str,
    name: &str,
    precision: Precision,
    out: &Out,
) -> Result<Device, Failure> {
    let chosen = Device::choose(name, precision, precision.into())
        .map_err(|e| Failure::Usage(format!("{option} {name}: {e}")))?;
    if let Some(note) = &chosen.note {
        out.note(note);
    }
    Ok(chosen.device)
}

/// Cells of a table's row.
pub(crate) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}
