//! An image of a real distribution: dynamically linked programs, and users by name.

use std::path::PathBuf;

use nacre_tests::pods::PodScene;
use nacre_tests::{PATIENCE, eventually, run};

use crate::network::fetch;

const IMAGE: &str = "docker.io/library/debian-perl:lab";
/// Makes it of the lab's own Debian: the files of a few packages that are there. Their
/// lists also have documentation, which is not.
const MAKE: &str = "set -e
    mkdir -p $1/tree
    dpkg-query -L base-files libc6 libtinfo6 bash libcrypt1 perl-base > $1/lists
    printf '%s\\n' /bin /lib /lib64 /etc/passwd /etc/group >> $1/lists
    sort -u $1/lists | while read -r path; do
        if [ -e \"$path\" ] || [ -L \"$path\" ]; then printf '%s\\n' \"$path\"; fi
    done > $1/files
    tar -c --no-recursion -T $1/files | tar -x -C $1/tree
    mkimage --name $2 --user www-data --out $1/image.tar $1/tree";

const SERVE: &str = "use IO::Socket::INET; $| = 1; \
    $s = IO::Socket::INET->new(LocalPort => 8080, Listen => 5) or die $!; print \"ready\\n\"; \
    while ($c = $s->accept) { <$c>; print $c getpwuid($<) . \" serves\\n\"; close $c }";

fn make_image(scene: &PodScene) -> PathBuf {
    let directory = scene.directory("distribution");
    let path = directory.to_str().unwrap();
    run("sh", &["-c", MAKE, "sh", path, IMAGE]).exits(0);
    directory.join("image.tar")
}

#[test]
fn a_server_of_a_real_distribution() {
    let scene = PodScene::new();
    scene.import(IMAGE, &make_image(&scene));
    let pod = scene.pod("debian").run();
    let app = pod.container("app", &["perl", "-e", SERVE]).image(IMAGE);
    let app = app.start();
    app.exec(&[
        "bash",
        "-c",
        ". /etc/os-release; echo $ID ${BASH_VERSION%%.*}",
    ])
    .exits(0)
    .prints("debian 5\n");
    app.await_logged("stdout", "ready");
    let address = format!("{}:8080", pod.ip());
    eventually("it is reached", || {
        fetch(&address, PATIENCE).as_deref() == Some("www-data serves\n")
    });
}
