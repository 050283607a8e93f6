//! `peft train`

use std::path::Path;

use peft::Error;
use peft::core::entry_for;
use peft::train::data::RowKind;
use peft::train::{
    EvalReport, Observer, RawData, StepReport, Summary, TrainConfig, apply_set, train,
};
use serde_json::{Value, json};

use super::eval::{metrics, to_json};
use super::row;
use crate::args::Train;
use crate::failure::Failure;
use crate::out::{Out, count, counted, program, seconds, shell_word};
use crate::progress::Progress;

pub(crate) fn run(args: &Train, out: &Out) -> Result<(), Failure> {
    let mut value = crate::config::read(&args.config, &args.set)?;
    if let Some(bytes) = args.memory_limit {
        apply_set(&mut value, &format!("train.memory_limit=\"{bytes}B\""))?;
    }
    if let Some(device) = &args.device {
        apply_set(&mut value, &format!("device={device:?}"))?;
    }
    let config = TrainConfig::from_value(&value).map_err(|e| wrong(args, &e))?;
    plan(&config, out)?;
    let mut watch = Watch {
        out,
        bar: None,
        rows: None,
        total: 0,
        output: config.output.dir.clone(),
    };
    let summary = train(&config, args.resume, &mut watch)?;
    drop(watch);
    if out.json {
        return out.value(&summary_json(&summary));
    }
    report(&config, &summary, out)
}

/// What is wrong with the configuration, and which of the user's words it is in.
fn wrong(args: &Train, error: &Error) -> Failure {
    let field = match error {
        Error::Config { field, .. } => field.as_str(),
        _ => "",
    };
    let is_set = |set: &String| {
        let key = set.split('=').next().unwrap_or_default().trim();
        field == key || field.starts_with(&format!("{key}."))
    };
    Failure::Usage(match &args.device {
        Some(_) if field == "device" => format!("--device: {error}"),
        _ if args.set.iter().any(is_set) => format!("--set {error}"),
        _ => format!("{}: {error}", args.config.display()),
    })
}

/// What is about to happen.
fn plan(config: &TrainConfig, out: &Out) -> Result<(), Failure> {
    out.note(&format!("model    {}", config.model.path));
    let method = match (&config.adapter, config.init_from()?) {
        (None, _) => "none: every parameter of the model is trained".to_owned(),
        (Some(fields), from) => {
            let started = from.map_or(String::new(), |folder| format!(", starting from {folder}"));
            // Without a type of its own the adapter is that of the folder it starts from.
            let title = match fields.contains_key("peft_type") {
                true => {
                    entry_for(&Value::Object(fields.clone()))
                        .map_err(|e| Failure::Usage(format!("[adapter] {e}")))?
                        .title
                }
                false => "as saved",
            };
            format!("{title}{started}")
        }
    };
    out.note(&format!("adapter  {method}"));
    let data = &config.data;
    let held_out = match (&data.eval, data.eval_split) {
        (Some(files), _) => format!(", evaluated on {files}"),
        (None, Some(rows)) if rows >= 1.0 => format!(", {} of it held out", counted(rows, "row")),
        (None, Some(share)) => format!(", {} % of it held out", 100.0 * share),
        (None, None) => String::new(),
    };
    out.note(&format!("data     {}{held_out}", data.train));
    let t = &config.train;
    let length = t
        .steps
        .map_or_else(|| counted(t.epochs, "epoch"), |n| counted(n as f64, "step"));
    let accumulated = match t.gradient_accumulation {
        1 => String::new(),
        times => format!(" x {times}"),
    };
    out.note(&format!(
        "train    {length}, batch {}{accumulated}, learning rate {}, seed {}",
        t.batch_size, t.learning_rate, t.seed
    ));
    out.note(&format!("output   {}", config.output.dir.display()));
    Ok(())
}

fn summary_json(summary: &Summary) -> Value {
    json!({
        "output": summary.output, "steps": summary.steps, "trainable": summary.trainable,
        "first_loss": summary.first_loss, "last_loss": summary.last_loss,
        "eval_before": summary.eval_before.as_ref().map(to_json),
        "eval_after": summary.eval_after.as_ref().map(to_json),
        "elapsed_s": summary.elapsed_s,
    })
}

fn report(config: &TrainConfig, summary: &Summary, out: &Out) -> Result<(), Failure> {
    let loss = match (summary.first_loss, summary.last_loss) {
        (Some(first), Some(last)) => format!(", loss {first:.4} -> {last:.4}"),
        _ => String::new(),
    };
    out.note(&format!(
        "{} in {}{loss}",
        counted(summary.steps as f64, "step"),
        seconds(summary.elapsed_s)
    ));
    if let Some(after) = &summary.eval_after {
        let before = summary
            .eval_before
            .as_ref()
            .map(metrics)
            .unwrap_or_default();
        let mut rows = vec![row(["held out", "before", "after"])];
        for (name, value) in metrics(after) {
            let old = before
                .iter()
                .find(|(n, _)| *n == name)
                .map_or(String::new(), |(_, v)| format!("{v:.4}"));
            rows.push(vec![name.to_owned(), old, format!("{value:.4}")]);
        }
        out.table(&rows)?;
    }
    next_commands(config, summary, out);
    Ok(())
}

