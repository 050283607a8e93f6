//! `cargo xtask docs`: docs/methods/ and the README's table, made from what each method says of itself.
//!
//! A method's file opens with a title line, perhaps a paragraph or two, and the headings of [`HEADINGS`], each with a
//! text. Together with the registry's facts that is its page.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, bail};
use peft::MethodEntry;

use crate::workspace::{self, FAMILIES};

/// What every method's head says, in this order.
const HEADINGS: [&str; 6] = [
    "Paper",
    "Formula",
    "Saved keys",
    "Defaults and their source",
    "Differences from HF",
    "Limits",
];
const PAGES: &str = "docs/methods";
const BEGIN: &str = "<!-- methods:begin -->";
const END: &str = "<!-- methods:end -->";
const MADE_BY: &str = "<!-- Made by `cargo xtask docs`; edit the method's file instead. -->";

/// Makes the pages, or says which are out of date.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let methods = workspace::methods();
    let mut wrong = places(&workspace::files(root)?, &methods);
    let mut heads = Vec::new();
    for entry in &methods {
        let file = entry.file.replace('\\', "/");
        match workspace::read(&root.join(&file)).and_then(|code| Head::read(&file, &code)) {
            Ok(head) => heads.push((*entry, head)),
            Err(error) => wrong.push(format!("{error:#}")),
        }
    }
    let mut pages: BTreeMap<String, String> = BTreeMap::new();
    for (entry, head) in &heads {
        pages.insert(format!("{PAGES}/{}.md", entry.id), page(entry, head));
    }
    pages.insert(format!("{PAGES}/README.md"), index(&heads));
    let readme = root.join("README.md");
    if readme.is_file() {
        match between_markers(&workspace::read(&readme)?, &table(&heads, "docs/methods/")) {
            Some(text) => {
                pages.insert("README.md".to_owned(), text);
            }
            None => wrong.push(format!(
                "README.md: has no {BEGIN} .. {END} for the table of methods"
            )),
        }
    }
    let stale: Vec<String> = workspace::files(root)?
        .into_iter()
        .filter(|file| file.starts_with(&format!("{PAGES}/")) && !pages.contains_key(file))
        .collect();
    if !wrong.is_empty() {
        wrong.iter().for_each(|line| println!("{line}"));
        bail!("docs: {} to put right", wrong.len());
    }
    if check {
        compare(root, &pages, &stale)
    } else {
        write(root, &pages, &stale)
    }
}

fn compare(root: &Path, pages: &BTreeMap<String, String>, stale: &[String]) -> Result<()> {
    let is_old = |(path, text): &(&String, &String)| {
        workspace::read(&root.join(path)).ok().as_ref() != Some(text)
    };
    let old: Vec<&String> = pages
        .iter()
        .filter(is_old)
        .map(|(path, _)| path)
        .chain(stale)
        .collect();
    if old.is_empty() {
        eprintln!("docs: {} pages up to date", pages.len());
        return Ok(());
    }
    old.iter().for_each(|path| println!("{path}: out of date"));
    bail!("docs: run `cargo xtask docs`")
}

fn write(root: &Path, pages: &BTreeMap<String, String>, stale: &[String]) -> Result<()> {
    for (path, text) in pages {
        workspace::write(&root.join(path), text)?;
    }
    for path in stale {
        std::fs::remove_file(root.join(path))?;
    }
    eprintln!(
        "docs: {} pages written, {} removed",
        pages.len(),
        stale.len()
    );
    Ok(())
}

/// Every file in a sub-family's folder is a registered method, and the other way round.
fn places(files: &[String], methods: &[&MethodEntry]) -> Vec<String> {
    let registered: Vec<String> = methods
        .iter()
        .map(|entry| entry.file.replace('\\', "/"))
        .collect();
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| workspace::is_method_file(file)) {
        if !registered.contains(file) {
            wrong.push(format!("{file}: registers no method (is its `mod` line there?); shared code goes beside lib.rs"));
        }
    }
    for (entry, file) in methods.iter().zip(&registered) {
        if !workspace::is_method_file(file) {
            wrong.push(format!(
                "{file}: the method {} has to be in a sub-family's folder",
                entry.id
            ));
        }
        let stem = file
            .rsplit('/')
            .next()
            .and_then(|name| name.strip_suffix(".rs"));
        if stem != Some(entry.id) {
            wrong.push(format!(
                "{file}: registers the id {:?}, which has to be the file's name",
                entry.id
            ));
        }
        let home = FAMILIES
            .iter()
            .find(|family| file.starts_with(&format!("crates/peft-{family}/")));
        if home.is_some_and(|home| !entry.family.name().starts_with(home)) {
            wrong.push(format!(
                "{file}: says that its family is {}",
                entry.family.name()
            ));
        }
        if methods.iter().filter(|other| other.id == entry.id).count() > 1 {
            wrong.push(format!("{file}: the id {} is taken", entry.id));
        }
    }
    wrong
}

