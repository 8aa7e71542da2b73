//! The one map from the shim's errors to ttrpc status codes.
//!
//! containerd decides by code: `NOT_FOUND` on Kill and Delete means "already
//! gone, carry on", `UNAVAILABLE` means "the shim or its VM is dead, clean up".
//! So each code is given only where it means that.
//!
//! To a start that fails neither containerd nor kubelet does anything else by the code: the
//! one cleans up, the other tries again. There it tells people and their tools who can mend
//! it: whoever wrote the request (`INVALID_ARGUMENT`), whoever has the host, so that the same
//! request succeeds (`FAILED_PRECONDITION`, `RESOURCE_EXHAUSTED`), or neither (`INTERNAL`).

use ttrpc::Code;

use crate::cgroup::CgroupError;
use crate::machine::MachineError;
use crate::network::NetworkError;
use crate::rundir::RunDirError;
use crate::sandbox::SandboxError;
use crate::storage::StorageError;
use crate::task::TaskError;
use crate::task::console::ConsoleError;

/// Writes an error and its sources on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

fn code(error: &TaskError) -> Code {
    match error {
        TaskError::NoContainer(_)
        | TaskError::NoExec { .. }
        | TaskError::NoSandbox(_)
        | TaskError::Finished { .. } => Code::NOT_FOUND,
        TaskError::ContainerExists(_)
        | TaskError::ExecExists { .. }
        | TaskError::SandboxExists(_) => Code::ALREADY_EXISTS,
        TaskError::WrongPhase { .. } | TaskError::GivenUp(_) => Code::FAILED_PRECONDITION,
        TaskError::Invalid(_) | TaskError::Spec { .. } => Code::INVALID_ARGUMENT,
        TaskError::Unsupported(_) | TaskError::Hook(_) => Code::UNIMPLEMENTED,
        TaskError::Timeout { .. } => Code::DEADLINE_EXCEEDED,
        TaskError::Machine(error) => machine_code(error),
        TaskError::Sandbox(error) => sandbox_code(error),
        TaskError::Storage(error) => storage_code(error),
        TaskError::Io(_) | TaskError::Encode(_) | TaskError::Cancelled => Code::INTERNAL,
    }
}

fn storage_code(error: &StorageError) -> Code {
    match error {
        StorageError::ContainerId(_)
        | StorageError::UnsupportedRootfs { .. }
        | StorageError::RootfsOption { .. }
        | StorageError::TooManyLayers { .. }
        | StorageError::NoRootfs(_)
        | StorageError::VolumeRefused { .. }
        | StorageError::Device { source: None, .. } => Code::INVALID_ARGUMENT,
        // The same request is right once the host has it.
        StorageError::NeedsDisk { .. }
        | StorageError::VolumeSource { .. }
        | StorageError::Device {
            source: Some(_), ..
        } => Code::FAILED_PRECONDITION,
        StorageError::Users { .. }
        | StorageError::VolumeCopy { .. }
        | StorageError::Host { .. } => Code::INTERNAL,
    }
}

fn sandbox_code(error: &SandboxError) -> Code {
    match error {
        SandboxError::HostNetwork { .. }
        | SandboxError::HostNamespace { .. }
        | SandboxError::Invalid(_) => Code::INVALID_ARGUMENT,
        SandboxError::Machine(error) => machine_code(error),
        SandboxError::Network(error) => network_code(error),
        SandboxError::Cgroup(error) => cgroup_code(error),
        SandboxError::RunDir(error) => run_dir_code(error),
        SandboxError::Agent { answer, .. } => agent_code(answer),
        SandboxError::AgentSilent { .. }
        | SandboxError::Late { .. }
        | SandboxError::PlugTimeout { .. } => Code::DEADLINE_EXCEEDED,
        SandboxError::Stopped | SandboxError::Kubelet { .. } => Code::UNAVAILABLE,
        SandboxError::NoHotplug { .. }
        | SandboxError::Devices { .. }
        | SandboxError::Claim { .. }
        | SandboxError::OpenDevices { .. }
        | SandboxError::Drivers { .. }
        | SandboxError::NoSlot { .. }
        | SandboxError::NoPciSlot { .. }
        | SandboxError::LostDevice { .. }
        | SandboxError::NotBooted { .. }
        | SandboxError::TooLarge { .. }
        | SandboxError::Pinned { .. } => Code::FAILED_PRECONDITION,
        SandboxError::NotGrown { .. }
        | SandboxError::NoVcpus { .. }
        | SandboxError::OutOfMemory { .. } => Code::RESOURCE_EXHAUSTED,
        SandboxError::Io { .. } | SandboxError::Virtiofsd(_) | SandboxError::Hook(_) => {
            Code::INTERNAL
        }
    }
}

