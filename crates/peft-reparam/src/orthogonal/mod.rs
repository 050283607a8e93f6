//! Rotations and reflections of a weight's input side.

pub mod boft;
pub mod hra;
pub mod oft;
