//! A namespace with a veth pair whose other end plays the node, and frames
//! through it.

use super::*;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A network namespace.
pub(crate) struct Netns(pub(crate) File);

impl Netns {
    /// A new namespace, or none where that is not allowed: the test is skipped.
    fn new() -> Option<Self> {
        let worker = std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET).map_err(io::Error::from)?;
            File::open("/proc/thread-self/ns/net")
        });
        match worker.join().unwrap() {
            Ok(file) if tools_are_there() => Some(Self(file)),
            Ok(_) => {
                eprintln!("skipped: no ip(8) or no /dev/net/tun");
                None
            }
            Err(error) => {
                eprintln!("skipped: no network namespace: {error}");
                None
            }
        }
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        in_netns(&self.0, || Ok(work())).unwrap()
    }

    /// ip(8) in it.
    pub(crate) fn ip(&self, arguments: &str) {
        self.tool("ip", arguments);
    }

    fn tool(&self, program: &str, arguments: &str) {
        let status = self.run(|| {
            Command::new(program)
                .args(arguments.split_whitespace())
                .status()
                .unwrap()
        });
        assert!(status.success(), "{program} {arguments}");
    }

    /// A pod's namespace and the node's end of its veth.
    pub(crate) fn pod_and_node() -> Option<(Self, Self)> {
        let (pod, node) = (Self::new()?, Self::new()?);
        pod.ip("link add eth0 address 02:00:00:00:00:05 mtu 1450 type veth peer name node0");
        pod.move_link("node0", &node);
        node.ip("link set node0 up");
        node.ip("addr add 10.88.0.1/16 dev node0");
        pod.ip("addr add 10.88.0.5/16 dev eth0");
        pod.ip("link set lo up");
        pod.ip("link set eth0 up");
        pod.ip("route add default via 10.88.0.1");
        pod.ip("route add 192.0.2.0/24 dev eth0 table 100");
        pod.ip("route add 192.0.2.0/24 dev eth0 table 1000");
        pod.ip("rule add from 10.88.0.5 table 100 priority 500");
        pod.ip("rule add not fwmark 7/255 iif lo table 1000 priority 600");
        pod.ip("rule add uidrange 1-2 table 100 priority 700");
        pod.ip("-6 rule add to fd00:1::/64 prohibit priority 800");
        pod.ip("neigh add 10.88.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
        Some((pod, node))
    }

    fn move_link(&self, link: &str, to: &Self) {
        // ip(8) takes a namespace by path; a child sees ours under its parent.
        let path = format!("/proc/{}/fd/{}", std::process::id(), to.0.as_raw_fd());
        let status = self.run(|| {
            Command::new("ip")
                .args(["link", "set", link, "netns", &path])
                .status()
                .unwrap()
        });
        assert!(status.success());
    }
}

fn tools_are_there() -> bool {
    let ip = Command::new("ip").arg("-V").output();
    ip.is_ok() && Path::new("/dev/net/tun").exists()
}

/// Reads frames from a tap until one satisfies `wanted`; without the header.
fn await_frame(tap: &OwnedFd, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut file = File::from(tap.try_clone().unwrap());
    let deadline = Instant::now() + Duration::from_secs(5);
    while Instant::now() < deadline {
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(100u8)).unwrap();
        let mut buffer = [0; 2048];
        match file.read(&mut buffer) {
            Ok(len) if wanted(&buffer[12..len]) => return buffer[12..len].to_vec(),
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
    panic!("no such frame within five seconds");
}

/// Whether a frame is an ARP request for 10.88.0.5 (RFC 826).
fn is_request(frame: &[u8]) -> bool {
    frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 1] && frame[38..42] == [10, 88, 0, 5]
}

/// The reply of 02:00:00:00:00:05, with an empty virtio-net header before it.
fn reply(request: &[u8]) -> Vec<u8> {
    let mac = [2, 0, 0, 0, 0, 5];
    let mut packet = vec![0; 12];
    packet.extend(&request[6..12]);
    packet.extend(mac);
    packet.extend(&request[12..20]);
    packet.extend([0, 2]);
    packet.extend(mac);
    packet.extend([10, 88, 0, 5]);
    packet.extend(&request[22..32]);
    packet
}