/// The `//!` head of a method's file.
pub(crate) struct Head {
    /// Its first line.
    summary: String,
    /// What follows before the first heading.
    intro: String,
    /// The texts under [`HEADINGS`].
    sections: Vec<String>,
}

impl Head {
    pub(crate) fn read(file: &str, code: &str) -> Result<Self> {
        let lines: Vec<&str> = code
            .lines()
            .map_while(|line| line.strip_prefix("//!"))
            .map(|line| line.strip_prefix(' ').unwrap_or(line))
            .collect();
        let mut sections: Vec<(&str, Vec<&str>)> = vec![("", Vec::new())];
        let mut in_code = false;
        for line in lines {
            in_code ^= line.starts_with("```");
            match line
                .strip_prefix('#')
                .map(|rest| rest.trim_start_matches('#').trim())
            {
                Some(heading) if !in_code => sections.push((heading, Vec::new())),
                _ => sections
                    .last_mut()
                    .map(|(_, text)| text.push(line))
                    .unwrap_or_default(),
            }
        }
        let names: Vec<&str> = sections[1..].iter().map(|(name, _)| *name).collect();
        if names != HEADINGS {
            let missing: Vec<&str> = HEADINGS
                .into_iter()
                .filter(|h| !names.contains(h))
                .collect();
            let foreign: Vec<&str> = names
                .iter()
                .copied()
                .filter(|n| !HEADINGS.contains(n))
                .collect();
            match (&missing[..], &foreign[..]) {
                ([], []) => bail!(
                    "{file}: its headings have to be, in this order: {}",
                    HEADINGS.join(", ")
                ),
                (missing, []) => bail!("{file}: its head has no {}", missing.join(", no ")),
                (_, foreign) => bail!(
                    "{file}: its head has {}; headings are {}",
                    foreign.join(", "),
                    HEADINGS.join(", ")
                ),
            }
        }
        let mut texts = sections
            .into_iter()
            .map(|(name, text)| (name, text.join("\n").trim().to_owned()));
        let top = texts.next().map(|(_, text)| text).unwrap_or_default();
        let (summary, intro) = top.split_once("\n\n").unwrap_or((&top, ""));
        let (summary, intro) = (summary.replace('\n', " "), intro.trim().to_owned());
        if summary.is_empty() {
            bail!("{file}: has to open with a line `//! Name: what it does.`");
        }
        let mut bodies = Vec::new();
        for (name, text) in texts {
            if text.is_empty() {
                bail!("{file}: says nothing under {name}");
            }
            bodies.push(text);
        }
        Ok(Self {
            summary,
            intro,
            sections: bodies,
        })
    }
}

impl Head {
    /// The summary without the name in front.
    fn does(&self) -> &str {
        self.summary
            .split_once(": ")
            .map_or(&self.summary, |(_, does)| does)
    }
}

fn yes(fact: bool) -> &'static str {
    if fact { "yes" } else { "no" }
}

pub(crate) fn page(entry: &MethodEntry, head: &Head) -> String {
    let mut text = format!(
        "{MADE_BY}\n\n# {}\n\n{}\n",
        entry.title,
        capital(head.does())
    );
    if !head.intro.is_empty() {
        text += &format!("\n{}\n", head.intro);
    }
    let rows = [
        ("id", format!("`{}`", entry.id)),
        (
            "family",
            format!("{}, {}", entry.family.name(), entry.subfamily),
        ),
        ("`peft_type`", format!("`{}`", entry.peft_type)),
        (
            "a fresh adapter changes nothing",
            yes(entry.identity_at_init).to_owned(),
        ),
        ("can be merged", yes(entry.mergeable).to_owned()),
        ("moves base parameters", yes(entry.moves_base).to_owned()),
        (
            "code",
            format!("[{0}](../../{0})", entry.file.replace('\\', "/")),
        ),
    ];
    text += "\n| | |\n|---|---|\n";
    for (name, value) in rows {
        text += &format!("| {name} | {value} |\n");
    }
    for (heading, body) in HEADINGS.iter().zip(&head.sections) {
        text += &format!("\n## {heading}\n\n{body}\n");
    }
    text + &format!(
        "\n## Smallest configuration\n\n```json\n{}\n```\n",
        example(entry)
    )
}

/// The entry's example with its `peft_type`, over several lines.
fn example(entry: &MethodEntry) -> String {
    let mut fields = serde_json::Map::new();
    fields.insert("peft_type".to_owned(), entry.peft_type.into());
    if let Ok(serde_json::Value::Object(given)) = serde_json::from_str(entry.example) {
        fields.extend(given);
    }
    serde_json::to_string_pretty(&fields).unwrap_or_default()
}

