//! The operator's command; see [`nacre_shim::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    nacre_shim::cli::run()
}
