//! `containerd-shim-nacre-v2`; see [`nacre_shim::bootstrap`].

use std::process::ExitCode;

fn main() -> ExitCode {
    nacre_shim::bootstrap::main()
}
