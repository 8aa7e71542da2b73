//! `ctr run --rm ... true`, from ctr's start to its end, nacre beside runc.
//!
//! The ways take turns, so that what drifts drifts for all of them.

use std::time::Instant;

use anyhow::ensure;
use nacre_tests::{BUSYBOX, RUNTIME, ctr};

use crate::table::Table;

const ROUNDS: usize = 7;
const RUNC: &str = "io.containerd.runc.v2";

/// A way to run a container.
pub struct Way {
    name: &'static str,
    runtime: &'static str,
    snapshotter: &'static str,
}

/// runc first: the others are compared with it.
pub const WAYS: [Way; 3] = [
    Way {
        name: "runc, overlayfs",
        runtime: RUNC,
        snapshotter: "overlayfs",
    },
    Way {
        name: "nacre, overlayfs by virtio-fs",
        runtime: RUNTIME,
        snapshotter: "overlayfs",
    },
    Way {
        name: "nacre, erofs by virtio-blk",
        runtime: RUNTIME,
        snapshotter: "erofs",
    },
];

/// Seconds one container takes.
pub fn run_once(way: &Way) -> anyhow::Result<f64> {
    let begin = Instant::now();
    let said = ctr(&[
        "run",
        "--rm",
        "--runtime",
        way.runtime,
        "--snapshotter",
        way.snapshotter,
        BUSYBOX,
        "bench-seconds",
        "true",
    ]);
    let seconds = begin.elapsed().as_secs_f64();
    ensure!(said.code == Some(0), "{}: {said:?}", way.name);
    Ok(seconds)
}

/// Measures; the report's section.
pub fn measure() -> anyhow::Result<String> {
    let mut times: [Vec<f64>; WAYS.len()] = Default::default();
    for _ in 0..ROUNDS {
        for (way, times) in WAYS.iter().zip(&mut times) {
            times.push(run_once(way)?);
        }
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    let mut text = format!(
        "## `ctr run --rm` busybox `true`\n\n{ROUNDS} rounds after one to warm up, in seconds.\n\n"
    );
    let mut table = Table::new(&["", "median", "least", "most", "to runc"]);
    let base = median(&times[0]);
    for (way, times) in WAYS.iter().zip(&times) {
        let [middle, least, most] = [
            median(times),
            times.first().copied().unwrap_or(f64::NAN),
            times.last().copied().unwrap_or(f64::NAN),
        ];
        table.row([
            way.name,
            &format!("{middle:.3}"),
            &format!("{least:.3}"),
            &format!("{most:.3}"),
            &format!("{:.2}", middle / base),
        ]);
    }
    text.push_str(&table.to_string());
    Ok(text)
}

/// Of sorted numbers.
fn median(sorted: &[f64]) -> f64 {
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
