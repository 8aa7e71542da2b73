//! Much data between pods, and between a pod and the host, by `nacre-wire`, which
//! compares checksums. UDP may lose datagrams: what counts is that its protocol gets all
//! of them across.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{HostSegments, SEGMENTS, run};

const MANY: u64 = 64 << 20;
/// Those of UDP, each of whose datagrams costs the lab's processor a packet of its own.
const SOME: u64 = 16 << 20;
const MORE: u64 = 1 << 30;
/// Time for a transfer of so many in the lab.
const LONG: Duration = Duration::from_secs(900);
/// The lab's bridge; and where the servers listen.
const HOST: &str = "10.88.0.1:7100";
const PORT: u16 = 7100;
/// That of the lab's pods.
const MTU: u64 = 1500;

/// A server on the host, until it is dropped.
struct HostServer(Child);

impl HostServer {
    fn start() -> Self {
        let mut server = Command::new("nacre-wire")
            .args(["serve", HOST])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut said = BufReader::new(server.stdout.take().unwrap());
        said.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self(server)
    }
}

impl Drop for HostServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Puts the program and all that it is linked with into a directory.
fn program(scene: &PodScene) -> PathBuf {
    let found = run("sh", &["-c", "command -v nacre-wire"]).exits(0).stdout;
    let directory = scene.directory("wire");
    let linked = run("ldd", &[found.trim()]).exits(0).stdout;
    let files = linked
        .split_whitespace()
        .filter(|word| word.starts_with('/'));
    for file in files.chain([found.trim()]) {
        let name = Path::new(file).file_name().unwrap();
        fs::copy(file, directory.join(name)).unwrap();
    }
    directory
}

/// A pod that has the program, and takes data.
struct Peer<'s> {
    pod: Pod<'s>,
    wire: PodContainer,
}

/// The program by its own loader: the container's image has none.
fn wire(arguments: &[&str]) -> Vec<String> {
    let loader = "/wire/ld-linux-x86-64.so.2";
    let program = [loader, "--library-path", "/wire", "/wire/nacre-wire"];
    let all = program.iter().chain(arguments);
    all.map(|word| (*word).to_owned()).collect()
}

impl<'s> Peer<'s> {
    fn start(scene: &'s PodScene, program: &Path, name: &str) -> Self {
        let pod = scene.pod(name).sysctl(SEGMENTS.0, SEGMENTS.1).run();
        let serve = wire(&["serve", &format!("0.0.0.0:{PORT}")]);
        let serve: Vec<&str> = serve.iter().map(String::as_str).collect();
        let wire = pod.container("wire", &serve).mount(program, "/wire");
        let wire = wire.start();
        wire.await_logged("stdout", "ready");
        Self { pod, wire }
    }

    fn address(&self) -> String {
        format!("{}:{PORT}", self.pod.ip())
    }

    fn sends(&self, protocol: &str, to: &str, bytes: u64) {
        let send = wire(&[protocol, to, &bytes.to_string()]);
        let send: Vec<&str> = send.iter().map(String::as_str).collect();
        let begin = Instant::now();
        let sent = self.wire.exec(&send).exits(0).stdout;
        let took = begin.elapsed();
        println!("from {} in {took:.1?}: {sent}", self.pod.id);
    }

    /// Bytes and packets that went to the pod's interface, and those that came from it.
    fn traffic(&self) -> [Traffic; 2] {
        let path = format!("/proc/{}/net/dev", self.pod.monitor());
        let text = fs::read_to_string(path).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"));
        let numbers = line.unwrap().split_whitespace();
        let numbers: Vec<u64> = numbers.map(|number| number.parse().unwrap()).collect();
        [0, 8].map(|at| Traffic {
            bytes: numbers[at],
            packets: numbers[at + 1],
        })
    }

