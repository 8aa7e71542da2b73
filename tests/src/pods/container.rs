//! A container of a pod, before it is made and after.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::Status;

use super::Pod;
use crate::cri::Cri;
use crate::cri::messages::*;
use crate::cri::owned;
use crate::cri::stream::Stream;
use crate::{BUSYBOX, Said, eventually};

/// What kubelet would make of a container in a pod's manifest.
#[derive(Clone)]
pub struct ContainerManifest<'p, 's> {
    pod: &'p Pod<'s>,
    limit: Duration,
    config: ContainerConfig,
}

impl<'p, 's> ContainerManifest<'p, 's> {
    pub(super) fn new(pod: &'p Pod<'s>, name: &str, command: &[&str]) -> Self {
        let sandbox = pod.config.linux.clone().unwrap_or_default();
        let security = sandbox.security_context.unwrap_or_default();
        let linux = LinuxContainerConfig {
            resources: Some(LinuxContainerResources::default()),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: security.namespace_options,
                ..Default::default()
            }),
        };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: BUSYBOX.into(),
            }),
            command: owned(command),
            log_path: format!("{name}_0.log"),
            linux: Some(linux),
            ..Default::default()
        };
        Self {
            pod,
            limit: pod.scene.cri().limit(),
            config,
        }
    }

    /// With anything changed that has no word of its own here.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Of another image than busybox.
    #[must_use]
    pub fn image(mut self, name: &str) -> Self {
        self.config.image = Some(ImageSpec { image: name.into() });
        self
    }

    /// The `attempt`th of its name.
    #[must_use]
    pub fn attempt(mut self, attempt: u32) -> Self {
        let metadata = self.config.metadata.get_or_insert_default();
        metadata.attempt = attempt;
        self.config.log_path = format!("{}_{attempt}.log", metadata.name);
        self
    }

    /// With a directory or file of the host.
    #[must_use]
    pub fn mount(self, host: &Path, container: &str) -> Self {
        self.mount_as(host, container, false)
    }

    /// The same, read-only.
    #[must_use]
    pub fn mount_read_only(self, host: &Path, container: &str) -> Self {
        self.mount_as(host, container, true)
    }

    fn mount_as(mut self, host: &Path, container: &str, readonly: bool) -> Self {
        // kubelet has volumes follow the pod's users.
        let users = self.linux().security_context.as_ref();
        let users = users.and_then(|security| security.namespace_options.as_ref());
        let users = users.and_then(|options| options.userns_options.clone());
        let users = users.unwrap_or_default();
        self.config.mounts.push(Mount {
            container_path: container.into(),
            host_path: host.display().to_string(),
            readonly,
            uid_mappings: users.uids,
            gid_mappings: users.gids,
            ..Default::default()
        });
        self
    }

    /// With a volume mounted as `change` says.
    #[must_use]
    pub fn mount_with(
        mut self,
        host: &Path,
        container: &str,
        change: impl FnOnce(&mut Mount),
    ) -> Self {
        self = self.mount(host, container);
        if let Some(mount) = self.config.mounts.last_mut() {
            change(mount);
        }
        self
    }

    /// `volumeDevices`, with kubelet's permissions: `mrw`, or `r` if read-only.
    #[must_use]
    pub fn device(mut self, host: &str, container: &str, permissions: &str) -> Self {
        self.config.devices.push(Device {
            container_path: container.into(),
            host_path: host.into(),
            permissions: permissions.into(),
        });
        self
    }

    /// With a device by its name of CDI, `vendor.com/gpu=0`.
    #[must_use]
    pub fn cdi_device(mut self, name: &str) -> Self {
        self.config
            .cdi_devices
            .push(CdiDevice { name: name.into() });
        self
    }

    fn linux(&mut self) -> &mut LinuxContainerConfig {
        self.config.linux.get_or_insert_default()
    }

    /// With a security context changed.
    #[must_use]
    pub fn security(mut self, change: impl FnOnce(&mut LinuxContainerSecurityContext)) -> Self {
        change(self.linux().security_context.get_or_insert_default());
        self
    }

    /// `runAsUser`, `runAsGroup`.
    #[must_use]
    pub fn run_as(self, uid: i64, gid: i64) -> Self {
        self.security(|security| {
            security.run_as_user = Some(Int64Value { value: uid });
            security.run_as_group = Some(Int64Value { value: gid });
        })
    }

    /// With limits.
    #[must_use]
    pub fn resources(mut self, change: impl FnOnce(&mut LinuxContainerResources)) -> Self {
        change(self.linux().resources.get_or_insert_default());
        self
    }

    /// With `tty: true` and `stdin: true`.
    #[must_use]
    pub fn tty(mut self) -> Self {
        (self.config.tty, self.config.stdin) = (true, true);
        self
    }

    /// With `stdin: true`.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.config.stdin = true;
        self
    }

    /// `stdin: true` and `stdinOnce: true`: its input ends with the first who attaches.
    #[must_use]
    pub fn stdin_once(mut self) -> Self {
        (self.config.stdin, self.config.stdin_once) = (true, true);
        self
    }

    /// Made within so much time, or not at all as far as this client knows.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// `CreateContainer`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn try_create(self) -> Result<PodContainer, Status> {
        let cri = self.pod.scene.cri().clone();
        let id = cri
            .within(self.limit)
            .create(&self.pod.id, &self.pod.config, &self.config)?;
        let log = Path::new(&self.pod.config.log_directory).join(&self.config.log_path);
        Ok(PodContainer { cri, id, log })
    }

    /// `CreateContainer`.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[must_use]
    #[track_caller]
    pub fn create(self) -> PodContainer {
        let created = self.try_create();
        created.unwrap_or_else(|error| panic!("create the container: {error}"))
    }

    /// `CreateContainer` and `StartContainer`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn try_start(self) -> Result<PodContainer, Status> {
        let container = self.try_create()?;
        container.cri.start(&container.id)?;
        Ok(container)
    }

    /// `CreateContainer` and `StartContainer`.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[must_use]
    #[track_caller]
    pub fn start(self) -> PodContainer {
        let started = self.try_start();
        started.unwrap_or_else(|error| panic!("start the container: {error}"))
    }

    /// Runs it to its end; what it wrote is taken from its log.
    #[must_use]
    #[track_caller]
    pub fn run(self) -> Said {
        let container = self.start();
        let status = container.await_exit();
        container.said(status.exit_code)
    }
}

