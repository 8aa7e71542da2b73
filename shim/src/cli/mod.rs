//! The `nacre` command: whether a host is ready, which pods run, what they
//! logged. It reads files and starts nothing.

mod check;
mod elf;
mod pods;
mod trial;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError};
use crate::error::chain;

/// Errors of the command, told to a person.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The pods' directory or a file in it cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// What.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No pod has that name.
    #[error("no pod {0:?}; `nacre ps` lists them")]
    NoPod(String),
    /// Several pods have names that start so.
    #[error("{0:?} is the start of several pods' names")]
    Ambiguous(String),
    /// The output is closed.
    #[error("cannot write the output")]
    Write(#[source] std::io::Error),
}

/// Pods in micro-VMs: the operator's side.
#[derive(Debug, Parser)]
#[command(name = "nacre", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tell whether this host can run pods, and what to do if not.
    Check,
    /// List the pods that run here.
    Ps,
    /// Print what a pod's shim and monitor logged.
    Logs {
        /// The pod's id, or a start of it that no other shares.
        pod: String,
        /// Print the guest's console instead (needs `debug_console = true`).
        #[arg(long)]
        console: bool,
        /// Go on with what is yet to come, until the pod is gone.
        #[arg(short, long)]
        follow: bool,
    },
}

/// Runs the command with the process's arguments.
pub fn run() -> ExitCode {
    let mut out = std::io::stdout().lock();
    let result = match Arguments::parse().command {
        Command::Check => check::run(&mut out).map_err(CliError::Write),
        Command::Ps => Config::load()
            .map_err(CliError::from)
            .and_then(|config| pods::list(&config.run_dir, &mut out))
            .map(|()| true),
        Command::Logs {
            pod,
            console,
            follow,
        } => Config::load()
            .map_err(CliError::from)
            .and_then(|config| {
                let wanted = pods::Wanted { console, follow };
                pods::logs(&config.run_dir, &pod, wanted, &mut out)
            })
            .map(|()| true),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // `nacre logs POD | head` is no failure.
        Err(CliError::Write(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("nacre: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}
