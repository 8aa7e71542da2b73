//! A container's shim, called as containerd calls it: for what `ctr` has no
//! command for, and for the codes it answers with.

use containerd_shim_protos::api::{
    CheckpointTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, ProcessInfo, ResumeRequest, StartRequest, StateRequest, StatsRequest, Status,
    UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::{Client, TaskClient};
use serde_json::{Value, json};
use ttrpc::Result;
use ttrpc::context::Context;

use crate::PATIENCE;

/// Where containerd 2 keeps its bundles of the namespace "default".
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/default";

/// See the module. Each has a connection of its own.
pub struct Shim {
    id: String,
    client: TaskClient,
}

fn context() -> Context {
    ttrpc::context::with_timeout(i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX))
}

fn json_any(value: &Value) -> Option<Any> {
    Some(Any {
        value: value.to_string().into_bytes(),
        ..Default::default()
    })
}

impl Shim {
    /// The shim of a container.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn of(id: &str) -> Self {
        Self::find(id).unwrap_or_else(|error| panic!("no shim of {id}: {error}"))
    }

    /// The shim of a container, if it has one yet.
    ///
    /// # Errors
    ///
    /// What is missing.
    pub fn find(id: &str) -> anyhow::Result<Self> {
        let text = std::fs::read(format!("{BUNDLES}/{id}/bootstrap.json"))?;
        let bootstrap: Value = serde_json::from_slice(&text)?;
        let address = bootstrap["address"].as_str().unwrap_or_default();
        Ok(Self {
            id: id.to_owned(),
            client: TaskClient::new(Client::connect(address)?),
        })
    }

    /// The same shim asked for another container.
    #[must_use]
    pub fn asked_for(mut self, id: &str) -> Self {
        id.clone_into(&mut self.id);
        self
    }

    /// Changes the container's limits to those named in `resources`, OCI's
    /// `linux.resources`.
    ///
    /// # Errors
    ///
    /// The shim's answer, here and below.
    pub fn update(&self, resources: &Value) -> Result<()> {
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            resources: json_any(resources).into(),
            ..Default::default()
        };
        self.client.update(context(), &request).map(drop)
    }

    /// Adds an exec without streams.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn exec(&self, exec_id: &str, command: &[&str]) -> Result<()> {
        let process = json!({
            "cwd": "/", "user": {"uid": 0, "gid": 0}, "args": command, "env": ["PATH=/bin"],
        });
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            spec: json_any(&process).into(),
            ..Default::default()
        };
        self.client.exec(context(), &request).map(drop)
    }

    /// Starts an exec.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn start(&self, exec_id: &str) -> Result<()> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        self.client.start(context(), &request).map(drop)
    }

    /// Sends SIGKILL to a process; the container's own if `exec_id` is empty.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn kill(&self, exec_id: &str) -> Result<()> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            signal: 9,
            ..Default::default()
        };
        self.client.kill(context(), &request).map(drop)
    }

    /// Waits for a process's end; returns its exit status.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn wait(&self, exec_id: &str) -> Result<u32> {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer = self.client.wait(context(), &request);
        answer.map(|answer| answer.exit_status)
    }

    /// Deletes an exec; returns its exit status.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn delete(&self, exec_id: &str) -> Result<u32> {
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer = self.client.delete(context(), &request);
        answer.map(|answer| answer.exit_status)
    }

    /// What a process is doing.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn state(&self, exec_id: &str) -> Result<Status> {
        let request = StateRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            ..Default::default()
        };
        let answer = self.client.state(context(), &request)?;
        Ok(answer.status.enum_value_or_default())
    }

    /// Freezes the container.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn pause(&self) -> Result<()> {
        let request = PauseRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.client.pause(context(), &request).map(drop)
    }

    /// Thaws it.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn resume(&self) -> Result<()> {
        let request = ResumeRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.client.resume(context(), &request).map(drop)
    }

    /// Asks for a checkpoint.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn checkpoint(&self) -> Result<()> {
        let request = CheckpointTaskRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        self.client.checkpoint(context(), &request).map(drop)
    }

    /// The container's processes, by their numbers in the guest.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    pub fn pids(&self) -> Result<Vec<u32>> {
        let processes = self.processes()?;
        Ok(processes.iter().map(|process| process.pid).collect())
    }

    /// The execs of which the shim knows that they run.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    ///
    /// # Panics
    ///
    /// When one is not described as runc describes it.
    pub fn execs(&self) -> Result<Vec<String>> {
        let processes = self.processes()?;
        let details = processes.iter().filter_map(|process| process.info.as_ref());
        let details = details.map(|any| ProcessDetails::parse_from_bytes(&any.value));
        Ok(details
            .map(|details| details.expect("details of runc's kind").exec_id)
            .collect())
    }

    fn processes(&self) -> Result<Vec<ProcessInfo>> {
        let request = PidsRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        Ok(self.client.pids(context(), &request)?.processes)
    }

    /// The container's counters.
    ///
    /// # Errors
    ///
    /// See [`Self::update`].
    ///
    /// # Panics
    ///
    /// When they are no `Metrics` of cgroup v2.
    pub fn stats(&self) -> Result<Metrics> {
        let request = StatsRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let answer = self.client.stats(context(), &request)?;
        Ok(Metrics::parse_from_bytes(&answer.stats.value).expect("counters of cgroup v2"))
    }
}
