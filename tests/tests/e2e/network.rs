//! Pods' networks: `ctr run --cni` on the lab's bridge.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;

use nacre_tests::{HostSegments, PATIENCE, SEGMENTS, Scene, eventually, md5, run};

const BULK: usize = 64 << 20;
/// Addresses of the bridge (tests/lab, `10-lab.conflist`).
const BRIDGE: [&str; 2] = ["10.88.0.1", "fd00:88::1"];

/// 64 MiB of which no two parts are alike.
fn bulk() -> Vec<u8> {
    let mut bytes = vec![0; BULK];
    let mut random = File::open("/dev/urandom").unwrap();
    random.read_exact(&mut bytes).unwrap();
    bytes
}

/// A pod's addresses, IPv4 and IPv6.
fn addresses(scene: &Scene, id: &str) -> [String; 2] {
    ["-4", "-6"].map(|family| {
        let script = format!("ip {family} addr show dev eth0 scope global");
        let said = scene.exec(id, &[], &["sh", "-c", &script]).exits(0);
        let mut words = said.stdout.split_whitespace();
        words
            .find(|word| word.starts_with("inet"))
            .unwrap_or_else(|| panic!("no address in {said:#?}"));
        let address = words.next().unwrap();
        address.split('/').next().unwrap().to_owned()
    })
}

fn start_pod(scene: &mut Scene) -> String {
    scene.start_sleeper(&["--cni"])
}

#[test]
fn interface_has_what_cni_gave_it() {
    let mut scene = Scene::new();
    let id = start_pod(&mut scene);
    let pid = scene
        .ctr(&["task", "ls"])
        .stdout
        .lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(&id)).then(|| words.next().unwrap().to_owned())
        })
        .unwrap();
    let on_host = |what: &[&str]| {
        let mut arguments = vec!["-t", &pid, "-n", "ip"];
        arguments.extend(what);
        run("nsenter", &arguments).exits(0).stdout
    };
    let in_guest = |what: &[&str]| {
        let mut command = vec!["ip"];
        command.extend(what);
        scene.exec(&id, &[], &command).exits(0).stdout
    };
    let word_after = |text: &str, key: &str| {
        let mut words = text.split_whitespace();
        words.find(|word| *word == key);
        words.next().map(str::to_owned)
    };
    let (host, guest) = (
        on_host(&["addr", "show", "dev", "eth0"]),
        in_guest(&["addr", "show", "dev", "eth0"]),
    );
    for key in ["link/ether", "mtu", "inet", "inet6"] {
        let expected = word_after(&host, key);
        assert!(expected.is_some(), "no {key} in {host}");
        assert_eq!(word_after(&guest, key), expected, "{key}: {host} {guest}");
    }
    for family in ["-4", "-6"] {
        let routes = in_guest(&[family, "route"]);
        assert!(routes.contains("default via"), "{routes}");
    }
}

#[test]
fn namespace_without_interfaces_gives_no_card() {
    let mut scene = Scene::new();
    scene.run(&["ls", "/sys/class/net"]).exits(0).prints("lo\n");
}

#[test]
fn bridge_answers_ping() {
    let mut scene = Scene::new();
    let id = start_pod(&mut scene);
    for address in BRIDGE {
        scene
            .exec(&id, &[], &["ping", "-c", "2", "-W", "20", address])
            .exits(0);
    }
}

/// A pod that serves 64 MiB at port 80, and their checksum. It may set sysctls.
fn serve_bulk(scene: &mut Scene) -> (String, String) {
    let id = scene.start_sleeper(&["--cni", "--privileged"]);
    let (name, value) = SEGMENTS;
    let script = format!(
        "sysctl -w {name}={value} >/dev/null && cd /dev/shm \
         && dd if=/dev/urandom of=bulk bs=1M count=64 2>/dev/null && httpd -h . && md5sum <bulk"
    );
    let sum = scene.exec(&id, &[], &["sh", "-c", &script]).exits(0).stdout;
    (id, sum)
}

/// A container gets what is at `address`: its checksum as `md5sum` says it.
fn fetch(scene: &Scene, id: &str, address: SocketAddr) -> String {
    let script = format!("wget -q -T 60 -O - http://{address}/bulk | md5sum");
    scene.exec(id, &[], &["sh", "-c", &script]).exits(0).stdout
}

fn socket(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Answers one request with `bytes`.
fn answer_once(listener: &TcpListener, bytes: &[u8]) {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut request = BufReader::new(&stream);
    let mut line = String::new();
    while line != "\r\n" {
        line.clear();
        assert_ne!(request.read_line(&mut line).unwrap(), 0, "half a request");
    }
    let header = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len());
    (&stream).write_all(header.as_bytes()).unwrap();
    (&stream).write_all(bytes).unwrap();
}

#[test]
fn sixty_four_mebibytes_between_container_and_host() {
    let mut scene = Scene::new();
    let (id, sum) = serve_bulk(&mut scene);
    for address in addresses(&scene, &id) {
        let mut stream = TcpStream::connect_timeout(&socket(&address, 80), PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"GET /bulk HTTP/1.0\r\n\r\n").unwrap();
        let mut received = Vec::with_capacity(BULK);
        stream.read_to_end(&mut received).unwrap();
        let body = received.len().checked_sub(BULK).unwrap();
        assert_eq!(md5(&received[body..]), sum, "to the host over {address}");
    }
    let expected = Arc::new(bulk());
    let _segments = HostSegments::set();
    for address in BRIDGE {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let bytes = Arc::clone(&expected);
        let server = std::thread::spawn(move || answer_once(&listener, &bytes));
        let said = fetch(&scene, &id, socket(address, port));
        assert_eq!(said, md5(&expected), "to the container over {address}");
        server.join().unwrap();
    }
}

#[test]
fn sixty_four_mebibytes_between_pods() {
    let mut scene = Scene::new();
    let (server, sum) = serve_bulk(&mut scene);
    let client = start_pod(&mut scene);
    for address in addresses(&scene, &server) {
        let ping = ["ping", "-c", "2", "-W", "20", &address];
        scene.exec(&client, &[], &ping).exits(0);
        let said = fetch(&scene, &client, socket(&address, 80));
        assert_eq!(said, sum, "over {address}");
    }
}

#[test]
fn host_reaches_a_server_in_the_pod() {
    let mut scene = Scene::new();
    let id = start_pod(&mut scene);
    let [address, _] = addresses(&scene, &id);
    let serve = "while :; do echo pearl | nc -l -p 80; done";
    let mut server = scene
        .exec_command(&id, &[], &["sh", "-c", serve])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = String::new();
    eventually("the server answers", || {
        said.clear();
        TcpStream::connect((address.as_str(), 80))
            .and_then(|mut stream| {
                stream.shutdown(Shutdown::Write)?;
                stream.read_to_string(&mut said)
            })
            .is_ok()
    });
    assert_eq!(said, "pearl\n");
    scene.ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
    server.wait().unwrap();
}
