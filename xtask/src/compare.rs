//! `cargo xtask compare`: every method on the same work, from real runs of the command, as docs/comparison.md.
//!
//! examples/compare/rows.json says what is run: tasks (a run configuration each) and rows (what each method changes in
//! it). A run whose configuration has not changed since its result was written is not run again, so an interrupted
//! comparison goes on where it was.

mod table;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{process, workspace};

const ROWS: &str = "examples/compare/rows.json";
const WORK: &str = "out/compare";
const PAGE: &str = "docs/comparison.md";

/// What to run, and how.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Runs at the same time, each with its share of the processor's threads
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// Only these rows, by name, separated by commas
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only this task
    #[arg(long)]
    task: Option<String>,
    /// Makes the page from the results there are, without running anything
    #[arg(long)]
    page: bool,
}

/// One run to be made.
struct Job {
    task: String,
    row: String,
    config: Value,
    folder: PathBuf,
}

/// Runs what is missing and writes the page.
pub(crate) fn run(root: &Path, options: &Options) -> Result<()> {
    let plan: Value = serde_json::from_str(&workspace::read(&root.join(ROWS))?).context(ROWS)?;
    let jobs = jobs(root, &plan)?;
    if !options.page {
        crate::models::run(root)?;
        process::run(
            root,
            env!("CARGO"),
            &["build", "--release", "-p", "peft-cli"],
        )?;
        let wanted = |job: &&Job| {
            (options.only.is_empty() || options.only.contains(&job.row))
                && options.task.as_ref().is_none_or(|task| *task == job.task)
        };
        for task in plan["tasks"].as_object().into_iter().flatten() {
            shorten(root, task.1)?;
        }
        let missing: VecDeque<&Job> = jobs
            .iter()
            .filter(wanted)
            .filter(|job| result(job).is_none())
            .collect();
        work(root, missing, options.jobs.max(1))?;
    }
    let mut results = BTreeMap::new();
    for job in &jobs {
        if let Some(result) = result(job) {
            results.insert((job.row.clone(), job.task.clone()), result);
        }
    }
    let page = table::page(&plan, &results, &workspace::methods())?;
    workspace::write(&root.join(PAGE), &page)?;
    println!("{PAGE}: {} of {} runs", results.len(), jobs.len());
    Ok(())
}

/// Every run of the plan, its configuration put together.
fn jobs(root: &Path, plan: &Value) -> Result<Vec<Job>> {
    let tasks = plan["tasks"].as_object().context("rows.json: no tasks")?;
    let rows = plan["rows"].as_array().context("rows.json: no rows")?;
    let mut jobs = Vec::new();
    for (task, about) in tasks {
        for row in rows {
            let name = row["name"]
                .as_str()
                .context("rows.json: a row without a name")?;
            let Some(own) = row.get(task) else { continue };
            ensure!(own.is_object(), "rows.json: {name}: {task} is no table");
            let folder = root.join(WORK).join(task).join(name);
            let mut config = about["config"].clone();
            lay_over(&mut config, own);
            config["output"] =
                json!({"dir": format!("{WORK}/{task}/{name}/run"), "overwrite": true});
            jobs.push(Job {
                task: task.clone(),
                row: name.to_owned(),
                config,
                folder,
            });
        }
    }
    Ok(jobs)
}

/// Puts the fields of `over` into `config`; tables are joined, other than the adapter's.
fn lay_over(config: &mut Value, over: &Value) {
    for (key, value) in over.as_object().into_iter().flatten() {
        if config[key].is_object() && value.is_object() && key != "adapter" {
            lay_over(&mut config[key], value);
        } else {
            config[key] = value.clone();
        }
    }
}

/// The result of a run that was made with this very configuration.
fn result(job: &Job) -> Option<Value> {
    let text = fs::read_to_string(job.folder.join("result.json")).ok()?;
    let result: Value = serde_json::from_str(&text).ok()?;
    (result["config"] == job.config).then_some(result)
}

