//! `cargo xtask ci`: everything that has to pass before a change goes in, with seconds for each step.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::{docs, process, tidy};

type Action = Box<dyn FnOnce(&Path) -> Result<Outcome>>;

enum Outcome {
    Passed,
    Skipped(&'static str),
}

/// Runs every step, the later ones too when one fails.
pub(crate) fn run(root: &Path, no_tests: bool) -> Result<()> {
    let mut steps: Vec<(&str, Action)> = vec![
        ("format", cargo(&["fmt", "--all", "--check"])),
        (
            "docs",
            Box::new(|root| docs::run(root, true).map(|()| Outcome::Passed)),
        ),
        (
            "tidy",
            Box::new(|root| tidy::run(root).map(|()| Outcome::Passed)),
        ),
        (
            "clippy",
            cargo(&[
                "clippy",
                "--release",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]),
        ),
    ];
    if !no_tests {
        steps.push(("tests", cargo(&["test", "--release", "--workspace"])));
    }
    steps.push(("lapack", Box::new(lapack)));
    steps.push(("custom method", Box::new(custom_method)));

    let mut failed = Vec::new();
    let mut lines = Vec::new();
    for (name, step) in steps {
        eprintln!("== {name}");
        let start = Instant::now();
        let outcome = step(root);
        let seconds = start.elapsed().as_secs_f64();
        lines.push(match outcome {
            Ok(Outcome::Passed) => format!("{name:<14} {seconds:8.1} s  passed"),
            Ok(Outcome::Skipped(why)) => format!("{name:<14} {seconds:8.1} s  skipped: {why}"),
            Err(error) => {
                failed.push(name);
                format!("{name:<14} {seconds:8.1} s  FAILED: {error:#}")
            }
        });
    }
    println!("{}", lines.join("\n"));
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("failed: {}", failed.join(", "))
    }
}

/// A step that is one cargo command. Documentation tests are part of `cargo test`.
fn cargo(args: &'static [&'static str]) -> Action {
    Box::new(|root| process::run(root, "cargo", args).map(|()| Outcome::Passed))
}

/// The decompositions by LAPACK, under the same property tests as the default ones.
fn lapack(root: &Path) -> Result<Outcome> {
    if !has_openblas() {
        bail!(
            "this step needs OpenBLAS: apt-get install libopenblas-dev, or your system's package of it"
        );
    }
    process::run(
        root,
        "cargo",
        &[
            "test",
            "--release",
            "-p",
            "peft-tensor",
            "--features",
            "lapack",
            "--test",
            "linalg",
        ],
    )?;
    Ok(Outcome::Passed)
}

/// Whether the C compiler's linker finds the library.
fn has_openblas() -> bool {
    let probe = std::process::Command::new("cc")
        .args(["-print-file-name=libopenblas.so"])
        .output();
    // A library that is not found is answered with its bare name.
    probe.is_ok_and(|out| String::from_utf8_lossy(&out.stdout).contains('/'))
}

/// A method outside the workspace that depends on `peft-core` alone.
fn custom_method(root: &Path) -> Result<Outcome> {
    let folder = root.join("examples/custom-method");
    if !folder.join("Cargo.toml").is_file() {
        return Ok(Outcome::Skipped("examples/custom-method is not there"));
    }
    // The workspace's target folder: its dependencies are built there already.
    let target = root.join("target").display().to_string();
    process::run(
        &folder,
        "cargo",
        &["test", "--release", "--target-dir", &target],
    )?;
    Ok(Outcome::Passed)
}
