//! `cargo xtask goldens`: the interop goldens, made anew from the pinned Python packages.

use std::path::Path;

use anyhow::Result;

use crate::process;

const VENV: &str = ".venv-goldens";

/// Makes the environment if it is not there or not up to date, then runs the script with `args`.
pub(crate) fn run(root: &Path, args: &[String]) -> Result<()> {
    let python = process::venv(root, VENV)?;
    let requirements = "xtask/python/requirements.txt";
    let wanted = std::fs::read_to_string(root.join(requirements))?;
    let stamp = root.join(VENV).join("installed.txt");
    if std::fs::read_to_string(&stamp).ok().as_ref() != Some(&wanted) {
        process::run(
            root,
            &python,
            &["-m", "pip", "install", "--quiet", "-r", requirements],
        )?;
        std::fs::write(&stamp, wanted)?;
    }
    let script = ["xtask/python/goldens.py".to_owned()];
    process::run(root, &python, &[&script[..], args].concat())
}
