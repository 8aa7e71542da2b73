//! Device nodes and links of the container's /dev.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};

use super::error::{InitError, Step};

/// The devices every container has (OCI runtime spec, "Default Devices").
const DEFAULT_DEVICES: [(&str, u64, u64); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
    ("pts/ptmx", "/dev/ptmx"),
];

/// Makes nodes and links, with a umask of 0, inside the container's root.
///
/// A /dev that is a bind mount is somebody else's and is left alone.
///
/// # Errors
///
/// The node that could not be made.
pub fn create(spec: &Spec) -> Result<(), InitError> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let foreign = mounts.iter().any(|mount| {
        mount.destination() == Path::new("/dev")
            && (mount.typ().as_deref() == Some("bind")
                || mount
                    .options()
                    .iter()
                    .flatten()
                    .any(|o| o == "bind" || o == "rbind"))
    });
    if foreign {
        return Ok(());
    }
    let listed = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.devices().as_deref());
    let listed = listed.unwrap_or_default();
    for device in listed {
        create_listed(device).step(|| format!("create device {}", device.path().display()))?;
    }
    for (path, major, minor) in DEFAULT_DEVICES {
        if !listed.iter().any(|device| device.path() == Path::new(path)) {
            let mode = Mode::from_bits_truncate(0o666);
            node(Path::new(path), SFlag::S_IFCHR, mode, makedev(major, minor))
                .step(|| format!("create device {path}"))?;
        }
    }
    for (target, link) in LINKS {
        if fs::symlink_metadata(link).is_err() {
            symlink(target, link).step(|| format!("create link {link}"))?;
        }
    }
    Ok(())
}

fn create_listed(device: &LinuxDevice) -> io::Result<()> {
    let kind = match device.typ() {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::C | LinuxDeviceType::U => SFlag::S_IFCHR,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        LinuxDeviceType::A => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    let mode = Mode::from_bits_truncate(device.file_mode().unwrap_or(0o666) & 0o7777);
    let path = Path::new("/").join(device.path());
    let device_number = makedev(number(device.major()), number(device.minor()));
    node(&path, kind, mode, device_number)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(mode.bits()))?;
    chown(&path, device.uid(), device.gid())
}

fn node(path: &Path, kind: SFlag, mode: Mode, number: u64) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    match mknod(path, kind, mode, number) {
        // An image with device nodes of its own in /dev.
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
