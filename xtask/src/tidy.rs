//! `cargo xtask tidy`: what the compiler does not check.
//!
//! Each rule gives lines of `file:line: what is wrong`; all of them are shown, then the task fails if there are any.

mod code;
mod layers;
mod text;

use std::path::Path;

use anyhow::{Result, bail};
use peft::MethodEntry;

use crate::source::{self, Token};
use crate::workspace;

/// A Rust file, read once for all rules.
struct RustFile {
    path: String,
    lines: usize,
    /// Without the parts under `#[cfg(test)]`.
    tokens: Vec<Token>,
}

impl RustFile {
    fn new(path: &str, code: &str) -> Self {
        let tokens = source::without_tests(&source::tokens(code));
        Self {
            path: path.to_owned(),
            lines: code.lines().count(),
            tokens,
        }
    }

    /// The crate whose shipped code it is: not its tests, benches or examples.
    fn shipped_by(&self) -> Option<&str> {
        let (name, rest) = self.path.strip_prefix("crates/")?.split_once('/')?;
        let is_test = rest.ends_with("/tests.rs") || rest.contains("/tests/");
        (rest.starts_with("src/") && !is_test).then_some(name)
    }
}

/// Checks the workspace.
pub(crate) fn run(root: &Path) -> Result<()> {
    let mut wrong = layers::check(root)?;
    let mut rust = Vec::new();
    for path in workspace::files(root)? {
        // Python's caches and data have no lines to look at.
        let Ok(content) = std::fs::read_to_string(root.join(&path)) else {
            continue;
        };
        wrong.extend(text::check(&path, &content));
        if path.ends_with(".rs") {
            rust.push(RustFile::new(&path, &content));
        }
    }
    let methods: Vec<Named> = workspace::methods()
        .into_iter()
        .map(|entry| Named::new(entry, &rust))
        .collect();
    wrong.extend(rust.iter().flat_map(|file| code::check(file, &methods)));
    if wrong.is_empty() {
        eprintln!(
            "tidy: {} Rust files, {} methods, nothing to say",
            rust.len(),
            methods.len()
        );
        return Ok(());
    }
    for line in &wrong {
        println!("{line}");
    }
    bail!("tidy: {} to put right", wrong.len())
}

/// The names that only a method's own file may say.
struct Named {
    id: String,
    file: String,
    /// Its id, its struct.
    words: Vec<String>,
    /// Its id and its `peft_type`, as whole strings.
    texts: Vec<String>,
}

impl Named {
    fn new(entry: &MethodEntry, rust: &[RustFile]) -> Self {
        let mut words = vec![entry.id.to_owned(), upper_camel(entry.id)];
        let own = rust
            .iter()
            .find(|file| file.path == entry.file.replace('\\', "/"));
        words.extend(own.and_then(registered_type));
        words.dedup();
        // An id that is a keyword cannot be told from the keyword.
        words.retain(|word| word != "union");
        Self {
            id: entry.id.to_owned(),
            file: entry.file.replace('\\', "/"),
            words,
            texts: vec![entry.id.to_owned(), entry.peft_type.to_owned()],
        }
    }
}

/// The type that a file's `register!(` begins with.
fn registered_type(file: &RustFile) -> Option<String> {
    let at = file
        .tokens
        .windows(3)
        .position(|t| t[0].is_word("register") && t[1].is_sign("!") && t[2].is_sign("("))?;
    file.tokens.get(at + 3).map(|token| token.text.clone())
}

/// `prefix_tuning` to `PrefixTuning`.
pub(crate) fn upper_camel(id: &str) -> String {
    let capital = |part: &str| {
        let mut chars = part.chars();
        chars
            .next()
            .map(|c| c.to_ascii_uppercase().to_string() + chars.as_str())
            .unwrap_or_default()
    };
    id.split('_').map(capital).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_become_type_names() {
        assert_eq!(upper_camel("prefix_tuning"), "PrefixTuning");
        assert_eq!(upper_camel("ia3"), "Ia3");
        assert_eq!(upper_camel("a__b"), "AB");
    }

    #[test]
    fn the_registered_type_is_found() {
        let file = RustFile::new(
            "x.rs",
            "use peft_core::register;\nregister!(\n    BitFit, id = \"bitfit\");",
        );
        assert_eq!(registered_type(&file).as_deref(), Some("BitFit"));
        assert_eq!(registered_type(&RustFile::new("x.rs", "fn f() {}")), None);
    }

    #[test]
    fn tests_are_not_shipped() {
        let shipped = |path: &str| RustFile::new(path, "").shipped_by().map(str::to_owned);
        assert_eq!(
            shipped("crates/peft-io/src/gguf/read.rs").as_deref(),
            Some("peft-io")
        );
        for path in [
            "crates/peft-io/tests/a.rs",
            "crates/peft-io/src/a/tests.rs",
            "crates/x/src/tests/a.rs",
            "xtask/src/a.rs",
        ] {
            assert_eq!(shipped(path), None, "{path}");
        }
    }
}
