//! A namespace that changes, a machine that only notes its cards, an agent that only
//! notes what it is told.

use super::*;

use std::cell::Cell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use crate::machine::fake::{FakeHost, FakeMachine, Journal};
use crate::network::tests::Netns;
use crate::sandbox::Sandbox;
use crate::task::lock;

struct Scene {
    host: FakeHost,
    machine: Arc<FakeMachine>,
    _sandbox: Sandbox,
    follow: tokio::task::JoinHandle<()>,
    /// The machine's.
    _taps: Vec<OwnedFd>,
    /// How far the journal was waited for.
    heard: Cell<usize>,
}

impl Scene {
    /// A machine in the namespace whose first card is in slot 5.
    async fn new(pod: &Netns) -> Self {
        Self::following(pod, pod.0.try_clone().unwrap()).await
    }

    /// The same, whose shim looks for changes there.
    async fn following(pod: &Netns, netns: File) -> Self {
        let host = FakeHost::scripted();
        let sandbox = host.open();
        host.boot(&sandbox).await.unwrap();
        let machine = lock(&host.machine).clone().unwrap();
        let network = network::prepare(&pod.0, 1).unwrap();
        let taps = network.nics[0].taps.iter();
        let taps = taps.map(|tap| tap.try_clone().unwrap()).collect();
        let cards = Cards::new(network, 5);
        assert_eq!(cards.given().interfaces[0].card, "0000:00:05.0");
        let follower = Follower {
            netns: Arc::new(netns),
            queues: 1,
            machine: machine.clone(),
            agent: sandbox.agent().unwrap().clone(),
            cards,
        };
        Self {
            host,
            machine,
            _sandbox: sandbox,
            follow: tokio::spawn(follower.follow()),
            _taps: taps,
            heard: Cell::new(0),
        }
    }

    fn journal(&self) -> &Journal {
        &self.host.journal
    }

    /// Waits until the journal has this line.
    async fn noted(&self, line: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !lock(self.journal()).iter().any(|noted| noted == line) {
            let journal = lock(self.journal()).clone();
            assert!(Instant::now() < deadline, "{journal:#?} has no {line}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the journal has these lines one after the other, behind those that were
    /// waited for before.
    async fn notes(&self, lines: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let journal = lock(self.journal()).clone();
            let heard = self.heard.get();
            let mut windows = journal[heard..].windows(lines.len());
            if let Some(position) = windows.position(|window| window == lines) {
                self.heard.set(heard + position + lines.len());
                return;
            }
            let rest = &journal[heard..];
            assert!(Instant::now() < deadline, "no {lines:#?} in {rest:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits for nothing that the journal has already.
    fn forgets(&self) {
        self.heard.set(lock(self.journal()).len());
    }
}

#[tokio::test]
async fn interface_that_comes_and_goes_is_the_guest_s() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    for round in 0..2 {
        pod.ip("link add net1 address 02:00:00:00:00:06 mtu 1400 type veth peer name far1");
        pod.ip("addr add 10.99.0.5/24 dev net1");
        pod.ip("link set net1 up");
        scene
            .notes(&[
                "card 02:00:00:00:00:06, mtu 1400, in 20",
                "guest +net1 0000:00:14.0 10.99.0.5/24",
            ])
            .await;
        pod.ip("route add 192.0.2.0/24 via 10.99.0.1");
        scene.notes(&["guest +192.0.2.0/24 net1"]).await;
        pod.ip("addr add fd00:99::5/64 dev net1 nodad");
        scene
            .notes(&["guest +net1 0000:00:14.0 fd00:99::5/64"])
            .await;
        pod.ip("route del 192.0.2.0/24 via 10.99.0.1");
        scene.notes(&["guest -192.0.2.0/24 net1"]).await;
        pod.ip("link delete net1");
        scene
            .notes(&["guest lets go of 0000:00:14.0", "no card in 20"])
            .await;
        let journal = lock(scene.journal()).clone();
        let cards = journal.iter().filter(|line| line.starts_with("card"));
        assert_eq!(cards.count(), round + 1, "{journal:#?}");
    }
    assert!(!scene.follow.is_finished());
}

#[tokio::test]
async fn what_changes_of_the_first_interface_reaches_the_guest_and_its_end() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    pod.ip("addr add 10.88.0.6/32 dev eth0");
    scene
        .notes(&["guest +eth0 0000:00:05.0 10.88.0.6/32"])
        .await;
    pod.ip("addr del 10.88.0.6/32 dev eth0");
    scene
        .notes(&["guest -eth0 0000:00:05.0 10.88.0.6/32"])
        .await;
    pod.ip("link delete eth0");
    scene
        .notes(&["guest lets go of 0000:00:05.0", "no card in 5"])
        .await;
}

#[tokio::test]
async fn interface_that_the_machine_refuses_is_refused_once_while_it_is_up() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    scene.machine.refuses_cards(true);
    pod.ip("link add net1 type veth peer name far1");
    pod.ip("link set net1 up");
    scene.notes(&["no room for a card"]).await;
    // Its tap came and went meanwhile, which are changes of the namespace, too.
    pod.ip("addr add 10.88.0.6/32 dev eth0");
    scene
        .notes(&["guest +eth0 0000:00:05.0 10.88.0.6/32"])
        .await;
    let tried = |line: &&String| *line == "no room for a card";
    assert_eq!(lock(scene.journal()).iter().filter(tried).count(), 1);
    let links = network::look(&pod.0).unwrap().links;
    let net1 = links.iter().find(|link| link.name == "net1").unwrap();
    let error = chain(&network::part(&pod.0, net1).unwrap_err());
    assert!(error.contains("ingress hook"), "it is there still: {error}");

    scene.machine.refuses_cards(false);
    pod.ip("link set net1 down");
    pod.ip("addr del 10.88.0.6/32 dev eth0");
    scene
        .notes(&["guest -eth0 0000:00:05.0 10.88.0.6/32"])
        .await;
    pod.ip("link set net1 address 02:00:00:00:00:06 mtu 1400 up");
    scene.noted("card 02:00:00:00:00:06, mtu 1400, in 20").await;
}

/// Such as a room that was another's.
#[tokio::test]
async fn interface_that_was_refused_comes_when_another_goes() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    scene.machine.refuses_cards(true);
    pod.ip("link add net1 address 02:00:00:00:00:06 mtu 1400 type veth peer name far1");
    pod.ip("link set net1 up");
    scene.notes(&["no room for a card"]).await;
    scene.machine.refuses_cards(false);
    pod.ip("link delete eth0");
    scene.noted("card 02:00:00:00:00:06, mtu 1400, in 20").await;
}

/// Without any further change.
#[tokio::test]
async fn what_the_guest_refuses_it_is_told_again_with_all_the_rest() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    scene.machine.refuses_network(2);
    pod.ip("addr add 10.88.0.6/32 dev eth0");
    let all = [
        "guest +eth0 0000:00:05.0 10.88.0.5/16 10.88.0.6/32",
        "guest +192.0.2.0/24 eth0",
        "guest +192.0.2.0/24 eth0",
        "guest + eth0",
    ];
    let first = ["guest +eth0 0000:00:05.0 10.88.0.6/32", "guest refuses"];
    let second = [&all[..], &["guest refuses"]].concat();
    scene
        .notes(&[&first[..], &second[..], &all[..]].concat())
        .await;
}

