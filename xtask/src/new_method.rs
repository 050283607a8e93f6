//! `cargo xtask new-method`: a method's file that compiles and passes, its `mod` line, and what to do next.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::tidy::upper_camel;
use crate::workspace::{self, FAMILIES};

const TEMPLATE: &str = include_str!("new_method.template");

/// Writes `crates/peft-<family>/src/<subfamily>/<id>.rs`.
pub(crate) fn run(root: &Path, family: &str, subfamily: &str, id: &str) -> Result<()> {
    ensure!(
        FAMILIES.contains(&family),
        "the family {family:?} is not one of {}",
        FAMILIES.join(", ")
    );
    for (what, name) in [("subfamily", subfamily), ("id", id)] {
        ensure!(
            is_name(name),
            "the {what} {name:?} has to be lower-case letters, digits and _, a letter first"
        );
    }
    let taken = workspace::methods()
        .into_iter()
        .find(|entry| entry.id == id);
    ensure!(taken.is_none(), "there is a method {id} already");
    let source = format!("crates/peft-{family}/src");
    let file = format!("{source}/{subfamily}/{id}.rs");
    ensure!(!root.join(&file).exists(), "{file} is there already");

    let index = root.join(&source).join(subfamily).join("mod.rs");
    if !index.exists() {
        let title = subfamily.replace('_', " ");
        workspace::write(
            &index,
            &format!("//! Methods of the sub-family {title}.\n\n"),
        )?;
        declare(&root.join(&source).join("lib.rs"), subfamily)?;
    }
    declare(&index, id)?;
    workspace::write(&root.join(&file), &skeleton(family, subfamily, id))?;
    println!("{file}: written, with its mod line. Next:");
    println!(
        "  1. its head: paper, formula, saved keys; `cargo xtask docs` refuses an unfinished one only by heading"
    );
    println!("  2. its fields, `attach` and `weight` (or `forward`), and a test computed by hand");
    println!("  3. cargo test --release -p peft-{family} && cargo test --release -p peft-tests");
    println!("  4. cargo xtask docs && cargo xtask ci");
    Ok(())
}

fn is_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// Adds `pub mod name;` among the others, in order of the alphabet.
fn declare(file: &Path, name: &str) -> Result<()> {
    let text = workspace::read(file)?;
    workspace::write(file, &with_declaration(&text, name))
}

fn with_declaration(text: &str, name: &str) -> String {
    let line = format!("pub mod {name};");
    let mut lines: Vec<&str> = text.lines().collect();
    if lines.contains(&line.as_str()) {
        return text.to_owned();
    }
    let is_mod = |l: &str| l.starts_with("pub mod ") && l.ends_with(';');
    let after = lines.iter().rposition(|l| is_mod(l) && **l < *line);
    let before = lines.iter().position(|l| is_mod(l));
    let at = after.map(|i| i + 1).or(before).unwrap_or_else(|| {
        // Behind the head.
        lines
            .iter()
            .rposition(|l| l.starts_with("//!"))
            .map_or(0, |i| (i + 2).min(lines.len()))
    });
    lines.insert(at, &line);
    lines.join("\n") + "\n"
}

fn skeleton(family: &str, subfamily: &str, id: &str) -> String {
    let registered = match family {
        "reparam" => "Reparameterized".to_owned(),
        other => upper_camel(other),
    };
    TEMPLATE
        .replace("{Type}", &upper_camel(id))
        .replace("{id}", id)
        .replace("{title}", &id.replace('_', " "))
        .replace("{Family}", &registered)
        .replace("{subfamily}", &subfamily.replace('_', " "))
        .replace("{PEFT_TYPE}", &id.to_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mod_lines_stay_in_order() {
        let text = "//! Head.\n\npub mod b;\npub mod d;\n\npub use x;\n";
        for (name, expected) in [
            (
                "a",
                "//! Head.\n\npub mod a;\npub mod b;\npub mod d;\n\npub use x;\n",
            ),
            (
                "c",
                "//! Head.\n\npub mod b;\npub mod c;\npub mod d;\n\npub use x;\n",
            ),
            (
                "e",
                "//! Head.\n\npub mod b;\npub mod d;\npub mod e;\n\npub use x;\n",
            ),
            ("d", text),
        ] {
            assert_eq!(with_declaration(text, name), expected, "{name}");
        }
        assert_eq!(
            with_declaration("//! Head.\n\n", "a"),
            "//! Head.\n\npub mod a;\n"
        );
    }

    #[test]
    fn names_are_checked_and_nothing_is_left_open() {
        assert!(
            is_name("my_method2")
                && !is_name("2x")
                && !is_name("My")
                && !is_name("a-b")
                && !is_name("../a")
        );
        for family in FAMILIES {
            let text = skeleton(family, "low_rank", "my_method");
            assert!(
                text.contains("struct MyMethod") && text.contains("\"MY_METHOD\""),
                "{text}"
            );
            assert!(
                ![
                    "{Type}",
                    "{id}",
                    "{title}",
                    "{Family}",
                    "{subfamily}",
                    "{PEFT_TYPE}"
                ]
                .iter()
                .any(|p| text.contains(p))
            );
        }
    }
}
