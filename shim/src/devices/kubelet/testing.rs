//! A kubelet that knows one pod.

use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes, BytesMut};
use h2::server;
use http::{HeaderMap, HeaderValue, Response};
use prost::Message;
use tempfile::TempDir;
use tokio::net::{UnixListener, UnixStream};

use super::*;

/// Its socket's directory; it answers until this is dropped.
pub(crate) struct Kubelet {
    dir: TempDir,
    serving: tokio::task::JoinHandle<()>,
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Kubelet {
    /// One that has given `default/trainer` devices: of plugins (resource and ids), each
    /// resource to a container of its own, and by DRA (CDI names) to a further one.
    pub(crate) fn new(plugins: &[(&str, &[&str])], cdi: &[&str]) -> Self {
        let of_plugin = |(resource, ids): &(&str, &[&str])| ContainerResources {
            devices: vec![ContainerDevices {
                resource_name: (*resource).into(),
                device_ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            }],
            ..Default::default()
        };
        let cdi_devices = cdi.iter().map(|name| CdiDevice {
            name: (*name).into(),
        });
        let by_dra = ContainerResources {
            dynamic_resources: vec![DynamicResource {
                claim_resources: vec![ClaimResource {
                    cdi_devices: cdi_devices.collect(),
                }],
            }],
            ..Default::default()
        };
        let other = PodResources {
            name: "trainer".into(),
            namespace: "other".into(),
            containers: vec![of_plugin(&("other.com/gpu", &["0000:99:00.0"]))],
        };
        let trainer = PodResources {
            name: "trainer".into(),
            namespace: "default".into(),
            containers: plugins.iter().map(of_plugin).chain([by_dra]).collect(),
        };
        Self::answering(&ListResponse {
            pod_resources: vec![other, trainer],
        })
    }

    fn answering(answer: &ListResponse) -> Self {
        Self::serving("0", Some(answer.encode_to_vec()))
    }

    /// One that refuses with a status.
    pub(crate) fn refusing(status: &'static str) -> Self {
        Self::serving(status, None)
    }

    fn serving(status: &'static str, answer: Option<Vec<u8>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("kubelet.sock")).unwrap();
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serve(stream, status, answer.clone()));
            }
        });
        Self { dir, serving }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("kubelet.sock")
    }

    /// Where no kubelet listens.
    pub(crate) fn nowhere(dir: &Path) -> PathBuf {
        dir.join("none.sock")
    }
}

/// gRPC over HTTP/2: a flag and the length before each message, and the status in the trailers.
async fn serve(stream: UnixStream, status: &'static str, answer: Option<Vec<u8>>) {
    let mut connection = server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        assert_eq!(request.uri().path(), LIST);
        let response = Response::builder().header("content-type", "application/grpc");
        let mut stream = respond
            .send_response(response.body(()).unwrap(), false)
            .unwrap();
        if let Some(message) = &answer {
            let mut body = BytesMut::new();
            body.put_u8(0);
            body.put_u32(u32::try_from(message.len()).unwrap());
            body.put_slice(message);
            stream.send_data(Bytes::from(body), false).unwrap();
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static(status));
        trailers.insert(
            "grpc-message",
            HeaderValue::from_static("as the test wants"),
        );
        stream.send_trailers(trailers).unwrap();
    }
}
