//! What config/ has for containerd is what the lab's containerds run with, whichever of its
//! settings are taken in.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails here")]

use nacre_tests::pods::HANDLER;
use toml::{Table, Value};

const CONFIG_2: &str = include_str!("../../config/containerd-2.toml");
const CONFIG_1_7: &str = include_str!("../../config/containerd-1.7.toml");
const LAB: &str = include_str!("../lab/guest/etc/containerd/config.toml");

const CRI_2: &str = "io.containerd.cri.v1.runtime";
const CRI_1_7: &str = "io.containerd.grpc.v1.cri";

/// A line that is a setting once its `#` is off.
fn setting(line: &str) -> Option<&str> {
    let rest = line.trim_start().strip_prefix('#')?;
    (!rest.is_empty() && !rest.starts_with(' ')).then_some(rest)
}

/// Whether a line gives the runtime its type.
fn is_type(line: &str) -> bool {
    line.trim_start().starts_with("runtime_type =")
}

/// The file with the settings of one block, or of each, taken in as it tells: another type of
/// runtime is in place of the first one.
fn with_settings(file: &str, taken: impl Fn(&str) -> bool) -> Table {
    let blocks = file.split("\n\n").map(|block| {
        let line = |line| setting(line).filter(|_| taken(block)).unwrap_or(line);
        block.lines().map(line).collect::<Vec<_>>().join("\n")
    });
    let mut text = blocks.collect::<Vec<_>>().join("\n");
    if text.lines().filter(|line| is_type(line)).count() > 1 {
        let first = text.lines().find(|line| is_type(line)).unwrap().to_owned();
        text = text.replacen(&first, "", 1);
    }
    text.parse().unwrap_or_else(|error| panic!("{error}{text}"))
}

/// What a block is of.
fn settings(block: &str) -> Vec<&str> {
    block.lines().filter_map(setting).collect()
}

#[track_caller]
fn runtime<'t>(table: &'t Table, cri: &str, name: &str) -> &'t Value {
    &table["plugins"][cri]["containerd"]["runtimes"][name]
}

/// The RuntimeClass's handler is the runtime's name, without any of the settings.
#[test]
fn the_handler_is_a_runtime() {
    let [two, one, lab] = [CONFIG_2, CONFIG_1_7, LAB].map(|text| text.parse::<Table>().unwrap());
    let expected = runtime(&lab, CRI_2, HANDLER);
    assert_eq!(runtime(&two, CRI_2, HANDLER), expected);
    assert_eq!(runtime(&one, CRI_1_7, HANDLER), expected);
}

#[test]
fn each_setting_makes_it_one_of_the_lab_s() {
    let lab: Table = LAB.parse().unwrap();
    let blocks: Vec<_> = CONFIG_2.split("\n\n").map(settings).collect();
    let blocks: Vec<_> = blocks.into_iter().filter(|all| !all.is_empty()).collect();
    let names = ["sandboxed", "features", "devices", "erofs"].map(|name| format!("nacre-{name}"));
    assert_eq!(blocks.len(), names.len(), "{blocks:?}");
    for (block, name) in blocks.iter().zip(&names) {
        let ours = with_settings(CONFIG_2, |text| settings(text) == *block);
        let expected = runtime(&lab, CRI_2, name);
        assert_eq!(runtime(&ours, CRI_2, HANDLER), expected, "{name}");
    }
    let ours = with_settings(CONFIG_2, |_| true);
    let platforms = |table: &Table, name: &str| {
        table["plugins"]["io.containerd.cri.v1.images"]["runtime_platforms"][name].clone()
    };
    assert_eq!(platforms(&ours, HANDLER), platforms(&lab, "nacre-erofs"));
    let differ = "io.containerd.service.v1.diff-service";
    assert_eq!(ours["plugins"][differ], lab["plugins"][differ]);
    // The lab unpacks for other snapshotters besides.
    let unpacks = |table: &Table| {
        let all = &table["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"];
        all.as_array().unwrap().clone()
    };
    let labs = unpacks(&lab);
    assert!(
        unpacks(&ours).iter().all(|one| labs.contains(one)),
        "{labs:?}"
    );
    let of_runtimes = unpacks(&ours).len();
    assert_eq!(of_runtimes, 2, "of runc's snapshotter and of nacre's");
}

#[test]
fn the_setting_for_1_7_is_that_for_2() {
    let lab: Table = LAB.parse().unwrap();
    let ours = with_settings(CONFIG_1_7, |_| true);
    let expected = runtime(&lab, CRI_2, "nacre-devices");
    assert_eq!(runtime(&ours, CRI_1_7, HANDLER), expected);
}
