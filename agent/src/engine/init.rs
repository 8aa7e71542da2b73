//! The helper program, `nacre-agent init`: one thread, short-lived.
//!
//! It joins namespaces and the container's cgroup, forks a sibling (so that
//! the new process is the agent's child), reports its PID and exits. The
//! sibling becomes the container's process.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nacre_protocol::idmap::IdMaps;
use nix::sched::{CloneFlags, setns};
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceType, LinuxSeccomp, Process, Spec, State};
use serde::{Deserialize, Serialize};

use super::error::{InitError, Step};
use super::hooks::StartHooks;
use super::pause;
use super::process::Launch;
use super::rootfs::{self, Sources};
use super::sync::{self, Report};
use super::sys::{self, WindowSize};
use super::{is_new, namespaces, users};

/// First argument that makes the agent's program the helper.
pub const COMMAND: &str = "init";
/// Descriptor of the request, a memfd.
pub const REQUEST_FD: RawFd = 3;
/// Descriptor of the socket to the agent.
pub const SYNC_FD: RawFd = 4;

/// What the helper is to do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The container's cgroup.
    pub cgroup: PathBuf,
    /// Initial size of the terminal.
    pub window: Option<WindowSize>,
    /// Which process.
    pub kind: Kind,
}

/// The kinds of processes.
#[derive(Debug, Serialize, Deserialize)]
pub enum Kind {
    /// The first process of a container.
    Create {
        /// Its specification.
        spec: Box<Spec>,
        /// What its hooks are told.
        state: Box<State>,
    },
    /// The first one of a PID namespace that containers share. It stays in the
    /// agent's cgroup.
    Pause,
    /// A further one.
    Exec {
        /// PID of the container's first process.
        container_pid: i32,
        /// The process.
        process: Box<Process>,
        /// The container's profile.
        seccomp: Option<LinuxSeccomp>,
        /// The container's users, if they are its own.
        users: Option<IdMaps>,
    },
}

/// Runs the helper; the exit code is for whoever looks at it.
pub fn main() -> ExitCode {
    let socket = sys::inherited(SYNC_FD);
    let request = File::from(sys::inherited(REQUEST_FD));
    let Err(error) = run(request, &socket) else {
        return ExitCode::SUCCESS;
    };
    // The agent learns of an undelivered report by the end of file and by the
    // exit status.
    let _ = sync::send(&socket, &Report::Failed(error.into()), None);
    ExitCode::from(127)
}

/// Returns in the helper; the sibling leaves by execve or an error.
fn run(mut file: File, socket: &OwnedFd) -> Result<(), InitError> {
    let mut body = Vec::new();
    file.rewind()
        .and_then(|()| file.read_to_end(&mut body))
        .step(|| "read the request")?;
    drop(file);
    let request: Request = serde_json::from_slice(&body).step(|| "parse the request")?;
    drop(body);
    sys::cloexec_from(SYNC_FD).step(|| "set close-on-exec")?;
    sys::set_undumpable().step(|| "hide the helper")?;
    let (flags, sources) = match &request.kind {
        Kind::Create { spec, .. } => enter_new(spec, &request.cgroup)?,
        Kind::Pause => (libc::CLONE_NEWPID | libc::CLONE_NEWNS, None),
        Kind::Exec {
            container_pid,
            process,
            users,
            ..
        } => {
            join_cgroup(&request.cgroup, Some(*container_pid))?;
            set_oom_score(process)?;
            join_container(*container_pid, process, users.as_ref())?;
            (0, None)
        }
    };
    match sys::fork_sibling(flags).step(|| "fork into new namespaces")? {
        Some(pid) => sync::send(socket, &Report::Pid(pid.as_raw()), None).step(|| "report the pid"),
        None => match become_process(&request, sources, socket)? {},
    }
}

/// Enters what a new container's process is forked in; returns the namespaces to be
/// made with it, and what it needs that only this process could open.
fn enter_new<'a>(
    spec: &'a Spec,
    cgroup: &Path,
) -> Result<(libc::c_int, Option<Sources<'a>>), InitError> {
    let process = process_of(spec)?;
    join_cgroup(cgroup, None)?;
    set_oom_score(process)?;
    let flags = join_listed(spec)?;
    let sources = IdMaps::of_spec(spec)
        .map(|maps| users::enter_new(spec, &maps, process, cgroup))
        .transpose()?;
    Ok((flags, sources))
}

