//! What can go wrong with a tensor.

/// Result of this crate.
pub type Result<T> = std::result::Result<T, TensorError>;

/// An operation that could not be done, and why.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// Shapes that do not fit the operation.
    #[error("{op}: {detail}")]
    Shape {
        /// The operation's name.
        op: &'static str,
        /// The shapes and what was expected of them.
        detail: String,
    },
    /// Stored bytes that are not a weight of the stated format and shape.
    #[error("weight format: {0}")]
    Format(String),
    /// A decomposition that did not converge or got values that are not finite.
    #[error("linear algebra: {0}")]
    Linalg(String),
    /// Something this device or build does not offer.
    #[error("{0}")]
    Unsupported(String),
    /// What a device ran into: no memory left, a driver's refusal, a device that went away.
    #[error("device: {0}")]
    Device(String),
    /// An index outside of its range (a token id beyond the vocabulary, a row that is not there).
    #[error("{op}: index {index} is out of range, there are {len}")]
    Index {
        /// The operation's name.
        op: &'static str,
        /// The offending index.
        index: i64,
        /// How many entries there are.
        len: usize,
    },
}

/// Shorthand for a [`TensorError::Shape`].
pub(crate) fn shape_err<T>(op: &'static str, detail: impl Into<String>) -> Result<T> {
    Err(TensorError::Shape {
        op,
        detail: detail.into(),
    })
}
