//! `peft devices`

use peft::ops;
use peft::tensor::{Device, DeviceFacts, Precision};
use serde_json::{Value, json};

use super::row;
use crate::args::Devices;
use crate::failure::Failure;
use crate::out::{Out, bytes};

pub(crate) fn run(args: &Devices, out: &Out) -> Result<(), Failure> {
    if let Some(name) = &args.bench {
        return measured(name, args.size, out);
    }
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
    out.wide_table(&rows, &["driver", "largest tensor"])?;
    for d in present.iter().filter(|d| !d.notes.is_empty()) {
        out.note(&format!(
            "{} ({}): {}",
            d.device,
            d.name,
            d.notes.join("; ")
        ));
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

/// Speeds of one device's products.
fn measured(name: &str, size: usize, out: &Out) -> Result<(), Failure> {
    if !size.is_multiple_of(64) {
        let detail =
            format!("--size {size}: has to be a multiple of 64, as packed formats have blocks");
        return Err(Failure::Usage(detail));
    }
    let device = super::named_by("--bench", name, Precision::F32, out)?;
    let called = device.backend().name();
    out.note(&format!(
        "{size} x {size} on {called}, GFLOP/s, the best of several rounds"
    ));
    let all = ops::bench(&device, size)?;
    let kernels = ops::kernels(&device, size)?;
    if out.json {
        let speeds: Vec<Value> = all
            .iter()
            .map(|s| json!({"product": s.product, "gflops": s.gflops}))
            .collect();
        let kernels: Vec<Value> = kernels
            .iter()
            .map(|k| json!({"kernel": k.kernel, "speed": k.speed, "unit": k.unit, "peak": k.peak}))
            .collect();
        return out.value(&json!({
            "device": called, "size": size, "products": speeds, "kernels": kernels,
        }));
    }
    let mut rows = vec![row(["product", "GFLOP/s"])];
    rows.extend(
        all.iter()
            .map(|s| vec![s.product.clone(), format!("{:.2}", s.gflops)]),
    );
    out.table(&rows)?;
    if kernels.is_empty() {
        return Ok(());
    }
    out.note("kernels beside the most that the device did in this run, in registers or reading");
    let mut rows = vec![row(["kernel", "speed", "unit", "most", "share"])];
    rows.extend(kernels.iter().map(|k| {
        vec![
            k.kernel.clone(),
            format!("{:.2}", k.speed),
            k.unit.to_owned(),
            format!("{:.2}", k.peak),
            format!("{:.0} %", 100.0 * k.speed / k.peak),
        ]
    }));
    out.table(&rows)
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