    /// Fails unless packets larger than the MTU go to the pod, or come from it, while
    /// `transfer` runs: there are such only with segmentation offload.
    fn is_offloaded(&self, direction: usize, transfer: impl FnOnce()) {
        let before = self.traffic();
        transfer();
        let after = self.traffic();
        let bytes = after[direction].bytes - before[direction].bytes;
        let packets = after[direction].packets - before[direction].packets;
        let mean = bytes / packets;
        assert!(mean > MTU, "{packets} packets of {mean} bytes");
    }

    /// Fails unless both the guest and the host leave checksums to the other side:
    /// `VIRTIO_NET_F_CSUM` and `VIRTIO_NET_F_GUEST_CSUM` (virtio 1.2, 5.1.3), the first two
    /// features of the guest's card. UDP has no other offload here.
    fn leaves_checksums(&self) {
        let features = "/sys/class/net/eth0/device/features";
        let said = self.wire.exec(&["cat", features]).exits(0);
        assert!(said.stdout.starts_with("11"), "{said:#?}");
    }
}

#[derive(Debug, Clone, Copy)]
struct Traffic {
    bytes: u64,
    packets: u64,
}

const TO: usize = 0;
const FROM: usize = 1;

fn host_sends(protocol: &str, to: &str, bytes: u64) {
    let begin = Instant::now();
    let sent = run("nacre-wire", &[protocol, to, &bytes.to_string()]);
    let sent = sent.exits(0).stdout;
    println!("from the host in {:.1?}: {sent}", begin.elapsed());
}

fn tcp_between_pods(bytes: u64) {
    let scene = PodScene::within(LONG);
    let program = program(&scene);
    let [one, other] = ["one", "other"].map(|name| Peer::start(&scene, &program, name));
    one.is_offloaded(FROM, || one.sends("tcp", &other.address(), bytes));
    one.is_offloaded(TO, || other.sends("tcp", &one.address(), bytes));
}

fn tcp_between_pod_and_host(bytes: u64) {
    let scene = PodScene::within(LONG);
    let pod = Peer::start(&scene, &program(&scene), "pod");
    let _host = HostServer::start();
    let _segments = HostSegments::set();
    pod.is_offloaded(FROM, || pod.sends("tcp", HOST, bytes));
    pod.is_offloaded(TO, || host_sends("tcp", &pod.address(), bytes));
}

fn udp_between_pods(bytes: u64) {
    let scene = PodScene::within(LONG);
    let program = program(&scene);
    let [one, other] = ["one", "other"].map(|name| Peer::start(&scene, &program, name));
    one.leaves_checksums();
    one.sends("udp", &other.address(), bytes);
    other.sends("udp", &one.address(), bytes);
}

fn udp_between_pod_and_host(bytes: u64) {
    let scene = PodScene::within(LONG);
    let pod = Peer::start(&scene, &program(&scene), "pod");
    let _host = HostServer::start();
    pod.leaves_checksums();
    pod.sends("udp", HOST, bytes);
    host_sends("udp", &pod.address(), bytes);
}

#[test]
fn tcp_carries_64_mebibytes_each_way() {
    tcp_between_pods(MANY);
    tcp_between_pod_and_host(MANY);
}

#[test]
fn udp_carries_16_mebibytes_each_way() {
    udp_between_pods(SOME);
    udp_between_pod_and_host(SOME);
}

#[test]
#[ignore = "a gibibyte takes an emulated processor five minutes each way: make long"]
fn tcp_carries_a_gibibyte_each_way_between_pods() {
    tcp_between_pods(MORE);
}

#[test]
#[ignore = "a gibibyte takes an emulated processor five minutes each way: make long"]
fn tcp_carries_a_gibibyte_each_way_between_pod_and_host() {
    tcp_between_pod_and_host(MORE);
}

#[test]
#[ignore = "a gibibyte takes an emulated processor five minutes each way: make long"]
fn udp_carries_a_gibibyte_each_way_between_pods() {
    udp_between_pods(MORE);
}

#[test]
#[ignore = "a gibibyte takes an emulated processor five minutes each way: make long"]
fn udp_carries_a_gibibyte_each_way_between_pod_and_host() {
    udp_between_pod_and_host(MORE);
}
