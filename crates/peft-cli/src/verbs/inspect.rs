//! `peft inspect`

use std::path::Path;

use peft::core::{Common, ModuleKind, methods};
use peft::io::AdapterFiles;
use peft::models::LoadOptions;
use peft::ops::{self, Inspection, Subject};
use peft::train::{TrainConfig, apply_set, predict};
use serde_json::{Map, Value, json};

use super::row;
use crate::args::Inspect;
use crate::failure::Failure;
use crate::out::{Out, bytes, count, seconds};

pub(crate) fn run(args: &Inspect, out: &Out) -> Result<(), Failure> {
    if let Some(path) = &args.train_config {
        return forecast(path, args, out);
    }
    let (subject, matched) = open(args)?;
    let mut found = ops::inspect(&subject);
    if let Some(paths) = matched {
        found
            .modules
            .iter_mut()
            .for_each(|m| m.adapted = paths.contains(&m.path));
    }
    let planned = args.target_modules.is_some() && args.method.is_none();
    if out.json {
        return out.value(&found.to_json());
    }
    if !found.runnable {
        out.note(&format!(
            "note: model_type {:?} is not one this build runs; modules are read from names and shapes alone",
            found.model_type
        ));
    }
    print_modules(args, &found, out)?;
    print_totals(&found, planned, out)
}

/// What a training run will need.
fn forecast(path: &Path, args: &Inspect, out: &Out) -> Result<(), Failure> {
    let value = crate::config::read(path, &args.set)?;
    let config = TrainConfig::from_value(&value)
        .map_err(|e| Failure::Usage(format!("{}: {e}", path.display())))?;
    let found = predict(&config)?;
    if out.json {
        return out.value(&found.to_json());
    }
    let mut rows = vec![row(["peak memory, predicted", ""])];
    let parts = found.memory.parts().into_iter();
    rows.extend(
        parts
            .filter(|(_, size)| *size > 0)
            .map(|(name, size)| vec![name.to_owned(), bytes(size)]),
    );
    rows.push(vec!["total".to_owned(), bytes(found.memory.total())]);
    out.table(&rows)?;
    if found.again > 0 {
        let note = format!(
            "note: {} blocks are computed again in the backward pass",
            found.again
        );
        out.note(&note);
    }
    if found.paged {
        out.note("note: train.memory_limit puts the optimizer's moments on disk");
    }
    out.text("\n")?;
    let each = found.step_tokens / found.step_seconds.max(1e-9);
    out.table(&[
        row(["time, predicted", ""]),
        vec!["step".to_owned(), format!("{:.3} s", found.step_seconds)],
        vec!["tokens/s".to_owned(), format!("{each:.0}")],
        vec!["steps".to_owned(), found.steps.to_string()],
        vec![
            "run without evaluation".to_owned(),
            seconds(found.step_seconds * found.steps as f64),
        ],
        vec![
            "largest batch".to_owned(),
            format!("{} x {} tokens", found.largest.0, found.largest.1),
        ],
    ])
}

/// The model with what is asked about attached, or the paths that targets alone would match.
fn open(args: &Inspect) -> Result<(Subject, Option<Vec<String>>), Failure> {
    let options = LoadOptions::default();
    let model = args.model.as_deref().unwrap_or_default();
    let config = match (&args.config, &args.target_modules) {
        (Some(path), _) => crate::config::read_adapter(path, &args.set)?,
        (None, Some(targets)) => from_targets(args, &targets.join(","))?,
        (None, None) => {
            let (subject, _) = Subject::with_adapters(model, &args.adapter, true)?;
            return Ok((subject, None));
        }
    };
    let planned = [planned(&config)];
    let mut subject = Subject::open(model, &planned, &options)?;
    if args.target_modules.is_some() && args.method.is_none() {
        let kinds = [
            ModuleKind::Linear,
            ModuleKind::Conv1d,
            ModuleKind::Embedding,
        ];
        let sites =
            subject
                .network()
                .tree()
                .matching(&Common::from_config(&config)?, &kinds, None)?;
        return Ok((subject, Some(sites.into_iter().map(|s| s.path).collect())));
    }
    subject.network_mut()?.attach("default", &config, 0)?;
    Ok((subject, None))
}

