//! What is read of kubelet's answers, and what of its silence.

use super::testing::Kubelet;
use super::*;
use crate::error::chain;

fn plugin(resource: &str, id: &str) -> Allocated {
    Allocated::Plugin {
        resource: resource.into(),
        id: id.into(),
    }
}

#[tokio::test]
async fn devices_of_all_containers_of_the_pod_are_told() {
    let plugins: [(&str, &[&str]); 2] = [
        ("vendor.com/gpu", &["0000:65:00.0", "0000:66:00.0"]),
        ("vendor.com/nic", &["7"]),
    ];
    let kubelet = Kubelet::new(&plugins, &["vendor.com/gpu=3"]);
    let names = allocated(&kubelet.socket(), "default", "trainer").await;
    let expected = [
        plugin("vendor.com/gpu", "0000:65:00.0"),
        plugin("vendor.com/gpu", "0000:66:00.0"),
        plugin("vendor.com/nic", "7"),
        Allocated::Cdi("vendor.com/gpu=3".into()),
    ];
    assert_eq!(names.unwrap(), expected);
}

#[tokio::test]
async fn a_pod_that_others_have_made_has_been_given_nothing() {
    let kubelet = Kubelet::new(&[("vendor.com/gpu", &["0"])], &[]);
    for (namespace, name) in [("default", "web"), ("kube-system", "trainer")] {
        let names = allocated(&kubelet.socket(), namespace, name).await;
        assert_eq!(names.unwrap(), []);
    }
}

#[tokio::test]
async fn who_does_not_answer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let socket = Kubelet::nowhere(dir.path());
    let error = allocated(&socket, "default", "trainer").await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("none.sock"), "{text}");

    let kubelet = Kubelet::refusing("12");
    let error = allocated(&kubelet.socket(), "default", "trainer").await;
    let text = chain(&error.unwrap_err());
    assert!(text.contains("as the test wants"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_is_waited_for_once() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kubelet.sock");
    let _silent = tokio::net::UnixListener::bind(&socket).unwrap();
    let begin = tokio::time::Instant::now();
    let error = allocated(&socket, "default", "trainer").await.unwrap_err();
    assert!(matches!(error, KubeletError::Late { .. }), "{error}");
    assert!(begin.elapsed() < PATIENCE * 3 / 2);
}
