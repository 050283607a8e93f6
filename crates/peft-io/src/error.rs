//! What can go wrong with a file. Every variant says which file, and which tensor, key or line of it.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A file that could not be read, written, understood or found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done, as a verb: `read`, `write`, `rename`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason the system gave.
        source: std::io::Error,
    },
    /// The file as a whole is not what its name or first bytes promise.
    #[error("{}: {detail}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// One tensor of a file is damaged, missing, or stored in a form that cannot be used.
    #[error("{}: tensor `{name}`: {detail}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name as stored.
        name: String,
        /// What is wrong with it.
        detail: String,
    },
    /// One metadata or configuration key is missing or has the wrong type or value.
    #[error("{}: key `{key}`: {detail}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A well-formed file of a kind this crate does not read.
    #[error("{}: {detail}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do instead.
        detail: String,
    },
    /// A NaN or an infinity where only numbers may be.
    #[error("tensor `{name}` holds {value} at element {index}: the weights are damaged")]
    NonFinite {
        /// The tensor.
        name: String,
        /// Index of the first such element in row-major order.
        index: usize,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
    },
    /// The target already holds something that would be lost.
    #[error("{}: {detail}", path.display())]
    Exists {
        /// The file or folder in the way.
        path: PathBuf,
        /// What it is, and how to go ahead.
        detail: String,
    },
    /// A model or adapter that is neither a path, nor cached, nor could be downloaded.
    #[error("cannot find the {what} `{spec}`; tried:\n{}", list(tried))]
    NotFound {
        /// `model` or `adapter`.
        what: &'static str,
        /// What was asked for.
        spec: String,
        /// Each place looked in and what was found there; the last entry says what to do.
        tried: Vec<String>,
    },
    /// The caller asked for something that contradicts what it said before.
    #[error("{0}")]
    Usage(String),
}

fn list(lines: &[String]) -> String {
    lines
        .iter()
        .map(|line| format!("  - {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

impl Error {
    /// Wraps what the operating system said about `path`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io {
            action,
            path: path.as_ref().to_owned(),
            source,
        }
    }

    /// A damaged file.
    pub fn format(path: impl AsRef<Path>, detail: impl Into<String>) -> Self {
        Self::Format {
            path: path.as_ref().to_owned(),
            detail: detail.into(),
        }
    }

    /// A tensor of `path` that cannot be used.
    pub fn tensor(
        path: impl AsRef<Path>,
        name: impl Into<String>,
        detail: impl Into<String>,
    ) -> Self {
        Self::Tensor {
            path: path.as_ref().to_owned(),
            name: name.into(),
            detail: detail.into(),
        }
    }

    /// A key of `path` that is missing or wrong.
    pub fn key(path: impl AsRef<Path>, key: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Key {
            path: path.as_ref().to_owned(),
            key: key.into(),
            detail: detail.into(),
        }
    }

    /// A kind of file that is not read here.
    pub fn unsupported(path: impl AsRef<Path>, detail: impl Into<String>) -> Self {
        Self::Unsupported {
            path: path.as_ref().to_owned(),
            detail: detail.into(),
        }
    }

    /// A target in the way.
    pub fn exists(path: impl AsRef<Path>, detail: impl Into<String>) -> Self {
        Self::Exists {
            path: path.as_ref().to_owned(),
            detail: detail.into(),
        }
    }
}

impl From<Error> for peft_core::Error {
    fn from(error: Error) -> Self {
        use peft_core::Error as Core;
        match error {
            Error::Format { path, detail }
            | Error::Unsupported { path, detail }
            | Error::Exists { path, detail } => Core::file(path, detail),
            Error::Tensor { path, name, detail } => {
                Core::file(path, format!("tensor `{name}`: {detail}"))
            }
            Error::Key { path, key, detail } => Core::file(path, format!("key `{key}`: {detail}")),
            Error::Io {
                action,
                path,
                source,
            } => {
                // The path stands in front here.
                let action = action.trim_end_matches(" in").trim_end_matches(" to");
                Core::file(path, format!("cannot {action}: {source}"))
            }
            other @ (Error::NonFinite { .. } | Error::NotFound { .. } | Error::Usage(_)) => {
                Core::other(other.to_string())
            }
        }
    }
}
