//! Rules about Rust code: sizes, forbidden words, who touches files, who names a method.

use super::{Named, RustFile};
use crate::workspace;

const FILE_LINES: usize = 600;
const METHOD_LINES: usize = 400;

/// Checks one file.
pub(super) fn check(file: &RustFile, methods: &[Named]) -> Vec<String> {
    let mut wrong = Vec::new();
    size(file, &mut wrong);
    macros(file, &mut wrong);
    unsafe_code(file, &mut wrong);
    files(file, &mut wrong);
    method_names(file, methods, &mut wrong);
    wrong
}

fn size(file: &RustFile, wrong: &mut Vec<String>) {
    let limit = if workspace::is_method_file(&file.path) {
        METHOD_LINES
    } else {
        FILE_LINES
    };
    if file.lines > limit {
        wrong.push(format!(
            "{}: {} lines, at most {limit}; split it by theme",
            file.path, file.lines
        ));
    }
}

fn macros(file: &RustFile, wrong: &mut Vec<String>) {
    for pair in file.tokens.windows(2) {
        let is_unfinished = ["todo", "unimplemented", "dbg"]
            .iter()
            .any(|word| pair[0].is_word(word));
        if is_unfinished && pair[1].is_sign("!") {
            wrong.push(format!(
                "{}:{}: {}! is left over",
                file.path, pair[0].line, pair[0].text
            ));
        }
    }
}

fn unsafe_code(file: &RustFile, wrong: &mut Vec<String>) {
    // There, experimental features are asked for, and what an earlier process compiled is handed to the driver.
    let driver = ["features", "kept"]
        .map(|name| format!("crates/peft-wgpu/src/{name}.rs"))
        .contains(&file.path);
    if driver || file.path.starts_with("crates/peft-tensor/") {
        return;
    }
    for token in file.tokens.iter().filter(|token| token.is_word("unsafe")) {
        wrong.push(format!(
            "{}:{}: unsafe belongs in peft-tensor's kernels",
            file.path, token.line
        ));
    }
}

/// In shipped code only `peft-io` opens, reads and writes files; `peft-tensor` maps a file that was opened for it.
fn files(file: &RustFile, wrong: &mut Vec<String>) {
    let Some(owner) = file.shipped_by() else {
        return;
    };
    if owner == "peft-io" {
        return;
    }
    let may_hold_file = file.path == "crates/peft-tensor/src/bytes.rs";
    for (at, token) in file.tokens.iter().enumerate() {
        let names_only_file = || {
            let next: Vec<&str> = file.tokens[at + 1..]
                .iter()
                .take(3)
                .map(|t| t.text.as_str())
                .collect();
            next == [":", ":", "File"]
        };
        if token.is_word("fs") && !(may_hold_file && names_only_file()) {
            wrong.push(format!(
                "{}:{}: only peft-io touches files",
                file.path, token.line
            ));
        }
    }
}

