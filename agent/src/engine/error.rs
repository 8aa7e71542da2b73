//! Errors of the container helper, which cross a socket to the agent.

use std::fmt::Display;
use std::io;

use nacre_protocol::hook::HookError;
use serde::{Deserialize, Serialize};

/// Why a process could not be made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The command is missing or cannot be executed. The text is what
    /// containerd's clients know from runc.
    #[error("{0}")]
    Command(String),
    /// The specification asks for something that does not exist here.
    #[error("{0}")]
    Invalid(String),
    /// A hook says no.
    #[error(transparent)]
    Hook(HookError),
    /// A step of the set-up failed.
    #[error("{what}")]
    Step {
        /// What was attempted, with its parameters.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// Adds what was attempted to an error of the system.
pub trait Step<T> {
    /// Names the step that failed.
    ///
    /// # Errors
    ///
    /// The error itself, named.
    fn step<D: Display>(self, what: impl FnOnce() -> D) -> Result<T, InitError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step<D: Display>(self, what: impl FnOnce() -> D) -> Result<T, InitError> {
        self.map_err(|source| InitError::Step {
            what: what().to_string(),
            source: source.into(),
        })
    }
}

/// An [`InitError`] as the agent receives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whether the caller's request is at fault rather than the system.
    pub invalid: bool,
    /// The whole text, causes included.
    pub message: String,
}

impl From<InitError> for Failure {
    fn from(error: InitError) -> Self {
        match error {
            InitError::Command(message) | InitError::Invalid(message) => Self {
                invalid: true,
                message,
            },
            InitError::Hook(error) => Self {
                invalid: false,
                message: match &error {
                    HookError::Run { source, .. } => {
                        format!("startContainer: {error}: {}", plain(source))
                    }
                    error => format!("startContainer: {error}"),
                },
            },
            InitError::Step { what, source } => Self {
                invalid: false,
                message: format!("{what}: {}", plain(&source)),
            },
        }
    }
}

/// An error of the system in the words C programs use, lower case, without
/// Rust's "(os error 2)".
#[must_use]
pub fn plain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_lowercase(),
        None => error.to_string(),
    }
}
