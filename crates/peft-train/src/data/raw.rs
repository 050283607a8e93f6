//! Rows as they stand in a file, typed but not yet tokens.

use std::path::Path;

use peft_core::{Error, Result};
use serde_json::Value;

use super::{csv, jsonl};
use crate::config::{DataFormat, Files};
use crate::io;

/// What a row is of. Where it has the fields of several, the first of these wins: `input_ids`, `messages`,
/// `prompt` with `completion`, `text` with `label`, `text`; other fields are left alone.
#[derive(Clone, Debug, PartialEq)]
pub enum RowKind {
    /// Plain text; every token is learned.
    Text(String),
    /// Text of a class.
    Labelled {
        /// The text.
        text: String,
        /// Its class.
        label: RawLabel,
    },
    /// The completion is learned, the prompt is not.
    Completion {
        /// What comes first.
        prompt: String,
        /// What is to follow.
        completion: String,
    },
    /// A conversation; what the assistant says is learned.
    Messages(Vec<Value>),
    /// Tokens of the user's own making.
    Tokens {
        /// Token ids.
        ids: Vec<u32>,
        /// A label for each token (-100 for none), not shifted; the ids themselves where absent.
        labels: Option<Vec<i64>>,
        /// Which tokens are looked at; all where absent.
        mask: Option<Vec<bool>>,
        /// The class of the row instead of labels for its tokens.
        class: Option<RawLabel>,
    },
}

impl RowKind {
    /// The class the row names, if it does.
    pub fn class(&self) -> Option<&RawLabel> {
        match self {
            Self::Labelled { label, .. } => Some(label),
            Self::Tokens { class, .. } => class.as_ref(),
            _ => None,
        }
    }
}

/// A class as written: by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RawLabel {
    /// Its number, from 0.
    Index(usize),
    /// Its name.
    Name(String),
}

impl std::fmt::Display for RawLabel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Index(index) => write!(f, "{index}"),
            Self::Name(name) => write!(f, "{name:?}"),
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq)]
pub struct RawRow {
    /// Its line in the file, from 1.
    pub line: usize,
    /// Its file, by number.
    pub file: usize,
    /// The task it belongs to, where there are several: its whole number `task`, or else that of its file.
    pub task: Option<u32>,
    /// What it is.
    pub kind: RowKind,
}

/// The rows of one file, or of several.
#[derive(Clone, Debug, PartialEq)]
pub struct RawData {
    /// The files.
    pub files: Files,
    /// Their rows, in order.
    pub rows: Vec<RawRow>,
}

impl RawData {
    /// Reads a file of rows. Blank lines are skipped.
    ///
    /// # Errors
    /// When the file cannot be read or has no rows; for a bad row, its line and what is wrong with it.
    pub fn read(path: &Path, format: DataFormat) -> Result<Self> {
        Self::read_all(&Files::from(path), format)
    }

    /// Reads several files of rows as one.
    ///
    /// # Errors
    /// As [`RawData::read`], and where some rows of a single file have a `task` and others have none.
    pub fn read_all(files: &Files, format: DataFormat) -> Result<Self> {
        let mut rows = Vec::new();
        for (file, path) in files.0.iter().enumerate() {
            let own = Self::rows_of(path, format)?.into_iter();
            rows.extend(own.map(|row| RawRow { file, ..row }));
        }
        let raw = Self {
            files: files.clone(),
            rows,
        };
        raw.with_tasks()
    }

    fn with_tasks(mut self) -> Result<Self> {
        if self.files.0.len() > 1 {
            for row in &mut self.rows {
                row.task = row.task.or_else(|| u32::try_from(row.file).ok());
            }
        }
        if self.rows.iter().any(|row| row.task.is_some())
            && let Some(row) = self.rows.iter().find(|row| row.task.is_none())
        {
            return Err(self.at(row, "has no `task`, a whole number, but other rows have"));
        }
        Ok(self)
    }

    fn rows_of(path: &Path, format: DataFormat) -> Result<Vec<RawRow>> {
        let is_csv = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("csv"));
        let rows = match format {
            DataFormat::Csv => csv::read(path)?,
            DataFormat::Auto if is_csv => csv::read(path)?,
            DataFormat::Auto | DataFormat::Jsonl => jsonl::read(path)?,
        };
        if rows.is_empty() {
            return Err(Error::file(path, "has no rows"));
        }
        Ok(rows)
    }

    /// Gives every row that has none this task.
    pub fn set_task(&mut self, task: u32) {
        for row in &mut self.rows {
            row.task.get_or_insert(task);
        }
    }

    /// Whether the rows are for classification: all have a class, or none has.
    ///
    /// # Errors
    /// The first row that is not like the first.
    pub fn has_classes(&self) -> Result<bool> {
        let classed = self
            .rows
            .first()
            .is_some_and(|row| row.kind.class().is_some());
        match self
            .rows
            .iter()
            .find(|row| row.kind.class().is_some() != classed)
        {
            None => Ok(classed),
            Some(row) if classed => {
                Err(self.at(row, "has no `label`, but the rows before it have"))
            }
            Some(row) => Err(self.at(row, "has a `label`, but the rows before it have none")),
        }
    }

    /// An error about one row.
    pub(super) fn at(&self, row: &RawRow, detail: impl Into<String>) -> Error {
        let path = self.files.0.get(row.file).cloned().unwrap_or_default();
        Error::data(path, row.line, detail)
    }
}

/// The text of a file's lines, for the readers.
pub(super) fn text_lines(path: &Path) -> Result<impl Iterator<Item = Result<(usize, String)>>> {
    let lines = peft_io::read_lines(path).map_err(io)?;
    Ok(lines.map(|line| line.map_err(io)))
}
