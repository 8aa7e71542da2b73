//! What a console's shell is made of: the host's program and an OCI spec.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use serde_json::json;

use super::super::TaskError;
use super::ConsoleError;
use crate::elf;

/// Where the shell is in its root.
pub(super) const SHELL: &str = "/bin/sh";
/// The largest shell: what ttrpc takes as one message, less the rest of it.
const MAX_SHELL_BYTES: u64 = (4 << 20) - (64 << 10);
/// Every capability (capabilities(7)).
const CAPABILITIES: &str = "AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF \
    CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL \
    LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST \
    NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYSLOG SYS_ADMIN SYS_BOOT SYS_CHROOT SYS_MODULE \
    SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG WAKE_ALARM";

/// The OCI spec of a shell: no namespace of its own but that of the mounts, no
/// limit, every right.
pub(super) fn spec(root: &Path, terminal_kind: &str) -> Vec<u8> {
    let all: Vec<_> = CAPABILITIES.split(' ').collect();
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": {"path": root},
        "process": {
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "args": [SHELL],
            "env": [
                "PATH=/bin",
                "PS1=guest:\\w# ",
                format!("TERM={terminal_kind}"),
            ],
            "capabilities": {"bounding": all, "effective": all, "permitted": all},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind"]},
            {"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind"]},
        ],
        "linux": {
            "namespaces": [{"type": "mount"}],
            "resources": {"devices": [{"allow": true, "access": "rwm"}]},
        },
    });
    spec.to_string().into_bytes()
}

/// Reads the configured shell.
///
/// # Errors
///
/// `Shell` for one that cannot run in a guest.
pub(super) async fn read(path: &Path) -> Result<Vec<u8>, ConsoleError> {
    let shell = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || read_static(&shell));
    let read = reading.await.map_err(|_| TaskError::Cancelled)?;
    read.map_err(|problem| ConsoleError::Shell {
        path: path.to_owned(),
        problem,
    })
}

fn read_static(path: &Path) -> Result<Vec<u8>, String> {
    let text = |error: io::Error| error.to_string();
    let mut file = File::open(path).map_err(text)?;
    let bytes = file.metadata().map_err(text)?.len();
    if bytes > MAX_SHELL_BYTES {
        return Err(format!(
            "{bytes} bytes are too many; at most {MAX_SHELL_BYTES} can be put into a guest"
        ));
    }
    elf::check_static(&mut file)?;
    file.rewind().map_err(text)?;
    let mut program = Vec::new();
    file.take(MAX_SHELL_BYTES)
        .read_to_end(&mut program)
        .map_err(text)?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_capability_is_one() {
        let spec = spec(Path::new("/root"), "vt100");
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&spec).unwrap();
        let process = spec.process().clone().unwrap();
        let capabilities = process.capabilities().clone().unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 41);
        assert_eq!(capabilities.permitted(), capabilities.bounding());
        let env = process.env().clone().unwrap();
        assert!(env.contains(&"TERM=vt100".to_owned()), "{env:?}");
    }

    #[test]
    fn shells_that_cannot_run_in_a_guest() {
        let problem = |path: &Path| read_static(path).unwrap_err();
        assert!(problem(Path::new("/nonexistent")).contains("No such file"));
        // This test has a loader.
        let this = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let start = directory.path().join("start");
        let mut bytes = std::fs::read(&this).unwrap();
        bytes.truncate(1 << 20);
        std::fs::write(&start, &bytes).unwrap();
        assert!(problem(&start).contains("not static"));
        bytes.resize(5 << 20, 0);
        std::fs::write(&start, &bytes).unwrap();
        assert!(problem(&start).contains("too many"));
    }
}
