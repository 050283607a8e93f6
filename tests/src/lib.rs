//! What the conformance suite shares: small models to run methods on, the law runner, and readers for the goldens.
//!
//! The suite itself is in `tests/`: `laws.rs` runs every registered method through the laws ([`laws`]) on every device,
//! `goldens.rs` compares with files Hugging Face PEFT wrote, `facade.rs` checks that nothing fell out of the registry.

pub mod compare;
mod descent;
pub mod golden;
pub mod laws;
pub mod members;
pub mod state;
pub mod subject;
pub mod toy;
