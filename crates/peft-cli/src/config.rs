//! Configuration files: TOML, YAML or JSON by their ending, with `--set` on top.

use std::path::Path;

use peft::core::{known_fields, nearest};
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

/// As [`read`], for the configuration of an adapter: a file may have fields that the method does not read, as those of other
/// programs do, but an override of one is a typing mistake.
pub(crate) fn read_adapter(path: &Path, sets: &[String]) -> Result<Value, Failure> {
    let written = read(path, &[])?;
    let value = read(path, sets)?;
    // What is wrong with the rest shows when it is attached, with the module it is about.
    let Ok(known) = known_fields(&value) else {
        return Ok(value);
    };
    for set in sets {
        let key = set.split(['=', '.']).next().unwrap_or_default().trim();
        if known.iter().any(|field| field == key) || written.get(key).is_some() {
            continue;
        }
        let near = nearest(key, known.iter().map(String::as_str));
        let hint = match near.is_empty() {
            true => format!("known: {}", known.join(", ")),
            false => format!("nearest: {}", near.join(", ")),
        };
        let detail = format!("--set `{key}`: is no field of this method; {hint}");
        return Err(Failure::Usage(detail));
    }
    Ok(value)
}
