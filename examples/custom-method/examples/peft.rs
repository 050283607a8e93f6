//! The `peft` command with the method of this crate in it: `cargo run --release --example peft -- methods`.

use std::process::ExitCode;

// Linked but never named, the crate's registration would be lost.
use custom_method as _;

fn main() -> ExitCode {
    peft_cli::main()
}
