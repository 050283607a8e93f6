//! `peft methods`

use peft::core::{MethodEntry, methods, nearest};
use peft::models::{LoadOptions, Task};
use peft::ops::{Subject, count_parameters};
use serde_json::{Value, json};

use super::row;
use crate::args::Methods;
use crate::failure::Failure;
use crate::out::{Out, count};

pub(crate) fn run(args: &Methods, out: &Out) -> Result<(), Failure> {
    let chosen = match &args.id {
        Some(id) => vec![find(id)?],
        None => methods(),
    };
    let counts = match &args.model {
        Some(model) => Some(counts(model, &chosen)?),
        None => None,
    };
    let all: Vec<Value> = chosen
        .iter()
        .enumerate()
        .map(|(i, entry)| facts(entry, counts.as_ref().map(|c| &c[i])))
        .collect();
    match (&args.id, all.first()) {
        (Some(_), Some(one)) if out.json => out.value(one),
        _ if out.json => out.value(&json!(all)),
        (Some(_), Some(one)) => one_in_full(one, out),
        _ => table(&chosen, counts.as_deref(), out),
    }
}

/// A method by its id, or by its `peft_type` where only one has that.
pub(super) fn find(id: &str) -> Result<&'static MethodEntry, Failure> {
    let all = methods();
    let by_type = || {
        let mut same = all.iter().filter(|e| e.peft_type.eq_ignore_ascii_case(id));
        same.next().filter(|_| same.next().is_none())
    };
    if let Some(entry) = all
        .iter()
        .find(|e| e.id.eq_ignore_ascii_case(id))
        .or_else(by_type)
    {
        return Ok(entry);
    }
    let near = nearest(id, all.iter().map(|e| e.id));
    let hint = if near.is_empty() {
        "see `peft methods`".to_owned()
    } else {
        format!("nearest: {}", near.join(", "))
    };
    Err(Failure::Usage(format!("there is no method {id:?}; {hint}")))
}

/// A method's smallest configuration, complete with its `peft_type`.
pub(super) fn example(entry: &MethodEntry) -> Result<Value, Failure> {
    let mut config: Value = serde_json::from_str(entry.example)
        .map_err(|e| peft::Error::other(format!("the example of {} is not JSON: {e}", entry.id)))?;
    if let Some(fields) = config.as_object_mut() {
        fields.insert("peft_type".to_owned(), json!(entry.peft_type));
    }
    Ok(config)
}

/// Trainable parameters of each method's example on a model, or why it does not apply there.
fn counts(model: &str, chosen: &[&MethodEntry]) -> Result<Vec<Result<usize, String>>, Failure> {
    let mut subject = Subject::open(model, &[], &LoadOptions::default())?;
    let task = match subject.model().map(peft::models::Model::task) {
        Some(Task::CausalLm) => json!("CAUSAL_LM"),
        Some(Task::SequenceClassification { .. }) => json!("SEQ_CLS"),
        Some(Task::Features) => json!("FEATURE_EXTRACTION"),
        None => Value::Null,
    };
    let mut counts = Vec::with_capacity(chosen.len());
    for entry in chosen {
        let mut config = example(entry)?;
        if config["task_type"].is_null() {
            config["task_type"] = task.clone();
        }
        let network = subject.network_mut()?;
        let mut count = |config: &Value| count_parameters(network, config);
        let counted = count(&config).or_else(|first| {
            // The example names a Llama's modules: elsewhere the method's own choice counts, or all linear layers.
            count(&elsewhere(&config, None))
                .or_else(|_| count(&elsewhere(&config, Some("all-linear"))))
                .map_err(|_| first)
        });
        counts.push(counted.map_err(|e| e.to_string()));
    }
    Ok(counts)
}

/// A configuration, its members' included, with other target modules.
fn elsewhere(config: &Value, target: Option<&str>) -> Value {
    let mut config = config.clone();
    if let Some(fields) = config.as_object_mut() {
        fields.shift_remove("feedforward_modules");
        let named = fields.shift_remove("target_modules").is_some();
        if let (true, Some(target)) = (named, target) {
            fields.insert("target_modules".to_owned(), json!(target));
        }
        if let Some(members) = fields.get_mut("members").and_then(Value::as_array_mut) {
            for member in members {
                *member = elsewhere(member, target);
            }
        }
    }
    config
}

fn facts(entry: &MethodEntry, counted: Option<&Result<usize, String>>) -> Value {
    let mut facts = json!({
        "id": entry.id,
        "title": entry.title,
        "family": entry.family.name(),
        "subfamily": entry.subfamily,
        "peft_type": entry.peft_type,
        "mergeable": entry.mergeable,
        "identity_at_init": entry.identity_at_init,
        "moves_base": entry.moves_base,
        "paper": entry.paper,
        "example": example(entry).unwrap_or_default(),
    });
    match counted {
        Some(Ok(n)) => facts["trainable"] = json!(n),
        Some(Err(why)) => facts["does_not_apply"] = json!(why),
        None => {}
    }
    facts
}

fn table(
    chosen: &[&MethodEntry],
    counts: Option<&[Result<usize, String>]>,
    out: &Out,
) -> Result<(), Failure> {
    let mut head = row([
        "id",
        "family",
        "subfamily",
        "peft_type",
        "merges",
        "title",
        "paper",
    ]);
    if counts.is_some() {
        head.insert(5, "trainable".to_owned());
    }
    let mut rows = vec![head];
    for (i, e) in chosen.iter().enumerate() {
        let mut cells = row([
            e.id,
            e.family.name(),
            e.subfamily,
            e.peft_type,
            if e.mergeable { "yes" } else { "no" },
            e.title,
            e.paper,
        ]);
        if let Some(counts) = counts {
            cells.insert(5, counts[i].as_ref().map_or("-".to_owned(), |&n| count(n)));
        }
        rows.push(cells);
    }
    out.wide_table(&rows, &["paper", "peft_type", "subfamily"])?;
    let refused = counts.into_iter().flatten().filter(|c| c.is_err()).count();
    if refused > 0 {
        out.note(&format!("note: - means that the example configuration does not apply to this model ({refused} of {}); `peft methods ID --model M` says why", chosen.len()));
    }
    Ok(())
}

fn one_in_full(facts: &Value, out: &Out) -> Result<(), Failure> {
    let word = |value: &Value| match value {
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(n) => n
            .as_u64()
            .map_or_else(|| n.to_string(), |n| count(n as usize)),
        other => other.to_string(),
    };
    let fields = facts
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| *key != "example");
    let mut rows = vec![row(["fact", "value"])];
    rows.extend(fields.map(|(key, value)| vec![key.replace('_', " "), word(value)]));
    out.table(&rows)?;
    out.text(&format!(
        "\nadapter_config.json, the smallest:\n{:#}\n",
        facts["example"]
    ))
}
