//! The ttrpc service: requests to [`Sandbox`] methods, results to messages.

use std::sync::Arc;

use async_trait::async_trait;
use nacre_protocol::agent::{
    AdjustClockRequest, ConfigureSandboxRequest, ContainerRequest, CreateContainerRequest,
    DirectoryVolume, EjectDeviceRequest, Empty, Event, ExecRequest, ListProcessesResponse, OomKill,
    PingResponse, ProcessRequest, ProcessStarted, ReadFileRequest, ReadFileResponse,
    RemoveCardRequest, ResizeTerminalRequest, SetCpusRequest, SetCpusResponse, SignalRequest,
    StatsResponse, TmpfsVolume, UpdateNetworkRequest, UpdateRequest, WaitResponse,
};
use nacre_protocol::agent_ttrpc::Agent;
use ttrpc::r#async::TtrpcContext;

use crate::clock;
use crate::error::Error;
use crate::network::{self, Network};
use crate::pci;
use crate::sandbox::Sandbox;
use crate::stdio;

/// The service.
pub struct Service(pub Arc<Sandbox>);

fn started(pid: u32) -> ProcessStarted {
    ProcessStarted {
        pid,
        ..ProcessStarted::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.configure(request).await?;
        Ok(Empty::default())
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<Empty> {
        let mut network = Network::connect()?;
        network.update(&request.removed, &request.added).await?;
        Ok(Empty::default())
    }

    async fn remove_card(
        &self,
        _: &TtrpcContext,
        request: RemoveCardRequest,
    ) -> ttrpc::Result<Empty> {
        network::remove_card(&request.card).await?;
        Ok(Empty::default())
    }

    async fn mount_shared(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.0.mount_shared().await?;
        Ok(Empty::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<ProcessStarted> {
        Ok(started(self.0.create(request).await?))
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        container.start().await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<ProcessStarted> {
        Ok(started(self.0.exec(request).await?))
    }

    async fn delete_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.delete(&request.container_id).await?;
        Ok(Empty::default())
    }

    async fn eject_device(
        &self,
        _: &TtrpcContext,
        request: EjectDeviceRequest,
    ) -> ttrpc::Result<Empty> {
        pci::eject(&request.address).await?;
        Ok(Empty::default())
    }

    async fn set_cpus(
        &self,
        _: &TtrpcContext,
        request: SetCpusRequest,
    ) -> ttrpc::Result<SetCpusResponse> {
        Ok(SetCpusResponse {
            count: self.0.set_cpus(request.count).await?,
            ..SetCpusResponse::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        if request.all {
            container.signal_all(request.signal)?;
        } else {
            container
                .process(&request.exec_id)?
                .signal(request.signal)?;
        }
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let (exit, oom_kills) = self.0.wait(&request.container_id, &request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at_seconds: exit.seconds,
            exited_at_nanos: exit.nanos,
            oom_kills,
            ..WaitResponse::default()
        })
    }

    async fn delete_exec(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        if request.exec_id.is_empty() {
            return Err(Error::InvalidArgument("no exec id".into()).into());
        }
        let container = self.0.container(&request.container_id)?;
        container.delete_exec(&request.exec_id)?;
        Ok(Empty::default())
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        let process = container.process(&request.exec_id)?;
        if let Some(size) = stdio::size(request.width, request.height) {
            process.io.resize(size)?;
        }
        Ok(Empty::default())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<ListProcessesResponse> {
        let container = self.0.container(&request.container_id)?;
        Ok(ListProcessesResponse {
            pids: container.cgroup.processes()?,
            ..ListProcessesResponse::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<StatsResponse> {
        Ok(self.0.stats(&request.container_id)?)
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        container.cgroup.freeze().await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        container.cgroup.thaw().await?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let (id, resources) = (&request.container_id, &request.resources);
        self.0.update(id, resources).await?;
        Ok(Empty::default())
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Event> {
        let (container_id, count) = self.0.next_oom().await?;
        let mut event = Event {
            container_id,
            ..Event::default()
        };
        event.set_oom_kill(OomKill {
            count,
            ..OomKill::default()
        });
        Ok(event)
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<PingResponse> {
        Ok(PingResponse {
            time_ns: clock::now_ns(),
            ..PingResponse::default()
        })
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: AdjustClockRequest,
    ) -> ttrpc::Result<Empty> {
        self.0.adjust_clock(request.by_ns)?;
        Ok(Empty::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.0.shutdown().await;
        Ok(Empty::default())
    }

    async fn make_tmpfs(&self, _: &TtrpcContext, volume: TmpfsVolume) -> ttrpc::Result<Empty> {
        self.0.make_tmpfs(volume).await?;
        Ok(Empty::default())
    }

    async fn put_directory(
        &self,
        _: &TtrpcContext,
        volume: DirectoryVolume,
    ) -> ttrpc::Result<Empty> {
        self.0.put_directory(volume).await?;
        Ok(Empty::default())
    }

    async fn read_file(
        &self,
        _: &TtrpcContext,
        request: ReadFileRequest,
    ) -> ttrpc::Result<ReadFileResponse> {
        Ok(ReadFileResponse {
            contents: self.0.read_file(request).await?,
            ..ReadFileResponse::default()
        })
    }
}
