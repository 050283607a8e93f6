//! The `peft` command: train, evaluate, generate, merge and inspect from the shell.
//!
//! Human text goes to stderr, results and tables to stdout (JSON with `--json`). Exit codes: 0 done, 1 failed,
//! 2 bad usage (arguments, or a configuration file whose own text is wrong).

mod args;
mod config;
mod failure;
mod out;
mod progress;
mod signals;
mod verbs;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Verb};
use failure::Failure;
use out::Out;

/// Runs the command with this process's arguments. A program that links further methods and calls this is the same
/// command with those methods in it.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr(cli.quiet);
    // A panic is a bug of ours, whatever the input was; its place is all a user could report.
    std::panic::set_hook(Box::new(|info| {
        let place = info
            .location()
            .map(|l| format!(" at {}:{}", l.file(), l.line()))
            .unwrap_or_default();
        let text = info
            .payload()
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned());
        let text = text
            .or_else(|| info.payload().downcast_ref::<String>().cloned())
            .unwrap_or_default();
        out::to_stderr(&format!(
            "error: internal error{place}: {text}; this is a bug, please report it"
        ));
    }));
    signals::watch();
    // This thread becomes one of the workers: else each product would be handed over to one and waited for. Where there is
    // a pool already, there is nothing to do.
    let _there_already = rayon::ThreadPoolBuilder::new()
        .use_current_thread()
        .build_global();
    match catch_unwind(AssertUnwindSafe(|| run(cli))) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            if let Some(text) = failure.text() {
                out::to_stderr(&format!("error: {text}"));
            }
            ExitCode::from(failure.code())
        }
        Err(_) => ExitCode::from(1),
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let out = Out::new(cli.json, cli.quiet);
    match cli.verb {
        Verb::Train(args) => verbs::train::run(&args, &out),
        Verb::Eval(args) => verbs::eval::run(&args, &out),
        Verb::Generate(args) => verbs::generate::run(&args, &out),
        Verb::Logits(args) => verbs::logits::run(&args, &out),
        Verb::Merge(args) => verbs::merge::run(&args, &out),
        Verb::Quantize(args) => verbs::quantize::run(&args, &out),
        Verb::Inspect(args) => verbs::inspect::run(&args, &out),
        Verb::Methods(args) => verbs::methods::run(&args, &out),
        Verb::Init(args) => verbs::init::run(&args, &out),
        Verb::Export(args) => verbs::export::run(&args, &out),
        Verb::Devices(args) => verbs::devices::run(&args, &out),
    }
}

/// Warnings of the libraries; `PEFT_LOG` takes a filter such as `debug` or `peft_models=info`.
fn log_to_stderr(quiet: bool) {
    // That a head starts from random values is no news in training, and `ops::open` says where it matters.
    let default = if quiet {
        "error"
    } else {
        "warn,peft_models::source=error"
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("PEFT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .init();
}
