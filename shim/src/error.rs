//! The one map from the shim's errors to ttrpc status codes.
//!
//! containerd decides by code: `NOT_FOUND` on Kill and Delete means "already
//! gone, carry on", `UNAVAILABLE` means "the shim or its VM is dead, clean up".
//! So each code is given only where it means that.

use ttrpc::Code;

use crate::machine::MachineError;
use crate::sandbox::SandboxError;
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
        TaskError::Io(_) | TaskError::Storage(_) | TaskError::Encode(_) | TaskError::Cancelled => {
            Code::INTERNAL
        }
    }
}

fn sandbox_code(error: &SandboxError) -> Code {
    match error {
        SandboxError::HostNetwork { .. }
        | SandboxError::HostNamespace { .. }
        | SandboxError::Invalid(_) => Code::INVALID_ARGUMENT,
        SandboxError::Machine(error) => machine_code(error),
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
        SandboxError::Io { .. }
        | SandboxError::RunDir(_)
        | SandboxError::Config(_)
        | SandboxError::Network(_)
        | SandboxError::Cgroup(_)
        | SandboxError::Virtiofsd(_)
        | SandboxError::Hook(_) => Code::INTERNAL,
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
        | MachineError::Nic(_) => Code::INTERNAL,
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
