//! The ttrpc trait. Every method only unpacks, delegates and packs.
//!
//! containerd.task.v2.Task and v3.Task are the same messages under two names,
//! so one implementation is registered as both. ttrpc drops a call when its
//! connection goes away, so calls that change something run as tasks of their
//! own: containerd's restart must not leave a container half made.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::*;
use containerd_shim_protos::shim_async::{Task, create_task};
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::TaskError;
use super::container::Container;
use super::pod::Pod;
use super::process::Process;
use crate::events::timestamp;

const V2: &str = "containerd.task.v2.Task";

/// The services of a pod, for a server.
pub fn create(pod: &Arc<Pod>) -> HashMap<String, Service> {
    let service = Arc::new(TaskService { pod: pod.clone() });
    let mut services = create_task(service.clone());
    let v2 = create_task(service).into_values().next();
    services.extend(v2.map(|service| (V2.to_owned(), service)));
    services
}

struct TaskService {
    pod: Arc<Pod>,
}

/// The answer to a call on a pod. What the kubelet or a log has of an error is its text
/// alone, so that names the pod.
pub(super) fn answer<T>(pod: &Pod, result: Result<T, TaskError>) -> ttrpc::Result<T> {
    result.map_err(|error| error.of_pod(pod.host.sandbox_id()))
}

/// Runs `work` on a pod to its end, whatever becomes of the caller.
pub(super) async fn detached<T: Send + 'static>(
    pod: &Pod,
    work: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> ttrpc::Result<T> {
    let result = tokio::spawn(work).await;
    answer(pod, result.unwrap_or(Err(TaskError::Cancelled)))
}

impl TaskService {
    fn container(&self, id: &str) -> ttrpc::Result<Arc<Container>> {
        answer(&self.pod, self.pod.container(id))
    }

    fn process(&self, id: &str, exec_id: &str) -> ttrpc::Result<Arc<Process>> {
        answer(&self.pod, self.container(id)?.process(exec_id))
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let state = self.container(&request.id)?.state(&request.exec_id);
        answer(&self.pod, state)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pod = self.pod.clone();
        let pid = detached(&self.pod, async move { pod.create(request).await }).await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pod = self.pod.clone();
        let pid = detached(&self.pod, async move {
            pod.start(&request.id, &request.exec_id).await
        })
        .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let pod = self.pod.clone();
        detached(&self.pod, async move { pod.delete(&request).await }).await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = self.container(&request.id)?.pids().await;
        Ok(PidsResponse {
            processes: answer(&self.pod, pids)?,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        detached(&self.pod, async move { container.pause().await }).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        detached(&self.pod, async move { container.resume().await }).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        answer(&self.pod, Err(TaskError::Unsupported("checkpointing")))
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let killed = self.container(&request.id)?.kill(&request).await;
        answer(&self.pod, killed)?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let added = self.container(&request.id)?.exec(request);
        answer(&self.pod, added)?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let resized = container.resize(&request.exec_id, request.width, request.height);
        answer(&self.pod, resized.await)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let process = self.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(&self.pod, async move {
            pod.update(&request.id, &request.resources.value).await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.process(&request.id, &request.exec_id)?;
        let exit = process.exited().await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = self.container(&request.id)?.stats().await;
        Ok(StatsResponse {
            stats: Some(answer(&self.pod, stats)?).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = match self.pod.container(&request.id) {
            Ok(container) => container.pid(),
            // containerd asks before there is a container, too.
            Err(_) => self.pod.pid(),
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached(&self.pod, async move {
            pod.shutdown(&request.id).await;
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}
