//! Nothing falls out of the registry: what lies in the families' folders is registered, and says what it has to.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use peft::core::Family;

/// The headings `xtask docs` reads from a method's file.
const HEADINGS: &[&str] = &[
    "Paper",
    "Formula",
    "Saved keys",
    "Defaults and their source",
    "Differences from HF",
    "Limits",
];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn crate_of(family: Family) -> &'static str {
    match family {
        Family::Additive => "crates/peft-additive",
        Family::Selective => "crates/peft-selective",
        Family::Reparameterized => "crates/peft-reparam",
        Family::Hybrid => "crates/peft-hybrid",
    }
}

const FAMILIES: [Family; 4] = [
    Family::Additive,
    Family::Selective,
    Family::Reparameterized,
    Family::Hybrid,
];

/// Every file in a sub-family's folder but `mod.rs`, relative to the workspace.
fn method_files() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for family in FAMILIES {
        let source = format!("{}/src", crate_of(family));
        for folder in list(&workspace().join(&source))
            .into_iter()
            .filter(|p| p.is_dir())
        {
            for file in list(&folder) {
                let name = file
                    .file_name()
                    .and_then(|n| n.to_str())
                    .expect("a name")
                    .to_owned();
                let parent = folder.file_name().and_then(|n| n.to_str()).expect("a name");
                if name != "mod.rs" && name.ends_with(".rs") {
                    found.insert(format!("{source}/{parent}/{name}"));
                }
            }
        }
    }
    found
}

fn list(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    entries.map(|e| e.expect("an entry").path()).collect()
}

#[test]
fn every_method_file_is_registered() {
    let registered: BTreeSet<String> = peft::methods()
        .iter()
        .map(|m| m.file.replace('\\', "/"))
        .collect();
    assert_eq!(
        registered.len(),
        peft::methods().len(),
        "two methods are registered in one file"
    );
    assert_eq!(
        registered,
        method_files(),
        "registered (left) are not the files in the families' folders (right)"
    );
}

#[test]
fn every_family_is_there() {
    let methods = peft::methods();
    for family in FAMILIES {
        let files: Vec<_> = methods
            .iter()
            .filter(|m| m.family == family)
            .map(|m| m.file)
            .collect();
        assert!(
            !files.is_empty(),
            "no {} method is registered",
            family.name()
        );
        assert!(
            files.iter().all(|f| f.starts_with(crate_of(family))),
            "{} methods elsewhere: {files:?}",
            family.name()
        );
    }
}

/// The facade has one feature for each family, all on by default.
#[test]
fn features() {
    let text =
        std::fs::read_to_string(workspace().join("crates/peft/Cargo.toml")).expect("the manifest");
    let section = text.split("[features]").nth(1).expect("features");
    let default = section
        .lines()
        .find(|l| l.starts_with("default"))
        .expect("a default");
    for feature in ["additive", "selective", "reparam", "hybrid"] {
        assert!(
            section.contains(&format!("\n{feature} = [\"dep:peft-{feature}\"]")),
            "{feature} is no feature:\n{section}"
        );
        assert!(
            default.contains(&format!("\"{feature}\"")),
            "{feature} is not on by default"
        );
    }
}

#[test]
fn ids_are_file_names() {
    let mut seen = BTreeSet::new();
    for method in peft::methods() {
        let snake = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(
            method.id.chars().all(snake),
            "{} is not in snake case",
            method.id
        );
        assert!(seen.insert(method.id), "{} is registered twice", method.id);
        let stem = Path::new(method.file).file_stem().and_then(|s| s.to_str());
        assert_eq!(
            stem,
            Some(method.id),
            "the file of {} has another name",
            method.id
        );
    }
}

#[test]
fn heads_have_every_heading_with_text_below() {
    for method in peft::methods() {
        let text = std::fs::read_to_string(workspace().join(method.file)).expect("the file");
        let head: Vec<&str> = text
            .lines()
            .map_while(|l| l.strip_prefix("//!"))
            .map(str::trim)
            .collect();
        let headings: Vec<&str> = head.iter().filter_map(|l| l.strip_prefix("# ")).collect();
        assert_eq!(headings, HEADINGS, "headings of {}", method.file);
        for heading in HEADINGS {
            let below = head
                .iter()
                .skip_while(|l| l.strip_prefix("# ") != Some(heading))
                .skip(1);
            let text: usize = below
                .take_while(|l| !l.starts_with("# "))
                .map(|l| l.len())
                .sum();
            assert!(text > 0, "{}: nothing under {heading}", method.file);
        }
        assert!(
            head[0].len() > 20 && !head[0].starts_with('#'),
            "{}: the head opens without a summary",
            method.file
        );
        assert!(
            !method.title.is_empty() && !method.paper.is_empty() && !method.subfamily.is_empty(),
            "{}",
            method.id
        );
    }
}
