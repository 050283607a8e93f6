//! Rules about any text file: no trailing blanks, a newline at the end, no paths of one machine.

/// Beginnings of paths that exist on one machine only. Put together here, so that this file passes its own rule.
fn machine_paths() -> [String; 6] {
    ["root", "home", "Users", "work", "opt", "tmp"].map(|name| format!("/{name}/"))
}

/// Checks one file's lines.
pub(super) fn check(path: &str, content: &str) -> Vec<String> {
    const TEXT: [&str; 7] = [".rs", ".toml", ".md", ".py", ".yml", ".sh", ".txt"];
    let is_ours = TEXT.iter().any(|end| path.ends_with(end))
        || path.starts_with(".ci/")
        || path == ".gitignore";
    // Goldens are data, and proptest writes its own seeds.
    if !is_ours || path.contains("/goldens/") || path.contains("proptest-regressions") {
        return Vec::new();
    }
    let forbidden = machine_paths();
    let mut wrong = Vec::new();
    for (at, line) in content.lines().enumerate() {
        let mut say = |what: String| wrong.push(format!("{path}:{}: {what}", at + 1));
        if line.ends_with([' ', '\t', '\r']) {
            say("blanks at the end of the line".to_owned());
        }
        for start in &forbidden {
            if stands_alone(line, start) {
                say(format!("a path of one machine ({start}..)"));
            }
        }
    }
    if !content.is_empty() && !content.ends_with('\n') {
        wrong.push(format!("{path}: no newline at the end"));
    }
    wrong
}

/// Whether `start` is the beginning of a path in this line, not a part of one or of an address.
fn stands_alone(line: &str, start: &str) -> bool {
    line.match_indices(start).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "_-.~/:*})$>".contains(c))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_clean() {
        assert!(check("a.rs", "fn f() {}\n\n").is_empty());
        assert_eq!(
            check("a.rs", "a \nb\t\nc\n"),
            [
                "a.rs:1: blanks at the end of the line",
                "a.rs:2: blanks at the end of the line"
            ]
        );
        assert_eq!(check("a.md", "x"), ["a.md: no newline at the end"]);
        assert!(check("tests/goldens/a.txt", "x ").is_empty());
        assert!(check("a.bin", "x ").is_empty());
    }

    #[test]
    fn paths_of_one_machine() {
        let at_home = format!("\"{}me/models\"\n", machine_paths()[1]);
        assert_eq!(check("a.toml", &at_home).len(), 1);
        assert!(
            check(
                "a.toml",
                &format!("https://x.org{}me\n", machine_paths()[1])
            )
            .is_empty()
        );
        assert!(check("a.toml", &format!("${{HOME}}{}me\n", machine_paths()[5])).is_empty());
    }
}
