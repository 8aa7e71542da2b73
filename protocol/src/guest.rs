//! Names both sides of the guest boundary agree on: vsock ports and paths.

/// Port on the host (CID 2) that the agent dials once, when it is ready. The
/// monitor hands the connection to the shim; the agent serves `agent.proto` on
/// it. The guest can dial no other port.
pub const AGENT_PORT: u32 = 1024;

/// Port the agent listens on for stdio streams. Each connection starts with
/// the stream's id, 8 bytes little-endian.
pub const STREAM_PORT: u32 = 1025;

/// Port the agent listens on for connections to the pod's loopback. Each starts
/// with the TCP port that it is for, 2 bytes little-endian; without anybody there
/// it is closed.
pub const FORWARD_PORT: u32 = 1026;

/// The guest's vsock context id. CIDs are local to a VM here (the monitor
/// implements the device itself), so every guest has the same one.
pub const GUEST_CID: u64 = 3;

/// virtio-fs tag of the pod's shared directory.
pub const SHARED_TAG: &str = "shared";

/// Where the guest mounts the shared directory.
pub const SHARED_DIR: &str = "/run/nacre/shared";

/// Stands, in a container's spec, for the PID namespace that the containers of a
/// pod share: the path of a PID namespace to join. The agent makes it with the
/// first container that asks for it.
pub const POD_PID_NAMESPACE: &str = "/run/nacre/pod/pid";

/// Per-container directories of the guest:
/// `CONTAINERS_DIR/<container id>/{rootfs,layers/,files/,...}`.
pub const CONTAINERS_DIR: &str = "/run/nacre/containers";

/// Where the guest mounts driver images: `DRIVERS_DIR/<number>`, from 0.
pub const DRIVERS_DIR: &str = "/run/nacre/drivers";

/// Directories that containers of the guest share: `VOLUMES_DIR/<name>`.
pub const VOLUMES_DIR: &str = "/run/nacre/volumes";

/// Seconds that the start of a container may take beside its own `startContainer` hooks.
/// Those of driver images, of which the host knows nothing, have no more.
pub const START_SECONDS: u64 = 10;

/// Seconds that the guest's kernel may take to find a PCI device in a hot-plug slot. Its driver
/// waits a second for the link and looks then; the rest is for a host that is busy.
pub const ARRIVAL_SECONDS: u64 = 20;

/// Seconds that a driver is given to take a PCI device, its modules loaded first. That of a GPU
/// loads firmware and takes ten and more. The guest does not cut it short.
pub const PROBE_SECONDS: u64 = 30;

/// Seconds that the disks of a storage controller may take. One may have none.
pub const DISKS_SECONDS: u64 = 10;

/// The size of a huge page, in KiB, from its name as resources have it: "2MB"
/// (runtime-spec 1.2, config-linux.md, "Huge page limits").
#[must_use]
pub fn huge_page_kib(name: &str) -> Option<u64> {
    let (number, unit) = [("KB", 1), ("MB", 1 << 10), ("GB", 1 << 20)]
        .iter()
        .find_map(|(suffix, unit)| Some((name.strip_suffix(suffix)?, unit)))?;
    number
        .parse::<u64>()
        .ok()?
        .checked_mul(*unit)
        .filter(|kib| kib.is_power_of_two() && *kib <= 1 << 24)
}

/// Bytes that a limit of huge pages lets a container have for certain: without a limit
/// none. cgroup v1's word for "no limit" is the largest multiple of a page.
#[must_use]
pub fn huge_page_bytes(limit: i64) -> u64 {
    u64::try_from(limit)
        .ok()
        .filter(|bytes| *bytes < 1 << 62)
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_without_a_limit() {
        assert_eq!(huge_page_bytes(2 << 20), 2 << 20);
        for none in [-1, 0, i64::MAX, i64::MAX & !0xfff] {
            assert_eq!(huge_page_bytes(none), 0, "{none}");
        }
    }

    #[test]
    fn names_of_huge_pages() {
        let named = ["64KB", "2MB", "1GB", "16GB"].map(huge_page_kib);
        assert_eq!(named, [64, 2 << 10, 1 << 20, 16 << 20].map(Some));
        for bad in [
            "",
            "2",
            "2M",
            "2 MB",
            "-2MB",
            "3MB",
            "0KB",
            "32GB",
            "99999999999999GB",
        ] {
            assert_eq!(huge_page_kib(bad), None, "{bad}");
        }
    }
}
