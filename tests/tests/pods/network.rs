//! The pod's network: addresses, names, ports.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use nacre_tests::cri::stream::{STDIN, Stream};
use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{PATIENCE, eventually, md5};

use crate::SLEEP;

in_both_modes![names_and_name_servers];

/// Answers each connection to port 8080 with the host name.
const SERVE: &[&str] = &["sh", "-c", "while true; do hostname | nc -l -p 8080; done"];

/// What is served at an address, if a connection to it is made in time.
pub fn fetch(address: &str, patience: Duration) -> Option<String> {
    let address: SocketAddr = address.parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&address, patience).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn pods_reach_each_other_and_the_host_reaches_them() {
    let scene = PodScene::new();
    let server = scene.pod("server").host_port(18080, 8080).run();
    let _app = server.container("app", SERVE).start();
    let sibling = server.container("sibling", SLEEP).start();
    let client = scene.pod("client").run();
    let shell = client.container("shell", SLEEP).start();

    let from_pod = format!("nc {} 8080 </dev/null", server.ip());
    eventually("the other pod answers", || {
        shell.sh(&from_pod).stdout == "server\n"
    });
    // The containers of a pod have one network.
    eventually("localhost answers", || {
        sibling.sh("nc 127.0.0.1 8080 </dev/null").stdout == "server\n"
    });
    let direct = format!("{}:8080", server.ip());
    eventually("the pod's address answers", || {
        fetch(&direct, PATIENCE).as_deref() == Some("server\n")
    });
    // portmap does not lead the host's own loopback.
    let gateway = "10.88.0.1:18080";
    eventually("the host's port answers", || {
        fetch(gateway, PATIENCE).as_deref() == Some("server\n")
    });
}

/// MiB of the transfers through a forwarded port; and of those that take minutes.
const SOME: usize = 16;
const MANY: usize = 64;

/// A web server at `address`: `name` says which one it is.
fn serve(address: &str, name: &str) -> String {
    format!(
        "mkdir -p /tmp/www/cgi-bin && cd /tmp/www && echo {name} > name && \
         exec httpd -f -p {address} -h ."
    )
}

/// What it serves besides: `bulk` is so many random MiB, and what is sent to `cgi-bin/sum` is
/// answered with its checksum. Prints that of `bulk`.
fn serve_bulk(mib: usize) -> String {
    format!(
        "cd /tmp/www && cat > cgi-bin/sum <<'END' && chmod +x cgi-bin/sum && \
         dd if=/dev/urandom of=/dev/shm/bulk bs=1M count={mib} 2>/dev/null && \
         ln -s /dev/shm/bulk bulk && md5sum < bulk\n\
         #!/bin/sh\nprintf '\\r\\n'\nhead -c $CONTENT_LENGTH | md5sum\nEND\n"
    )
}

/// Each way, through the port of `local`.
fn bulk_is_forwarded(pod: &Pod, local: &PodContainer, mib: usize) {
    let sum = local.sh(&serve_bulk(mib)).exits(0).stdout;
    let body = get(pod.port_forward(7070), 7070, "bulk");
    let length = body.len();
    assert_eq!(length, mib << 20);
    assert_eq!(md5(&body), sum, "from the pod");
    let mut request =
        format!("POST /cgi-bin/sum HTTP/1.0\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    request.extend(&body);
    let said = through(pod.port_forward(7070), 7070, &request);
    assert_eq!(String::from_utf8(said).unwrap(), sum, "to the pod");
}

/// What a server answers through a forwarded port.
fn through(mut stream: Stream, port: u16, request: &[u8]) -> Vec<u8> {
    for part in request.chunks(32 << 10) {
        stream.send(STDIN, part);
    }
    stream.read_to_end();
    // Each channel begins with the port.
    let said = stream.bytes(STDIN).strip_prefix(&port.to_le_bytes());
    let said = said.expect("the port");
    let end = said.windows(4).position(|window| window == b"\r\n\r\n");
    let body = end.map(|end| &said[end + 4..]);
    let body = body.unwrap_or_else(|| panic!("no answer in {:?}", stream.text(STDIN)));
    body.to_vec()
}

fn get(stream: Stream, port: u16, path: &str) -> Vec<u8> {
    through(
        stream,
        port,
        format!("GET /{path} HTTP/1.0\r\n\r\n").as_bytes(),
    )
}

/// A pod's servers, once they listen: at 127.0.0.1:7070 and at the pod's address, 7071.
fn servers(pod: &Pod) -> [PodContainer; 2] {
    let own = pod.ip();
    [("local", "127.0.0.1", 7070), ("own", own.as_str(), 7071)].map(|(name, address, port)| {
        let script = serve(&format!("{address}:{port}"), name);
        let container = pod.container(name, &["sh", "-c", &script]).start();
        let listens = format!(":{port} ");
        eventually("the server listens", || {
            container.sh("netstat -lnt").stdout.contains(&listens)
        });
        container
    })
}

/// containerd dials 127.0.0.1 in the pod's network namespace on the host. Returns the
/// server of port 7070.
pub fn ports_are_forwarded_to(pod: &Pod) -> PodContainer {
    let [local, _own] = servers(pod);
    assert_eq!(get(pod.port_forward(7070), 7070, "name"), b"local\n");
    assert_eq!(get(pod.port_forward(7071), 7071, "name"), b"own\n");
    local
}

#[test]
fn ports_are_forwarded_to_the_pod() {
    let scene = PodScene::new();
    let pod = scene.pod("forwarded").run();
    let local = ports_are_forwarded_to(&pod);
    let streams: Vec<_> = (0..20).map(|_| pod.port_forward(7070)).collect();
    thread::scope(|threads| {
        let asking: Vec<_> = streams
            .into_iter()
            .map(|stream| threads.spawn(|| get(stream, 7070, "name")))
            .collect();
        for answer in asking {
            assert_eq!(answer.join().unwrap(), b"local\n");
        }
    });
    bulk_is_forwarded(&pod, &local, SOME);
}

#[test]
#[ignore = "an emulated processor takes a minute for each way: make long"]
fn sixty_four_mebibytes_through_a_port() {
    let scene = PodScene::new();
    let pod = scene.pod("forwarded").run();
    let local = ports_are_forwarded_to(&pod);
    bulk_is_forwarded(&pod, &local, MANY);
}

fn names_and_name_servers(scene: &PodScene) {
    let pod = scene
        .pod("named")
        .dns(
            &["192.0.2.53"],
            &["default.svc.cluster.local"],
            &["ndots:5"],
        )
        .run();
    let app = pod.container("app", SLEEP).start();
    app.exec(&["cat", "/etc/resolv.conf"])
        .exits(0)
        .prints("search default.svc.cluster.local\nnameserver 192.0.2.53\noptions ndots:5\n");
    app.exec(&["cat", "/etc/hostname"])
        .exits(0)
        .prints("named\n");
    app.exec(&["hostname"]).exits(0).prints("named\n");
    // kubelet brings its own hosts file.
    let hosts = scene.directory("kubelet").join("hosts");
    std::fs::write(&hosts, format!("127.0.0.1 localhost\n{} named\n", pod.ip())).unwrap();
    let other = pod
        .container("other", SLEEP)
        .mount(&hosts, "/etc/hosts")
        .start();
    let said = other.exec(&["cat", "/etc/hosts"]).exits(0);
    assert_eq!(said.stdout, std::fs::read_to_string(&hosts).unwrap());
    let address = other
        .sh("ip -4 -o addr show eth0 | awk '{print $4}'")
        .exits(0);
    assert_eq!(address.stdout.split('/').next(), Some(pod.ip().as_str()));
}
