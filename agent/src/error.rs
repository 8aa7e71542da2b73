//! Errors of the agent, and what the shim sees of them.

use std::fmt::Display;
use std::io;

use ttrpc::Code;

use crate::engine::error::{Failure, plain};

/// Result of the agent's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation failed. The variants are the status codes of
/// `agent.proto`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container or process, or it has exited.
    #[error("{0} not found")]
    NotFound(String),
    /// The id is in use.
    #[error("{0} already exists")]
    AlreadyExists(String),
    /// Not in this state.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request cannot be carried out as it stands; for example its command
    /// does not exist.
    #[error("{0}")]
    InvalidArgument(String),
    /// Nothing was made, and something may use disks yet that were to be part of it.
    #[error("{0}")]
    Aborted(String),
    /// The system refused.
    #[error("{what}")]
    Io {
        /// What was attempted.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Something that should not happen.
    #[error("{0}")]
    Internal(String),
}

/// Names what was attempted.
pub trait Context<T> {
    /// Adds `what` to an error of the system.
    ///
    /// # Errors
    ///
    /// The error itself, named.
    fn context(self, what: impl Display) -> Result<T>;
    /// The same, with the text made only when it is needed.
    ///
    /// # Errors
    ///
    /// The error itself, named.
    fn with_context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl Display) -> Result<T> {
        self.with_context(|| what)
    }

    fn with_context<D: Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what().to_string(),
            source: source.into(),
        })
    }
}

impl Error {
    /// Whether the system refused with one of these.
    #[must_use]
    pub fn has_errno(&self, errnos: &[i32]) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        source
            .raw_os_error()
            .is_some_and(|errno| errnos.contains(&errno))
    }

    /// The message with its cause, on one line.
    #[must_use]
    pub fn full(&self) -> String {
        match self {
            Self::Io { what, source } => format!("{what}: {}", plain(source)),
            other => other.to_string(),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        if failure.invalid {
            Self::InvalidArgument(failure.message)
        } else {
            Self::Internal(failure.message)
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Error::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Error::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Error::Aborted(_) => Code::ABORTED,
            Error::Io { .. } | Error::Internal(_) => Code::INTERNAL,
        };
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, error.full()))
    }
}
