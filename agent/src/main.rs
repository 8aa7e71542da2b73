//! One program, three roles: PID 1 of a guest, the test server `serve`, and the
//! container helper `init`.
//!
//! It has a C `main`: Rust's own start-up opens /dev/null for closed standard
//! streams and aborts where there is none, which is the state the kernel may
//! start PID 1 in.
#![no_main]

use std::process::{ExitCode, Termination};

use nacre_agent::engine::{init, sys};
use nacre_agent::{boot, log, serve};

/// Called by the C library's start-up code. The arguments come by
/// `std::env::args`, which glibc fills in before.
#[unsafe(no_mangle)]
pub extern "C" fn main(_argc: i32, _argv: *const *const u8) -> i32 {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let code = match arguments.split_first() {
        Some((command, [])) if command == init::COMMAND => init::main(),
        Some((command, rest)) if command == "serve" => run_serve(rest),
        _ if std::process::id() == 1 => run_boot(),
        _ => {
            eprintln!("usage: nacre-agent serve --rpc-fd N --streams-fd N --root DIR");
            ExitCode::FAILURE
        }
    };
    i32::from(code.report() != ExitCode::SUCCESS)
}

fn run_boot() -> ExitCode {
    if let Err(error) = boot::ensure_standard_streams() {
        log::last_words(&format!("standard streams: {error}"));
    }
    sys::ignore_sigpipe();
    boot::main()
}

fn run_serve(arguments: &[String]) -> ExitCode {
    sys::ignore_sigpipe();
    log::init_stderr();
    match serve::Arguments::parse(arguments).and_then(serve::Arguments::run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nacre-agent: {}", error.full());
            ExitCode::FAILURE
        }
    }
}