/// An adapter that is only a configuration so far.
pub(super) fn planned(config: &Value) -> AdapterFiles {
    AdapterFiles {
        folder: Default::default(),
        config: config.clone(),
        tensors: Default::default(),
        formats: Default::default(),
        metadata: Default::default(),
    }
}

fn from_targets(args: &Inspect, targets: &str) -> Result<Value, Failure> {
    let mut config = match &args.method {
        Some(id) => {
            let entry = super::methods::find(id)?;
            super::methods::example(entry)?
        }
        None => Value::Object(Map::new()),
    };
    config["target_modules"] = as_targets(targets);
    if let Some(excluded) = &args.exclude_modules {
        config["exclude_modules"] = as_targets(excluded);
    }
    for set in &args.set {
        apply_set(&mut config, set).map_err(|e| Failure::Usage(format!("--set {e}")))?;
    }
    Ok(config)
}

/// `all-linear` and regular expressions as text, names as a list.
fn as_targets(text: &str) -> Value {
    if text.eq_ignore_ascii_case("all-linear")
        || text.contains(['*', '+', '(', '[', '|', '\\', '^', '$', '?'])
    {
        return json!(text);
    }
    json!(
        text.split(',')
            .map(str::trim)
            .filter(|name| !name.is_empty())
            .collect::<Vec<_>>()
    )
}

fn print_modules(args: &Inspect, found: &Inspection, out: &Out) -> Result<(), Failure> {
    let mut rows = vec![row([
        "module",
        "kind",
        "shape",
        "dtype",
        "adapted",
        "trainable",
    ])];
    for m in found.modules.iter().filter(|m| m.adapted || !args.adapted) {
        let shape = m.shape.as_ref().map_or(String::new(), |s| {
            s.iter()
                .map(usize::to_string)
                .collect::<Vec<_>>()
                .join(" x ")
        });
        let format = match &m.shares {
            Some(other) => format!("= {other}"),
            None => m.format.clone().unwrap_or_default(),
        };
        rows.push(vec![
            m.path.clone(),
            m.kind.name().to_owned(),
            shape,
            format,
            if m.adapted {
                "yes".to_owned()
            } else {
                String::new()
            },
            if m.trainable > 0 {
                count(m.trainable)
            } else {
                String::new()
            },
        ]);
    }
    out.table(&rows)
}

fn print_totals(found: &Inspection, planned: bool, out: &Out) -> Result<(), Failure> {
    let mut rows = vec![
        row(["total", ""]),
        vec!["parameters".to_owned(), count(found.parameters)],
        vec!["base bytes".to_owned(), bytes(found.base_bytes)],
    ];
    let adapted = found.modules.iter().filter(|m| m.adapted).count();
    if adapted > 0 || found.trainable > 0 {
        rows.push(vec!["modules adapted".to_owned(), count(adapted)]);
    }
    if found.trainable > 0 {
        rows.push(vec![
            "trainable".to_owned(),
            format!("{} ({:.4} %)", count(found.trainable), found.percent()),
        ]);
        rows.push(vec!["adapter bytes".to_owned(), bytes(found.adapter_bytes)]);
        rows.push(vec![
            "optimizer bytes".to_owned(),
            bytes(found.optimizer_bytes),
        ]);
    }
    if found.virtual_tokens > 0 {
        rows.push(vec![
            "virtual tokens".to_owned(),
            count(found.virtual_tokens),
        ]);
    }
    out.text("\n")?;
    out.table(&rows)?;
    if planned {
        let first = methods().first().map_or("ID", |entry| entry.id);
        out.note(&format!(
            "note: add --method ID (such as {first}) to count what it would train there"
        ));
    }
    Ok(())
}
