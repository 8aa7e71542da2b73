//! System calls that neither `std` nor `nix` wraps, each as a safe function.
//!
//! The engine's `unsafe` is here, but for what runs between fork and exec and for
//! signal dispositions; this module holds no policy.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::Pid;

fn cstring(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    Ok(Errno::result(result)?)
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just installed this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Forks a sibling of the caller (same parent), in new namespaces by `flags`.
/// `None` in the child.
///
/// The caller has one thread, so the child may run any code.
///
/// # Errors
///
/// Those of clone3(2).
pub fn fork_sibling(flags: libc::c_int) -> io::Result<Option<Pid>> {
    // SAFETY: all-zero is a valid clone_args; zero fields mean "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((flags | libc::CLONE_PARENT).cast_unsigned());
    // SAFETY: without CLONE_VM the child works on a copy of our memory; the
    // argument structure outlives the call and its size is passed along.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    })?;
    Ok(match libc::pid_t::try_from(pid) {
        Ok(0) | Err(_) => None,
        Ok(pid) => Some(Pid::from_raw(pid)),
    })
}

/// pidfd_open(2), close-on-exec.
///
/// # Errors
///
/// Those of the call.
pub fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: no pointers are passed.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })
}

/// Copies the mount at `path` (with all below it, if `recursive`) into a mount
/// object that is attached nowhere; see open_tree(2).
///
/// # Errors
///
/// Those of the call.
pub fn clone_mount(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = cstring(path)?;
    let mut flags = libc::OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned();
    if recursive {
        flags |= libc::AT_RECURSIVE.cast_unsigned();
    }
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// Attaches a mount object at `target`; see move_mount(2).
///
/// # Errors
///
/// Those of the call.
pub fn attach_mount(tree: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    let target = cstring(target)?;
    // SAFETY: both strings are NUL-terminated and outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_SYMLINKS,
        )
    })?;
    Ok(())
}

/// What mount_setattr(2) changes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct MountAttr {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0.
    pub propagation: u64,
}

impl MountAttr {
    /// Whether there is nothing to change.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Changes the attributes of a mount, or of the whole tree below it.
///
/// # Errors
///
/// Those of mount_setattr(2).
pub fn set_mount_attr(mount: BorrowedFd<'_>, attr: MountAttr, recursive: bool) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attr.set,
        attr_clr: attr.clear,
        propagation: attr.propagation,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: string and structure outlive the call; the size is the structure's.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    })?;
    Ok(())
}

fn prctl(option: libc::c_int, arg2: libc::c_ulong, arg3: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used in this module take integers only.
    Errno::result(unsafe { libc::prctl(option, arg2, arg3, 0, 0) })?;
    Ok(())
}

/// Hides this process's /proc files (its executable above all) from the
/// processes it is about to share a PID namespace with.
///
/// # Errors
///
/// Those of prctl(2).
pub fn set_undumpable() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0, 0)
}

/// Orphans of our descendants become our children.
///
/// # Errors
///
/// Those of prctl(2).
pub fn set_child_subreaper() -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0)
}

/// SIGKILL when the parent ends.
///
/// # Errors
///
/// Those of prctl(2).
pub fn die_with_parent() -> io::Result<()> {
    prctl(
        libc::PR_SET_PDEATHSIG,
        libc::SIGKILL.unsigned_abs().into(),
        0,
    )
}

/// Sets `no_new_privs`.
///
/// # Errors
///
/// Those of prctl(2).
pub fn set_no_new_privs() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
}

/// Keeps permitted capabilities over the next setuid(2).
///
/// # Errors
///
/// Those of prctl(2).
pub fn keep_capabilities() -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, 1, 0)
}

/// Removes a capability from the bounding set. `EINVAL`: the kernel has none
/// with this number.
///
/// # Errors
///
/// Those of prctl(2).
pub fn drop_bounding(capability: u8) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0)
}

