//! Plain files: text, JSON, line-by-line data, logs that survive a resume, and the small files that
//! travel with a checkpoint.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::stage::{Stage, parent};
use crate::{Error, Result};

/// Longest file that is read whole, in bytes.
const MAX_WHOLE: u64 = 1 << 30;

/// What travels with a checkpoint beside `config.json`: tokenizer, chat template, generation defaults.
pub const SIDE_FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
];

/// Writes a file so that at every moment `path` is either as before or complete.
///
/// # Errors
/// When the folder cannot be made or the file not written; `path` is then as before.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<()> {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
        return Err(Error::Usage(format!(
            "{}: not the path of a file",
            path.display()
        )));
    };
    let mut stage = Stage::new(parent(path))?;
    stage.add(name, bytes)?;
    stage.commit()
}

/// Makes a folder and its ancestors; one that is there already is fine.
///
/// # Errors
/// When it cannot be made, or a file is in the way.
pub fn create_folder(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|e| Error::io("make folder", path, e))
}

/// A whole file.
///
/// # Errors
/// When it cannot be read or is over a gigabyte.
pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let file = open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_WHOLE + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io("read", path, e))?;
    if bytes.len() as u64 > MAX_WHOLE {
        return Err(Error::format(
            path,
            format!("is longer than {MAX_WHOLE} bytes"),
        ));
    }
    Ok(bytes)
}

/// A whole text file; a byte-order mark is dropped.
///
/// # Errors
/// As [`read_bytes`], or when it is not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let text = String::from_utf8(read_bytes(path)?)
        .map_err(|e| Error::format(path, format!("is not UTF-8: {}", e.utf8_error())))?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

/// A JSON file.
///
/// # Errors
/// As [`read_text`], or when it is not JSON; the message has line and column.
pub fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|e| Error::format(path, format!("is not valid JSON: {e}")))
}

/// Writes JSON as Hugging Face does, two blanks of indent and sorted keys, atomically.
///
/// # Errors
/// As [`atomic_write`].
pub fn write_json(path: &Path, value: &Value) -> Result<()> {
    atomic_write(path, pretty_json(value).as_bytes())
}

/// JSON with sorted keys, indented by two, ending in a newline.
pub(crate) fn pretty_json(value: &Value) -> String {
    // `{:#}` of a `Value` is serde_json's pretty form, indented by two, and cannot fail.
    format!("{:#}\n", sorted(value))
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by_key(|(key, _)| *key);
            Value::Object(
                entries
                    .into_iter()
                    .map(|(k, v)| (k.clone(), sorted(v)))
                    .collect(),
            )
        }
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        other => other.clone(),
    }
}

/// Opens a text file to be read line by line.
///
/// # Errors
/// When it cannot be opened.
pub fn read_lines(path: &Path) -> Result<Lines> {
    Ok(Lines {
        path: path.to_owned(),
        reader: BufReader::new(open(path)?),
        number: 0,
    })
}

/// The lines of a file with their numbers, from 1, without line ends; holds one line at a time.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: usize,
}

impl Iterator for Lines {
    type Item = Result<(usize, String)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        self.number += 1;
        match (&mut self.reader)
            .take(MAX_WHOLE)
            .read_until(b'\n', &mut line)
        {
            Err(e) => return Some(Err(Error::io("read", &self.path, e))),
            Ok(0) => return None,
            Ok(_) => {}
        }
        let mut line = match String::from_utf8(line) {
            Ok(line) => line,
            Err(e) => {
                let detail = format!("line {} is not UTF-8: {}", self.number, e.utf8_error());
                return Some(Err(Error::format(&self.path, detail)));
            }
        };
        line.truncate(line.trim_end_matches(['\n', '\r']).len());
        if self.number == 1 && line.starts_with('\u{feff}') {
            line.drain(..'\u{feff}'.len_utf8());
        }
        Some(Ok((self.number, line)))
    }
}

/// A file of JSON lines that only grows, such as `metrics.jsonl`. Each line is handed to the system as
/// soon as it is pushed; a line cut off by a kill is dropped by [`resume`](Self::resume).
#[derive(Debug)]
pub struct LineLog {
    path: PathBuf,
    file: File,
}

impl LineLog {
    /// Starts a new log, replacing an old one.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        atomic_write(path, b"")?;
        Self::append(path)
    }

    /// Goes on with a log after dropping the lines that are not whole JSON or that `keep` refuses (those
    /// of steps that will be done again). A log that is not there is started.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn resume(path: &Path, keep: impl Fn(&Value) -> bool) -> Result<Self> {
        let mut kept = String::new();
        if path.exists() {
            for line in String::from_utf8_lossy(&read_bytes(path)?).lines() {
                if serde_json::from_str(line).is_ok_and(|value| keep(&value)) {
                    kept.push_str(line);
                    kept.push('\n');
                }
            }
        }
        atomic_write(path, kept.as_bytes())?;
        Self::append(path)
    }

    fn append(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(|e| Error::io("open", path, e))?;
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Adds one line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn push(&mut self, value: &Value) -> Result<()> {
        self.file
            .write_all(format!("{value}\n").as_bytes())
            .map_err(|e| Error::io("write", &self.path, e))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Copies those of `names` (usually [`SIDE_FILES`]) that are in folder `from` to folder `to`, each
/// atomically, and says which they were.
///
/// # Errors
/// When one cannot be read or written, or a name is not a plain file name.
pub fn copy_side_files(from: &Path, to: &Path, names: &[&str]) -> Result<Vec<String>> {
    let mut copied = Vec::new();
    for &name in names {
        if !crate::checkpoint::is_file_name(name) {
            return Err(Error::Usage(format!("`{name}` is not a file name")));
        }
        let source = from.join(name);
        if source.is_file() {
            atomic_write(&to.join(name), &read_bytes(&source)?)?;
            copied.push(name.to_owned());
        }
    }
    Ok(copied)
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|e| Error::io("open", path, e))
}