/// It may have it all the same.
#[tokio::test]
async fn what_the_guest_refused_is_taken_from_it_when_it_is_gone() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    scene.machine.refuses_network(u32::MAX);
    pod.ip("addr add 10.88.0.6/32 dev eth0");
    scene.noted("guest refuses").await;
    pod.ip("addr del 10.88.0.6/32 dev eth0");
    scene.noted("guest -eth0 0000:00:05.0 10.88.0.6/32").await;
    scene.machine.refuses_network(0);
    scene.forgets();
    scene
        .notes(&[
            "guest -eth0 0000:00:05.0 10.88.0.6/32",
            "guest +eth0 0000:00:05.0 10.88.0.5/16",
            "guest +192.0.2.0/24 eth0",
            "guest +192.0.2.0/24 eth0",
            "guest + eth0",
        ])
        .await;
    pod.ip("addr add 10.88.0.7/32 dev eth0");
    scene
        .notes(&["guest +eth0 0000:00:05.0 10.88.0.7/32"])
        .await;
}

/// As of a pod that has no processes left while it boots.
#[tokio::test]
async fn a_shim_that_hears_of_nothing_yet_tries_again() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let no_namespace = File::open("/dev/null").unwrap();
    let descriptor = no_namespace.as_raw_fd();
    let mut scene = Scene::following(&pod, no_namespace).await;
    let follows = tokio::time::timeout(Duration::from_millis(500), &mut scene.follow);
    follows.await.expect_err("it does not end");
    // SAFETY: both descriptors are open; the one that is replaced is the follower's file.
    let replaced = unsafe { libc::dup2(pod.0.as_raw_fd(), descriptor) };
    assert_eq!(replaced, descriptor);
    pod.ip("addr add 10.88.0.6/32 dev eth0");
    scene
        .notes(&["guest +eth0 0000:00:05.0 10.88.0.6/32"])
        .await;
}

/// As when it was moved to another namespace and back.
#[tokio::test]
async fn interface_that_was_gone_meanwhile_is_joined_again() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    let eth0 = |seen: Seen| seen.links.into_iter().find(|link| link.name == "eth0");
    let eth0 = || eth0(network::look(&pod.0).unwrap()).unwrap();
    assert!(eth0().is_joined);
    network::part(&pod.0, &eth0()).unwrap();
    assert!(!eth0().is_joined);
    pod.ip("addr add 10.88.0.6/32 dev eth0");
    scene
        .notes(&["guest +eth0 0000:00:05.0 10.88.0.6/32"])
        .await;
    assert!(eth0().is_joined);
}

#[tokio::test]
async fn card_is_not_outgrown() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    for (mtu, expected) in [(1400, 1400), (1500, 1450)] {
        pod.ip(&format!("link set eth0 mtu {mtu}"));
        let told = format!("guest +eth0 0000:00:05.0 mtu {expected}");
        scene.notes(&[told.as_str()]).await;
    }
}

#[tokio::test]
async fn card_that_the_guest_keeps_is_taken_out_all_the_same() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    scene.machine.keeps_cards();
    pod.ip("link delete eth0");
    scene
        .notes(&["guest keeps 0000:00:05.0", "no card in 5, by force"])
        .await;
}

#[test]
fn what_was_said_when_the_pod_was_made_is_not_said_again() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    pod.ip("link add br7 type bridge");
    pod.ip("link set br7 up");
    let cards = Cards::new(network::prepare(&pod.0, 1).unwrap(), 5);
    assert_eq!(cards.others, HashSet::from(["br7".to_owned()]));
}

#[tokio::test]
async fn dead_machine_is_not_followed() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    scene.machine.kill();
    scene.follow.await.unwrap();
}
