//! PID 1: from the kernel's hand-over to serving the shim.
//!
//! The initramfs holds this program and nothing else. Its root cannot be
//! pivoted away from (rootfs, pivot_root(2)), and containers need to do just
//! that, so the agent moves into a tmpfs first.
//!
//! There is no way out but powering off: when the connection to the shim
//! breaks, on any error, on a panic.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use nacre_protocol::guest::{AGENT_PORT, CONTAINERS_DIR, FORWARD_PORT, STREAM_PORT};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use nix::sys::stat::{Mode as FileMode, SFlag, makedev, mknod};

use crate::cgroup::CgroupBase;
use crate::engine::sys;
use crate::error::{Context, Result};
use crate::forward;
use crate::log;
use crate::sandbox::Mode;
use crate::serve::{block_on, serve};
use crate::streams::StreamListener;

const NONE: Option<&str> = None;
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Open files per process: containers inherit it, as from containerd's service.
const MAX_FILES: u64 = 1_048_576;

/// Spares the agent when the machine has no memory left (proc_pid_oom_score_adj(5)):
/// without it the guest ends. One that has nobody else to kill panics, which is told.
const OOM_SCORE: &str = "-1000";

/// File system, where, flags, data.
type Mount = (&'static str, &'static str, MsFlags, &'static str);

const NO_SUID: MsFlags = MsFlags::MS_NOSUID;
const NO_DEV: MsFlags = MsFlags::MS_NODEV;
const NO_EXEC: MsFlags = MsFlags::MS_NOEXEC;

const MOUNTS: [Mount; 8] = [
    ("proc", "/proc", NO_SUID.union(NO_DEV).union(NO_EXEC), ""),
    ("sysfs", "/sys", NO_SUID.union(NO_DEV).union(NO_EXEC), ""),
    ("devtmpfs", "/dev", NO_SUID, "mode=755"),
    (
        "devpts",
        "/dev/pts",
        NO_SUID.union(NO_EXEC),
        "mode=620,ptmxmode=666",
    ),
    ("tmpfs", "/dev/shm", NO_SUID.union(NO_DEV), "mode=1777"),
    (
        "cgroup2",
        CGROUP_ROOT,
        NO_SUID.union(NO_DEV).union(NO_EXEC),
        "",
    ),
    // Container files and image layers live here: no noexec, no nodev.
    ("tmpfs", "/run", NO_SUID, "mode=755"),
    ("tmpfs", "/tmp", NO_SUID.union(NO_DEV), "mode=1777"),
];

/// Kernel parameters. The shim gives the addresses, so the guest neither asks
/// routers for some nor doubts those it is given; a missing file is a kernel
/// without IPv6.
const SYSCTLS: [(&str, &str); 6] = [
    // As on hosts with systemd: with its first address a subnet does not lose the others.
    ("net/ipv4/conf/all/promote_secondaries", "1"),
    ("net/ipv6/conf/all/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/ipv6/conf/default/autoconf", "0"),
    // Overlay and hundreds of watching programs are ordinary in a pod.
    ("fs/inotify/max_user_instances", "8192"),
];

/// Runs PID 1.
pub fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|info| {
        log::last_words(&info.to_string());
        power_off();
    }));
    if let Err(error) = boot() {
        log::last_words(&error.full());
    }
    power_off();
    // Not reached on a machine that can power off.
    ExitCode::FAILURE
}

/// Writes everything back and powers the machine off.
pub fn power_off() {
    nix::unistd::sync();
    let Err(errno) = reboot(RebootMode::RB_POWER_OFF) as std::result::Result<Infallible, _>;
    log::last_words(&format!("power off: {errno}"));
}

