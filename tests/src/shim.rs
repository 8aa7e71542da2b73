//! A container's shim, called as containerd calls it: for what `ctr` has no
//! command for.

use containerd_shim_protos::api::UpdateTaskRequest;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::{Client, TaskClient};
use serde_json::Value;

use crate::PATIENCE;

/// Where containerd 2 keeps its bundles of the namespace "default".
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/default";

/// See the module.
pub struct Shim {
    id: String,
    client: TaskClient,
}

impl Shim {
    /// The shim of a container.
    #[must_use]
    pub fn of(id: &str) -> Self {
        let path = format!("{BUNDLES}/{id}/bootstrap.json");
        let text = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let bootstrap: Value = serde_json::from_slice(&text).expect("containerd writes JSON");
        let address = bootstrap["address"].as_str().expect("an address");
        let client = Client::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        Self {
            id: id.to_owned(),
            client: TaskClient::new(client),
        }
    }

    /// Changes the container's limits to those named in `resources`, OCI's
    /// `linux.resources`.
    ///
    /// # Errors
    ///
    /// The shim's answer.
    pub fn update(&self, resources: &Value) -> ttrpc::Result<()> {
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            resources: Some(Any {
                value: resources.to_string().into_bytes(),
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let timeout = i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX);
        let context = ttrpc::context::with_timeout(timeout);
        self.client.update(context, &request).map(drop)
    }
}