fn network_code(error: &NetworkError) -> Code {
    match error {
        NetworkError::HostNetwork => Code::INVALID_ARGUMENT,
        NetworkError::Queues(_) | NetworkError::Tap { .. } => Code::FAILED_PRECONDITION,
        NetworkError::System { .. }
        | NetworkError::Netlink { .. }
        | NetworkError::Interface { .. } => Code::INTERNAL,
    }
}

fn run_dir_code(error: &RunDirError) -> Code {
    match error {
        RunDirError::BadId(_) => Code::INVALID_ARGUMENT,
        RunDirError::NoUid { .. } => Code::RESOURCE_EXHAUSTED,
        // Not UNAVAILABLE: it is not this pod's machine that is dead.
        RunDirError::NotGone { .. } => Code::FAILED_PRECONDITION,
        RunDirError::Io { .. } | RunDirError::Malformed { .. } => Code::INTERNAL,
    }
}

fn cgroup_code(error: &CgroupError) -> Code {
    match error {
        CgroupError::BadPath(_) | CgroupError::Inside(_) => Code::INVALID_ARGUMENT,
        CgroupError::NotV2(_) | CgroupError::Exists(_) | CgroupError::Elsewhere { .. } => {
            Code::FAILED_PRECONDITION
        }
        CgroupError::Systemd { .. } | CgroupError::Io { .. } => Code::INTERNAL,
    }
}

fn machine_code(error: &MachineError) -> Code {
    match error {
        MachineError::Stopped(_) | MachineError::Channel(_) => Code::UNAVAILABLE,
        MachineError::Slots(_) => Code::FAILED_PRECONDITION,
        MachineError::DiskBusy { .. } => Code::DEADLINE_EXCEEDED,
        MachineError::Spawn(_)
        | MachineError::Io { .. }
        | MachineError::Disk { .. }
        | MachineError::Nic(_)
        | MachineError::SharedDir(_) => Code::INTERNAL,
    }
}

/// The guest chooses this code, so only the meanings agent.proto names pass.
fn agent_code(error: &ttrpc::Error) -> Code {
    match error {
        ttrpc::Error::RpcStatus(status) => match status.code() {
            code @ (Code::NOT_FOUND
            | Code::ALREADY_EXISTS
            | Code::FAILED_PRECONDITION
            | Code::INVALID_ARGUMENT
            | Code::UNIMPLEMENTED
            | Code::DEADLINE_EXCEEDED) => code,
            _ => Code::INTERNAL,
        },
        ttrpc::Error::Socket(_)
        | ttrpc::Error::Nix(_)
        | ttrpc::Error::LocalClosed
        | ttrpc::Error::RemoteClosed
        | ttrpc::Error::Eof => Code::UNAVAILABLE,
        ttrpc::Error::Others(_) => Code::INTERNAL,
    }
}

fn console_code(error: &ConsoleError) -> Code {
    match error {
        ConsoleError::Off { .. } | ConsoleError::NotBooted | ConsoleError::Shell { .. } => {
            Code::FAILED_PRECONDITION
        }
        ConsoleError::Exists { .. } => Code::ALREADY_EXISTS,
        ConsoleError::NotFound { .. } => Code::NOT_FOUND,
        ConsoleError::Task(error) => code(error),
    }
}

