//! `cargo xtask`: what keeps the workspace in order and makes its generated parts.

mod ci;
mod compare;
mod docs;
mod goldens;
mod models;
mod new_method;
mod process;
mod quickstart;
mod reviews;
mod source;
mod tidy;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use peft::MethodEntry;

/// The documentation page of a registered method, from the text of its file; for methods outside of the workspace too.
///
/// # Errors
/// If the file's head lacks a heading or the text under it.
pub fn method_page(entry: &MethodEntry, code: &str) -> Result<String> {
    Ok(docs::page(entry, &docs::Head::read(entry.file, code)?))
}

/// Tasks of the peft workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Checks what the compiler does not: who depends on whom, file sizes, who names a method, who touches files.
    Tidy,
    /// Makes docs/methods/ and the README's table of methods from the heads of the method files.
    Docs {
        /// Only says what differs.
        #[arg(long)]
        check: bool,
    },
    /// Writes a new method's file and its mod line.
    NewMethod {
        /// additive, selective, reparam or hybrid
        family: String,
        /// The folder in the family's crate, e.g. low_rank
        subfamily: String,
        /// The file's name, e.g. my_method
        id: String,
    },
    /// Downloads the small models and the review data that the longer tests and the guide use, into models/.
    Models,
    /// Runs every method on the same work and writes docs/comparison.md; goes on where it was interrupted.
    Compare(compare::Options),
    /// Makes tests/goldens/ from the pinned Python packages.
    Goldens {
        /// Passed on to xtask/python/goldens.py.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Makes examples/quickstart/ again: data, tokenizer and base model (needs Python; trains for about ten minutes).
    Quickstart {
        /// Stops before the training.
        #[arg(long)]
        data_only: bool,
    },
    /// Everything that has to pass before a change goes in.
    Ci {
        /// Leaves out `cargo test --workspace`, where it has just run.
        #[arg(long)]
        no_tests: bool,
    },
}

/// Runs the task that the arguments name.
pub fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let root = workspace::root();
    match task {
        Task::Tidy => tidy::run(&root),
        Task::Docs { check } => docs::run(&root, check),
        Task::NewMethod {
            family,
            subfamily,
            id,
        } => new_method::run(&root, &family, &subfamily, &id),
        Task::Models => models::run(&root),
        Task::Compare(options) => compare::run(&root, &options),
        Task::Goldens { args } => goldens::run(&root, &args),
        Task::Quickstart { data_only } => quickstart::run(&root, data_only),
        Task::Ci { no_tests } => ci::run(&root, no_tests),
    }
}
