//! Who may depend on whom, and that every crate takes the workspace's lints.

use std::path::Path;

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, MetadataCommand};

use crate::workspace;

/// What a crate may depend on inside the workspace; `None` for crates the table does not know.
fn allowed(name: &str) -> Option<&'static [&'static str]> {
    const CORE: &[&str] = &["peft-tensor", "peft-core"];
    Some(match name {
        "peft-tensor" => &[],
        "peft-core" | "peft-wgpu" => &["peft-tensor"],
        "peft-additive" | "peft-selective" | "peft-reparam" | "peft-io" => CORE,
        "peft-hybrid" => &[
            "peft-tensor",
            "peft-core",
            "peft-additive",
            "peft-selective",
            "peft-reparam",
        ],
        "peft-models" => &["peft-tensor", "peft-core", "peft-io"],
        "peft-train" => &["peft-tensor", "peft-core", "peft-io", "peft-models"],
        "peft" => &[
            "peft-tensor",
            "peft-core",
            "peft-additive",
            "peft-selective",
            "peft-reparam",
            "peft-hybrid",
            "peft-io",
            "peft-models",
            "peft-train",
            "peft-wgpu",
        ],
        "peft-cli" | "xtask" => &["peft"],
        "peft-tests" => &[
            "peft",
            "peft-tensor",
            "peft-core",
            "peft-additive",
            "peft-selective",
            "peft-reparam",
            "peft-hybrid",
            "peft-io",
            "peft-models",
            "peft-train",
            "peft-wgpu",
        ],
        _ => return None,
    })
}

/// Checks every member's manifest.
pub(super) fn check(root: &Path) -> Result<Vec<String>> {
    let metadata = MetadataCommand::new()
        .manifest_path(root.join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("running cargo metadata")?;
    let members: Vec<&str> = metadata
        .packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let mut wrong = Vec::new();
    for package in &metadata.packages {
        // Tests may bring the methods they run.
        let inside = package
            .dependencies
            .iter()
            .filter(|d| d.kind != DependencyKind::Development)
            .map(|d| d.name.as_str())
            .filter(|name| members.contains(name));
        wrong.extend(judge(package.name.as_str(), inside));
        let manifest = package.manifest_path.as_std_path();
        if !takes_lints(&workspace::read(manifest)?) {
            let shown = manifest
                .strip_prefix(root)
                .unwrap_or(manifest)
                .display()
                .to_string();
            wrong.push(format!(
                "{shown}: has to take the workspace's lints: [lints] workspace = true"
            ));
        }
    }
    Ok(wrong)
}

/// Errors for one crate's dependencies on other members.
fn judge<'a>(name: &str, dependencies: impl Iterator<Item = &'a str>) -> Vec<String> {
    let Some(allowed) = allowed(name) else {
        return vec![format!(
            "{name}: has no place in the order of crates yet; give it one in xtask's tidy/layers.rs"
        )];
    };
    let mut forbidden: Vec<&str> = dependencies
        .filter(|d| *d != name && !allowed.contains(d))
        .collect();
    forbidden.sort_unstable();
    forbidden.dedup();
    forbidden
        .into_iter()
        .map(|dependency| {
            let may = if allowed.is_empty() {
                "no other member".to_owned()
            } else {
                allowed.join(", ")
            };
            format!("{name}: must not depend on {dependency}; it may on {may}")
        })
        .collect()
}

fn takes_lints(manifest: &str) -> bool {
    let section = manifest
        .lines()
        .map(str::trim)
        .skip_while(|line| *line != "[lints]")
        .skip(1);
    section
        .take_while(|line| !line.starts_with('['))
        .any(|line| line.replace(' ', "") == "workspace=true")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_point_one_way() {
        assert!(judge("peft-hybrid", ["peft-core", "peft-reparam"].into_iter()).is_empty());
        assert!(judge("peft-core", ["peft-core", "peft-tensor"].into_iter()).is_empty());
        let wrong = judge(
            "peft-core",
            ["peft-io", "peft-tensor", "peft-io"].into_iter(),
        );
        assert_eq!(wrong.len(), 1);
        assert!(
            wrong[0].contains("peft-core: must not depend on peft-io"),
            "{wrong:?}"
        );
        assert_eq!(
            judge("peft-reparam", ["peft-additive"].into_iter()).len(),
            1
        );
        assert_eq!(judge("peft-cli", ["peft-core"].into_iter()).len(), 1);
        assert_eq!(judge("peft-new", [].into_iter()).len(), 1);
    }

    #[test]
    fn lints_have_to_be_the_workspaces() {
        assert!(takes_lints(
            "[package]\nname = \"a\"\n\n[lints]\nworkspace = true\n\n[dependencies]\n"
        ));
        assert!(!takes_lints(
            "[package]\n\n[lints]\n\n[dependencies]\nworkspace = true\n"
        ));
        assert!(!takes_lints("[package]\nname = \"a\"\n"));
    }
}
