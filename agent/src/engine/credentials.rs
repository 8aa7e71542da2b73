//! Who the container's process is: capabilities, user, groups, limits.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid};
use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, PosixRlimit, PosixRlimitType, User,
};

use super::error::{InitError, Step};
use super::sys;

/// Capabilities by number (linux/capability.h).
const CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Highest number the kernel's 64-bit sets have room for.
const MAX_CAPABILITY: u8 = 63;

fn mask(set: Option<&Capabilities>) -> u64 {
    let Some(set) = set else { return 0 };
    (0u32..)
        .zip(CAPABILITIES)
        .filter(|(_, capability)| set.contains(capability))
        .fold(0, |mask, (number, _)| mask | 1 << number)
}

/// Capabilities this process may hand on: what it has itself.
fn permitted() -> u64 {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapPrm:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(u64::MAX)
}

/// What [`become_user`] needs to know before /proc changes hands.
#[derive(Debug, Clone, Copy)]
pub struct Permitted(u64);

impl Permitted {
    /// Reads this process's own permitted set.
    #[must_use]
    pub fn current() -> Self {
        Self(permitted())
    }
}

/// Gives up the agent's identity for the process's: bounding set, groups,
/// user, capabilities, ambient set, umask, in the order that leaves each step
/// the rights it needs.
///
/// Capabilities the agent itself lacks are left out, as runc does.
///
/// # Errors
///
/// Those of the system calls.
pub fn become_user(
    user: &User,
    capabilities: Option<&LinuxCapabilities>,
    own: Permitted,
) -> Result<(), InitError> {
    let set = |get: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        mask(capabilities.and_then(|all| get(all).as_ref())) & own.0
    };
    let bounding = set(LinuxCapabilities::bounding);
    drop_bounding(bounding)?;
    sys::keep_capabilities().step(|| "keep capabilities")?;
    sys::set_groups(user.additional_gids().as_deref().unwrap_or_default())
        .step(|| "set additional groups")?;
    nix::unistd::setgid(Gid::from_raw(user.gid())).step(|| format!("setgid {}", user.gid()))?;
    nix::unistd::setuid(Uid::from_raw(user.uid())).step(|| format!("setuid {}", user.uid()))?;
    sys::capset(
        set(LinuxCapabilities::effective),
        set(LinuxCapabilities::permitted),
        set(LinuxCapabilities::inheritable),
    )
    .step(|| "set capabilities")?;
    let ambient = set(LinuxCapabilities::ambient);
    for number in (0..=MAX_CAPABILITY).filter(|number| ambient >> number & 1 == 1) {
        // An ambient capability must be permitted and inheritable; one that is
        // not cannot be raised and is left out, as runc does.
        if let Err(error) = sys::raise_ambient(number)
            && error.kind() != io::ErrorKind::PermissionDenied
        {
            return Err(error).step(|| format!("raise ambient capability {number}"));
        }
    }
    if let Some(umask) = user.umask() {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(umask));
    }
    Ok(())
}

fn drop_bounding(keep: u64) -> Result<(), InitError> {
    for number in 0..=MAX_CAPABILITY {
        if keep >> number & 1 == 1 {
            continue;
        }
        match sys::drop_bounding(number) {
            // Past the last capability this kernel knows.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            result => result.step(|| format!("drop capability {number}"))?,
        }
    }
    Ok(())
}

/// Applies the resource limits.
///
/// # Errors
///
/// Those of setrlimit(2), with the limit's name.
pub fn set_rlimits(rlimits: &[PosixRlimit]) -> Result<(), InitError> {
    for limit in rlimits {
        setrlimit(resource(limit.typ()), limit.soft(), limit.hard())
            .step(|| format!("set {} to {}:{}", limit.typ(), limit.soft(), limit.hard()))?;
    }
    Ok(())
}

/// Raises what a process may raise its limits to, as far as [`set_rlimits`] will
/// want it. That takes rights in the guest's own user namespace.
///
/// # Errors
///
/// Those of getrlimit(2) and setrlimit(2), with the limit's name.
pub fn raise_limits(rlimits: &[PosixRlimit]) -> Result<(), InitError> {
    for limit in rlimits {
        let resource = resource(limit.typ());
        let what = || format!("raise {} to {}", limit.typ(), limit.hard());
        let (soft, hard) = getrlimit(resource).step(what)?;
        if limit.hard() > hard {
            setrlimit(resource, soft, limit.hard()).step(what)?;
        }
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_numbers() {
        let set: Capabilities = [
            Capability::Chown,
            Capability::NetRaw,
            Capability::SysAdmin,
            Capability::CheckpointRestore,
        ]
        .into_iter()
        .collect();
        assert_eq!(mask(Some(&set)), 1 | 1 << 13 | 1 << 21 | 1 << 40);
        assert_eq!(mask(None), 0);
    }
}
