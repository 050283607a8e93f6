//! Why the command stops, and with which exit code.

use peft::Error;

/// What ended a verb early.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The user's words: exit code 2.
    Usage(String),
    /// Everything else: exit code 1.
    Failed(Error),
    /// Nobody reads stdout any more (`| head`): exit code 0, without a word.
    Closed,
}

impl Failure {
    /// What to tell.
    pub(crate) fn text(&self) -> Option<String> {
        match self {
            Self::Usage(text) => Some(text.clone()),
            Self::Failed(error) => Some(error.to_string()),
            Self::Closed => None,
        }
    }

    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Failed(_) => 1,
            Self::Closed => 0,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<peft::io::Error> for Failure {
    fn from(error: peft::io::Error) -> Self {
        Self::Failed(error.into())
    }
}
