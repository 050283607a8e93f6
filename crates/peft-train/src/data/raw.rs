//! Rows as they stand in a file, typed but not yet tokens.

use std::path::{Path, PathBuf};

use peft_core::{Error, Result};
use serde_json::Value;

use super::{csv, jsonl};
use crate::config::DataFormat;
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
    /// What it is.
    pub kind: RowKind,
}

/// The rows of one file.
#[derive(Clone, Debug, PartialEq)]
pub struct RawData {
    /// The file.
    pub path: PathBuf,
    /// Its rows, in order.
    pub rows: Vec<RawRow>,
}

impl RawData {
    /// Reads a file of rows. Blank lines are skipped.
    ///
    /// # Errors
    /// When the file cannot be read or has no rows; for a bad row, its line and what is wrong with it.
    pub fn read(path: &Path, format: DataFormat) -> Result<Self> {
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
        Ok(Self {
            path: path.to_owned(),
            rows,
        })
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
                Err(self.at(row.line, "has no `label`, but the rows before it have"))
            }
            Some(row) => Err(self.at(row.line, "has a `label`, but the rows before it have none")),
        }
    }

    /// An error about one line.
    pub(super) fn at(&self, line: usize, detail: impl Into<String>) -> Error {
        Error::data(&self.path, line, detail)
    }
}

/// The text of a file's lines, for the readers.
pub(super) fn text_lines(path: &Path) -> Result<impl Iterator<Item = Result<(usize, String)>>> {
    let lines = peft_io::read_lines(path).map_err(io)?;
    Ok(lines.map(|line| line.map_err(io)))
}
