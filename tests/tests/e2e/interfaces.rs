//! Network namespaces as other CNI plugins leave them: several interfaces, their
//! sizes, one family alone, policy routing, static neighbours, macvlan and ipvlan, and
//! what comes and goes later.

use std::fs;
use std::path::PathBuf;

use nacre_tests::{Scene, eventually, process_of, run};
use serde_json::json;

/// A network namespace of the host's, and links of the host that go with it.
struct Netns {
    path: PathBuf,
    links: Vec<&'static str>,
}

impl Netns {
    /// A namespace with nothing in it. ip(8)'s own would leave a mount behind.
    fn new(name: &str) -> Self {
        let path = PathBuf::from(format!("/tmp/e2e-netns-{name}"));
        fs::write(&path, "").unwrap();
        let option = format!("--net={}", path.display());
        run("unshare", &[&option, "true"]).exits(0);
        Self {
            path,
            links: Vec::new(),
        }
    }

    /// ip(8) on the host.
    fn host(arguments: &str) {
        let arguments: Vec<_> = arguments.split_whitespace().collect();
        run("ip", &arguments).exits(0);
    }

    /// ip(8) in it.
    fn ip(&self, arguments: &str) {
        self.said("ip", arguments);
    }

    /// What a program in it says.
    fn said(&self, program: &str, arguments: &str) -> String {
        let option = format!("--net={}", self.path.display());
        let mut all = vec![option.as_str(), program];
        all.extend(arguments.split_whitespace());
        run("nsenter", &all).exits(0).stdout
    }

    /// Writes a file as it is in it.
    fn write(&self, file: &str, text: &str) {
        let option = format!("--net={}", self.path.display());
        let script = format!("echo {text} > {file}");
        run("nsenter", &[&option, "sh", "-c", &script]).exits(0);
    }

    /// Moves an interface of the host into it, as `name`.
    fn take(&self, link: &str, name: &str) {
        let path = self.path.display();
        Self::host(&format!("link set {link} name {name} netns {path}"));
    }

    /// A veth pair: `inside` in it, `outside` on the host.
    fn veth(&self, inside: &str, outside: &str, mtu: u32) {
        Self::host(&format!(
            "link add {outside} mtu {mtu} type veth peer name {outside}-p mtu {mtu}"
        ));
        Self::host(&format!("link set {outside} up"));
        self.take(&format!("{outside}-p"), inside);
    }

    /// A macvlan or ipvlan, `inside`, on one end of a veth pair of the host whose other
    /// end is `outside`.
    fn on_parent(&mut self, kind: &str, inside: &str, outside: &'static str) {
        Self::host(&format!(
            "link add {outside} type veth peer name {outside}-p"
        ));
        self.links.push(outside);
        for link in [outside.to_owned(), format!("{outside}-p")] {
            Self::host(&format!("link set {link} up"));
        }
        Self::host(&format!("link add link {outside}-p name {inside}-x {kind}"));
        self.take(&format!("{inside}-x"), inside);
    }

    /// Starts a container in it that sleeps.
    fn start(&self, scene: &mut Scene) -> String {
        let path = self.path.clone();
        scene.start_spec(|spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
            namespaces.push(json!({"type": "network", "path": path}));
            spec["process"]["args"] = json!(["sleep", "3600"]);
        })
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        for link in &self.links {
            run("ip", &["link", "delete", link]);
        }
        run("umount", &[self.path.to_str().unwrap()]);
        fs::remove_file(&self.path).ok();
    }
}

fn reaches(scene: &Scene, id: &str, options: &[&str], address: &str) {
    let mut command = vec!["ping", "-c", "2", "-W", "20"];
    command.extend(options);
    command.push(address);
    scene.exec(id, &[], &command).exits(0);
}