fn process_of(spec: &Spec) -> Result<&Process, InitError> {
    let process = spec.process().as_ref();
    process.ok_or_else(|| InitError::Invalid("the specification has no process".into()))
}

fn become_process(
    request: &Request,
    sources: Option<Sources<'_>>,
    socket: &OwnedFd,
) -> Result<Infallible, InitError> {
    nix::unistd::setsid().step(|| "setsid")?;
    match &request.kind {
        Kind::Create { spec, state } => {
            set_up(spec, request, sources)?;
            launch(spec, state, request, socket)
        }
        Kind::Pause => pause::run(socket),
        Kind::Exec {
            process, seccomp, ..
        } => {
            let launch = Launch {
                process,
                seccomp: seccomp.as_ref(),
                window: request.window,
                waits: false,
                console: false,
                hooks: None,
            };
            launch.run(socket)
        }
    }
}

/// Makes the container around this process.
fn set_up<'a>(
    spec: &'a Spec,
    request: &Request,
    sources: Option<Sources<'a>>,
) -> Result<(), InitError> {
    // These go through the guest's /proc, which is gone after pivot_root.
    set_sysctls(spec)?;
    set_names(spec)?;
    if is_new(spec, LinuxNamespaceType::Network) {
        sys::loopback_up().step(|| "bring up loopback")?;
    }
    rootfs::enter(spec, &request.cgroup, sources)
}

fn launch(
    spec: &Spec,
    state: &State,
    request: &Request,
    socket: &OwnedFd,
) -> Result<Infallible, InitError> {
    let linux = spec.linux().as_ref();
    let hooks = spec.hooks().as_ref();
    let hooks = hooks.and_then(|hooks| hooks.start_container().as_deref());
    let launch = Launch {
        process: process_of(spec)?,
        seccomp: linux.and_then(|linux| linux.seccomp().as_ref()),
        window: request.window,
        waits: true,
        console: true,
        hooks: hooks.map(|list| StartHooks { list, state }),
    };
    launch.run(socket)
}

/// Enters the cgroup, or the one the container's init has moved to: an init
/// system that enabled controllers below made its own cgroup unenterable.
fn join_cgroup(cgroup: &Path, container_pid: Option<i32>) -> Result<(), InitError> {
    let enter = |cgroup: &Path| fs::write(cgroup.join("cgroup.procs"), "0");
    let result = match (enter(cgroup), container_pid) {
        (Err(error), Some(pid)) if error.raw_os_error() == Some(libc::EBUSY) => {
            let text = fs::read_to_string(format!("/proc/{pid}/cgroup"));
            let text = text.step(|| format!("read the cgroup of {pid}"))?;
            let name = cgroup.file_name().unwrap_or_default().to_string_lossy();
            let below = text
                .lines()
                .find_map(|line| line.strip_prefix("0::"))
                .and_then(|path| path.split_once(&format!("/{name}/")))
                .map(|(_, below)| cgroup.join(below));
            below.map_or(Err(error), |cgroup| enter(&cgroup))
        }
        (result, _) => result,
    };
    result.step(|| format!("enter cgroup {}", cgroup.display()))
}

fn clone_flag(kind: LinuxNamespaceType) -> libc::c_int {
    match kind {
        LinuxNamespaceType::Mount => libc::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => libc::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => libc::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => libc::CLONE_NEWIPC,
        LinuxNamespaceType::User => libc::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => libc::CLONE_NEWPID,
        LinuxNamespaceType::Network => libc::CLONE_NEWNET,
        LinuxNamespaceType::Time => 0x80,
    }
}

