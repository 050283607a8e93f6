//! The command from the outside: every verb on tiny models, every exit code, every kind of bad input.

mod bad_input;
mod common;
#[cfg(unix)]
mod interrupted;
mod looking;
mod merging;
mod quantising;
mod training;
mod usage;
