//! Configuration files: TOML, YAML or JSON by their ending, with `--set` on top.

use std::path::Path;

use peft::train::apply_set;
use serde_json::Value;

use crate::failure::Failure;

/// Reads a configuration and applies the overrides in order.
///
/// A file that is not there fails (1); one that does not parse, or an override that makes no sense, is bad usage (2).
pub(crate) fn read(path: &Path, sets: &[String]) -> Result<Value, Failure> {
    let text = peft::io::read_text(path)?;
    let ending = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default()
        .to_ascii_lowercase();
    let wrong = |e: &dyn std::fmt::Display| {
        Failure::Usage(format!("{}: {}", path.display(), e.to_string().trim_end()))
    };
    let mut value: Value = match ending.as_str() {
        "toml" => toml::from_str(&text).map_err(|e| wrong(&e))?,
        "yaml" | "yml" => serde_norway::from_str(&text).map_err(|e| wrong(&e))?,
        "json" => serde_json::from_str(&text).map_err(|e| wrong(&e))?,
        _ => {
            let detail = "what it is written in is told by its ending: .toml, .yaml, .yml or .json";
            return Err(Failure::Usage(format!("{}: {detail}", path.display())));
        }
    };
    for set in sets {
        apply_set(&mut value, set).map_err(|e| Failure::Usage(format!("--set {e}")))?;
    }
    Ok(value)
}
