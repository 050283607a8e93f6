//! Vectors that scale and shift what is there.

pub mod ia3;
pub mod ssf;
