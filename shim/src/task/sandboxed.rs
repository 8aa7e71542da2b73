//! containerd's Sandbox API: a pod whose sandbox is no task.
//!
//! In its default mode containerd's CRI makes each pod a sandbox container and
//! drives it by the Task API. With `sandboxer = "shim"` it calls this service
//! instead, which drives the same container: its spec is made here, of the pod's
//! configuration ([`sandbox_spec`]), and so are the files CRI would have made.
//!
//! | Sandbox API | of the sandbox container |
//! |---|---|
//! | CreateSandbox, StartSandbox | Create, Start |
//! | StopSandbox | the machine's end, and with it everybody's exit |
//! | WaitSandbox, SandboxStatus, SandboxMetrics | Wait, State, Stats |
//! | ShutdownSandbox | the shim's end, whatever the pod holds |
//!
//! The other containers come by the Task API in both modes. It does not know this
//! one, no event tells of it, and it is never deleted: it goes with the shim.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::*;
use containerd_shim_protos::sandbox_async::{Sandbox, create_sandbox};
use nacre_protocol::cri::PodSandboxConfig;
use protobuf::Message;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::TaskError;
use super::container::Container;
use super::io::StdioPaths;
use super::pod::Pod;
use super::process::{Phase, lock};
use super::service::{answer, detached};
use crate::events::timestamp;
use crate::oci::pod::sandbox_spec;
use crate::sandbox::{Api, ContainerConfig, SandboxError};
use crate::storage::PodFiles;

/// `runtime.v1.PodSandboxState` by name, as containerd reads it.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// What CreateSandbox has to carry, by its name in protobuf.
const CONFIG_TYPE: &str = "runtime.v1.PodSandboxConfig";
/// Key of containerd's own information on a sandbox, which is JSON.
const INFO: &str = "info";
/// Time the machine has to be gone.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The service of a pod, for a server.
pub fn create(pod: &Arc<Pod>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(SandboxService { pod: pod.clone() }))
}

struct SandboxService {
    pod: Arc<Pod>,
}

impl SandboxService {
    fn container(&self, sandbox_id: &str) -> ttrpc::Result<Arc<Container>> {
        answer(&self.pod, self.pod.sandbox_container(sandbox_id))
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        let pod = self.pod.clone();
        detached(&self.pod, async move { pod.create_sandbox(request).await }).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let pod = self.pod.clone();
        let container = self.container(&request.sandbox_id)?;
        let created_at = container.created_at();
        let pid = detached(&self.pod, async move { pod.start_in(&container, "").await }).await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: Some(timestamp(created_at)).into(),
            ..Default::default()
        })
    }

    async fn platform(
        &self,
        _: &TtrpcContext,
        request: PlatformRequest,
    ) -> ttrpc::Result<PlatformResponse> {
        self.container(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        // In Go's words, as everywhere in containerd.
        (platform.os, platform.architecture) = ("linux".into(), "amd64".into());
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        let pod = self.pod.clone();
        detached(&self.pod, async move {
            pod.stop_sandbox(&request.sandbox_id).await
        })
        .await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        let container = self.container(&request.sandbox_id)?;
        let exit = container.init().exited().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let container = self.container(&request.sandbox_id)?;
        Ok(status(&container, request.verbose))
    }

    async fn ping_sandbox(
        &self,
        _: &TtrpcContext,
        request: PingRequest,
    ) -> ttrpc::Result<PingResponse> {
        let container = self.container(&request.sandbox_id)?;
        match container.init().phase().exit() {
            None => Ok(PingResponse::new()),
            Some(_) => answer(&self.pod, Err(SandboxError::Stopped.into())),
        }
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        let pod = self.pod.clone();
        detached(&self.pod, async move {
            pod.stop().await;
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        let container = self.container(&request.sandbox_id)?;
        let packed = answer(&self.pod, container.stats().await)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = request.sandbox_id;
        metric.timestamp = Some(timestamp(SystemTime::now())).into();
        metric.data = Some(packed).into();
        Ok(response)
    }
}

impl Pod {
    fn sandbox_container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        self.find(id, Api::Sandbox)
            .ok_or_else(|| TaskError::NoSandbox(id.to_owned()))
    }

    /// Makes the sandbox container, before any other.
    async fn create_sandbox(
        self: &Arc<Self>,
        request: CreateSandboxRequest,
    ) -> Result<(), TaskError> {
        if !lock(&self.containers).is_empty() {
            return Err(TaskError::SandboxExists(request.sandbox_id));
        }
        let mut config = pod_config(&request)?;
        if config.hostname.is_empty() {
            config.hostname = host_name()?;
        }
        let spec = sandbox_spec(&request, &config, self.publisher.namespace());
        let files = PodFiles::write(self.host.files_dir(), &config)?;
        let config = ContainerConfig {
            api: Api::Sandbox,
            id: request.sandbox_id,
            bundle: PathBuf::from(request.bundle_path),
            rootfs: request.rootfs,
            spec: Arc::new(spec),
        };
        self.make(config, StdioPaths::default()).await?;
        // Once: there is one sandbox.
        self.files.get_or_init(|| files);
        Ok(())
    }

    /// Ends the machine. containerd has stopped the containers; those that still run
    /// end with it.
    async fn stop_sandbox(&self, id: &str) -> Result<(), TaskError> {
        let container = self.sandbox_container(id)?;
        self.host.teardown().await;
        tokio::time::timeout(STOP_TIMEOUT, container.init().exited())
            .await
            .map(drop)
            .map_err(|_| TaskError::Timeout {
                what: "ending the virtual machine",
                seconds: STOP_TIMEOUT.as_secs(),
            })
    }
}

fn pod_config(request: &CreateSandboxRequest) -> Result<PodSandboxConfig, TaskError> {
    let options = request.options.get_or_default();
    // containerd's typeurl writes the name alone, others a URL that ends in it.
    if options.type_url.rsplit('/').next() != Some(CONFIG_TYPE) {
        return Err(TaskError::Invalid(format!(
            "sandbox {}: the options of CreateSandbox are {:?}, not a {CONFIG_TYPE}; nacre serves \
             the sandboxes of containerd's CRI",
            request.sandbox_id, options.type_url
        )));
    }
    PodSandboxConfig::parse_from_bytes(&options.value).map_err(|source| TaskError::Spec {
        container_id: request.sandbox_id.clone(),
        what: CONFIG_TYPE,
        source: source.into(),
    })
}

fn host_name() -> Result<String, TaskError> {
    let name = nix::unistd::gethostname().map_err(|errno| SandboxError::Io {
        what: "read the host's name".into(),
        source: errno.into(),
    })?;
    Ok(name.to_string_lossy().into_owned())
}

/// Reads what is known, and asks nobody.
fn status(container: &Container, verbose: bool) -> SandboxStatusResponse {
    let phase = container.init().phase();
    let exit = phase.exit();
    let pid = exit.map_or(container.pid(), |_| 0);
    let state = if phase == Phase::Running {
        READY
    } else {
        NOT_READY
    };
    let info = serde_json::json!({"pid": pid, "processStatus": phase.name()});
    SandboxStatusResponse {
        sandbox_id: container.config().id.clone(),
        pid,
        state: state.into(),
        info: verbose
            .then(|| (INFO.to_owned(), info.to_string()))
            .into_iter()
            .collect(),
        created_at: Some(timestamp(container.created_at())).into(),
        exited_at: exit.map(|exit| timestamp(exit.at)).into(),
        ..Default::default()
    }
}
