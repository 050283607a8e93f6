//! Rows as JSON lines.

use std::path::Path;

use peft_core::{Error, Result};
use serde_json::{Map, Value};

use super::raw::{RawLabel, RawRow, RowKind, text_lines};

/// What a row may be, for messages.
pub(super) const KINDS: &str = "a row has `text`, or `prompt` and `completion`, or `messages`, or `text` and `label`, or `input_ids`";

pub(super) fn read(path: &Path) -> Result<Vec<RawRow>> {
    let mut rows = Vec::new();
    for line in text_lines(path)? {
        let (line, text) = line?;
        if text.trim().is_empty() {
            continue;
        }
        let (kind, task) = row(&text).map_err(|detail| Error::data(path, line, detail))?;
        rows.push(RawRow {
            line,
            file: 0,
            task,
            kind,
        });
    }
    Ok(rows)
}

type Parsed<T> = std::result::Result<T, String>;

/// The row and its task, if it has one: a `task` that is no whole number is a field like any other.
fn row(text: &str) -> Parsed<(RowKind, Option<u32>)> {
    let row: Value = serde_json::from_str(text).map_err(|e| {
        // One line is parsed, so serde's own line number says nothing.
        let message = e.to_string();
        let message = message.split(" at line ").next().unwrap_or_default();
        format!("is not JSON: {message} (column {})", e.column())
    })?;
    let Value::Object(fields) = row else {
        return Err(format!("expected an object, got {}; {KINDS}", short(&row)));
    };
    let task = fields.get("task").and_then(Value::as_u64);
    let task = task.and_then(|task| u32::try_from(task).ok());
    Ok((kind(&fields)?, task))
}

fn kind(fields: &Map<String, Value>) -> Parsed<RowKind> {
    if let Some(ids) = field(fields, "input_ids") {
        return tokens(fields, ids);
    }
    if let Some(messages) = field(fields, "messages") {
        return conversation(messages).map(RowKind::Messages);
    }
    match (field(fields, "prompt"), field(fields, "completion")) {
        (Some(prompt), Some(completion)) => {
            return completion_row(string("prompt", prompt)?, string("completion", completion)?);
        }
        (Some(_), None) => return Err("has `prompt` but no `completion`".to_owned()),
        (None, Some(_)) => return Err("has `completion` but no `prompt`".to_owned()),
        (None, None) => {}
    }
    match (field(fields, "text"), field(fields, "label")) {
        (Some(text), label) => text_row(string("text", text)?, label.map(label_of).transpose()?),
        (None, Some(_)) => Err("has `label` but no `text`".to_owned()),
        (None, None) => {
            let names: Vec<&str> = fields.keys().map(String::as_str).take(10).collect();
            Err(format!(
                "has none of the fields of a row, only: {}; {KINDS}",
                names.join(", ")
            ))
        }
    }
}

/// A field that is there and not null.
fn field<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

/// Checks what CSV has too.
pub(super) fn text_row(text: String, label: Option<RawLabel>) -> Parsed<RowKind> {
    if text.is_empty() {
        return Err("`text` is empty".to_owned());
    }
    Ok(match label {
        Some(label) => RowKind::Labelled { text, label },
        None => RowKind::Text(text),
    })
}

/// Checks what CSV has too. An empty prompt is fine where the tokenizer begins texts with a token of its own.
pub(super) fn completion_row(prompt: String, completion: String) -> Parsed<RowKind> {
    if completion.is_empty() {
        return Err("`completion` is empty".to_owned());
    }
    Ok(RowKind::Completion { prompt, completion })
}

fn string(name: &str, value: &Value) -> Parsed<String> {
    value
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| format!("`{name}` has to be a string, not {}", short(value)))
}

