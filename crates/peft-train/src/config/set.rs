//! Overrides on the command line: `--set train.batch_size=4`.

use peft_core::{Error, Result};
use serde_json::{Map, Value};

use super::keys::kind;

/// Sets one key of a configuration: `"a.b=c"`. The value is read as JSON, then as TOML; what is neither is a
/// string. Tables on the way are made where there are none; `null` takes a key back to its default.
///
/// # Errors
/// When there is no `=`, a part of the name is empty, or something on the way is not a table.
pub fn apply_set(config: &mut Value, assignment: &str) -> Result<()> {
    let Some((path, text)) = assignment.split_once('=') else {
        return Err(Error::config(
            assignment,
            "expected `key=value`, such as `train.batch_size=4`",
        ));
    };
    let path = path.trim();
    let parts: Vec<&str> = path.split('.').collect();
    if parts.iter().any(|part| part.trim().is_empty()) {
        return Err(Error::config(
            path,
            "a part of the name before `=` is empty",
        ));
    }
    if config.is_null() {
        *config = Value::Object(Map::new());
    }
    let mut at = config;
    for (i, part) in parts.iter().enumerate() {
        let Value::Object(table) = at else {
            let name = parts[..i].join(".");
            return Err(Error::config(
                path,
                format!("`{name}` is {}, not a table", kind(at)),
            ));
        };
        if i + 1 == parts.len() {
            set(table, part, parse(text));
            return Ok(());
        }
        at = table
            .entry(part.trim())
            .or_insert_with(|| Value::Object(Map::new()));
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
    }
    Ok(())
}

fn set(table: &mut Map<String, Value>, key: &str, value: Value) {
    if value.is_null() {
        table.shift_remove(key.trim());
    } else {
        table.insert(key.trim().to_owned(), value);
    }
}

fn parse(text: &str) -> Value {
    let text = text.trim();
    if let Ok(value) = serde_json::from_str(text) {
        return value;
    }
    let as_toml = toml::from_str::<Map<String, Value>>(&format!("value = {text}"));
    match as_toml
        .ok()
        .and_then(|mut table| table.shift_remove("value"))
    {
        Some(value) => value,
        None => Value::String(text.to_owned()),
    }
}