fn index(heads: &[(&MethodEntry, Head)]) -> String {
    let mut text =
        format!("{MADE_BY}\n\n# Methods\n\nWhat each does to a frozen model, in a line. ");
    text += "`peft methods` prints the same list.\n";
    let mut families: Vec<_> = heads
        .iter()
        .map(|(entry, _)| (entry.family, entry.subfamily))
        .collect();
    families.sort_unstable();
    families.dedup();
    let mut last = None;
    for (family, subfamily) in families {
        if last != Some(family) {
            text += &format!("\n## {}\n", heading(family.name()));
            last = Some(family);
        }
        text += &format!(
            "\n### {}\n\n| method | does | `peft_type` | merges | paper |\n|---|---|---|---|---|\n",
            heading(subfamily)
        );
        for (entry, head) in heads
            .iter()
            .filter(|(e, _)| (e.family, e.subfamily) == (family, subfamily))
        {
            text += &format!(
                "| [{}]({}.md) | {} | `{}` | {} | {} |\n",
                entry.title,
                entry.id,
                cell(head.does()),
                entry.peft_type,
                yes(entry.mergeable),
                cell(entry.paper)
            );
        }
    }
    text
}

/// The README's table: a line for each sub-family.
fn table(heads: &[(&MethodEntry, Head)], folder: &str) -> String {
    let mut lines: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for (entry, _) in heads {
        let link = format!("[{}]({folder}{}.md)", entry.title, entry.id);
        lines
            .entry((entry.family, entry.subfamily))
            .or_default()
            .push(link);
    }
    let mut text = "| family | | methods |\n|---|---|---|\n".to_owned();
    for ((family, subfamily), links) in lines {
        text += &format!(
            "| {} | {} | {} |\n",
            family.name(),
            subfamily.replace('_', " "),
            links.join(", ")
        );
    }
    text
}

/// `soft_prompts` to `Soft prompts`.
fn heading(name: &str) -> String {
    capital(&name.replace('_', " "))
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars
        .next()
        .map(|c| c.to_uppercase().to_string() + chars.as_str())
        .unwrap_or_default()
}

/// Text that may stand in a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// `text` with what is between the markers replaced; `None` if they are not there.
fn between_markers(text: &str, table: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n\n{table}\n{END}{after}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "//! Name: does this\n//! and that.\n//!\n//! More.\n//!\n//! # Paper\n//! arXiv 1.\n//!\n//! # Formula\n//! ```text\n//! # not a heading\n//! ```\n//!\n//! # Saved keys\n//! k\n//!\n//! # Defaults and their source\n//! d\n//!\n//! # Differences from HF\n//! None.\n//!\n//! # Limits\n//! None known.\n\nuse x;\n//! # Later\n";

    #[test]
    fn a_head_is_read_whole() {
        let head = Head::read("f.rs", HEAD).unwrap();
        assert_eq!(head.summary, "Name: does this and that.");
        assert_eq!(head.does(), "does this and that.");
        assert_eq!(head.intro, "More.");
        assert_eq!(head.sections[0], "arXiv 1.");
        assert_eq!(head.sections[1], "```text\n# not a heading\n```");
        assert_eq!(head.sections[5], "None known.");
    }

    #[test]
    fn a_head_that_lacks_something_is_an_error() {
        for (from, to, said) in [
            ("//! # Limits\n//! None known.\n", "", "no Limits"),
            ("# Paper", "# Papers", "Papers"),
            ("//! arXiv 1.\n", "", "nothing under Paper"),
            ("# Saved keys\n//! k", "# Limits\n//! k", "Saved keys"),
        ] {
            let error = Head::read("f.rs", &HEAD.replace(from, to))
                .err()
                .map(|e| e.to_string())
                .unwrap_or_default();
            assert!(
                error.contains("f.rs") && error.contains(said),
                "{from}: {error}"
            );
        }
        let swapped = HEAD
            .replace("# Paper", "# X")
            .replace("# Formula", "# Paper")
            .replace("# X", "# Formula");
        assert!(Head::read("f.rs", &swapped).is_err());
        assert!(Head::read("f.rs", "use x;").is_err());
    }

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let text = format!("a\n{BEGIN}\nold\n{END}\nb\n");
        let new = between_markers(&text, "new\n").unwrap();
        assert_eq!(new, format!("a\n{BEGIN}\n\nnew\n\n{END}\nb\n"));
        assert_eq!(between_markers(&new, "new\n").unwrap(), new);
        assert_eq!(between_markers("a\n", "new\n"), None);
    }

    #[test]
    fn every_method_is_in_its_place() {
        let (methods, root) = (workspace::methods(), workspace::root());
        let files = workspace::files(&root).unwrap();
        assert_eq!(places(&files, &methods), Vec::<String>::new());
        assert!(!methods.is_empty(), "the facade links no family");
        // One that is not registered is noticed, and so is one that lies elsewhere.
        let more = [
            files,
            vec!["crates/peft-reparam/src/low_rank/nobody.rs".to_owned()],
        ]
        .concat();
        assert_eq!(places(&more, &methods).len(), 1);
    }
}
