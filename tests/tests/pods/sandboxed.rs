//! Pods of `sandboxer = "shim"` for what needs no pod of its own: what other tests do in
//! containerd's default mode, one thing after the other.

use nacre_tests::pods::PodScene;

use crate::{devices, exec, logs, network, pids, resources, stats, volumes};

#[test]
fn streams_ports_and_raw_volumes() {
    let scene = PodScene::sandboxed();
    let pod = scene.pod("plain").run();
    exec::exec_and_attach_in(&pod);
    network::ports_are_forwarded_to(&pod);
    devices::raw_volumes_in(&scene, &pod);
}

#[test]
fn stats_memory_and_shared_pids() {
    let scene = PodScene::sandboxed();
    let pod = scene.pod("shared").shared_pids().run();
    stats::stats_agree_in(&scene, &pod);
    resources::one_runs_out_of_memory_in(&pod);
    pids::pids_are_shared_in(&pod);
}

#[test]
fn logs_files_and_a_resize() {
    let scene = PodScene::sandboxed();
    let pod = scene.pod("written").run();
    logs::log_lines_in(&pod);
    logs::logs_are_reopened_in(&scene, &pod);
    volumes::what_kubelet_writes_in(&pod);
    pod.remove();
    resources::limits_change_in(&scene);
}
