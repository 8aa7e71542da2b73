//! A client of containerd's CRI: what kubelet calls, as a test calls it.
//!
//! ```text
//! mod.rs        the socket and its calls
//! messages.rs   what they carry
//! stream.rs     exec, attach and port-forward, over containerd's streaming server
//! ```

pub mod messages;
pub mod stream;

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::{Containerd, PATIENCE};
use messages::*;

/// Several clones are one connection; they may be used by several threads.
#[derive(Clone)]
pub struct Cri {
    runtime: Arc<Runtime>,
    channel: Channel,
    /// Of each call, as kubelet has one.
    limit: Duration,
}

impl Cri {
    /// A client of `containerd`; it connects with the first call, and again when it has to.
    ///
    /// # Panics
    ///
    /// Without threads or descriptors.
    #[must_use]
    pub fn of(containerd: Containerd) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime starts");
        let address = format!("unix://{}", containerd.address);
        let endpoint = Endpoint::from_shared(address).expect("a socket's path makes a URI");
        let channel = {
            let _inside = runtime.enter();
            endpoint.connect_lazy()
        };
        Self {
            runtime: Arc::new(runtime),
            channel,
            limit: PATIENCE,
        }
    }

    /// The same client with so much time for a call: containerd is told, and gives up as
    /// soon as it is over.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Self {
            limit,
            ..self.clone()
        }
    }

    /// The time it has for a call.
    #[must_use]
    pub fn limit(&self) -> Duration {
        self.limit
    }

    fn call<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        self.call_service("RuntimeService", method, request)
    }

    fn call_service<Q, A>(&self, service: &str, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let path = format!("/runtime.v1.{service}/{method}");
        let path = PathAndQuery::try_from(path).expect("a method's name makes a path");
        self.runtime.block_on(async {
            let mut client = Grpc::new(self.channel.clone());
            client
                .ready()
                .await
                .map_err(|error| Status::new(Code::Unavailable, error.to_string()))?;
            let codec = ProstCodec::<Q, A>::default();
            let mut request = Request::new(request);
            request.set_timeout(self.limit);
            let answer = client.unary(request, path, codec).await?;
            Ok(answer.into_inner())
        })
    }

    fn on_pod<A>(&self, method: &str, pod_sandbox_id: &str) -> Result<A, Status>
    where
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let pod_sandbox_id = pod_sandbox_id.to_owned();
        self.call(method, PodSandboxRequest { pod_sandbox_id })
    }

    fn on_container<A>(&self, method: &str, container_id: &str) -> Result<A, Status>
    where
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let container_id = container_id.to_owned();
        self.call(method, ContainerRequest { container_id })
    }

    /// What a runtime handler can do, of `Status`.
    ///
    /// # Errors
    ///
    /// containerd's; `NotFound` when it has no such handler.
    pub fn features(&self, handler: &str) -> Result<RuntimeHandlerFeatures, Status> {
        let answer: StatusResponse = self.call("Status", StatusRequest {})?;
        let mut handlers = answer.runtime_handlers.into_iter();
        let found = handlers.find(|known| known.name == handler);
        let found = found.ok_or_else(|| Status::not_found(handler.to_owned()))?;
        Ok(found.features.unwrap_or_default())
    }

    /// Whether the image is there, as far as CRI knows.
    #[must_use]
    pub fn has_image(&self, name: &str) -> bool {
        let request = ImageStatusRequest {
            image: Some(ImageSpec {
                image: name.to_owned(),
            }),
        };
        let answer: Result<ImageStatusResponse, _> =
            self.call_service("ImageService", "ImageStatus", request);
        answer.is_ok_and(|answer| answer.image.is_some())
    }

    /// `RunPodSandbox`; returns the sandbox's id.
    ///
    /// # Errors
    ///
    /// containerd's, as with all calls here.
    pub fn run_pod(&self, config: &PodSandboxConfig, handler: &str) -> Result<String, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let answer: RunPodSandboxResponse = self.call("RunPodSandbox", request)?;
        Ok(answer.pod_sandbox_id)
    }

    /// `StopPodSandbox`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn stop_pod(&self, id: &str) -> Result<(), Status> {
        self.on_pod("StopPodSandbox", id)
    }

    /// `RemovePodSandbox`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn remove_pod(&self, id: &str) -> Result<(), Status> {
        self.on_pod("RemovePodSandbox", id)
    }

    /// `PodSandboxStatus`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn pod_status(&self, id: &str) -> Result<PodSandboxStatus, Status> {
        let answer = self.pod_status_response(id, false)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// What a verbose `PodSandboxStatus` tells beyond the status, as `crictl inspectp`
    /// shows it.
    ///
    /// # Errors
    ///
    /// containerd's; `Internal` when that is not what it should be.
    pub fn pod_info(&self, id: &str) -> Result<serde_json::Value, Status> {
        let answer = self.pod_status_response(id, true)?;
        let info = answer.info.get("info").map_or("", String::as_str);
        serde_json::from_str(info).map_err(|error| Status::internal(format!("{info:?}: {error}")))
    }

    fn pod_status_response(
        &self,
        id: &str,
        verbose: bool,
    ) -> Result<PodSandboxStatusResponse, Status> {
        let pod_sandbox_id = id.to_owned();
        let request = PodSandboxStatusRequest {
            pod_sandbox_id,
            verbose,
        };
        self.call("PodSandboxStatus", request)
    }

    /// `ListPodSandbox`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn pods(&self) -> Result<Vec<PodSandbox>, Status> {
        let answer: ListPodSandboxResponse = self.call("ListPodSandbox", ListRequest {})?;
        Ok(answer.items)
    }

    /// `PodSandboxStats`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn pod_stats(&self, id: &str) -> Result<LinuxPodSandboxStats, Status> {
        let answer: PodSandboxStatsResponse = self.on_pod("PodSandboxStats", id)?;
        let stats = answer.stats.unwrap_or_default();
        Ok(stats.linux.unwrap_or_default())
    }

    /// `CreateContainer`; returns the container's id.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn create(
        &self,
        pod_id: &str,
        pod: &PodSandboxConfig,
        config: &ContainerConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod_id.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.clone()),
        };
        let answer: CreateContainerResponse = self.call("CreateContainer", request)?;
        Ok(answer.container_id)
    }

    /// `StartContainer`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn start(&self, id: &str) -> Result<(), Status> {
        self.on_container("StartContainer", id)
    }

    /// `StopContainer`: a signal, and SIGKILL after `grace`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn stop(&self, id: &str, grace: Duration) -> Result<(), Status> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: i64::try_from(grace.as_secs()).unwrap_or(i64::MAX),
        };
        self.call("StopContainer", request)
    }

    /// `RemoveContainer`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn remove(&self, id: &str) -> Result<(), Status> {
        self.on_container("RemoveContainer", id)
    }

    /// `ContainerStatus`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn status(&self, id: &str) -> Result<ContainerStatus, Status> {
        let answer: ContainerStatusResponse = self.on_container("ContainerStatus", id)?;
        Ok(answer.status.unwrap_or_default())
    }

    /// `ListContainers`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn containers(&self) -> Result<Vec<Container>, Status> {
        let answer: ListContainersResponse = self.call("ListContainers", ListRequest {})?;
        Ok(answer.containers)
    }

    /// `ContainerStats`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn stats(&self, id: &str) -> Result<ContainerStats, Status> {
        let answer: ContainerStatsResponse = self.on_container("ContainerStats", id)?;
        Ok(answer.stats.unwrap_or_default())
    }

    /// `ListContainerStats` of a pod.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn stats_of_pod(&self, pod_id: &str) -> Result<Vec<ContainerStats>, Status> {
        let pod_sandbox_id = pod_id.to_owned();
        let filter = Some(ContainerStatsFilter { pod_sandbox_id });
        let request = ListContainerStatsRequest { filter };
        let answer: ListContainerStatsResponse = self.call("ListContainerStats", request)?;
        Ok(answer.stats)
    }

    /// `UpdateContainerResources`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn update(&self, id: &str, resources: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
        };
        self.call("UpdateContainerResources", request)
    }

    /// `ReopenContainerLog`.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn reopen_log(&self, id: &str) -> Result<(), Status> {
        self.on_container("ReopenContainerLog", id)
    }

    /// `ExecSync`; zero `limit`: none.
    ///
    /// # Errors
    ///
    /// containerd's; `DeadlineExceeded` when the command runs for longer.
    pub fn exec_sync(
        &self,
        id: &str,
        command: &[&str],
        limit: Duration,
    ) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: owned(command),
            timeout: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        };
        self.call("ExecSync", request)
    }

    /// `Exec`; returns where it is served.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn exec(&self, request: ExecRequest) -> Result<String, Status> {
        let answer: StreamResponse = self.call("Exec", request)?;
        Ok(answer.url)
    }

    /// `Attach`; returns where it is served.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn attach(&self, request: AttachRequest) -> Result<String, Status> {
        let answer: StreamResponse = self.call("Attach", request)?;
        Ok(answer.url)
    }

    /// `PortForward`; returns where it is served.
    ///
    /// # Errors
    ///
    /// containerd's.
    pub fn port_forward(&self, pod_id: &str, port: u16) -> Result<String, Status> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod_id.to_owned(),
            port: vec![i32::from(port)],
        };
        let answer: StreamResponse = self.call("PortForward", request)?;
        Ok(answer.url)
    }
}

/// The same words, owned.
#[must_use]
pub fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}