/// The registry is the list of methods: nobody else says a method's name.
fn method_names(file: &RustFile, methods: &[Named], wrong: &mut Vec<String>) {
    if file.shipped_by().is_none() {
        return;
    }
    let is_index = file.path.ends_with("/lib.rs") || file.path.ends_with("/mod.rs");
    for (at, token) in file.tokens.iter().enumerate() {
        let named = |names: &[String]| names.contains(&token.text);
        let says = |method: &&Named| match token.kind {
            crate::source::Kind::Word => named(&method.words),
            crate::source::Kind::Text => named(&method.texts),
            crate::source::Kind::Sign => false,
        };
        let Some(method) = methods
            .iter()
            .filter(|method| method.file != file.path)
            .find(says)
        else {
            continue;
        };
        let declares = at > 0 && file.tokens[at - 1].is_word("mod");
        // A file may tell its own struct's name from another method's that is spelled the same.
        let own = methods
            .iter()
            .any(|other| other.file == file.path && (named(&other.words) || named(&other.texts)));
        if !(is_index && declares || own) {
            let what = format!(
                "names the method {} outside {}; ask the registry",
                method.id, method.file
            );
            wrong.push(format!(
                "{}:{}: {:?} {what}",
                file.path, token.line, token.text
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn methods() -> Vec<Named> {
        let named = |id: &str, words: &[&str], peft_type: &str| Named {
            id: id.to_owned(),
            file: format!("crates/peft-reparam/src/low_rank/{id}.rs"),
            words: words.iter().map(|&w| w.to_owned()).collect(),
            texts: vec![id.to_owned(), peft_type.to_owned()],
        };
        vec![
            named("first", &["first", "First"], "FIRST"),
            named("second", &["second", "Second"], "FIRST"),
        ]
    }

    fn wrong(path: &str, code: &str) -> Vec<String> {
        check(&RustFile::new(path, code), &methods())
    }

    #[test]
    fn sizes() {
        let code = "// x\n".repeat(500);
        assert!(wrong("crates/peft-core/src/a.rs", &code).is_empty());
        assert_eq!(wrong("crates/peft-core/src/a.rs", &code.repeat(2)).len(), 1);
        assert_eq!(
            wrong("crates/peft-reparam/src/low_rank/a.rs", &code).len(),
            1
        );
    }

    #[test]
    fn forbidden_words() {
        assert_eq!(
            wrong("crates/peft-core/src/a.rs", "fn f() { todo!() }"),
            ["crates/peft-core/src/a.rs:1: todo! is left over"]
        );
        assert!(
            wrong(
                "crates/peft-core/src/a.rs",
                "// todo!\nfn todo() { \"dbg!\" }"
            )
            .is_empty()
        );
        assert_eq!(
            wrong("crates/peft-core/src/a.rs", "\nunsafe fn f() {}").len(),
            1
        );
        assert!(wrong("crates/peft-tensor/src/cpu/a.rs", "unsafe fn f() {}").is_empty());
    }

    #[test]
    fn files_are_peft_ios() {
        assert_eq!(wrong("crates/peft-train/src/a.rs", "use std::fs;").len(), 1);
        assert_eq!(
            wrong("crates/peft-train/src/a.rs", "use std::{fs::File, io};").len(),
            1
        );
        assert!(wrong("crates/peft-io/src/a.rs", "use std::fs;").is_empty());
        assert!(
            wrong(
                "crates/peft-train/src/a.rs",
                "#[cfg(test)] mod tests { use std::fs; }"
            )
            .is_empty()
        );
        assert!(wrong("crates/peft-train/tests/a.rs", "use std::fs;").is_empty());
        assert!(wrong("crates/peft-tensor/src/bytes.rs", "use std::fs::File;").is_empty());
        assert_eq!(
            wrong("crates/peft-tensor/src/bytes.rs", "std::fs::read(path)").len(),
            1
        );
        assert_eq!(
            wrong("crates/peft-tensor/src/a.rs", "use std::fs::File;").len(),
            1
        );
    }

    #[test]
    fn methods_are_named_at_home_only() {
        let core = "crates/peft-core/src/a.rs";
        for code in [
            "use x::First;",
            "match id { \"first\" => 1 }",
            "first::new()",
            "x == \"FIRST\"",
        ] {
            assert_eq!(wrong(core, code).len(), 1, "{code}");
        }
        for code in [
            "// first",
            "/// First\nfn f() {}",
            "\"the first one\"",
            "first_of()",
            "firsts",
        ] {
            assert!(wrong(core, code).is_empty(), "{code}");
        }
        assert!(
            wrong(
                "crates/peft-reparam/src/low_rank/first.rs",
                "struct First; \"FIRST\"; \"first\""
            )
            .is_empty()
        );
        assert!(
            wrong(
                "crates/peft-reparam/src/low_rank/second.rs",
                "struct Second; \"FIRST\""
            )
            .is_empty()
        );
        assert_eq!(
            wrong(
                "crates/peft-reparam/src/low_rank/second.rs",
                "use super::first::First;"
            )
            .len(),
            2
        );
        assert!(wrong("crates/peft-reparam/src/low_rank/mod.rs", "pub mod first;").is_empty());
        assert_eq!(
            wrong(
                "crates/peft-reparam/src/low_rank/mod.rs",
                "pub use first::First;"
            )
            .len(),
            2
        );
        assert!(wrong("tests/src/laws.rs", "First; \"first\"").is_empty());
    }
}
