//! The `peft` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    peft_cli::main()
}