#[test]
fn frames_cross_between_node_and_tap() {
    let Some((pod, node)) = Netns::pod_and_node() else {
        return;
    };
    let network = prepare(&pod.0, 1).unwrap();
    let [nic] = network.nics.as_slice() else {
        panic!("{network:?}");
    };
    let send = || {
        let socket = std::net::UdpSocket::bind("10.88.0.1:0").unwrap();
        socket.send_to(b"over the wire", "10.88.0.5:7").unwrap();
    };

    node.run(send);
    let request = await_frame(&nic.taps[0], is_request);
    File::from(nic.taps[0].try_clone().unwrap())
        .write_all(&reply(&request))
        .unwrap();

    // The datagram leaves only once the node got our answer.
    let datagram = await_frame(&nic.taps[0], |frame| frame.ends_with(b"over the wire"));
    assert_eq!(datagram[..6], [2, 0, 0, 0, 0, 5]);
}

#[test]
fn what_the_namespace_holds_is_told() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let network = prepare(&pod.0, 2).unwrap();

    let nic = &network.nics[0];
    assert_eq!((nic.mac, nic.mtu), ([2, 0, 0, 0, 0, 5], 1450));
    assert_eq!(nic.taps.len(), 2);
    let interface = &network.config.interfaces[0];
    assert_eq!((interface.name.as_str(), interface.mtu), ("eth0", 1450));
    assert_eq!(interface.mac, "02:00:00:00:00:05");
    assert!(interface.card.is_empty(), "the machine is not there yet");
    assert_eq!(interface.addresses, ["10.88.0.5/16"]);
    let routes: Vec<_> = network
        .config
        .routes
        .iter()
        .map(|r| (r.destination.as_str(), r.gateway.as_str(), r.table))
        .collect();
    let mut expected = [
        ("192.0.2.0/24", "", 100),
        ("192.0.2.0/24", "", 1000),
        ("", "10.88.0.1", 0),
    ];
    expected.sort_by_key(|(_, gateway, table)| (!gateway.is_empty(), *table));
    let mut routes = routes;
    routes.sort_by_key(|(_, gateway, table)| (!gateway.is_empty(), *table));
    assert_eq!(routes, expected);
    let mut all = network.config.routes.iter();
    assert!(all.all(|route| route.device == "eth0"));
    assert_eq!(network.config.neighbors.len(), 1);
    assert_eq!(network.config.neighbors[0].address, "10.88.0.9");
}

#[test]
fn rules_are_told_but_for_the_kernel_s() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let rules = prepare(&pod.0, 1).unwrap().config.rules;
    // The one with users is left out: the guest's are others.
    let [from, mark, prohibit] = rules.as_slice() else {
        panic!("{rules:?}");
    };
    assert_eq!((from.priority, from.table), (500, 100));
    assert_eq!((from.from.as_str(), from.action), ("10.88.0.5/32", 1));
    assert_eq!((mark.fw_mark, mark.fw_mask, mark.invert), (7, 255, true));
    assert_eq!((mark.input_device.as_str(), mark.table), ("lo", 1000));
    assert_eq!((prohibit.to.as_str(), prohibit.action), ("fd00:1::/64", 8));
    assert!(prohibit.ipv6 && !from.ipv6);
}

#[test]
fn a_second_vm_may_follow_in_the_same_namespace() {
    let Some((pod, node)) = Netns::pod_and_node() else {
        return;
    };
    drop(prepare(&pod.0, 1).unwrap());
    let network = prepare(&pod.0, 1).unwrap();
    node.run(|| {
        let socket = std::net::UdpSocket::bind("10.88.0.1:0").unwrap();
        socket.send_to(b"x", "10.88.0.5:7").unwrap();
    });
    await_frame(&network.nics[0].taps[0], is_request);
}