impl From<ConsoleError> for ttrpc::Error {
    fn from(error: ConsoleError) -> Self {
        ttrpc::error::get_rpc_status(console_code(&error), chain(&error))
    }
}

impl TaskError {
    /// The answer to a call on a pod; its text names the pod.
    pub(crate) fn of_pod(&self, sandbox_id: &str) -> ttrpc::Error {
        let mut text = chain(self);
        if !text.contains(sandbox_id) {
            text = format!("pod {sandbox_id}: {text}");
        }
        ttrpc::error::get_rpc_status(code(self), text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use ttrpc::error::get_rpc_status;

    fn agent_error(answer: ttrpc::Error) -> Code {
        sandbox_code(&SandboxError::Agent {
            what: "test",
            answer,
        })
    }

    #[test]
    fn the_guest_cannot_invent_codes() {
        assert_eq!(
            agent_error(get_rpc_status(Code::NOT_FOUND, "x")),
            Code::NOT_FOUND
        );
        assert_eq!(
            agent_error(get_rpc_status(Code::UNAVAILABLE, "x")),
            Code::INTERNAL
        );
        assert_eq!(agent_error(get_rpc_status(Code::OK, "x")), Code::INTERNAL);
        assert_eq!(agent_error(ttrpc::Error::RemoteClosed), Code::UNAVAILABLE);
    }

    #[test]
    fn errors_of_a_pod_name_it_once() {
        let text = |error: TaskError| match error.of_pod("5a5a") {
            ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
            other => panic!("{other}"),
        };
        let silent = TaskError::from(SandboxError::AgentSilent { seconds: 7 });
        let (code, said) = text(silent);
        assert_eq!(code, Code::DEADLINE_EXCEEDED);
        assert!(said.starts_with("pod 5a5a: the guest's agent"), "{said}");
        let (_, said) = text(TaskError::NoSandbox("5a5a".into()));
        assert_eq!(said, "no sandbox 5a5a");
    }

    /// Who asked can mend it, or the host's administrator, or nobody.
    #[test]
    fn mistakes_of_the_caller_are_told_from_failures() {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let volume = StorageError::VolumeSource {
            container_id: "c".into(),
            destination: "/mnt".into(),
            source_path: "/none".into(),
            source: missing(),
        };
        let device = |source| StorageError::Device {
            container_id: "c".into(),
            path: "/dev/x".into(),
            reason: "is no disk".into(),
            source,
        };
        let tap = NetworkError::Tap {
            name: "tap_2".into(),
            source: missing(),
        };
        let uids = RunDirError::NoUid { base: 1, count: 1 };
        let (asked, host) = (Code::INVALID_ARGUMENT, Code::FAILED_PRECONDITION);
        for (expected, error) in [
            (asked, TaskError::from(StorageError::NoRootfs("c".into()))),
            (asked, device(None).into()),
            (host, device(Some(missing())).into()),
            (host, volume.into()),
            (host, SandboxError::from(tap).into()),
            (Code::RESOURCE_EXHAUSTED, SandboxError::from(uids).into()),
            (asked, SandboxError::from(NetworkError::HostNetwork).into()),
            (
                asked,
                SandboxError::from(CgroupError::BadPath("x".into())).into(),
            ),
            (
                host,
                SandboxError::from(CgroupError::NotV2("/sys".into())).into(),
            ),
            (
                host,
                StorageError::NeedsDisk {
                    container_id: "c".into(),
                    fstype: "ext4".into(),
                }
                .into(),
            ),
            (
                Code::INTERNAL,
                StorageError::Host {
                    action: "mount",
                    path: "/mnt".into(),
                    source: missing(),
                }
                .into(),
            ),
        ] {
            assert_eq!(code(&error), expected, "{error}");
        }
    }

    #[test]
    fn sources_are_told_once_each() {
        let inner = std::io::Error::other("disk on fire");
        let error = MachineError::Io {
            what: "boot",
            source: inner,
        };
        assert_eq!(chain(&error), "boot: disk on fire");
    }
}