/// Joins the namespaces the specification names by path; returns the clone
/// flags of those to be made.
fn join_listed(spec: &Spec) -> Result<libc::c_int, InitError> {
    // The container always has its own mounts: pivot_root in the agent's mount
    // namespace would be the end of the guest.
    let mut flags = libc::CLONE_NEWNS;
    let mut joined = Vec::new();
    for namespace in namespaces(spec) {
        let kind = namespace.typ();
        match kind {
            LinuxNamespaceType::Time => {
                let text = "time namespaces are not supported";
                return Err(InitError::Invalid(text.into()));
            }
            // It comes first and owns the others: `users.rs`.
            LinuxNamespaceType::User => continue,
            _ => {}
        }
        let path = namespace
            .path()
            .as_ref()
            .filter(|path| !path.as_os_str().is_empty());
        match path {
            Some(path) if kind == LinuxNamespaceType::Mount => {
                return Err(InitError::Invalid(format!(
                    "cannot join mount namespace {}",
                    path.display()
                )));
            }
            Some(path) => {
                let what = || format!("join {kind} namespace {}", path.display());
                joined.push((File::open(path).step(what)?, kind, path));
            }
            None => flags |= clone_flag(kind),
        }
    }
    for (file, kind, path) in joined {
        setns(file, CloneFlags::from_bits_truncate(clone_flag(kind)))
            .step(|| format!("join {kind} namespace {}", path.display()))?;
    }
    Ok(flags)
}

/// Joins all namespaces of the container's first process.
fn join_container(pid: i32, process: &Process, users: Option<&IdMaps>) -> Result<(), InitError> {
    let what = || format!("join the namespaces of process {pid}");
    let pidfd = sys::pidfd_open(Pid::from_raw(pid)).step(what)?;
    let mut all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET;
    let Some(maps) = users else {
        return setns(pidfd.as_fd(), all).step(what);
    };
    users::hand_over(maps, process)?;
    all |= CloneFlags::CLONE_NEWUSER;
    setns(pidfd.as_fd(), all).step(what)?;
    users::become_root()
}

/// The agent's own score spares it; no process of a container inherits that.
fn set_oom_score(process: &Process) -> Result<(), InitError> {
    let score = process.oom_score_adj().unwrap_or(0);
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .step(|| format!("set oom_score_adj to {score}"))
}

fn set_sysctls(spec: &Spec) -> Result<(), InitError> {
    let linux = spec.linux().as_ref();
    for (key, value) in linux
        .and_then(|linux| linux.sysctl().as_ref())
        .into_iter()
        .flatten()
    {
        set_sysctl(key, value)?;
    }
    Ok(())
}

/// Sets a kernel parameter, in the namespaces of the caller.
///
/// # Errors
///
/// A name that cannot be one, and what the kernel says.
pub fn set_sysctl(key: &str, value: &str) -> Result<(), InitError> {
    let path = sysctl_path(key)?;
    fs::write(&path, value).step(|| format!("set sysctl {key} to {value:?}"))
}

/// "net.ipv4.ip_forward" and, for names with dots, "net/ipv4/conf/eth0.1/...".
fn sysctl_path(key: &str) -> Result<PathBuf, InitError> {
    let relative = if key.contains('/') {
        key.to_owned()
    } else {
        key.replace('.', "/")
    };
    let outside = relative
        .split('/')
        .any(|part| matches!(part, "" | "." | ".."));
    if outside {
        return Err(InitError::Invalid(format!("sysctl {key:?}")));
    }
    Ok(Path::new("/proc/sys").join(relative))
}

fn set_names(spec: &Spec) -> Result<(), InitError> {
    if !is_new(spec, LinuxNamespaceType::Uts) {
        return Ok(());
    }
    if let Some(name) = spec.hostname().as_deref().filter(|name| !name.is_empty()) {
        nix::unistd::sethostname(name).step(|| format!("set hostname {name:?}"))?;
    }
    if let Some(name) = spec.domainname().as_deref().filter(|name| !name.is_empty()) {
        sys::set_domain_name(name).step(|| format!("set domainname {name:?}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_names() {
        let path = |key| sysctl_path(key).unwrap();
        assert_eq!(
            path("net.ipv4.ip_forward"),
            Path::new("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding"),
            Path::new("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        assert!(sysctl_path("net..ipv4").is_err());
        assert!(sysctl_path("../../etc/passwd").is_err());
    }
}
