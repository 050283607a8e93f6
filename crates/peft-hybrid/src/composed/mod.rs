//! Several methods on one model.

pub mod union;
