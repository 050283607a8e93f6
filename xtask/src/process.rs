//! Running other programs with their output shown.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Runs a program in `folder`; an error says what was run.
pub(crate) fn run<S: AsRef<OsStr>>(
    folder: &Path,
    program: impl AsRef<OsStr>,
    args: &[S],
) -> Result<()> {
    let mut line = program.as_ref().to_string_lossy().into_owned();
    for arg in args {
        let _ = write!(line, " {}", arg.as_ref().to_string_lossy());
    }
    eprintln!("$ {line}");
    let status = Command::new(program.as_ref())
        .args(args)
        .current_dir(folder)
        .status()
        .with_context(|| format!("starting {line}"))?;
    ensure!(status.success(), "{line}: {status}");
    Ok(())
}

/// The Python that is there.
pub(crate) fn python() -> Result<&'static str> {
    ["python3", "python"]
        .into_iter()
        .find(|name| {
            Command::new(name)
                .arg("--version")
                .output()
                .is_ok_and(|out| out.status.success())
        })
        .context("this task needs Python 3.10 or newer on the PATH")
}

/// Makes a virtual environment if it is not there, and gives the path of its Python.
pub(crate) fn venv(root: &Path, name: &str) -> Result<std::path::PathBuf> {
    let folder = root.join(name);
    let inside = if cfg!(windows) {
        "Scripts/python.exe"
    } else {
        "bin/python"
    };
    let python_inside = folder.join(inside);
    if !python_inside.exists() {
        run(root, python()?, &["-m", "venv", name])?;
    }
    Ok(python_inside)
}
