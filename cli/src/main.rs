//! `engine-cli`: see the library of that name.

use std::process::ExitCode;

fn main() -> ExitCode {
    engine_cli::main()
}