/// Adds a capability to the ambient set.
///
/// # Errors
///
/// Those of prctl(2).
pub fn raise_ambient(capability: u8) -> io::Result<()> {
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_RAISE.cast_unsigned().into(),
        capability.into(),
    )
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Sets the three capability sets of this thread, given as bit masks.
///
/// # Errors
///
/// Those of capset(2).
pub fn capset(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
    let header = CapHeader {
        version: LINUX_CAPABILITY_VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| {
        let word = |mask: u64| ((mask >> shift) & u64::from(u32::MAX)) as u32;
        CapData {
            effective: word(effective),
            permitted: word(permitted),
            inheritable: word(inheritable),
        }
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 takes a header and two data structures, which outlive
    // the call.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// Installs a seccomp filter for this thread; see seccomp(2).
///
/// # Errors
///
/// `E2BIG` for a filter longer than the kernel takes, else those of the call.
pub fn install_seccomp(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| Errno::E2BIG)?;
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies the program, which outlives the call; it does
    // not write to it.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })?;
    Ok(())
}

/// Marks all descriptors from `first` on close-on-exec.
///
/// # Errors
///
/// Those of close_range(2).
pub fn cloexec_from(first: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed; descriptors stay open until exec.
    check(unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first.cast_unsigned(),
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    })?;
    Ok(())
}

/// Clears close-on-exec.
///
/// # Errors
///
/// Those of fcntl(2).
pub fn inherit(fd: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
    Ok(())
}

/// Takes ownership of a descriptor the parent process left us.
#[must_use]
pub fn inherited(fd: RawFd) -> OwnedFd {
    // SAFETY: callers name the descriptors their parent passed by agreement;
    // nothing else in this process owns them.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WindowSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// Sets the size of a terminal, at either end.
///
/// # Errors
///
/// Those of the ioctl.
pub fn set_window_size(terminal: impl AsFd, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: size.height,
        ws_col: size.width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    Errno::result(unsafe {
        libc::ioctl(
            terminal.as_fd().as_raw_fd(),
            libc::TIOCSWINSZ,
            &raw const size,
        )
    })?;
    Ok(())
}

/// Unlocks the pseudo terminal `master` and opens its other end. Also returns
/// its number under /dev/pts.
///
/// # Errors
///
/// Those of the ioctls; `ENOTTY` if this is no pseudo terminal.
pub fn open_terminal_peer(master: impl AsFd) -> io::Result<(OwnedFd, u32)> {
    let raw = master.as_fd().as_raw_fd();
    let unlock: libc::c_int = 0;
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCSPTLCK reads one int, TIOCGPTN writes one unsigned int.
    unsafe {
        Errno::result(libc::ioctl(raw, libc::TIOCSPTLCK, &raw const unlock))?;
        Errno::result(libc::ioctl(raw, libc::TIOCGPTN, &raw mut number))?;
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value and returns a new descriptor.
    let peer = owned(unsafe { libc::ioctl(raw, libc::TIOCGPTPEER, flags) }.into())?;
    Ok((peer, number))
}

/// Has the kernel look for the partitions of a disk.
///
/// # Errors
///
/// Those of the ioctl; `EBUSY` while one of those it knows is in use.
pub fn scan_partitions(disk: impl AsFd) -> io::Result<()> {
    /// linux/fs.h, `_IO(0x12, 95)`.
    const BLKRRPART: libc::Ioctl = 0x125f;
    // SAFETY: BLKRRPART takes nothing.
    Errno::result(unsafe { libc::ioctl(disk.as_fd().as_raw_fd(), BLKRRPART) })?;
    Ok(())
}

/// Makes standard input the controlling terminal of this session.
///
/// # Errors
///
/// Those of the ioctl.
pub fn set_controlling_terminal() -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
    Ok(())
}

/// Puts `fd` (also) at the number `number`, not close-on-exec.
///
/// # Errors
///
/// Those of dup2(2).
pub fn dup_to(fd: impl AsFd, number: RawFd) -> io::Result<()> {
    // SAFETY: dup2 passes no pointers. What was open at `number` belongs to
    // nobody: it is one of the standard streams, which nothing here owns.
    Errno::result(unsafe { libc::dup2(fd.as_fd().as_raw_fd(), number) })?;
    Ok(())
}

/// Sets the supplementary groups of this thread, bypassing glibc's
/// all-threads wrapper.
///
/// # Errors
///
/// Those of setgroups(2).
pub fn set_groups(groups: &[libc::gid_t]) -> io::Result<()> {
    // SAFETY: pointer and length describe the slice.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// setdomainname(2).
///
/// # Errors
///
/// Those of the call.
pub fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe the string.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) })?;
    Ok(())
}

/// Brings the loopback interface of the current network namespace up.
///
/// # Errors
///
/// Those of socket(2) and the ioctl.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: no pointers are passed.
    let socket = owned(
        unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }.into(),
    )?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which outlives the call.
    Errno::result(unsafe {
        libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request)
    })?;
    Ok(())
}

/// Replaces the process image. Returns only to report an error.
#[must_use]
pub fn exec(path: &CStr, args: &[CString], env: &[CString]) -> io::Error {
    match nix::unistd::execve(path, args, env) {
        Ok(never) => match never {},
        Err(errno) => errno.into(),
    }
}

/// Loads a program of type `BPF_PROG_TYPE_CGROUP_DEVICE`.
///
/// # Errors
///
/// Those of bpf(2): `EPERM` where it is not permitted, `EINVAL` or `EACCES` for
/// a program the verifier refuses.
pub fn bpf_load_device(program: &[crate::cgroup::devices::Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    /// The part of `union bpf_attr` used here; the kernel takes the rest as 0.
    #[repr(C)]
    struct Load {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
    }
    let attr = Load {
        program_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        instructions: program.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
    };
    // SAFETY: the pointers in the structure and the structure itself outlive
    // the call; the kernel only reads them.
    owned(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            &raw const attr,
            size_of::<Load>(),
        )
    })
}

/// Attaches a device program to a cgroup, besides those that may be there.
///
/// # Errors
///
/// Those of bpf(2).
pub fn bpf_attach_device(cgroup: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    #[repr(C)]
    struct Attach {
        target: i32,
        program: i32,
        attach_type: u32,
        flags: u32,
    }
    let attr = Attach {
        target: cgroup.as_raw_fd(),
        program: program.as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the structure outlives the call; the kernel only reads it.
    check(unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_ATTACH,
            &raw const attr,
            size_of::<Attach>(),
        )
    })?;
    Ok(())
}

/// Collects one exited child: PID, and exit code or 128 + signal. `None` if
/// there is none now.
///
/// (nix's waitpid loses the child when a real-time signal ended it.)
#[must_use]
pub fn reap() -> Option<(libc::pid_t, u32)> {
    let mut status: libc::c_int = 0;
    loop {
        // SAFETY: `status` outlives the call.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid > 0 {
            let code = if libc::WIFSIGNALED(status) {
                128 + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            return Some((pid, code.cast_unsigned()));
        }
        if pid == 0 || Errno::last() != Errno::EINTR {
            return None;
        }
    }
}

/// kill(2) with any signal number, real-time signals too.
///
/// # Errors
///
/// Those of the call.
pub fn kill(pid: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: no pointers are passed.
    Errno::result(unsafe { libc::kill(pid, signal) })?;
    Ok(())
}

/// Writes to closed pipes fail instead of killing us.
pub fn ignore_sigpipe() {
    // SAFETY: SIG_IGN runs no code of ours; SIGPIPE is a valid signal.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
    }
}
