//! The pod's network: addresses, names, ports.

use std::io::{Read, Write};
use std::net::TcpStream;

use nacre_tests::cri::stream::STDIN;
use nacre_tests::eventually;
use nacre_tests::pods::PodScene;

use crate::SLEEP;

/// Answers each connection to port 8080 with the host name.
const SERVE: &[&str] = &["sh", "-c", "while true; do hostname | nc -l -p 8080; done"];

fn fetch(address: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
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
        fetch(&direct).as_deref() == Some("server\n")
    });
    // portmap does not lead the host's own loopback.
    let gateway = "10.88.0.1:18080";
    eventually("the host's port answers", || {
        fetch(gateway).as_deref() == Some("server\n")
    });
}

/// containerd dials 127.0.0.1 in the pod's network namespace on the host.
#[test]
fn ports_are_forwarded_to_the_pod_s_loopback() {
    let scene = PodScene::new();
    let pod = scene.pod("forwarded").run();
    let script = "while true; do nc -l -p 7070 -e sh -c 'read line; echo got $line'; done";
    let app = pod.container("app", &["sh", "-c", script]).start();
    eventually("somebody listens", || {
        app.sh("netstat -lnt").stdout.contains(":7070")
    });
    for text in ["one\n", "two\n"] {
        let mut stream = pod.port_forward(7070);
        let port = 7070u16.to_le_bytes();
        // Each of the two channels begins with the port.
        stream.send(STDIN, text.as_bytes());
        let answer = format!("{}got {text}", String::from_utf8_lossy(&port));
        stream.read_until(STDIN, |said| said == answer);
    }
}

#[test]
fn names_and_name_servers() {
    let scene = PodScene::new();
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
