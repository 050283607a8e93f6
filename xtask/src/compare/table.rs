//! The comparison's page, from the results of its runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use peft::MethodEntry;
use serde_json::Value;

/// Results by row and task.
type Results = BTreeMap<(String, String), Value>;

/// Renders the page.
pub(super) fn page(
    plan: &Value,
    results: &Results,
    methods: &[&'static MethodEntry],
) -> Result<String> {
    let mut out = String::from(
        "<!-- Made by `cargo xtask compare` from its runs; edit examples/compare/rows.json instead. -->\n\n\
         # Every method on the same work\n\n",
    );
    out.push_str(plan["about"].as_str().unwrap_or_default());
    out.push_str("\n\n");
    let threads = results.values().filter_map(|r| r["threads"].as_u64()).max();
    let _ = writeln!(
        out,
        "Each run had {} thread(s). Times are processor time, which other processes on the machine do not stretch \
         much; they are for comparing the rows of a table with each other.\n",
        threads.unwrap_or(1)
    );
    let rows = plan["rows"].as_array().context("rows.json: no rows")?;
    for (task, about) in plan["tasks"].as_object().into_iter().flatten() {
        let _ = writeln!(out, "## {}\n", about["title"].as_str().unwrap_or(task));
        let _ = writeln!(out, "{}\n", about["about"].as_str().unwrap_or_default());
        let classifier = about["measure"] == "accuracy";
        out.push_str(if classifier {
            "| method | family | trained | accuracy | loss | CPU s an epoch | peak MB |\n|---|---|--:|--:|--:|--:|--:|\n"
        } else {
            "| method | family | trained | choice accuracy | loss | CPU s a step | peak MB |\n|---|---|--:|--:|--:|--:|--:|\n"
        });
        let mut lines = Vec::new();
        for row in rows {
            let name = row["name"].as_str().unwrap_or_default();
            let Some(result) = results.get(&(name.to_owned(), task.clone())) else {
                continue;
            };
            lines.push(line(row, name, result, classifier, methods));
        }
        lines.sort_by(|a, b| b.0.total_cmp(&a.0));
        lines.iter().for_each(|(_, line)| out.push_str(line));
        out.push('\n');
        for row in rows {
            let name = row["name"].as_str().unwrap_or_default();
            let why = row.get(format!("no_{task}")).and_then(Value::as_str);
            if let Some(why) = why {
                let _ = writeln!(out, "- {name}: {why}");
            }
        }
        out.push('\n');
    }
    let notes: Vec<String> = rows
        .iter()
        .filter_map(|row| {
            let note = row["note"].as_str()?;
            Some(format!("- {}: {note}", row["name"].as_str()?))
        })
        .collect();
    if !notes.is_empty() {
        let _ = writeln!(out, "## Notes\n\n{}\n", notes.join("\n"));
    }
    while out.ends_with("\n\n") {
        out.pop();
    }
    Ok(out)
}

/// One row, with what it is sorted by.
fn line(
    row: &Value,
    name: &str,
    result: &Value,
    classifier: bool,
    methods: &[&'static MethodEntry],
) -> (f64, String) {
    let entry = methods
        .iter()
        .find(|m| row["method"].as_str() == Some(m.id));
    let (title, family) = match entry {
        Some(entry) => (
            format!("[{name}](methods/{}.md)", entry.id),
            entry.family.name(),
        ),
        None => (format!("*{name}*"), ""),
    };
    let eval = &result["summary"]["eval_after"];
    let number = |keys: &[&str]| keys.iter().find_map(|key| eval[*key].as_f64());
    let loss = number(&["eval_loss", "loss"]).unwrap_or(f64::NAN);
    let accuracy = if classifier {
        number(&["eval_accuracy", "accuracy"])
    } else {
        number(&["eval_choice_accuracy", "choice_accuracy"])
    };
    let elapsed = result["elapsed_s"].as_f64().unwrap_or(f64::NAN);
    let per = if classifier {
        result["epoch"].as_f64()
    } else {
        result["steps"].as_f64()
    };
    // Of the processor time of the whole run, the share of its training.
    let whole = result["summary"]["elapsed_s"].as_f64().unwrap_or(f64::NAN);
    let training = result["cpu_s"].as_f64().unwrap_or(f64::NAN) * elapsed / whole;
    let time = training / per.unwrap_or(f64::NAN);
    let peak = match result["peak_bytes"].as_f64() {
        Some(bytes) => format!("{:.0}", bytes / 1e6),
        None => "?".to_owned(),
    };
    let trained = result["summary"]["trainable"].as_u64().unwrap_or(0);
    let accuracy = accuracy.unwrap_or(f64::NAN);
    let line = format!(
        "| {title} | {family} | {} | {accuracy:.3} | {loss:.3} | {time:.1} | {peak} |\n",
        grouped(trained)
    );
    (accuracy, line)
}

/// 1234567 as 1,234,567.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