#[test]
fn two_interfaces_with_rules_and_neighbours() {
    let mut scene = Scene::new();
    let netns = Netns::new("two");
    netns.veth("eth0", "e2e-small", 1400);
    netns.veth("net1", "e2e-jumbo", 9000);
    Netns::host("addr add 10.77.0.1/24 dev e2e-small");
    Netns::host("addr add fd00:77::1/64 dev e2e-jumbo nodad");
    netns.ip("link set lo up");
    netns.ip("link set eth0 up");
    netns.ip("link set net1 up");
    netns.ip("addr add 10.77.0.5/24 dev eth0");
    netns.ip("addr add fd00:77::5/64 dev net1 nodad");
    netns.ip("route add default via 10.77.0.1");
    netns.ip("-6 route add default via fd00:77::1 dev net1 table 300");
    netns.ip("-6 rule add from fd00:77::5 table 300 priority 700");
    netns.ip("rule add to 192.0.2.0/24 prohibit priority 600");
    netns.ip("neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent");
    let id = netns.start(&mut scene);

    let shell = |script: &str| scene.exec(&id, &[], &["sh", "-c", script]);
    shell("cat /sys/class/net/eth0/mtu /sys/class/net/net1/mtu")
        .exits(0)
        .prints("1400\n9000\n");
    // One packet each: pieces would arrive at whatever MTU there is.
    reaches(&scene, &id, &["-s", "1300"], "10.77.0.1");
    let fragments = || {
        let text = fs::read_to_string("/proc/net/snmp6").unwrap();
        let line = text.lines().find(|line| line.starts_with("Ip6ReasmReqds"));
        line.unwrap().to_owned()
    };
    let before = fragments();
    reaches(&scene, &id, &["-s", "8800"], "fd00:77::1");
    assert_eq!(fragments(), before);

    let said = shell("ip -6 rule; ip -6 route show table 300").exits(0);
    for part in [
        "from fd00:77::5 lookup 300",
        "default via fd00:77::1 dev net1",
    ] {
        assert!(said.stdout.contains(part), "no {part} in {said:#?}");
    }
    // Only by the rule is there a way to another network.
    let source = ["-I", "fd00:77::5"];
    Netns::host("addr add fd00:7777::1/128 dev e2e-jumbo nodad");
    reaches(&scene, &id, &source, "fd00:7777::1");
    shell("ping -c 1 -W 2 192.0.2.1")
        .exits(1)
        .complains(&["Permission denied"]);
    let said = shell("cat /proc/net/arp").exits(0);
    let entry = said.stdout.lines().find(|line| line.contains("10.77.0.9"));
    // 0x6: complete and permanent.
    assert!(
        entry.is_some_and(|line| line.contains("0x6") && line.contains("02:00:00:00:00:09")),
        "{said:#?}"
    );
}

/// Neither has an IPv4 address.
#[test]
fn macvlan_and_ipvlan_with_ipv6_alone() {
    let mut scene = Scene::new();
    let mut netns = Netns::new("vlan");
    netns.on_parent("type macvlan mode bridge", "eth0", "e2e-mac");
    netns.on_parent("type ipvlan mode l2", "net1", "e2e-ip");
    Netns::host("addr add fd00:78::1/64 dev e2e-mac nodad");
    Netns::host("addr add fd00:79::1/64 dev e2e-ip nodad");
    netns.ip("link set eth0 up");
    netns.ip("link set net1 up");
    netns.ip("addr add fd00:78::5/64 dev eth0 nodad");
    netns.ip("addr add fd00:79::5/64 dev net1 nodad");
    netns.ip("-6 route add default via fd00:78::1 dev eth0");
    let id = netns.start(&mut scene);
    for address in ["fd00:78::1", "fd00:79::1"] {
        reaches(&scene, &id, &[], address);
    }
    let said = scene.exec(
        &id,
        &[],
        &["sh", "-c", "ip -4 addr show dev eth0; ip -6 route"],
    );
    let said = said.exits(0);
    assert!(!said.stdout.contains("inet "), "{said:#?}");
    assert!(said.stdout.contains("default via fd00:78::1"), "{said:#?}");
    for address in ["fd00:78::5", "fd00:79::5"] {
        run("ping", &["-6", "-c", "2", "-W", "20", address]).exits(0);
    }
}

/// As one whose guest has had the monitor make as many threads as there may be. The
/// shim goes on, and catches up when there is room again.
#[test]
fn pod_at_its_limit_of_processes_lives_and_catches_up() {
    let mut scene = Scene::new();
    let netns = Netns::new("full");
    netns.veth("eth0", "e2e-full", 1500);
    netns.ip("link set eth0 up");
    netns.ip("addr add 10.77.0.5/24 dev eth0");
    let id = netns.start(&mut scene);
    let limit = format!("/sys/fs/cgroup/default/{id}/pids.max");
    fs::write(&limit, "1").unwrap();
    netns.ip("addr add 10.79.0.5/24 dev eth0");
    let log = format!("/run/nacre/default/{id}/log");
    eventually("the shim cannot look", || {
        fs::read_to_string(&log)
            .unwrap()
            .contains("cannot start a thread")
    });
    // Whether it is run is a matter of what it takes.
    println!("{:?}", scene.exec(&id, &[], &["true"]));
    fs::write(&limit, "max").unwrap();
    eventually("the guest has another address", || {
        let said = scene.exec(&id, &[], &["ip", "addr", "show", "dev", "eth0"]);
        said.code == Some(0) && said.stdout.contains("10.79.0.5/24")
    });
}

