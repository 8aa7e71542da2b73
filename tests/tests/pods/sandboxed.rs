//! Pods of `sandboxer = "shim"` for what needs no pod of its own: what other tests do in
//! containerd's default mode, one thing after the other.

use nacre_tests::pods::PodScene;

use crate::{devices, exec, lifecycle, logs, network, pids, resources, security, stats, volumes};

#[test]
fn streams_ports_and_raw_volumes() {
    let scene = PodScene::sandboxed();
    let pod = scene.pod("plain").run();
    exec::exec_and_attach_in(&pod);
    exec::terminals_in(&pod);
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
    lifecycle::no_call_waits_for_a_slow_create_in(&scene, &pod);
    volumes::what_kubelet_writes_in(&pod);
    pod.remove();
    resources::limits_change_in(&scene);
}

#[test]
fn volumes_users_profiles_and_processes() {
    let scene = PodScene::sandboxed();
    let pod = scene.pod("secured").privileged().run();
    volumes::host_paths_and_empty_dirs_in(&scene, &pod);
    volumes::volumes_belong_to_the_group_in(&pod);
    security::users_and_protections_in(&pod);
    security::profiles_and_privileges_in(&scene, &pod);
    pids::pids_are_apart_in(&pod);
    resources::processes_are_limited(&pod);
}
