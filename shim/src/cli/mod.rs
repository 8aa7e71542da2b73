//! The `nacre` command: whether a host is ready, which pods run, what they
//! logged, a shell in their guests, the host's devices for them; and how nacre itself
//! comes to a host and leaves it.

mod check;
mod console;
mod containerd;
mod devices;
mod install;
mod pods;
mod table;
mod trial;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Config, ConfigError, program_tree};
use crate::devices::{Address, Claims, DeviceError, System};
use crate::error::chain;

pub use containerd::ContainerdError;
pub use install::InstallError;

/// Errors of the command, told to a person.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// nacre cannot be installed or removed.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The program does not know where it is itself.
    #[error("cannot find this program's files")]
    Program(#[source] std::io::Error),
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
    /// A pod's shim cannot be reached, or no longer.
    #[error("the shim of pod {pod} is gone, and with it the pod")]
    NoShim {
        /// Whose.
        pod: String,
        /// Why.
        source: ttrpc::Error,
    },
    /// A pod gives no console, or no longer.
    #[error("pod {pod}: {problem}")]
    Console {
        /// Which.
        pod: String,
        /// Its shim's words.
        problem: String,
    },
    /// The console's own end failed.
    #[error("cannot {what}")]
    Terminal {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A device cannot be moved, or not be looked at.
    #[error(transparent)]
    Device(#[from] DeviceError),
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
    /// Run a shell in a pod's guest (needs `debug_shell` in the configuration).
    ///
    /// It runs in the guest itself, beside the containers: it sees all processes,
    /// the pod's network, and below /proc/1/root all files. Its input may be a
    /// terminal or anything else. The end of the input ends it.
    Console {
        /// The pod's id, or a start of it that no other shares.
        pod: String,
    },
    /// Install the files that are beside this program, or bring an installation up to them.
    ///
    /// Pods that run are left alone: each version has a directory of its own below
    /// PREFIX/lib/nacre, and an earlier one is removed when no pod uses it any more.
    /// Files in /etc that are there already stay as they are.
    Install(install::Place),
    /// Undo `nacre install`.
    ///
    /// Files in /etc that were edited since are kept.
    Uninstall {
        #[command(flatten)]
        place: install::Place,
        /// Do so even if there are pods. They run on, but nothing can end them properly.
        #[arg(long)]
        force: bool,
    },
    /// List the host's PCI and mediated devices that pods could be given, or move some.
    Devices {
        #[command(subcommand)]
        action: Option<Action>,
    },
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Give devices to vfio-pci, so that pods can be given them.
    ///
    /// A device in use is refused: a mounted disk, a network interface that is up,
    /// the console's GPU, whatever a process has open.
    Bind {
        /// PCI addresses, such as 0000:01:00.0.
        #[arg(required = true)]
        addresses: Vec<Address>,
    },
    /// Give devices back to the host's drivers.
    Unbind {
        /// PCI addresses, such as 0000:01:00.0.
        #[arg(required = true)]
        addresses: Vec<Address>,
    },
}

/// Runs the command with the process's arguments.
pub fn run() -> ExitCode {
    match execute(Arguments::parse().command) {
        Ok(code) => code,
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

fn execute(command: Command) -> Result<ExitCode, CliError> {
    let mut out = std::io::stdout();
    match command {
        Command::Check => {
            let is_ready = check::run(&mut out).map_err(CliError::Write)?;
            Ok(if is_ready {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        Command::Ps => {
            pods::list(&Config::load()?.run_dir, &mut out)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Logs {
            pod,
            console,
            follow,
        } => {
            let wanted = pods::Wanted { console, follow };
            pods::logs(&Config::load()?.run_dir, &pod, wanted, &mut out)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Install(place) => {
            let tree = program_tree().map_err(CliError::Program)?;
            install::install(&place, &tree, &mut out)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Uninstall { place, force } => {
            install::uninstall(&place, force, &mut out)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Console { pod } => console::run(&pods::find(&Config::load()?.run_dir, &pod)?),
        Command::Devices { action } => {
            let (system, claims) = (System::default(), Claims::of(&Config::load()?.run_dir));
            match action {
                None => devices::list(&system, &claims, &mut out)?,
                Some(Action::Bind { addresses }) => devices::bind(&system, &addresses, &mut out)?,
                Some(Action::Unbind { addresses }) => {
                    devices::unbind(&system, &claims, &addresses, &mut out)?;
                }
            }
            Ok(ExitCode::SUCCESS)
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