/// As a CNI plugin gives an interface to a pod that runs, and takes it away again.
#[test]
fn interface_comes_and_goes_while_the_container_runs() {
    let mut scene = Scene::new();
    let netns = Netns::new("late");
    netns.veth("eth0", "e2e-first", 1500);
    Netns::host("addr add 10.77.0.1/24 dev e2e-first");
    netns.ip("link set eth0 up");
    netns.ip("addr add 10.77.0.5/24 dev eth0");
    let promote = "/proc/sys/net/ipv4/conf/eth0/promote_secondaries";
    netns.write(promote, "1");
    let id = netns.start(&mut scene);
    let shell = |script: &str| scene.exec(&id, &[], &["sh", "-c", script]);

    for mac in ["02:00:00:00:00:77", "02:00:00:00:00:78"] {
        netns.veth("net1", "e2e-late", 9000);
        Netns::host("addr add 10.78.0.1/24 dev e2e-late");
        Netns::host("addr add 192.0.2.1/32 dev e2e-late");
        netns.ip(&format!("link set net1 address {mac}"));
        netns.ip("link set net1 up");
        netns.ip("addr add 10.78.0.5/24 dev net1");
        netns.ip("addr add fd00:78::5/64 dev net1 nodad");
        netns.ip("route add 192.0.2.0/24 via 10.78.0.1 table 300");
        netns.ip("rule add to 192.0.2.0/24 table 300 priority 700");
        eventually("the guest has the last of it", || {
            shell("ip rule")
                .stdout
                .contains("to 192.0.2.0/24 lookup 300")
        });
        shell("cat /sys/class/net/net1/mtu /sys/class/net/net1/address")
            .exits(0)
            .prints(&format!("9000\n{mac}\n"));
        let said = shell("ip addr show dev net1").exits(0).stdout;
        assert!(said.contains("inet6 fd00:78::5/64"), "{said}");
        // In one packet; and by the rule alone.
        reaches(&scene, &id, &["-s", "8800"], "10.78.0.1");
        reaches(&scene, &id, &[], "192.0.2.1");
        reaches(&scene, &id, &[], "10.77.0.1");

        netns.ip("rule del to 192.0.2.0/24 table 300 priority 700");
        Netns::host("link delete e2e-late");
        eventually("the guest has none of it", || {
            let said = shell("ls /sys/class/net; ip rule; ip addr").exits(0).stdout;
            !said.contains("net1") && !said.contains("lookup 300") && !said.contains("10.78")
        });
    }
    // What the container began with changes, too.
    netns.ip("addr add 10.77.0.6/24 dev eth0");
    eventually("the guest has another address", || {
        shell("ip addr show dev eth0")
            .stdout
            .contains("10.77.0.6/24")
    });
    run("ping", &["-c", "2", "-W", "20", "10.77.0.6"]).exits(0);
    // As plugins replace it: the other is the first of its subnet then, on both sides.
    netns.ip("addr del 10.77.0.5/24 dev eth0");
    eventually("the guest has the other address alone", || {
        !shell("ip addr show dev eth0").stdout.contains("10.77.0.5")
    });
    run("ping", &["-c", "2", "-W", "20", "10.77.0.6"]).exits(0);
    Netns::host("link delete e2e-first");
    eventually("the guest has no card", || {
        shell("ls /sys/class/net").stdout == "lo\n"
    });
}

/// The namespace answers itself once its pod is gone, however that ended: what led its frames
/// to the pod would lead them nowhere.
#[test]
fn namespace_that_outlives_its_pods_has_its_frames_again() {
    let mut scene = Scene::new();
    let netns = Netns::new("after");
    netns.veth("eth0", "e2e-after", 1500);
    Netns::host("addr add 10.77.0.1/24 dev e2e-after");
    netns.ip("link set eth0 up");
    netns.ip("addr add 10.77.0.5/24 dev eth0");
    let is_joined = || netns.said("tc", "qdisc show dev eth0").contains("ingress");
    assert!(!is_joined());
    for is_killed in [false, true] {
        let id = netns.start(&mut scene);
        assert!(is_joined());
        reaches(&scene, &id, &[], "10.77.0.1");
        if is_killed {
            // Nothing but its state on disk is left to clean up by.
            run("kill", &["-9", &process_of(&id, "daemon")]).exits(0);
        } else {
            scene.remove(&id);
        }
        eventually("nothing is left at the interface", || !is_joined());
        run("ping", &["-c", "2", "-W", "20", "10.77.0.5"]).exits(0);
    }
}
