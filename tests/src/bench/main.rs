//! `nacre-bench`: what a pod costs, in counts first and seconds last.
//!
//! It runs where the end-to-end tests do; `make bench` runs it in the lab, whose
//! clock counts instructions there. It prints what it finds beside the targets
//! and judges nothing: `docs/benchmarks.md` explains each number. With arguments
//! it measures only the sections they name.
//!
//! ```text
//! boot     one traced `ctr run`: VM exits and system calls up to the
//!          container's first instruction            trace.rs, boot.rs
//! memory   one idle container: what its processes and its guest hold    memory.rs
//! seconds  many `ctr run --rm ... true`, nacre beside runc             seconds.rs
//! ```

mod boot;
mod memory;
mod seconds;
mod table;
mod trace;

use std::process::ExitCode;

use anyhow::Context;
use nacre_tests::{BUSYBOX, run};

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nacre-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> anyhow::Result<()> {
    describe_machine()?;
    // Page cache, dentries and the image's unpacking belong to the first run of
    // a thing, not to the thing.
    unpack_for_erofs()?;
    for way in &seconds::WAYS {
        seconds::run_once(way)?;
    }
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let wants = |section: &str| wanted.is_empty() || wanted.iter().any(|name| name == section);
    if wants("boot") {
        let on_overlayfs = boot::measure("overlayfs")?;
        let on_erofs = boot::measure("erofs")?;
        print!("{}", boot::report(&on_overlayfs, &on_erofs));
    }
    if wants("memory") {
        print!("{}", memory::measure()?);
    }
    if wants("seconds") {
        print!("{}", seconds::measure()?);
    }
    Ok(())
}

fn describe_machine() -> anyhow::Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("osrelease")?;
    let date = run("date", &["-u", "+%Y-%m-%d"]).exits(0).stdout;
    println!("# nacre-bench, {}\n", date.trim());
    println!("Host kernel {}, image {BUSYBOX}.\n", kernel.trim());
    Ok(())
}

/// The image came with the machine for the default snapshotter only.
fn unpack_for_erofs() -> anyhow::Result<()> {
    let archive = "/opt/lab/images/busybox.tar";
    let said = run(
        "ctr",
        &["image", "import", "--snapshotter", "erofs", archive],
    );
    anyhow::ensure!(said.code == Some(0), "importing {archive}: {said:?}");
    Ok(())
}
