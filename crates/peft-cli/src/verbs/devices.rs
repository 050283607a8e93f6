//! `peft devices`

use peft::tensor::{Device, DeviceFacts};
use serde_json::{Value, json};

use super::row;
use crate::args::Devices;
use crate::failure::Failure;
use crate::out::{Out, bytes};

pub(crate) fn run(_args: &Devices, out: &Out) -> Result<(), Failure> {
    let present = Device::present();
    if out.json {
        return out.value(&Value::Array(present.iter().map(facts).collect()));
    }
    let mut rows = vec![row([
        "device",
        "name",
        "kind",
        "driver",
        "largest tensor",
        "auto",
    ])];
    rows.extend(present.iter().map(|d| {
        let largest = d.largest.map_or_else(|| "-".to_owned(), bytes);
        let auto = if d.fast { "yes" } else { "no" };
        row([d.device, &d.name, &d.kind, &d.driver, &largest, auto])
    }));
    out.table(&rows)?;
    for d in present.iter().filter(|d| !d.notes.is_empty()) {
        out.note(&format!("{}: {}", d.name, d.notes.join("; ")));
    }
    for name in Device::names() {
        if !present.iter().any(|d| d.device == name) {
            out.note(&format!(
                "{name}: in this build, and nothing found on this machine"
            ));
        }
    }
    if Device::names().len() == 1 {
        out.note("graphics cards: build with `--features wgpu`");
    }
    Ok(())
}

fn facts(d: &DeviceFacts) -> Value {
    json!({
        "device": d.device,
        "name": d.name,
        "kind": d.kind,
        "driver": d.driver,
        "largest_tensor": d.largest,
        "auto": d.fast,
        "notes": d.notes,
    })
}
