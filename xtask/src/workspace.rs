//! Where things are: the workspace's root, its files, its registered methods.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use peft::MethodEntry;

/// The workspace's root: above the manifest that `cargo run` runs, or that this was built from.
pub(crate) fn root() -> PathBuf {
    let here =
        std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let here = PathBuf::from(here);
    here.parent().map(Path::to_path_buf).unwrap_or(here)
}

/// Files that git holds or would hold, relative to the root, sorted, with `/` between parts.
pub(crate) fn files(root: &Path) -> Result<Vec<String>> {
    let listed = Command::new("git")
        .args([
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "-z",
        ])
        .current_dir(root)
        .output()
        .context("running git ls-files")?;
    ensure!(
        listed.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&listed.stderr)
    );
    let mut files: Vec<String> = String::from_utf8_lossy(&listed.stdout)
        .split('\0')
        .filter(|name| !name.is_empty() && root.join(name).is_file())
        .map(str::to_owned)
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// A text file's content, with the path in the error.
pub(crate) fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

/// Writes a file, making its folder.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// Every registered method, by id.
pub(crate) fn methods() -> Vec<&'static MethodEntry> {
    peft::methods()
}

/// Whether a file has to be a registered method: it lies in a sub-family's folder of a family's crate.
pub(crate) fn is_method_file(file: &str) -> bool {
    let Some(rest) = FAMILIES
        .iter()
        .find_map(|family| file.strip_prefix(&format!("crates/peft-{family}/src/")))
    else {
        return false;
    };
    rest.contains('/') && rest.ends_with(".rs") && !rest.ends_with("/mod.rs")
}

/// The families' crates, without `peft-`.
pub(crate) const FAMILIES: [&str; 4] = ["additive", "selective", "reparam", "hybrid"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn method_files_are_those_in_subfamily_folders() {
        for yes in [
            "crates/peft-reparam/src/low_rank/x.rs",
            "crates/peft-hybrid/src/a/b/c.rs",
        ] {
            assert!(is_method_file(yes), "{yes}");
        }
        for no in [
            "crates/peft-reparam/src/lib.rs",
            "crates/peft-reparam/src/init.rs",
            "crates/peft-reparam/src/low_rank/mod.rs",
            "crates/peft-core/src/matcher/pattern.rs",
            "crates/peft-reparam/tests/low_rank/x.rs",
            "crates/peft-reparam/src/low_rank/notes.md",
        ] {
            assert!(!is_method_file(no), "{no}");
        }
    }

    #[test]
    fn git_lists_this_file() {
        assert!(
            files(&root())
                .unwrap()
                .contains(&"xtask/src/workspace.rs".to_owned())
        );
    }
}
