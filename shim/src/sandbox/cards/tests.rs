//! A namespace that changes, a machine that only notes its cards, an agent that only
//! notes what it is told.

use super::*;

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
}

impl Scene {
    /// A machine in the namespace whose first card is in slot 5.
    async fn new(pod: &Netns) -> Self {
        let host = FakeHost::scripted();
        let sandbox = host.open();
        host.boot(&sandbox).await.unwrap();
        let machine = lock(&host.machine).clone().unwrap();
        let cards = Cards::new(network::prepare(&pod.0, 1).unwrap(), 5);
        assert_eq!(cards.given().interfaces[0].card, "0000:00:05.0");
        let follower = Follower {
            netns: Arc::new(pod.0.try_clone().unwrap()),
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
        }
    }

    fn journal(&self) -> &Journal {
        &self.host.journal
    }

    /// Waits until this is the journal's end.
    async fn notes(&self, last: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        let last: Vec<String> = last.iter().map(|&line| line.into()).collect();
        while !lock(self.journal()).ends_with(&last) {
            let journal = lock(self.journal()).clone();
            assert!(Instant::now() < deadline, "{journal:#?} does not end so");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
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
async fn interface_that_the_machine_refuses_is_refused_once() {
    let Some((pod, _node)) = Netns::pod_and_node() else {
        return;
    };
    let scene = Scene::new(&pod).await;
    scene.machine.refuses_cards();
    pod.ip("link add net1 type veth peer name far1");
    pod.ip("link set net1 up");
    scene.notes(&["no room for a card"]).await;
    // Its tap came and went meanwhile, which are changes of the namespace, too.
    pod.ip("addr add 10.88.0.6/32 dev eth0");
    scene
        .notes(&[
            "no room for a card",
            "guest +eth0 0000:00:05.0 10.88.0.6/32",
        ])
        .await;
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
        .notes(&["guest keeps 0000:00:05.0", "no card in 5"])
        .await;
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
