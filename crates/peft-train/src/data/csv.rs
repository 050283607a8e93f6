//! Rows as comma-separated values under a line of column names.

use std::path::Path;

use peft_core::{Error, Result};

use super::jsonl::{completion_row, text_row};
use super::raw::{RawLabel, RawRow};
use crate::io;

const COLUMNS: &str =
    "a CSV file has columns `text`, or `prompt` and `completion`, or `text` and `label`";

pub(super) fn read(path: &Path) -> Result<Vec<RawRow>> {
    let text = peft_io::read_text(path).map_err(io)?;
    let mut reader = csv::ReaderBuilder::new().from_reader(text.as_bytes());
    let header = reader.headers().map_err(|e| bad(path, &e))?.clone();
    let column = |name: &str| header.iter().position(|h| h.trim() == name);
    let (text, label) = (column("text"), column("label"));
    let (prompt, completion) = (column("prompt"), column("completion"));
    let task = column("task");
    let pair = match (prompt, completion) {
        (Some(prompt), Some(completion)) => Some((prompt, completion)),
        (Some(_), None) => {
            return Err(Error::data(
                path,
                1,
                "has the column `prompt` but not `completion`",
            ));
        }
        (None, Some(_)) => {
            return Err(Error::data(
                path,
                1,
                "has the column `completion` but not `prompt`",
            ));
        }
        (None, None) => None,
    };
    if pair.is_none() && text.is_none() {
        let names: Vec<&str> = header.iter().take(10).collect();
        return Err(Error::data(
            path,
            1,
            format!("has only the columns {}; {COLUMNS}", names.join(", ")),
        ));
    }
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.map_err(|e| bad(path, &e))?;
        let line = record.position().map_or(0, |p| p.line() as usize);
        let cell = |i: usize| record.get(i).unwrap_or_default().to_owned();
        let kind = match (pair, text) {
            (Some((prompt, completion)), _) => completion_row(cell(prompt), cell(completion)),
            (None, Some(text)) => match label.map(|i| class(&cell(i))).transpose() {
                Ok(label) => text_row(cell(text), label),
                Err(detail) => Err(detail),
            },
            (None, None) => Err(COLUMNS.to_owned()),
        };
        rows.push(RawRow {
            line,
            file: 0,
            task: task.and_then(|i| cell(i).trim().parse().ok()),
            kind: kind.map_err(|detail| Error::data(path, line, detail))?,
        });
    }
    Ok(rows)
}

fn class(cell: &str) -> std::result::Result<RawLabel, String> {
    let cell = cell.trim();
    if cell.is_empty() {
        return Err("`label` is empty".to_owned());
    }
    Ok(match cell.parse::<u16>() {
        Ok(index) => RawLabel::Index(usize::from(index)),
        Err(_) => RawLabel::Name(cell.to_owned()),
    })
}

fn bad(path: &Path, error: &csv::Error) -> Error {
    let line = error.position().map_or(1, |p| p.line() as usize);
    let detail = match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => {
            format!(
                "has {len} columns, the header has {expected_len}; is a quote or a comma amiss?"
            )
        }
        _ => format!("is not CSV: {error}"),
    };
    Error::data(path, line, detail)
}
