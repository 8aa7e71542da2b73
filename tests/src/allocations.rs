//! kubelet's pod resources API, played: what devices it has given to the containers of a pod
//! (k8s.io/kubelet/pkg/apis/podresources/v1, `api.proto`). Its messages are not the shim's,
//! whose mistakes it would share.

use std::path::{Path, PathBuf};

use h2::server;
use prost::Message;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Runtime;
use tonic::codegen::Bytes;
use tonic::codegen::http::{HeaderMap, HeaderValue, Response};

const LIST: &str = "/v1.PodResourcesLister/List";

/// A kubelet that has given devices to one pod. It answers until this is dropped.
pub struct Allocations {
    socket: PathBuf,
    _runtime: Runtime,
}

impl Allocations {
    /// Has given `id` of a device plugin's `resource` to a container of pod `name` in the
    /// namespace `default`. It listens in `dir`.
    ///
    /// # Panics
    ///
    /// When it cannot listen there.
    #[must_use]
    pub fn of_plugin(dir: &Path, name: &str, resource: &str, id: &str) -> Self {
        let devices = ContainerDevices {
            resource_name: resource.into(),
            device_ids: vec![id.into()],
        };
        let container = ContainerResources {
            devices: vec![devices],
        };
        let pod = PodResources {
            name: name.into(),
            namespace: "default".into(),
            containers: vec![container],
        };
        let answer = ListResponse {
            pod_resources: vec![pod],
        };
        Self::answering(dir, answer.encode_to_vec())
    }

    fn answering(dir: &Path, answer: Vec<u8>) -> Self {
        let socket = dir.join("kubelet.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime starts");
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(&socket).expect("it can listen")
        };
        runtime.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let answer = answer.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(stream, answer).await {
                        eprintln!("pod resources API: {error}");
                    }
                });
            }
        });
        Self {
            socket,
            _runtime: runtime,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

/// gRPC over HTTP/2: before the message a flag and its length, after it the status in the
/// trailers. Other calls than `List` it does not know (status 12).
async fn serve(stream: UnixStream, message: Vec<u8>) -> Result<(), h2::Error> {
    let mut connection = server::handshake(stream).await?;
    while let Some(call) = connection.accept().await {
        let (request, mut respond) = call?;
        let is_known = request.uri().path() == LIST;
        let mut response = Response::new(());
        let kind = HeaderValue::from_static("application/grpc");
        response.headers_mut().insert("content-type", kind);
        let mut stream = respond.send_response(response, false)?;
        if is_known {
            let len = u32::try_from(message.len()).expect("a short list");
            let body = [&[0][..], &len.to_be_bytes(), &message].concat();
            stream.send_data(Bytes::from(body), false)?;
        }
        let mut trailers = HeaderMap::new();
        let status = HeaderValue::from_static(if is_known { "0" } else { "12" });
        trailers.insert("grpc-status", status);
        stream.send_trailers(trailers)?;
    }
    Ok(())
}

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
}

/// `v1.ContainerDevices`.
#[derive(Clone, PartialEq, Message)]
struct ContainerDevices {
    #[prost(string, tag = "1")]
    resource_name: String,
    #[prost(string, repeated, tag = "2")]
    device_ids: Vec<String>,
}
