//! `peft eval`

use peft::ops::{self, Compose, EvaluateOptions};
use peft::train::{EvalOptions, EvalReport, Observer};
use serde_json::json;

use super::row;
use crate::args::Eval;
use crate::failure::Failure;
use crate::out::{Out, count, seconds};
use crate::progress::Progress;

pub(crate) fn run(args: &Eval, out: &Out) -> Result<(), Failure> {
    let options = EvaluateOptions {
        max_length: args.max_length,
        limit: args.limit,
        task: args.task,
        compose: args.combine.compose,
        quantize: args.kept.quantize,
        device: super::device(&args.subject.device, args.kept.precision, out)?,
        eval: EvalOptions {
            batch_size: args.batch_size,
            choices: args.choices.then_some(true),
        },
    };
    let adapters = &args.subject.adapter;
    if args.vote {
        return voted(args, &options, out);
    }
    if args.combine.compose == Compose::Parallel && adapters.len() > 1 {
        return each(args, &options, out);
    }
    let report = measured(args, adapters, &options, out)?;
    if out.json {
        return out.value(&to_json(&report));
    }
    out.note(&format!(
        "{} rows in {}",
        count(report.rows),
        seconds(report.seconds)
    ));
    let mut rows = vec![row(["metric", "value"])];
    rows.extend(
        metrics(&report)
            .into_iter()
            .map(|(name, value)| vec![name.to_owned(), format!("{value:.4}")]),
    );
    out.table(&rows)
}

/// The majority of the adapters' answers, and each alone.
fn voted(args: &Eval, options: &EvaluateOptions, out: &Out) -> Result<(), Failure> {
    let mut watch = Watch { out, bar: None };
    let (model, adapters) = (&args.subject.model, &args.subject.adapter);
    let report = ops::vote(model, adapters, &args.data, options, &mut watch)?;
    if out.json {
        return out.value(
            &json!({"rows": report.rows, "accuracy": report.accuracy, "alone": report.alone}),
        );
    }
    out.note(&format!("{} rows", count(report.rows)));
    let mut rows = vec![row(["answers of", "accuracy"])];
    for (adapter, accuracy) in adapters.iter().zip(&report.alone) {
        rows.push(vec![adapter.clone(), format!("{accuracy:.4}")]);
    }
    rows.push(vec![
        "the majority".to_owned(),
        format!("{:.4}", report.accuracy),
    ]);
    out.table(&rows)
}

fn measured(
    args: &Eval,
    adapters: &[String],
    options: &EvaluateOptions,
    out: &Out,
) -> Result<EvalReport, Failure> {
    let mut watch = Watch { out, bar: None };
    let (model, data) = (&args.subject.model, &args.data);
    Ok(ops::evaluate(model, adapters, data, options, &mut watch)?)
}

/// Every adapter on its own, side by side.
fn each(args: &Eval, options: &EvaluateOptions, out: &Out) -> Result<(), Failure> {
    let adapters = &args.subject.adapter;
    let mut reports = Vec::new();
    for adapter in adapters {
        reports.push(measured(args, std::slice::from_ref(adapter), options, out)?);
    }
    if out.json {
        let all = adapters.iter().zip(&reports);
        let all: Vec<_> = all
            .map(|(adapter, report)| json!({ "adapter": adapter, "report": to_json(report) }))
            .collect();
        return out.value(&json!(all));
    }
    let mut rows = vec![row(["adapter", "metric", "value"])];
    for (adapter, report) in adapters.iter().zip(&reports) {
        for (name, value) in metrics(report) {
            rows.push(vec![
                adapter.clone(),
                name.to_owned(),
                format!("{value:.4}"),
            ]);
        }
    }
    out.table(&rows)
}

/// The numbers of a report that there are, under the names people know.
pub(super) fn metrics(report: &EvalReport) -> Vec<(&'static str, f64)> {
    let all = [
        ("loss", Some(report.loss)),
        ("perplexity", report.perplexity),
        ("accuracy", Some(report.accuracy)),
        ("completion_accuracy", report.completion_accuracy),
        ("choice_accuracy", report.choice_accuracy),
    ];
    all.into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect()
}

/// The same for machines.
pub(super) fn to_json(report: &EvalReport) -> serde_json::Value {
    let mut map = serde_json::Map::new();
    map.insert("rows".to_owned(), json!(report.rows));
    map.insert("labels".to_owned(), json!(report.count));
    map.extend(
        metrics(report)
            .into_iter()
            .map(|(name, value)| (name.to_owned(), json!(value))),
    );
    map.insert("seconds".to_owned(), json!(report.seconds));
    map.into()
}

/// Shows the rows go by.
struct Watch<'a> {
    out: &'a Out,
    bar: Option<Progress>,
}

impl Observer for Watch<'_> {
    fn eval_progress(&mut self, done: usize, total: usize) {
        self.bar
            .get_or_insert_with(|| Progress::new(self.out, "rows", 0, total as u64))
            .set(done as u64, "");
    }

    fn message(&mut self, text: &str) {
        self.out.note(&format!("note: {text}"));
    }
}