fn boot() -> Result<()> {
    move_root().context("move to a tmpfs root")?;
    for (kind, target, flags, data) in MOUNTS {
        mount_at(kind, target, flags, data).with_context(|| format!("mount {target}"))?;
    }
    open_standard_streams().context("open /dev/null")?;
    log::init_guest();
    fs::create_dir_all(CONTAINERS_DIR).with_context(|| format!("create {CONTAINERS_DIR}"))?;
    links().context("links in /dev")?;
    if let Err(error) = set_limits() {
        tracing::warn!("{}", error.full());
    }
    fs::write("/proc/self/oom_score_adj", OOM_SCORE).context("set oom_score_adj")?;
    sys::loopback_up().context("bring up loopback")?;
    let cgroups = own_cgroup()?;
    for (name, value) in SYSCTLS {
        match fs::write(Path::new("/proc/sys").join(name), value) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("sysctl {name}: {error}");
            }
            _ => {}
        }
    }
    block_on(async {
        // First: the shim may open streams as soon as it has the connection.
        let streams = StreamListener::vsock(STREAM_PORT).context("listen on vsock")?;
        let forwarded = StreamListener::vsock(FORWARD_PORT).context("listen on vsock")?;
        tokio::spawn(forward::run(forwarded));
        let rpc = dial().context("dial the host")?;
        serve(Mode::Guest, cgroups, rpc, streams).await
    })
}

/// The kernel may have started us without standard streams, and the next files
/// opened would take their place. Makes /dev/null in the initramfs to be them.
pub fn ensure_standard_streams() -> io::Result<()> {
    use nix::errno::Errno;
    let open = |fd| {
        // SAFETY: only asks whether the number is in use.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
        !matches!(
            nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_GETFD),
            Err(Errno::EBADF)
        )
    };
    if (0..=2).all(open) {
        return Ok(());
    }
    let ignore_existing = |result| match result {
        Err(Errno::EEXIST) => Ok(()),
        result => result,
    };
    ignore_existing(nix::unistd::mkdir(
        "/dev",
        FileMode::from_bits_truncate(0o755),
    ))?;
    let mode = FileMode::from_bits_truncate(0o666);
    ignore_existing(mknod("/dev/null", SFlag::S_IFCHR, mode, makedev(1, 3)))?;
    while !(0..=2).all(open) {
        let flags = nix::fcntl::OFlag::O_RDWR;
        // Takes the lowest free number; kept open for good.
        std::mem::forget(nix::fcntl::open("/dev/null", flags, FileMode::empty())?);
    }
    Ok(())
}

/// switch_root's way: the new root is moved over the old one, which stays below
/// it, empty but for this program.
fn move_root() -> io::Result<()> {
    fs::create_dir_all("/root")?;
    mount(
        Some("root"),
        "/root",
        Some("tmpfs"),
        MsFlags::empty(),
        Some("mode=755"),
    )?;
    nix::unistd::chdir("/root")?;
    mount(Some("."), "/", NONE, MsFlags::MS_MOVE, NONE)?;
    nix::unistd::chroot(".")?;
    Ok(nix::unistd::chdir("/")?)
}

fn mount_at(kind: &str, target: &str, flags: MsFlags, data: &str) -> io::Result<()> {
    fs::create_dir_all(target)?;
    mount(Some(kind), target, Some(kind), flags, Some(data))?;
    Ok(())
}

/// Standard input and output are nobody's; standard error stays the console
/// where there is one.
fn open_standard_streams() -> io::Result<()> {
    let null = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    sys::dup_to(&null, 0)?;
    sys::dup_to(&null, 1)
}

fn links() -> io::Result<()> {
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        match std::os::unix::fs::symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    // devtmpfs has a ptmx of its own, of the first devpts instance: ours.
    Ok(())
}

/// What containers inherit unless their specification says otherwise.
fn set_limits() -> Result<()> {
    let infinity = libc::RLIM_INFINITY;
    setrlimit(Resource::RLIMIT_NOFILE, MAX_FILES, MAX_FILES).context("set RLIMIT_NOFILE")?;
    setrlimit(Resource::RLIMIT_NPROC, infinity, infinity).context("set RLIMIT_NPROC")
}

/// Moves the agent to a leaf and hands the controllers to the containers.
fn own_cgroup() -> Result<CgroupBase> {
    let leaf = Path::new(CGROUP_ROOT).join("agent");
    fs::create_dir_all(&leaf).context("create the agent's cgroup")?;
    fs::write(leaf.join("cgroup.procs"), "0").context("enter the agent's cgroup")?;
    CgroupBase::new(Path::new(CGROUP_ROOT), "containers", true)
}

fn dial() -> io::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let host = VsockAddr::new(libc::VMADDR_CID_HOST, AGENT_PORT);
    connect(socket.as_raw_fd(), &host)?;
    Ok(socket)
}