/// The first rows of an evaluation file, as the task asks for them.
fn shorten(root: &Path, task: &Value) -> Result<()> {
    let (Some(from), Some(rows), Some(to)) = (
        task["eval_from"].as_str(),
        task["eval_rows"].as_u64(),
        task["config"]["data"]["eval"].as_str(),
    ) else {
        bail!("rows.json: a task needs eval_from, eval_rows and data.eval");
    };
    let text = workspace::read(&root.join(from))?;
    let short: Vec<&str> = text.lines().take(rows as usize).collect();
    workspace::write(&root.join(to), &format!("{}\n", short.join("\n")))
}

/// Works the queue off, `side_by_side` runs at a time.
fn work(root: &Path, queue: VecDeque<&Job>, side_by_side: usize) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (total, queue) = (queue.len(), Mutex::new(queue));
    let next = || queue.lock().map_or(None, |mut queue| queue.pop_front());
    std::thread::scope(|scope| {
        for _ in 0..side_by_side {
            scope.spawn(|| {
                while let Some(job) = next() {
                    let left = queue.lock().map_or(0, |queue| queue.len());
                    eprintln!("[{}/{total}] {} {}", total - left, job.task, job.row);
                    if let Err(error) = one(root, job, (threads / side_by_side).max(1)) {
                        eprintln!("{} {}: {error:#}", job.task, job.row);
                    }
                }
            });
        }
    });
    Ok(())
}

/// One run of the command, measured.
fn one(root: &Path, job: &Job, threads: usize) -> Result<()> {
    fs::create_dir_all(&job.folder)?;
    let config = job.folder.join("run.json");
    workspace::write(&config, &format!("{:#}\n", job.config))?;
    let command = root.join("target/release/peft");
    let mut child = Command::new(&command)
        .args(["train", "--quiet", "--json"])
        .arg(&config)
        .current_dir(root)
        .env("RAYON_NUM_THREADS", threads.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", command.display()))?;
    let (use_of, status) = watch(&mut child)?;
    let (mut out, mut err) = (String::new(), String::new());
    if let (Some(stdout), Some(stderr)) = (&mut child.stdout, &mut child.stderr) {
        stdout.read_to_string(&mut out)?;
        stderr.read_to_string(&mut err)?;
    }
    ensure!(status.success(), "{}", err.trim());
    let summary: Value = serde_json::from_str(&out).context("the command's result")?;
    let log = workspace::read(
        &root
            .join(WORK)
            .join(&job.task)
            .join(&job.row)
            .join("run/metrics.jsonl"),
    )?;
    let steps: Vec<Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(|line: &Value| line["loss"].is_number())
        .collect();
    let last = steps.last().context("the run has no steps")?;
    let result = json!({
        "config": job.config,
        "summary": summary,
        "steps": steps.len(),
        "epoch": last["epoch"],
        "elapsed_s": last["elapsed_s"],
        "peak_bytes": use_of.peak_bytes,
        "cpu_s": use_of.cpu_s,
        "threads": threads,
    });
    workspace::write(&job.folder.join("result.json"), &format!("{result:#}\n"))
}

/// What a process used, where the system tells it.
#[derive(Default)]
struct Use {
    /// Largest resident size.
    peak_bytes: Option<u64>,
    /// Processor time of all threads, which other processes do not stretch.
    cpu_s: Option<f64>,
}

/// Waits for a process and gives what it used.
fn watch(child: &mut Child) -> Result<(Use, std::process::ExitStatus)> {
    let (status, stat) = (
        format!("/proc/{}/status", child.id()),
        format!("/proc/{}/stat", child.id()),
    );
    let mut used = Use::default();
    loop {
        let high = fs::read_to_string(&status).ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        used.peak_bytes = used.peak_bytes.max(high.map(|kib| kib * 1024));
        let cpu = fs::read_to_string(&stat).ok().and_then(|text| {
            // utime and stime, in ticks of 10 ms, are the 12th and 13th fields behind the name in brackets.
            let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
            let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
            Some((ticks(11)? + ticks(12)?) / 100.0)
        });
        if cpu > used.cpu_s {
            used.cpu_s = cpu;
        }
        if let Some(done) = child.try_wait()? {
            return Ok((used, done));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
