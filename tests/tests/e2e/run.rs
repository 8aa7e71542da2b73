//! `ctr run`: output, exit codes, errors, and what the image and spec ask for.

use nacre_tests::{LAYERS, Scene, ctr, run};

#[test]
fn output_comes_back_from_another_kernel() {
    let mut scene = Scene::new();
    let said = scene
        .run(&["sh", "-c", "echo out; echo err >&2; uname -r"])
        .exits(0);
    let host = run("uname", &["-r"]).stdout;
    let lines: Vec<&str> = said.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "{said:#?}");
    assert_eq!(lines[0], "out");
    assert_ne!(lines[1], host.trim());
    assert_eq!(said.stderr, "err\n");
}

#[test]
fn exit_codes() {
    let mut scene = Scene::new();
    scene.run(&["true"]).exits(0);
    scene.run(&["false"]).exits(1);
    scene.run(&["sh", "-c", "exit 42"]).exits(42);
    // A shell that a signal ends: the container's init reports 128 + 9.
    scene
        .run(&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"])
        .exits(137);
}

#[test]
fn killed_init_reports_137() {
    let mut scene = Scene::new();
    let id = scene.start_sleeper(&[]);
    ctr(&["task", "kill", "-s", "KILL", &id]).exits(0);
    scene.await_status(&id, "STOPPED");
    ctr(&["task", "rm", &id])
        .exits(0)
        .complains(&["non-zero exit code 137"]);
}

#[test]
fn missing_command() {
    let mut scene = Scene::new();
    scene
        .run(&["no-such-command"])
        .exits(1)
        .complains(&["exec: \"no-such-command\": executable file not found in $PATH"]);
    scene
        .run(&["/no/such/file"])
        .exits(1)
        .complains(&["exec: \"/no/such/file\"", "no such file or directory"]);
}

#[test]
fn command_that_is_not_executable() {
    let mut scene = Scene::new();
    scene
        .run(&["/etc/passwd"])
        .exits(1)
        .complains(&["exec: \"/etc/passwd\"", "permission denied"]);
}

#[test]
fn environment_and_working_directory() {
    let mut scene = Scene::new();
    scene
        .run_with(
            &["--env", "COLOUR=mother of pearl", "--cwd", "/var"],
            &["sh", "-c", "echo \"$COLOUR\"; pwd"],
        )
        .exits(0)
        .prints("mother of pearl\n/var\n");
}

#[test]
fn user_of_the_command_line() {
    let mut scene = Scene::new();
    scene
        .run_with(&["--user", "1000:50"], &["sh", "-c", "id -u; id -g"])
        .exits(0)
        .prints("1000\n50\n");
}

#[test]
fn image_s_entrypoint_user_environment_and_directory() {
    let mut scene = Scene::new();
    scene.run_image(LAYERS, &[], &[]).exits(0).prints("two\n");
    let command = ["sh", "-c", "id -u; id -g; pwd; echo $LAYERS"];
    let said = scene.run_image(LAYERS, &[], &command);
    said.exits(0).prints("1000\n50\n/data\n3\n");
}

#[test]
fn read_only_root() {
    let mut scene = Scene::new();
    scene
        .run_with(&["--read-only"], &["sh", "-c", "echo x > /file"])
        .exits(1)
        .complains(&["Read-only file system"]);
}

#[test]
fn hostname() {
    let mut scene = Scene::new();
    scene
        .run_with(&["--hostname", "pearl"], &["hostname"])
        .exits(0)
        .prints("pearl\n");
    // Without one, the pod's name.
    let id = scene.start_sleeper(&[]);
    let expected = format!("{id}\n");
    scene
        .exec(&id, &[], &["hostname"])
        .exits(0)
        .prints(&expected);
}

#[test]
fn capabilities_are_the_default_ones() {
    let mut scene = Scene::new();
    // containerd's default set, and the one ctr was asked to drop from it.
    scene
        .run(&["grep", "CapEff", "/proc/self/status"])
        .exits(0)
        .prints("CapEff:\t00000000a80425fb\n");
    let options = ["--cap-drop", "CAP_NET_RAW"];
    scene
        .run_with(&options, &["grep", "CapEff", "/proc/self/status"])
        .exits(0)
        .prints("CapEff:\t00000000a80405fb\n");
}

#[test]
fn seccomp_is_in_force() {
    let mut scene = Scene::new();
    let said = scene.run_with(
        &["--seccomp"],
        &[
            "sh",
            "-c",
            "grep Seccomp: /proc/self/status; unshare -U true",
        ],
    );
    // The default profile lets nobody without CAP_SYS_ADMIN make namespaces.
    assert_eq!(said.stdout, "Seccomp:\t2\n", "{said:#?}");
    said.exits(1).complains(&["Operation not permitted"]);
}

#[test]
fn masked_and_read_only_paths() {
    let mut scene = Scene::new();
    scene
        .run(&[
            "sh",
            "-c",
            "cat /proc/keys | wc -c; echo 1 > /proc/sys/kernel/panic",
        ])
        .exits(1)
        .prints("0\n")
        .complains(&["Read-only file system"]);
}

#[test]
fn devices_are_the_guest_s_and_few() {
    let mut scene = Scene::new();
    // A node of a device that takes no capability is made, and cannot be opened.
    scene
        .run(&[
            "sh",
            "-c",
            "echo x > /dev/null && mknod /dev/hwrng c 10 183 && head -c 1 /dev/hwrng",
        ])
        .exits(1)
        .complains(&["Operation not permitted"]);
}