fn label_of(value: &Value) -> Parsed<RawLabel> {
    let index = |n: u64| usize::try_from(n).ok().filter(|&n| n < 1 << 24);
    match value {
        Value::Bool(yes) => Ok(RawLabel::Index(usize::from(*yes))),
        Value::String(name) if name.trim().is_empty() => Err("`label` is empty".to_owned()),
        Value::String(name) => Ok(RawLabel::Name(name.clone())),
        Value::Number(n) => n.as_u64().and_then(index).map(RawLabel::Index).ok_or_else(|| {
            format!("`label` has to be a class, by name or by number from 0, not {n}; regression is not in this build")
        }),
        other => Err(format!("`label` has to be a name or a number, not {}", short(other))),
    }
}

fn conversation(value: &Value) -> Parsed<Vec<Value>> {
    let Value::Array(messages) = value else {
        return Err(format!("`messages` has to be a list, not {}", short(value)));
    };
    for (i, message) in messages.iter().enumerate() {
        let text = |key: &str| message.get(key).and_then(Value::as_str);
        if text("role").is_none_or(str::is_empty) {
            return Err(format!(
                "`messages[{i}]` has no `role`: a message is {{\"role\": ..., \"content\": ...}}"
            ));
        }
        // Turns that only call tools have null content.
        if text("content").is_none() && message.get("tool_calls").is_none() {
            return Err(format!("`messages[{i}]` has no text as its `content`"));
        }
    }
    if !messages
        .iter()
        .any(|m| m.get("role").and_then(Value::as_str) == Some("assistant"))
    {
        return Err("`messages` has no turn of the assistant to learn from".to_owned());
    }
    Ok(messages.clone())
}

fn tokens(fields: &Map<String, Value>, ids: &Value) -> Parsed<RowKind> {
    let ids: Vec<u32> = numbers("input_ids", ids, "token ids (whole numbers from 0)", |n| {
        n.as_u64()?.try_into().ok()
    })?;
    if ids.is_empty() {
        return Err("`input_ids` is empty".to_owned());
    }
    let labels = field(fields, "labels");
    let labels = labels
        .map(|v| numbers("labels", v, "token ids or -100", Value::as_i64))
        .transpose()?;
    if let Some(bad) = labels
        .iter()
        .flatten()
        .find(|&&l| l < 0 && l != peft_tensor::IGNORE)
    {
        return Err(format!(
            "`labels` has {bad}; a position without a label is -100"
        ));
    }
    let mask = field(fields, "attention_mask");
    let mask: Option<Vec<bool>> = mask
        .map(|v| {
            numbers("attention_mask", v, "zeros and ones", |n| match n {
                Value::Bool(b) => Some(*b),
                _ => n.as_u64().filter(|&n| n < 2).map(|n| n == 1),
            })
        })
        .transpose()?;
    for (name, len) in [
        ("labels", labels.as_ref().map(Vec::len)),
        ("attention_mask", mask.as_ref().map(Vec::len)),
    ] {
        if let Some(len) = len
            && len != ids.len()
        {
            return Err(format!(
                "`{name}` has {len} entries for {} `input_ids`",
                ids.len()
            ));
        }
    }
    if mask.as_ref().is_some_and(|mask| !mask.contains(&true)) {
        return Err("`attention_mask` has no 1".to_owned());
    }
    let class = field(fields, "label").map(label_of).transpose()?;
    if class.is_some() && labels.is_some() {
        return Err("has both `label` (a class) and `labels` (of tokens)".to_owned());
    }
    Ok(RowKind::Tokens {
        ids,
        labels,
        mask,
        class,
    })
}

fn numbers<T>(
    name: &str,
    value: &Value,
    what: &str,
    read: impl Fn(&Value) -> Option<T>,
) -> Parsed<Vec<T>> {
    let Value::Array(items) = value else {
        return Err(format!(
            "`{name}` has to be a list of {what}, not {}",
            short(value)
        ));
    };
    items
        .iter()
        .enumerate()
        .map(|(i, item)| {
            read(item).ok_or_else(|| format!("`{name}[{i}]` is {}; expected {what}", short(item)))
        })
        .collect()
}

/// A value, cut to what fits into a message.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
