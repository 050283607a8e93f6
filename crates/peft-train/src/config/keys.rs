//! Names of configuration keys: which there are, what a wrong one may have meant, and which one a type error
//! is about. The list of names is the default configuration's own.

use peft_core::{Error, Result, in_words, nearest};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{DataSection, LrRule, ModelSection, OutputSection, TrainConfig, TrainSection};

/// Other names of keys: section, name, the key itself.
const ALIASES: &[(&str, &str, &str)] = &[
    ("train", "max_steps", "steps"),
    ("train", "lr", "learning_rate"),
    (
        "train",
        "gradient_accumulation_steps",
        "gradient_accumulation",
    ),
];

/// Puts keys written under another name under their own.
pub(super) fn rename_aliases(value: &mut Value) -> Result<()> {
    for &(section, alias, key) in ALIASES {
        let Some(Value::Object(table)) = value.get_mut(section) else {
            continue;
        };
        let Some(given) = table.shift_remove(alias) else {
            continue;
        };
        if table.insert(key.to_owned(), given).is_some() {
            let field = format!("{section}.{alias}");
            return Err(Error::config(
                field,
                format!("is another name of `{section}.{key}`, which is set too"),
            ));
        }
    }
    Ok(())
}

/// Checks every key of a configuration against those there are. The fields of `[adapter]` are the method's
/// business.
///
/// # Errors
/// The first unknown key, with the nearest names; a section that is not a table.
pub fn validate_keys(value: &Value) -> Result<()> {
    let Value::Object(given) = value else {
        return Err(Error::config(
            "configuration",
            format!("expected a table of sections, got {}", kind(value)),
        ));
    };
    let known = known();
    let names = dotted(&known);
    for (key, value) in given {
        match known.get(key) {
            None => return Err(unknown(key, &names)),
            Some(Value::Object(fields)) => check_section(key, value, fields, &names)?,
            Some(_) => {}
        }
    }
    let rules = value
        .get("train")
        .and_then(|t| t.get("lr_multipliers"))
        .and_then(Value::as_array);
    for (i, rule) in rules.into_iter().flatten().enumerate() {
        let field = format!("train.lr_multipliers[{i}]");
        let fields = as_object(LrRule::default());
        let names: Vec<String> = fields.keys().map(|key| format!("{field}.{key}")).collect();
        check_section(&field, rule, &fields, &names)?;
    }
    Ok(())
}

fn check_section(
    name: &str,
    value: &Value,
    fields: &Map<String, Value>,
    names: &[String],
) -> Result<()> {
    let Value::Object(given) = value else {
        return Err(Error::config(
            name,
            format!("expected a table, got {}", kind(value)),
        ));
    };
    match given.keys().find(|key| !fields.contains_key(*key)) {
        Some(key) => Err(unknown(&format!("{name}.{key}"), names)),
        None => Ok(()),
    }
}

fn unknown(field: &str, names: &[String]) -> Error {
    let last = field.rsplit('.').next().unwrap_or(field);
    // A known key in the wrong section is found by its last part, a misspelt one by the whole name.
    let mut close: Vec<String> = names
        .iter()
        .filter(|name| name.rsplit('.').next() == Some(last))
        .cloned()
        .collect();
    close.extend(nearest(field, names.iter().map(String::as_str)));
    let mut seen = Vec::new();
    close.retain(|name| {
        !seen.contains(name) && {
            seen.push(name.clone());
            true
        }
    });
    close.truncate(3);
    let hint = if close.is_empty() {
        String::new()
    } else {
        format!("; nearest: {}", close.join(", "))
    };
    Error::config(field, format!("there is no such key{hint}"))
}

/// Every key with its default, sections as objects; `adapter` is null.
fn known() -> Map<String, Value> {
    as_object(TrainConfig::default())
}

fn as_object(config: impl serde::Serialize) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn dotted(known: &Map<String, Value>) -> Vec<String> {
    let mut names = Vec::new();
    for (key, value) in known {
        names.push(key.clone());
        if let Value::Object(fields) = value {
            names.extend(fields.keys().map(|field| format!("{key}.{field}")));
        }
    }
    names
}

/// The error of a value of the wrong type, with the name of its field: serde says what was expected, not where.
pub(super) fn blame(value: &Value, error: &serde_json::Error) -> Error {
    for (key, section) in value.as_object().into_iter().flatten() {
        let found = match key.as_str() {
            "model" => first_bad::<ModelSection>(section),
            "data" => first_bad::<DataSection>(section),
            "train" => first_bad::<TrainSection>(section),
            "output" => first_bad::<OutputSection>(section),
            _ => None,
        };
        if let Some((field, detail)) = found {
            return Error::config(format!("{key}.{field}"), detail);
        }
        let alone = Value::Object(Map::from_iter([(key.clone(), section.clone())]));
        if let Err(e) = serde_json::from_value::<TrainConfig>(alone) {
            return Error::config(key, in_words(&e));
        }
    }
    Error::config("configuration", in_words(error))
}

fn first_bad<T: DeserializeOwned>(section: &Value) -> Option<(String, String)> {
    section.as_object()?.iter().find_map(|(key, value)| {
        let alone = Value::Object(Map::from_iter([(key.clone(), value.clone())]));
        serde_json::from_value::<T>(alone)
            .err()
            .map(|e| (key.clone(), in_words(&e)))
    })
}

/// Collects the dotted names whose values differ.
pub(super) fn compare(at: &str, a: &Value, b: &Value, found: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(x), Value::Object(y)) => {
            let only_y = y.keys().filter(|key| !x.contains_key(*key));
            for key in x.keys().chain(only_y) {
                let name = if at.is_empty() {
                    key.clone()
                } else {
                    format!("{at}.{key}")
                };
                let side = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                compare(&name, &side(x), &side(y), found);
            }
        }
        _ if a != b => found.push(at.to_owned()),
        _ => {}
    }
}

/// The word for a value in messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "a table",
    }
}
