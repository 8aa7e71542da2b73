//! How containerd runs the shim's binary, and what each way does.
//!
//! ```text
//! containerd-shim-nacre-v2 FLAGS start     find or start the pod's daemon, print its address  start.rs
//!                          FLAGS delete    clean up from disk alone                            delete.rs
//!                          -info | -v      describe the runtime                                info.rs
//!                          FLAGS serve     the daemon itself; only `start` runs it   serve.rs, place.rs
//!                          monitor         the VM; only the daemon runs it          nacre_vmm::monitor
//! ```
//!
//! containerd reads stdout and stderr of `start` together as the answer, so it prints
//! nothing else unless it fails. What `delete` says on stderr containerd logs.

mod args;
mod delete;
mod group;
mod info;
mod place;
mod serve;
mod start;

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use serde::de::DeserializeOwned;

pub use args::{Action, Args};
pub use group::group_of;

/// What errors are printed with.
const NAME: &str = "containerd-shim-nacre-v2";

/// What a run of the binary failed with; printed as one line.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// The command line is wrong.
    #[error("{0}")]
    Usage(String),
    /// Reading or writing something of the bootstrap failed.
    #[error("{what}")]
    Io {
        /// What was being done.
        what: String,
        /// The failure.
        source: std::io::Error,
    },
    /// The daemon does not serve, in its own words.
    #[error("{0}")]
    Daemon(String),
    /// A message could not be encoded.
    #[error("encode the answer")]
    Encode(#[from] protobuf::Error),
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] crate::config::ConfigError),
    /// The run directory failed.
    #[error(transparent)]
    RunDir(#[from] crate::rundir::RunDirError),
    /// The daemon's RPC server failed.
    #[error("serve")]
    Server(#[from] ttrpc::Error),
}

impl BootstrapError {
    /// For `map_err`.
    fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Has what is logged written to stderr. `start` sets the daemon's level in `RUST_LOG`,
/// for the monitor's sake.
fn init_log(level: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(filter)
        .init();
}

/// What `T` takes of a bundle's config.json, if there is one.
fn read_spec<T: DeserializeOwned>(bundle: &Path) -> Result<Option<T>, BootstrapError> {
    let path = bundle.join("config.json");
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(BootstrapError::io(format!("read {}", path.display())))?,
    };
    let spec = serde_json::from_slice(&text)
        .map_err(io::Error::from)
        .map_err(BootstrapError::io(format!("parse {}", path.display())))?;
    Ok(Some(spec))
}

/// Longest runtime options taken from stdin.
const MAX_STDIN_BYTES: u64 = 16 << 20;

/// The binary's `main`.
pub fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // The monitor first: it runs with nothing of the shim set up.
    if arguments.first().map(String::as_str) == Some("monitor") {
        return monitor();
    }
    match run(&arguments) {
        Ok(answer) => print(&answer),
        Err(error) => {
            eprintln!("{NAME}: {}", crate::error::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<Vec<u8>, BootstrapError> {
    let args = Args::parse(arguments)?;
    match args.action {
        Action::Start => start::start(&args, &read_stdin()?),
        Action::Delete => delete::delete(&args),
        Action::Info => info::runtime_info(),
        Action::Version => Ok(info::version_text().into_bytes()),
        Action::Serve => serve::serve(&args).map(|()| Vec::new()),
    }
}

fn print(answer: &[u8]) -> ExitCode {
    match std::io::stdout().write_all(answer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn read_stdin() -> Result<Vec<u8>, BootstrapError> {
    let mut input = Vec::new();
    std::io::stdin()
        .take(MAX_STDIN_BYTES)
        .read_to_end(&mut input)
        .map_err(BootstrapError::io("read the runtime options from stdin"))?;
    Ok(input)
}

fn monitor() -> ExitCode {
    // SAFETY: the daemon starts this mode with the control channel as this
    // descriptor, and nothing has used it in this process.
    let channel = unsafe { OwnedFd::from_raw_fd(nacre_vmm::jail::CONTROL_FD) };
    nacre_vmm::monitor::run(channel)
}
