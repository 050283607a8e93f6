//! What is printed, where, and how numbers read.

use std::io::{ErrorKind, Write};

use peft::Error;
use serde_json::Value;

use crate::failure::Failure;

/// How to talk to the user.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    /// Results as JSON.
    pub(crate) json: bool,
    /// Nothing on stderr but errors.
    pub(crate) quiet: bool,
}

impl Out {
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// A line for people, on stderr.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            to_stderr(text);
        }
    }

    /// A result as JSON, on stdout.
    pub(crate) fn value(&self, value: &Value) -> Result<(), Failure> {
        self.text(&format!("{value:#}\n"))
    }

    /// Text on stdout, as it is.
    pub(crate) fn text(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = std::io::stdout().lock();
        match stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
        {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(Failure::Closed),
            Err(e) => Err(Error::other(format!("cannot write to stdout: {e}")).into()),
        }
    }

    /// A table on stdout: the first row is its head, columns of numbers stand at the right, columns of nothing are left
    /// out.
    pub(crate) fn table(&self, rows: &[Vec<String>]) -> Result<(), Failure> {
        self.text(&table(rows))
    }

    /// The same for a wide table: on a terminal that is too narrow for it, the columns of these names are left out one by
    /// one.
    pub(crate) fn wide_table(&self, rows: &[Vec<String>], spare: &[&str]) -> Result<(), Failure> {
        let width = terminal_size::terminal_size_of(std::io::stdout());
        let width = width.map_or(usize::MAX, |(width, _)| width.0.into());
        let (rows, left_out) = narrowed(rows, spare, width);
        self.table(&rows)?;
        if !left_out.is_empty() {
            self.note(&format!(
                "note: no room for {}; --json has all",
                left_out.join(", ")
            ));
        }
        Ok(())
    }
}

/// A line on stderr; a closed stderr is nobody's loss.
pub(crate) fn to_stderr(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Rows without as many of the spare columns as it takes to fit a width, and the names of those.
fn narrowed(rows: &[Vec<String>], spare: &[&str], width: usize) -> (Vec<Vec<String>>, Vec<String>) {
    let (mut rows, mut left_out) = (rows.to_vec(), Vec::new());
    for name in spare {
        let fits = |line: &str| line.chars().count() <= width;
        if table(&rows).lines().all(fits) {
            break;
        }
        let at = rows
            .first()
            .and_then(|head| head.iter().position(|h| h == name));
        if let Some(at) = at {
            rows.iter_mut()
                .filter(|row| at < row.len())
                .for_each(|row| {
                    row.remove(at);
                });
            left_out.push((*name).to_owned());
        }
    }
    (rows, left_out)
}

/// Whether a cell is a number, perhaps with a unit.
fn is_number(text: &str) -> bool {
    let units = ["B", "KB", "MB", "GB", "TB", "s", "%"];
    let digits = match text.split_once(' ') {
        Some((digits, unit)) if units.contains(&unit) => digits,
        _ => text,
    };
    let part = |ch: char| ch.is_ascii_digit() || ",.%-".contains(ch);
    !digits.is_empty() && digits.chars().all(part)
}

fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &'_ Vec<String>, c: usize| row.get(c).cloned().unwrap_or_default();
    let width = |c: usize| {
        rows.iter()
            .map(|row| cell(row, c).chars().count())
            .max()
            .unwrap_or(0)
    };
    let shape: Vec<(usize, usize, bool)> = (0..columns)
        .filter_map(|c| {
            let body: Vec<String> = rows
                .iter()
                .skip(1)
                .map(|row| cell(row, c))
                .filter(|t| !t.is_empty())
                .collect();
            let used = !body.is_empty() || rows.len() == 1;
            used.then(|| (c, width(c), body.iter().all(|t| is_number(t))))
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for &(c, width, right) in &shape {
            let cell = cell(row, c);
            let pad = " ".repeat(width - cell.chars().count());
            line.push_str(&if right {
                format!("{pad}{cell}")
            } else {
                format!("{cell}{pad}")
            });
            line.push_str("  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `1,234,567`
pub(crate) fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `538.1 MB`
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KB", "MB", "GB", "TB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{n} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// `1h 02m`, `3m 20s`, `4.2 s`, `28 ms`
pub(crate) fn seconds(s: f64) -> String {
    let whole = s.max(0.0) as u64;
    match whole {
        0 if s < 0.1 => format!("{:.0} ms", s.max(0.0) * 1e3),
        0..60 => format!("{s:.1} s"),
        60..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        _ => format!("{}h {:02}m", whole / 3600, whole / 60 % 60),
    }
}

/// `1 step`, `2 steps`
pub(crate) fn counted(n: f64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1.0 { "" } else { "s" })
}

/// As this program was called: `peft`, or target/release/peft from `cargo run`.
pub(crate) fn program() -> String {
    shell_word(&std::env::args().next().unwrap_or_else(|| "peft".to_owned()))
}

/// A word of a shell command, quoted where it has to be.
pub(crate) fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./@:=+-,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [999, 1000, 538_061_000].map(bytes),
            ["999 B", "1.0 KB", "538.1 MB"]
        );
        assert_eq!(
            [0.028, 0.1, 4.25, 200.0, 3720.0].map(seconds),
            ["28 ms", "0.1 s", "4.2 s", "3m 20s", "1h 02m"]
        );
    }

    #[test]
    fn a_wide_table_gives_up_columns_only_as_far_as_it_has_to() {
        let rows = [vec!["id", "title", "paper"], vec!["lora", "LoRA", "1234"]];
        let rows = rows.map(|r| r.into_iter().map(str::to_owned).collect::<Vec<_>>());
        let spare = ["paper", "title", "nobody"];
        for (width, left) in [(18, 3), (17, 2), (11, 2), (10, 1), (1, 1)] {
            let (narrow, left_out) = narrowed(&rows, &spare, width);
            assert_eq!(narrow[1], rows[1][..left], "{width}");
            assert_eq!(left_out, spare[..3 - left], "{width}");
        }
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell_word("a/b-c.gguf"), "a/b-c.gguf");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }

    #[test]
    fn tables_align_and_numbers_stand_right() {
        let rows = [vec!["name", "n"], vec!["é", "1,000"], vec!["long", "7"]];
        let rows = rows.map(|r| r.into_iter().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(table(&rows), "name      n\né     1,000\nlong      7\n");
        let rows = [
            vec!["memory", "note", ""],
            vec!["base", "", "2.6 MB"],
            vec!["all", "", "446.5 KB"],
        ];
        let rows = rows.map(|r| r.into_iter().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(table(&rows), "memory\nbase      2.6 MB\nall     446.5 KB\n");
    }
}
