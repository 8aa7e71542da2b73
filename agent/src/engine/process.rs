//! The last stretch of a process in the making, the same for a container's
//! init and for an exec: terminal, limits, credentials, seccomp, execve.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, fchown};
use std::path::Path;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use oci_spec::runtime::{LinuxSeccomp, Process};

use super::command;
use super::credentials::{self, Permitted};
use super::error::{InitError, Step};
use super::hooks::StartHooks;
use super::seccomp::Filter;
use super::sync::{self, Report};
use super::sys::{self, WindowSize};

/// What to execute, and how it reports.
pub struct Launch<'a> {
    /// The OCI process.
    pub process: &'a Process,
    /// The container's seccomp profile.
    pub seccomp: Option<&'a LinuxSeccomp>,
    /// Initial size of the terminal.
    pub window: Option<WindowSize>,
    /// Whether execve waits for the agent's word.
    pub waits: bool,
    /// Whether the terminal also becomes /dev/console.
    pub console: bool,
    /// What runs before it.
    pub hooks: Option<StartHooks<'a>>,
}

impl Launch<'_> {
    /// Executes the process. The working namespace, root and cgroup are
    /// already the container's.
    ///
    /// # Errors
    ///
    /// Returns only if it failed.
    pub fn run(&self, socket: &OwnedFd) -> Result<std::convert::Infallible, InitError> {
        let process = self.process;
        let user = process.user();
        let own = Permitted::current();
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let env = process.env().as_deref().unwrap_or_default();
        let env = command::with_home(env, user.uid(), &passwd);
        let filter = self.seccomp.map(Filter::compile).transpose()?;
        let no_new_privs = process.no_new_privileges().unwrap_or(false);

        let terminal = self.terminal()?;
        credentials::set_rlimits(process.rlimits().as_deref().unwrap_or_default())?;
        own_stdio(user.uid(), None)?;
        if no_new_privs {
            sys::set_no_new_privs().step(|| "set no_new_privs")?;
        } else if let Some(filter) = &filter {
            // Without no_new_privs this takes CAP_SYS_ADMIN, soon gone.
            filter.install()?;
        }
        let reached = self.enter_cwd();
        credentials::become_user(user, process.capabilities().as_ref(), own)?;
        reached.or_else(|_| self.enter_cwd())?;

        let args = process.args().as_deref().unwrap_or_default();
        let name = args
            .first()
            .ok_or_else(|| InitError::Invalid("process has no arguments".into()))?;
        let path = command::find(name, &env)?;
        self.announce(socket, terminal.as_ref().map(AsFd::as_fd))?;
        drop(terminal);

        let path = command::c_strings(&[path])?.pop().unwrap_or_default();
        let (args, env) = (command::c_strings(args)?, command::c_strings(&env)?);
        sys::cloexec_from(3).step(|| "close descriptors")?;
        default_signals().step(|| "reset signals")?;
        let filter = filter.filter(|_| no_new_privs);
        if let Some(hooks) = &self.hooks {
            hooks.run(filter.as_ref())?;
        }
        if let Some(filter) = filter {
            filter.install()?;
        }
        Err(command::failed(name, &sys::exec(&path, &args, &env)))
    }

    fn announce(
        &self,
        socket: &OwnedFd,
        terminal: Option<BorrowedFd<'_>>,
    ) -> Result<(), InitError> {
        sync::send(socket, &Report::Ready, terminal).step(|| "report to the agent")?;
        if self.waits {
            sync::wait_go(socket).step(|| "wait for start")?;
        }
        Ok(())
    }

    /// The directory must be usable by root or by the user: a home on a share
    /// may refuse root, a root-owned one may refuse the user.
    fn enter_cwd(&self) -> Result<(), InitError> {
        let cwd = self.process.cwd();
        nix::unistd::chdir(cwd).step(|| format!("chdir to cwd ({cwd:?}) set in config.json failed"))
    }

    /// Opens a terminal in the container's own devpts and makes it the
    /// standard streams. Returns the agent's end.
    fn terminal(&self) -> Result<Option<OwnedFd>, InitError> {
        if !self.process.terminal().unwrap_or(false) {
            return Ok(None);
        }
        let what = || "open a terminal in the container's /dev/pts";
        let master = File::options()
            .read(true)
            .write(true)
            .open("/dev/pts/ptmx")
            .step(what)?;
        let (peer, number) = sys::open_terminal_peer(&master).step(what)?;
        if let Some(size) = self.window {
            sys::set_window_size(&peer, size).step(|| "set the terminal's size")?;
        }
        for stream in 0..=2 {
            sys::dup_to(&peer, stream).step(what)?;
        }
        sys::set_controlling_terminal().step(what)?;
        if self.console {
            bind_console(number).step(|| "mount the terminal on /dev/console")?;
        }
        Ok(Some(master.into()))
    }
}

fn bind_console(number: u32) -> io::Result<()> {
    let console = Path::new("/dev/console");
    match File::options().write(true).create_new(true).open(console) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let peer = sys::clone_mount(Path::new(&format!("/dev/pts/{number}")), false)?;
    sys::attach_mount(peer.as_fd(), console)
}

/// Gives pipes and terminals to the user, who may reopen them as /dev/stdout.
pub(super) fn own_stdio(uid: u32, gid: Option<u32>) -> Result<(), InitError> {
    for stream in [
        io::stdin().as_fd(),
        io::stdout().as_fd(),
        io::stderr().as_fd(),
    ] {
        let what = || "change the owner of a standard stream";
        let file = File::from(stream.try_clone_to_owned().step(what)?);
        let kind = file.metadata().step(what)?.file_type();
        let is_null = kind.is_char_device() && !nix::unistd::isatty(stream).unwrap_or(false);
        if !is_null {
            fchown(&file, Some(uid), gid).step(what)?;
        }
    }
    Ok(())
}

/// Default dispositions and an empty mask, whatever the agent's are.
fn default_signals() -> io::Result<()> {
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in Signal::iterator() {
        if !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP) {
            // SAFETY: the default disposition runs no code of ours.
            unsafe { sigaction(signal, &default) }?;
        }
    }
    Ok(SigSet::empty().thread_set_mask()?)
}
