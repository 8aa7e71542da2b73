//! What goes through the pod's network besides TCP streams, and what must not.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nacre_tests::pods::{Pod, PodContainer, PodScene};
use nacre_tests::{PATIENCE, eventually, run, run_with_input};

use crate::network::fetch;
use crate::{PERL, SLEEP};

/// The host's end of a pod's veth.
#[track_caller]
fn host_end(pod: &Pod) -> String {
    let pid = pod.monitor().to_string();
    let said = run(
        "nsenter",
        &["-t", &pid, "-n", "ip", "-o", "link", "show", "eth0"],
    )
    .exits(0);
    let (_, rest) = said.stdout.split_once("@if").unwrap();
    let (index, _) = rest.split_once(':').unwrap();
    let links = fs::read_dir("/sys/class/net").unwrap().flatten();
    let mut ends = links.filter(|link| {
        let number = fs::read_to_string(link.path().join("ifindex")).unwrap_or_default();
        number.trim() == index
    });
    let end = ends.next().unwrap_or_else(|| panic!("no link {index}"));
    end.file_name().into_string().unwrap()
}

/// A network policy as the host enforces it: on its end of the pod's veth.
struct Policy;

impl Policy {
    /// Drops what goes to a port, of the pod or of others.
    fn drop_port(pod: &Pod, port: u16) -> Self {
        let link = host_end(pod);
        let chain = |name: &str, hook: &str| {
            format!(
                "chain {name} {{ type filter hook {hook} device \"{link}\" priority 0; \
                 tcp dport {port} counter drop; }}\n"
            )
        };
        let [to, from] = [chain("to_pod", "egress"), chain("from_pod", "ingress")];
        let rules = format!("table netdev denied {{\n{to}{from}}}\n");
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]);
        run_with_input(nft, rules.into_bytes()).exits(0);
        Self
    }

    /// How many of its two chains have dropped something.
    fn dropped(&self) -> usize {
        let said = run("nft", &["list", "table", "netdev", "denied"]).exits(0);
        let counters = said.stdout.matches("counter packets").count();
        counters - said.stdout.matches("counter packets 0 ").count()
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        let said = run("nft", &["delete", "table", "netdev", "denied"]);
        assert!(
            thread::panicking() || said.code == Some(0),
            "left behind: {said:#?}"
        );
    }
}

/// What a container gets at a port of the host.
fn fetch_from_host(container: &PodContainer, listener: &TcpListener) -> String {
    let port = listener.local_addr().unwrap().port();
    thread::scope(|threads| {
        threads.spawn(|| listener.accept().unwrap().0.write_all(b"host\n").unwrap());
        container
            .sh(&format!("nc 10.88.0.1 {port} </dev/null"))
            .stdout
    })
}

const DROPPED: u16 = 8080;
const OPEN: u16 = 8081;

#[test]
fn policies_on_the_host_s_end_of_the_veth_apply() {
    let scene = PodScene::new();
    let pod = scene.pod("policed").run();
    let serve = format!(
        "for port in {DROPPED} {OPEN}; do \
           while true; do echo served | nc -l -p $port; done & done; wait"
    );
    let app = pod.container("app", &["sh", "-c", &serve]).start();
    let at = |port| format!("{}:{port}", pod.ip());
    let answers = |port| {
        eventually(&format!("port {port} answers"), || {
            fetch(&at(port), PATIENCE).as_deref() == Some("served\n")
        });
    };
    let [dropped, open] = [DROPPED, OPEN].map(|port| {
        answers(port);
        TcpListener::bind(("10.88.0.1", port)).unwrap()
    });

    let policy = Policy::drop_port(&pod, DROPPED);
    assert_eq!(fetch(&at(DROPPED), Duration::from_secs(2)), None);
    assert_eq!(policy.dropped(), 1);
    let connect = format!("nc -w 2 10.88.0.1 {DROPPED} </dev/null");
    app.sh(&connect).exits(1).prints("");
    assert_eq!(policy.dropped(), 2);
    answers(OPEN);
    assert_eq!(fetch_from_host(&app, &open), "host\n");

    drop(policy);
    answers(DROPPED);
    assert_eq!(fetch_from_host(&app, &dropped), "host\n");
}

/// Sends each datagram back.
fn echo(port: u16) -> String {
    format!(
        "exec {PERL} -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => {port}, \
         Proto => \"udp\") or die; $| = 1; print \"ready\\n\"; \
         while ($p = $s->recv($b, 65535)) {{ $s->send($b, 0, $p) }} die $!'"
    )
}

const DATAGRAMS: usize = 600;

/// The `n`th of them: all sizes up to a frame's of 9000, most of which take several.
fn datagram(n: usize) -> Vec<u8> {
    let len = 1 + n * 37 % 8900;
    let number = n.to_le_bytes();
    number.iter().copied().cycle().take(len).collect()
}

/// Between host and pod, and between pods, both ways: none is lost or changed where
/// nothing else happens.
#[test]
fn datagrams_of_all_sizes() {
    let scene = PodScene::new();
    let usr = Path::new("/usr");
    let server = scene.pod("server").run();
    let app = server
        .container("app", &["sh", "-c", &echo(5000)])
        .mount_read_only(usr, "/run/usr")
        .start();
    let client = scene.pod("client").run();
    let shell = client.container("shell", SLEEP);
    let shell = shell.mount_read_only(usr, "/run/usr").start();
    app.await_logged("stdout", "ready");

    let socket = UdpSocket::bind(("10.88.0.1", 0)).unwrap();
    socket.connect((server.ip().as_str(), 5000)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut back = vec![0; 1 << 16];
    for n in 0..DATAGRAMS {
        let sent = datagram(n);
        socket.send(&sent).unwrap();
        let len = socket.recv(&mut back).unwrap();
        assert!(back[..len] == sent, "datagram {n} of {}: {len}", sent.len());
    }

    let script = format!(
        "exec {PERL} -MIO::Socket::INET -e '$s = IO::Socket::INET->new(PeerAddr => \"{}:5000\", \
         Proto => \"udp\") or die; for $n (1..200) {{ $m = $n . \"x\" x ($n * 37 % 8900); \
         $s->send($m); $s->recv($b, 65535); $b eq $m or die \"datagram $n\" }} \
         print \"all are back\\n\"'",
        server.ip()
    );
    shell.sh(&script).exits(0).prints("all are back\n");
}