/// What one does with the result, ready to be pasted.
fn next_commands(config: &TrainConfig, summary: &Summary, out: &Out) {
    let folder = shell_word(&summary.output.display().to_string());
    let adapter = config.adapter.is_some();
    let subject = match adapter {
        true => format!(
            "--model {} --adapter {folder}",
            shell_word(&config.model.path)
        ),
        false => format!("--model {folder}"),
    };
    out.note(&format!("results are in {}", summary.output.display()));
    out.note("next:");
    let peft = program();
    let evaluated = config.data.eval.iter().flat_map(|files| files.0.iter());
    for (task, data) in evaluated.clone().enumerate() {
        // As in training, each file of several is a task of its own.
        let task = if evaluated.clone().count() > 1 {
            format!(" --task {task}")
        } else {
            String::new()
        };
        out.note(&format!(
            "  {peft} eval {subject} --data {}{task}",
            shell_word(&data.display().to_string())
        ));
    }
    if !summary.classifier {
        let (prompt, raw) = example_prompt(config);
        let raw = if raw { " --raw" } else { "" };
        out.note(&format!(
            "  {peft} generate {subject}{raw} --prompt {}",
            shell_word(&prompt)
        ));
    }
    if mergeable(config) {
        out.note(&format!(
            "  {peft} merge {subject} --output {}",
            shell_word(&format!("{}-merged", summary.output.display()))
        ));
    }
}

/// Whether there is an adapter that a merge can dissolve.
fn mergeable(config: &TrainConfig) -> bool {
    let Some(adapter) = &config.adapter else {
        return false;
    };
    let kind = adapter.get("peft_type").and_then(|kind| kind.as_str());
    // An adapter that was started from another says nothing of its kind: then the merge itself will tell.
    kind.is_none_or(|kind| {
        peft::methods()
            .iter()
            .any(|m| m.peft_type.eq_ignore_ascii_case(kind) && m.mergeable)
    })
}

/// Something to go on from, the data's own where it is short text, and whether it stands without a chat template.
fn example_prompt(config: &TrainConfig) -> (String, bool) {
    let files = config.data.eval.as_ref().unwrap_or(&config.data.train);
    let rows = RawData::read_all(files, config.data.format)
        .map(|raw| raw.rows)
        .unwrap_or_default();
    let shown = |text: &str| text.len() <= 200 && !text.contains('\r');
    let found = rows.into_iter().find_map(|row| match row.kind {
        RowKind::Completion { prompt, .. } if shown(&prompt) => Some((prompt, true)),
        RowKind::Messages(messages) => {
            let said = messages.iter().find(|m| m["role"] == "user")?["content"].as_str()?;
            shown(said).then(|| (said.to_owned(), false))
        }
        _ => None,
    });
    found.unwrap_or_else(|| ("Once upon a time".to_owned(), true))
}

/// The bar, and lines for what happens beside it.
struct Watch<'a> {
    out: &'a Out,
    bar: Option<Progress>,
    rows: Option<Progress>,
    /// Steps in all.
    total: u64,
    output: std::path::PathBuf,
}

impl Watch<'_> {
    fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.note(text),
            None => self.out.note(text),
        }
    }
}

impl Observer for Watch<'_> {
    fn start(&mut self, done: u64, total: u64, trainable: usize) {
        self.note(&format!(
            "{} trainable parameters, {}",
            count(trainable),
            counted(total as f64, "step")
        ));
        self.total = total;
        self.bar = Some(Progress::new(self.out, "step", done, total));
    }

    fn step(&mut self, r: &StepReport) {
        let penalty = r
            .penalty
            .map_or(String::new(), |p| format!(", penalty {p:.4}"));
        let message = format!(
            "loss {:.4}{penalty}, {:.0} tokens/s",
            r.loss, r.tokens_per_second
        );
        if let Some(bar) = &mut self.bar {
            bar.set_after(r.step, r.seconds, &message);
        }
    }

    fn eval_progress(&mut self, done: usize, total: usize) {
        let rows = self
            .rows
            .get_or_insert_with(|| Progress::new(self.out, "evaluating", 0, total as u64));
        rows.set(done as u64, "");
    }

    fn eval(&mut self, step: u64, report: &EvalReport) {
        self.rows = None;
        if step == self.total && !self.out.json {
            // The table at the end has it.
            return;
        }
        let numbers: Vec<String> = metrics(report)
            .iter()
            .map(|(name, value)| format!("{name} {value:.4}"))
            .collect();
        self.note(&format!("step {step}: held out {}", numbers.join(", ")));
    }

    fn saved(&mut self, path: &Path) {
        if path != self.output {
            self.note(&format!("saved {}", path.display()));
        }
    }

    fn message(&mut self, text: &str) {
        self.note(&format!("note: {text}"));
    }
}
