//! What kubelet has given a pod: devices of device plugins and of DRA, by its pod resources
//! API (k8s.io/kubelet/pkg/apis/podresources/v1, `api.proto`).
//!
//! containerd tells of devices with the container that has them, when the pod's machine
//! runs. kubelet knows of them before it has a sandbox made, so that the machine can be built
//! with them. When the containers come, each asks for its own as ever.

use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

/// kubelet answers from memory.
const PATIENCE: Duration = Duration::from_secs(10);
const LIST: &str = "/v1.PodResourcesLister/List";

/// Why it is not known.
#[derive(Debug, thiserror::Error)]
pub enum KubeletError {
    /// Nobody there.
    #[error("kubelet does not listen at pod_resources_socket {}", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: tonic::transport::Error,
    },
    /// A refusal.
    #[error("kubelet does not list the resources of pods")]
    List(#[source] Box<Status>),
    /// No answer in time.
    #[error(
        "kubelet does not answer at pod_resources_socket {} within {} s",
        path.display(),
        PATIENCE.as_secs()
    )]
    Late {
        /// Where.
        path: PathBuf,
    },
}

/// A device, as kubelet names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allocated {
    /// A device plugin's.
    Plugin {
        /// `vendor.com/gpu`
        resource: String,
        /// The plugin's own name for it.
        id: String,
    },
    /// A DRA driver's: a CDI name.
    Cdi(String),
}

/// The devices of a pod's containers, of all of them; none of a pod that kubelet does not
/// know, which others have made. `socket` is kubelet's.
///
/// # Errors
///
/// kubelet does not answer.
pub async fn allocated(
    socket: &Path,
    namespace: &str,
    name: &str,
) -> Result<Vec<Allocated>, KubeletError> {
    let answer = tokio::time::timeout(PATIENCE, list(socket)).await;
    let late = |_| KubeletError::Late {
        path: socket.to_owned(),
    };
    let pods = answer.map_err(late)??.pod_resources;
    let is_this =
        |pod: &PodResources| (pod.namespace.as_str(), pod.name.as_str()) == (namespace, name);
    let containers = pods
        .into_iter()
        .filter(is_this)
        .flat_map(|pod| pod.containers);
    Ok(containers.flat_map(ContainerResources::names).collect())
}

async fn list(socket: &Path) -> Result<ListResponse, KubeletError> {
    let connect = |source| KubeletError::Connect {
        path: socket.to_owned(),
        source,
    };
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()));
    let endpoint = endpoint.map_err(connect)?;
    let channel = endpoint.connect().await.map_err(connect)?;
    let mut client = Grpc::new(channel);
    client.ready().await.map_err(connect)?;
    let codec = ProstCodec::<ListRequest, ListResponse>::default();
    let path = PathAndQuery::from_static(LIST);
    let answer = client
        .unary(Request::new(ListRequest {}), path, codec)
        .await;
    let answer = answer.map_err(|status| KubeletError::List(status.into()))?;
    Ok(answer.into_inner())
}

/// `v1.ListPodResourcesRequest`. Of the messages those fields are here that are used.
#[derive(Clone, PartialEq, Message)]
struct ListRequest {}

/// `v1.ListPodResourcesResponse`.
#[derive(Clone, PartialEq, Message)]
struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    pod_resources: Vec<PodResources>,
}

/// `v1.PodResources`.
#[derive(Clone, PartialEq, Message)]
struct PodResources {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(message, repeated, tag = "3")]
    containers: Vec<ContainerResources>,
}

/// `v1.ContainerResources`.
#[derive(Clone, PartialEq, Message)]
struct ContainerResources {
    #[prost(message, repeated, tag = "2")]
    devices: Vec<ContainerDevices>,
    #[prost(message, repeated, tag = "5")]
    dynamic_resources: Vec<DynamicResource>,
}

/// `v1.ContainerDevices`.
#[derive(Clone, PartialEq, Message)]
struct ContainerDevices {
    #[prost(string, tag = "1")]
    resource_name: String,
    #[prost(string, repeated, tag = "2")]
    device_ids: Vec<String>,
}

/// `v1.DynamicResource`.
#[derive(Clone, PartialEq, Message)]
struct DynamicResource {
    #[prost(message, repeated, tag = "4")]
    claim_resources: Vec<ClaimResource>,
}

/// `v1.ClaimResource`.
#[derive(Clone, PartialEq, Message)]
struct ClaimResource {
    #[prost(message, repeated, tag = "1")]
    cdi_devices: Vec<CdiDevice>,
}

/// `v1.CDIDevice`.
#[derive(Clone, PartialEq, Message)]
struct CdiDevice {
    #[prost(string, tag = "1")]
    name: String,
}

impl ContainerResources {
    fn names(self) -> Vec<Allocated> {
        let plugins = self.devices.into_iter().flat_map(|devices| {
            let ContainerDevices {
                resource_name,
                device_ids,
            } = devices;
            let ids = device_ids.into_iter();
            ids.map(move |id| Allocated::Plugin {
                resource: resource_name.clone(),
                id,
            })
        });
        let claims = self.dynamic_resources.into_iter();
        let claims = claims.flat_map(|resource| resource.claim_resources);
        let cdi = claims.flat_map(|claim| claim.cdi_devices);
        plugins
            .chain(cdi.map(|device| Allocated::Cdi(device.name)))
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
