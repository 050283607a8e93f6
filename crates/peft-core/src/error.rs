//! One error for everything a user can run into: what it is about, and the valid choices where there are any.

use std::path::PathBuf;

use peft_tensor::TensorError;

/// Result of this workspace's library crates.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, about which file, key, module or field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a configuration.
    #[error("`{field}`: {detail}")]
    Config {
        /// The field's name, dotted.
        field: String,
        /// What is wrong and what would be right.
        detail: String,
    },
    /// A name that matches nothing.
    #[error("`{field}`: {name:?} matches no module{}", did_you_mean(nearest))]
    NoMatch {
        /// The field the name stands in.
        field: String,
        /// The name or pattern.
        name: String,
        /// The closest names there are; more than three are all.
        nearest: Vec<String>,
    },
    /// Tensors that do not fit what they are loaded into; everything that is wrong at once.
    #[error(
        "{what} does not fit:{}{}{}",
        list("missing", missing),
        list("unexpected", unexpected),
        list("wrong shape", misshaped)
    )]
    Load {
        /// The adapter or checkpoint.
        what: String,
        /// Keys that should be there.
        missing: Vec<String>,
        /// Keys that should not.
        unexpected: Vec<String>,
        /// Keys with another shape, with both shapes.
        misshaped: Vec<String>,
    },
    /// A module of the model.
    #[error("module `{module}`: {detail}")]
    Module {
        /// Its path.
        module: String,
        /// What is wrong.
        detail: String,
    },
    /// A file or folder.
    #[error("{}: {detail}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// A row of a dataset.
    #[error("{}:{line}: {detail}", path.display())]
    Data {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// What is wrong.
        detail: String,
    },
    /// An error with the circumstances it came up in.
    #[error("{what}: {source}")]
    Context {
        /// The circumstances.
        what: String,
        /// The error.
        source: Box<Error>,
    },
    /// A tensor operation.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl Error {
    /// A field of a configuration.
    pub fn config(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Config {
            field: field.into(),
            detail: detail.into(),
        }
    }

    /// A module of the model.
    pub fn module(module: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Module {
            module: module.into(),
            detail: detail.into(),
        }
    }

    /// What a tensor operation of a module ran into. A device's fault stays one ([`Error::is_device`]).
    pub(crate) fn of_module(module: &str, error: TensorError) -> Self {
        match error {
            TensorError::Device(_) => Self::Tensor(error).context(format!("module `{module}`")),
            other => Self::module(module, other.to_string()),
        }
    }

    /// A file or folder.
    pub fn file(path: impl Into<PathBuf>, detail: impl Into<String>) -> Self {
        Self::File {
            path: path.into(),
            detail: detail.into(),
        }
    }

    /// A row of a dataset; lines count from 1.
    pub fn data(path: impl Into<PathBuf>, line: usize, detail: impl Into<String>) -> Self {
        Self::Data {
            path: path.into(),
            line,
            detail: detail.into(),
        }
    }

    /// Anything else.
    pub fn other(detail: impl Into<String>) -> Self {
        Self::Other(detail.into())
    }

    /// Whether it is what a device ran into, rather than what was asked for: on another device it may not come up.
    pub fn is_device(&self) -> bool {
        match self {
            Self::Tensor(e) => matches!(e, TensorError::Device(_)),
            Self::Context { source, .. } => source.is_device(),
            _ => false,
        }
    }

    /// The same error with the circumstances in front.
    #[must_use]
    pub fn context(self, what: impl Into<String>) -> Self {
        Self::Context {
            what: what.into(),
            source: Box::new(self),
        }
    }
}

fn did_you_mean(nearest: &[String]) -> String {
    let names = nearest.join(", ");
    match nearest.len() {
        0 => String::new(),
        1..=3 => format!("; nearest: {names}"),
        _ => format!("; there are: {names}"),
    }
}

/// What serde says of a value of the wrong type, with what was expected in words instead of Rust's names.
pub fn in_words(error: &impl std::fmt::Display) -> String {
    const WORDS: [(&str, &str); 5] = [
        (
            "u8 u16 u32 u64 usize",
            "a whole number that is not negative",
        ),
        ("i8 i16 i32 i64 isize", "a whole number"),
        ("f32 f64", "a number"),
        ("sequence", "list"),
        ("map", "table"),
    ];
    let text = error.to_string();
    let Some((front, wanted)) = text.split_once(", expected ") else {
        return text;
    };
    let named = |word: &str| {
        WORDS
            .iter()
            .find(|(names, _)| names.split(' ').any(|name| name == word))
    };
    let words: Vec<&str> = wanted
        .split(' ')
        .map(|word| named(word).map_or(word, |(_, said)| said))
        .collect();
    format!("{front}, expected {}", words.join(" "))
}

/// A titled list, cut after twenty entries: a whole wrong model would otherwise fill the screen.
fn list(title: &str, keys: &[String]) -> String {
    const SHOWN: usize = 20;
    if keys.is_empty() {
        return String::new();
    }
    let mut text = format!("\n  {title} ({}):", keys.len());
    for key in keys.iter().take(SHOWN) {
        text.push_str("\n    ");
        text.push_str(key);
    }
    if keys.len() > SHOWN {
        text.push_str(&format!("\n    ... and {} more", keys.len() - SHOWN));
    }
    text
}

/// Up to three names closest to `name`; a name's last dotted parts count as well as the whole.
pub fn nearest<'a>(name: &str, among: impl Iterator<Item = &'a str>) -> Vec<String> {
    let tail = |path: &'a str| {
        let parts = name.split('.').count();
        let start = path
            .rmatch_indices('.')
            .nth(parts - 1)
            .map_or(0, |(i, _)| i + 1);
        &path[start..]
    };
    let mut scored: Vec<(f64, &str)> = Vec::new();
    for path in among {
        let tail = tail(path);
        if scored.iter().any(|(_, seen)| *seen == tail) {
            continue;
        }
        let score = strsim::jaro_winkler(name, path).max(strsim::jaro_winkler(name, tail));
        scored.push((score, tail));
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored
        .into_iter()
        .filter(|(score, _)| *score > 0.6)
        .take(3)
        .map(|(_, n)| n.to_owned())
        .collect()
}