#[test]
fn frames_are_given_back_once_the_machine_is_gone() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let path = format!("/proc/self/fd/{}", pod.0.as_raw_fd());
    let is_joined_after_release = || {
        release(Path::new(&path)).unwrap();
        look(&pod.0).unwrap().links[0].is_joined
    };
    assert!(!is_joined_after_release());
    let network = prepare(&pod.0, 1).unwrap();
    assert!(is_joined_after_release(), "its machine lives");
    drop(network);
    assert!(look(&pod.0).unwrap().links[0].is_joined, "to nowhere");
    assert!(!is_joined_after_release());
    pod.tool("tc", "qdisc add dev eth0 ingress");
    pod.tool(
        "tc",
        "filter add dev eth0 parent ffff: protocol all u32 match u8 0 0 \
         action mirred egress redirect dev lo",
    );
    assert!(is_joined_after_release(), "another's");
}

#[test]
fn nothing_is_released_where_no_pod_s_namespace_is() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in [
        file.path(),
        Path::new("/none"),
        Path::new("/proc/self/ns/net"),
    ] {
        release(path).unwrap();
    }
}

#[test]
fn namespace_without_interfaces_gives_no_nic() {
    let Some(netns) = Netns::new() else { return };
    let network = prepare(&netns.0, 1).unwrap();
    assert!(network.nics.is_empty() && network.config.routes.is_empty());
}

#[test]
fn taps_are_no_strangers() {
    let Some(netns) = Netns::new() else { return };
    netns.ip("link add br7 type bridge");
    netns.ip("link set br7 up");
    let tap = netns.run(|| tap::open("tap_2", 1).unwrap());
    netns.ip("link set tap_2 up");
    let seen = look(&netns.0).unwrap();
    drop(tap);
    assert_eq!(seen.others, ["br7"]);
    assert!(seen.links.is_empty());
}

/// Such as that of a card which the machine still has.
#[test]
fn taps_are_not_shared() {
    let Some(netns) = Netns::new() else { return };
    for queues in [1, 2] {
        let open = || netns.run(|| tap::open("tap_2", queues));
        let first = open().unwrap();
        let error = open().unwrap_err();
        let text = crate::error::chain(&error);
        assert!(text.contains("tap_2") && text.contains("busy"), "{text}");
        drop(first);
    }
}

#[test]
fn an_interface_is_renamed_and_another_has_its_name() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let first = prepare(&pod.0, 1).unwrap();
    pod.ip("link set eth0 down");
    pod.ip("link set eth0 name eth1");
    pod.ip("link add eth0 type veth peer name far0");
    let links = look(&pod.0).unwrap().links;
    let second = links.iter().find(|link| link.name == "eth0").unwrap();
    let second = join(&pod.0, second, 1).unwrap();
    assert_ne!(first.nics[0].index, second.index);
}

#[tokio::test]
async fn what_changes_at_once_is_heard_of_once() {
    let Some(netns) = Netns::new() else { return };
    let changes = follow::Changes::of(&netns.0).unwrap();
    netns.ip("addr add 192.0.2.1/32 dev lo");
    let later = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        // The first has been heard of, and nothing else goes on in this thread meanwhile.
        netns.ip("addr add 192.0.2.2/32 dev lo");
    };
    let (heard, ()) = tokio::join!(changes.next(), later);
    heard.unwrap();
    let again = tokio::time::timeout(Duration::from_millis(300), changes.next()).await;
    assert!(again.is_err(), "twice");
    netns.ip("addr del 192.0.2.2/32 dev lo");
    changes.next().await.unwrap();
}

#[test]
fn host_network_is_refused() {
    let own = File::open("/proc/self/ns/net").unwrap();
    let error = prepare(&own, 1).unwrap_err();
    assert!(error.to_string().contains("hostNetwork: false"), "{error}");
}

#[test]
fn queues_are_bounded() {
    let own = File::open("/proc/self/ns/net").unwrap();
    for queues in [0, 65] {
        assert!(matches!(
            prepare(&own, queues),
            Err(NetworkError::Queues(_))
        ));
    }
}