/// A line of a container's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether it is the end of a line, not a part.
    pub full: bool,
    /// Without the end of line.
    pub text: String,
}

/// A container that was made.
pub struct PodContainer {
    cri: Cri,
    /// containerd's id.
    pub id: String,
    /// Its log file.
    pub log: PathBuf,
}

impl PodContainer {
    /// `ContainerStatus`.
    ///
    /// # Panics
    ///
    /// When containerd does not know it.
    #[must_use]
    #[track_caller]
    pub fn status(&self) -> ContainerStatus {
        let status = self.cri.status(&self.id);
        status.unwrap_or_else(|error| panic!("{}: {error}", self.id))
    }

    /// Its state.
    #[must_use]
    #[track_caller]
    pub fn state(&self) -> ContainerState {
        self.status().state()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn await_exit(&self) -> ContainerStatus {
        eventually(&format!("{} has exited", self.id), || {
            self.state() == ContainerState::Exited
        });
        self.status()
    }

    /// `StartContainer`.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[track_caller]
    pub fn start(&self) {
        let started = self.cri.start(&self.id);
        started.unwrap_or_else(|error| panic!("start {}: {error}", self.id));
    }

    /// `StopContainer`.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[track_caller]
    pub fn stop(&self, grace: Duration) {
        let stopped = self.cri.stop(&self.id, grace);
        stopped.unwrap_or_else(|error| panic!("stop {}: {error}", self.id));
    }

    /// `RemoveContainer`.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[track_caller]
    pub fn remove(&self) {
        let removed = self.cri.remove(&self.id);
        removed.unwrap_or_else(|error| panic!("remove {}: {error}", self.id));
    }

    /// `ExecSync`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn try_exec(&self, command: &[&str], limit: Duration) -> Result<Said, Status> {
        let answer = self.cri.exec_sync(&self.id, command, limit)?;
        Ok(Said {
            code: Some(answer.exit_code),
            stdout: String::from_utf8_lossy(&answer.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// `ExecSync` without a limit.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[must_use]
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Said {
        let said = self.try_exec(command, Duration::ZERO);
        said.unwrap_or_else(|error| panic!("{command:?}: {error}"))
    }

    /// A shell command, as [`Self::exec`].
    #[must_use]
    #[track_caller]
    pub fn sh(&self, script: &str) -> Said {
        self.exec(&["sh", "-c", script])
    }

    /// `Exec`, with input.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[must_use]
    #[track_caller]
    pub fn exec_stream(&self, command: &[&str], tty: bool) -> Stream {
        let url = self.cri.exec(ExecRequest {
            container_id: self.id.clone(),
            cmd: owned(command),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        });
        Stream::open(&url.unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// `Attach`, with input.
    ///
    /// # Panics
    ///
    /// When containerd refuses.
    #[must_use]
    #[track_caller]
    pub fn attach(&self, tty: bool) -> Stream {
        let url = self.cri.attach(AttachRequest {
            container_id: self.id.clone(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
        });
        Stream::open(&url.unwrap_or_else(|error| panic!("attach: {error}")))
    }

    /// The lines of its log, each with its time taken off.
    ///
    /// # Panics
    ///
    /// When the log is not one of CRI.
    #[must_use]
    #[track_caller]
    pub fn log(&self) -> Vec<LogLine> {
        let text = fs::read_to_string(&self.log);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", self.log.display()));
        // A line that is being written has no end yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(log_line).collect()
    }

    /// What its log has of a stream.
    #[must_use]
    #[track_caller]
    pub fn logged(&self, stream: &str) -> String {
        let lines = self.log().into_iter().filter(|line| line.stream == stream);
        lines.fold(String::new(), |text, line| {
            let end = if line.full { "\n" } else { "" };
            text + &line.text + end
        })
    }

    /// Waits until its log has a line.
    #[track_caller]
    pub fn await_logged(&self, stream: &str, text: &str) {
        eventually(&format!("{text:?} in {}", self.log.display()), || {
            self.log.exists() && self.logged(stream).contains(text)
        });
    }

    fn said(&self, code: i32) -> Said {
        Said {
            code: Some(code),
            stdout: self.logged("stdout"),
            stderr: self.logged("stderr"),
        }
    }
}

/// Takes `TIME STREAM F|P TEXT` apart.
#[track_caller]
fn log_line(line: &str) -> LogLine {
    let mut parts = line.splitn(4, ' ');
    let mut next = || {
        parts
            .next()
            .unwrap_or_else(|| panic!("no log line: {line:?}"))
    };
    let time = next();
    assert!(time.contains('T') && time.len() > 20, "no time: {line:?}");
    let (stream, tag) = (next().to_owned(), next());
    assert!(["F", "P"].contains(&tag), "no tag: {line:?}");
    LogLine {
        stream,
        full: tag == "F",
        text: next().to_owned(),
    }
}
