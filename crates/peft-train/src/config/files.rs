//! Data files in a configuration: one, or a list.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// One file or several, which are read as one. Written as a string, or as a list of strings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "OneOrMore", into = "OneOrMore")]
pub struct Files(pub Vec<PathBuf>);

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
enum OneOrMore {
    One(PathBuf),
    More(Vec<PathBuf>),
}

impl From<OneOrMore> for Files {
    fn from(files: OneOrMore) -> Self {
        match files {
            OneOrMore::One(path) if path.as_os_str().is_empty() => Self::default(),
            OneOrMore::One(path) => Self(vec![path]),
            OneOrMore::More(paths) => Self(paths),
        }
    }
}

impl From<Files> for OneOrMore {
    fn from(files: Files) -> Self {
        match <[PathBuf; 1]>::try_from(files.0) {
            Ok([path]) => Self::One(path),
            Err(paths) if paths.is_empty() => Self::One(PathBuf::new()),
            Err(paths) => Self::More(paths),
        }
    }
}

impl From<&Path> for Files {
    fn from(path: &Path) -> Self {
        Self(vec![path.to_owned()])
    }
}

impl Files {
    /// Whether there is none, or one without a name.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty() || self.0.iter().any(|path| path.as_os_str().is_empty())
    }
}

impl std::fmt::Display for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<String> = self.0.iter().map(|p| p.display().to_string()).collect();
        f.write_str(&names.join(", "))
    }
}
