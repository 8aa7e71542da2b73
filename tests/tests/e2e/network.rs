//! Pods' networks: `ctr run --cni` on the lab's bridge.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};

use nacre_tests::{Scene, eventually, run};

const BULK: usize = 64 << 20;
/// Addresses of the bridge (tests/lab, `10-lab.conflist`).
const BRIDGE: [&str; 2] = ["10.88.0.1", "fd00:88::1"];

/// 64 MiB that a shell makes as easily as this program.
fn bulk() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BULK + 16);
    let mut number = 1u64;
    while bytes.len() < BULK {
        writeln!(bytes, "{number}").unwrap();
        number += 1;
    }
    bytes.truncate(BULK);
    bytes
}

/// The same in a container.
const MAKE_BULK: &str = "seq 1 20000000 2>/dev/null | head -c 67108864";

fn md5(bytes: &[u8]) -> String {
    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
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

#[test]
fn sixty_four_mebibytes_between_container_and_host() {
    let mut scene = Scene::new();
    let id = start_pod(&mut scene);
    let expected = bulk();
    for address in BRIDGE {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let sum = md5(&expected);
        let client = scene.exec_command(
            &id,
            &[],
            &[
                "sh",
                "-c",
                &format!("{MAKE_BULK} | nc {address} {port} | md5sum"),
            ],
        );
        let mut client = spawn(client);
        let (mut stream, _) = listener.accept().unwrap();
        let mut received = Vec::with_capacity(BULK);
        // nc keeps its side open until the peer ends: the length is known.
        (&mut stream)
            .take(u64::try_from(BULK).unwrap())
            .read_to_end(&mut received)
            .unwrap();
        assert!(received == expected, "to the host over {address}");
        stream.write_all(&expected).unwrap();
        stream.shutdown(Shutdown::Both).unwrap();
        let mut said = String::new();
        client
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert!(client.wait().unwrap().success());
        assert_eq!(said, sum, "to the container over {address}");
    }
}

fn spawn(mut command: Command) -> std::process::Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn sixty_four_mebibytes_between_pods() {
    let mut scene = Scene::new();
    let (server, client) = (start_pod(&mut scene), start_pod(&mut scene));
    let sum = md5(&bulk());
    for (number, address) in addresses(&scene, &server).iter().enumerate() {
        let port = (5000 + number).to_string();
        let listen = format!("nc -l -p {port} | md5sum");
        let mut receiver = spawn(scene.exec_command(&server, &[], &["sh", "-c", &listen]));
        eventually("the server listens", || {
            let said = scene.exec(&server, &[], &["netstat", "-ltn"]);
            said.stdout.contains(&format!(":{port} "))
        });
        let send = format!("{MAKE_BULK} | nc {address} {port}");
        let mut sender = spawn(scene.exec_command(&client, &[], &["sh", "-c", &send]));
        let mut said = String::new();
        receiver
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        assert_eq!(said, sum, "over {address}");
        assert!(receiver.wait().unwrap().success());
        assert!(sender.wait().unwrap().success());
    }
}

#[test]
fn host_reaches_a_server_in_the_pod() {
    let mut scene = Scene::new();
    let id = start_pod(&mut scene);
    let [address, _] = addresses(&scene, &id);
    let serve = "while :; do echo pearl | nc -l -p 80; done";
    let mut server = spawn(scene.exec_command(&id, &[], &["sh", "-c", serve]));
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
