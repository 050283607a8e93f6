//! The classes of a dataset: their numbers and names, kept in `labels.json` beside the adapter.

use std::path::Path;

use peft_core::{Error, Result};
use serde_json::{Map, Value, json};

use super::{RawData, RawLabel};
use crate::io;

/// The file the names are kept in.
pub const LABELS_FILE: &str = "labels.json";

/// Names of classes 0, 1, ...
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelNames {
    names: Vec<String>,
}

impl LabelNames {
    /// The classes of training data: names in sorted order, or numbers from 0 to the largest there is.
    /// `num_labels` may ask for more than occur.
    ///
    /// # Errors
    /// A row that gives a number where others give names, or a class beyond `num_labels`.
    pub fn infer(data: &RawData, num_labels: Option<usize>) -> Result<Self> {
        let mut names = Vec::new();
        let mut highest = 0;
        let mut by_name = None;
        for row in &data.rows {
            let Some(label) = row.kind.class() else {
                continue;
            };
            let is_name = matches!(label, RawLabel::Name(_));
            if *by_name.get_or_insert(is_name) != is_name {
                let detail = format!(
                    "`label` {label} is a {}, but in rows before it is not",
                    if is_name { "name" } else { "number" }
                );
                return Err(data.at(row, detail));
            }
            match label {
                RawLabel::Name(name) => names.push(name.clone()),
                RawLabel::Index(index) => {
                    if num_labels.is_some_and(|n| *index >= n) {
                        let detail = format!(
                            "`label` {index} is beyond `model.num_labels` = {}",
                            num_labels.unwrap_or_default()
                        );
                        return Err(data.at(row, detail));
                    }
                    highest = highest.max(*index);
                }
            }
        }
        names.sort_unstable();
        names.dedup();
        let there = if by_name == Some(true) {
            names.len()
        } else {
            highest + 1
        };
        let wanted = num_labels.unwrap_or(there);
        if there > wanted {
            let detail = format!(
                "{wanted}, but {} has {there} classes: {}",
                data.files,
                names.join(", ")
            );
            return Err(Error::config("model.num_labels", detail));
        }
        names.extend((names.len()..wanted).map(|i| format!("LABEL_{i}")));
        Ok(Self { names })
    }

    /// These names, in the order of their numbers.
    pub fn new(names: Vec<String>) -> Self {
        Self { names }
    }

    /// Reads the names from a folder's `labels.json`, if it has one.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(LABELS_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let value = peft_io::read_json(&path).map_err(io)?;
        match Self::from_config(&value) {
            Some(names) => Ok(Some(names)),
            None => Err(Error::file(
                path,
                "has no `id2label` with a name for each class from 0",
            )),
        }
    }

    /// Writes the names to a folder's `labels.json`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        peft_io::write_json(&folder.join(LABELS_FILE), &self.to_json()).map_err(io)
    }

    /// The names in an `id2label` as `config.json` has it: `{"0": "negative", "1": "positive"}`.
    pub fn from_config(config: &Value) -> Option<Self> {
        let map = config.get("id2label")?.as_object()?;
        let name = |i: usize| map.get(&i.to_string())?.as_str().map(str::to_owned);
        let names: Option<Vec<String>> = (0..map.len()).map(name).collect();
        names.filter(|names| !names.is_empty()).map(Self::new)
    }

    /// `{"id2label": .., "label2id": ..}`
    pub fn to_json(&self) -> Value {
        let ids = self.names.iter().enumerate();
        let id2label: Map<String, Value> = ids
            .clone()
            .map(|(i, name)| (i.to_string(), json!(name)))
            .collect();
        let label2id: Map<String, Value> = ids.map(|(i, name)| (name.clone(), json!(i))).collect();
        json!({ "id2label": id2label, "label2id": label2id })
    }

    /// Number of classes.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The names, by number.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether every class of the data is among these.
    pub fn cover(&self, data: &RawData) -> bool {
        data.rows
            .iter()
            .filter_map(|row| row.kind.class())
            .all(|label| self.index(label).is_some())
    }

    /// The number of a class; None if there is no such class.
    pub fn index(&self, label: &RawLabel) -> Option<usize> {
        match label {
            RawLabel::Index(index) => Some(*index).filter(|&i| i < self.names.len()),
            RawLabel::Name(name) => self.names.iter().position(|n| n == name),
        }
    }
}
