//! `make soak`: one pod after another lives and ends, in every way a pod may, for a
//! time and for a number of pods. A third of them fails on purpose. What is left after each
//! fails at once; what grows over many is printed as a table and fails at the end.

use std::collections::BTreeMap;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_tests::{
    BUSYBOX, Changed, KILL_AGENT, Said, Sample, Scene, process_of, run, run_with_input, spawn,
};

/// Pods until everything that is made once was made.
const WARM_UP: usize = 50;
/// Pods between two rows of the table.
const PODS_PER_ROW: usize = 10;
/// About what a start takes.
const STARTS_MS: u64 = 4000;

/// How a pod ends.
struct Way {
    name: &'static str,
    /// With a random number.
    end: fn(&mut Scene, u64) -> Result<()>,
}

/// Until [`WARM_UP`], and every so many pods: a containerd that is new would hide what the
/// one before it had lost.
const RESTART: Way = Way {
    name: "outlives containerd",
    end: |scene, _| outlives_containerd(scene),
};

/// On purpose.
const FAILURES: [Way; 3] = [
    Way {
        name: "fails",
        end: |scene, _| exits(scene, &["sh", "-c", "exit 3"], 3),
    },
    Way {
        name: "has no command",
        end: |scene, _| exits(scene, &["no-such-command"], 1),
    },
    Way {
        name: "has no bind source",
        end: |scene, _| cannot_start(scene),
    },
];

const ENDS: [Way; 8] = [
    Way {
        name: "exits",
        end: |scene, _| exits(scene, &["true"], 0),
    },
    Way {
        name: "is killed",
        end: |scene, _| is_killed(scene),
    },
    Way {
        name: "loses its shim",
        end: |scene, random| loses(scene, "daemon", random),
    },
    Way {
        name: "loses its monitor",
        end: |scene, random| loses(scene, "monitor", random),
    },
    Way {
        name: "loses its file server",
        end: |scene, random| loses(scene, "virtiofsd", random),
    },
    Way {
        name: "loses its agent",
        end: |scene, _| loses_its_agent(scene),
    },
    Way {
        name: "loses its processes",
        end: |scene, _| asks_for(scene, "i"),
    },
    Way {
        name: "panics",
        end: |scene, _| asks_for(scene, "c"),
    },
];

/// The way of the next of `pods`.
fn way(pods: usize, random: u64) -> &'static Way {
    let among = |ways: &'static [Way]| {
        let count = u64::try_from(ways.len()).unwrap_or(1);
        let index = usize::try_from(random % count).unwrap_or_default();
        ways.get(index).unwrap_or(&RESTART)
    };
    match pods % 3 {
        _ if pods < WARM_UP && pods.is_multiple_of(PODS_PER_ROW) => &RESTART,
        2 => among(&FAILURES),
        _ => among(&ENDS),
    }
}

fn exits(scene: &mut Scene, command: &[&str], code: i32) -> Result<()> {
    let said = scene.run_with(&["--cni"], command);
    ensure!(said.code == Some(code), "not {code}: {said:#?}");
    Ok(())
}

fn cannot_start(scene: &mut Scene) -> Result<()> {
    let mount = "type=bind,src=/none/there,dst=/mnt,options=rbind:ro";
    let said = scene.run_with(&["--mount", mount], &["true"]);
    ensure!(said.code == Some(1), "{said:#?}");
    Ok(())
}

fn is_killed(scene: &mut Scene) -> Result<()> {
    let id = scene.start_sleeper(&["--cni"]);
    kill(scene, &id)
}

/// It works, and its init is killed.
fn kill(scene: &Scene, id: &str) -> Result<()> {
    let said = scene.exec(id, &[], &["echo", "hi"]);
    ensure!(said.stdout == "hi\n", "{said:#?}");
    let said = scene.ctr(&["task", "kill", "-s", "KILL", id]);
    ensure!(said.code == Some(0), "{said:#?}");
    scene.await_status(id, "STOPPED");
    Ok(())
}

fn outlives_containerd(scene: &mut Scene) -> Result<()> {
    let id = scene.start_sleeper(&["--cni"]);
    for action in ["kill", "start"] {
        let said = run("lab-containerd", &["2", action]);
        ensure!(said.code == Some(0), "{said:#?}");
    }
    kill(scene, &id)
}

/// A process of the pod is killed, half of the time so long after it is there: mostly while the
/// container starts.
fn loses(scene: &mut Scene, name: &str, random: u64) -> Result<()> {
    // Other bits than those that have chosen the way.
    let moment = Duration::from_millis((random >> 32) % (2 * STARTS_MS));
    if moment > Duration::from_millis(STARTS_MS) {
        let id = scene.start_sleeper(&["--cni"]);
        let said = run("kill", &["-9", &process_of(&id, name)]);
        ensure!(said.code == Some(0), "{said:#?}");
        containerd_notices(scene, &id);
        return Ok(());
    }
    let (id, command) = scene.command(BUSYBOX, &["-d"], &["sleep", "3600"]);
    let client = spawn(command);
    let pid = process_of(&id, name);
    sleep(moment);
    run("kill", &["-9", &pid]);
    // What it is told is a matter of the moment.
    let said = Said::from(client.wait_with_output()?);
    let is_done = said.code == Some(0);
    println!("{:>14}{name} killed, start done: {is_done}", "");
    containerd_notices(scene, &id);
    Ok(())
}

fn containerd_notices(scene: &Scene, id: &str) {
    nacre_tests::eventually("containerd has noticed", || {
        scene.status(id).is_none_or(|status| status == "STOPPED")
    });
}

fn loses_its_agent(scene: &mut Scene) -> Result<()> {
    let _shell = Changed::new("debug_shell", "\"/bin/busybox\"");
    let id = scene.start_sleeper(&["--cni"]);
    let mut console = Command::new("nacre");
    console.args(["console", &id]);
    let said = run_with_input(console, format!("{KILL_AGENT}\nsleep 3600\n").into_bytes());
    ensure!(
        said.stderr.contains("the guest kernel panicked"),
        "{said:#?}"
    );
    containerd_notices(scene, &id);
    Ok(())
}

/// The guest's kernel is asked for something (sysrq) that ends the container.
fn asks_for(scene: &mut Scene, what: &str) -> Result<()> {
    let id = scene.start_sleeper(&["--privileged"]);
    let script = format!("echo {what} > /proc/sysrq-trigger; sleep 3600");
    let said = scene.exec(&id, &[], &["sh", "-c", &script]);
    ensure!(said.code == Some(137), "{said:#?}");
    scene.await_status(&id, "STOPPED");
    Ok(())
}

/// A line of the first table.
fn row(pods: usize, begin: Instant, sample: &Sample) -> String {
    format!("{pods:>5} {:>6}  {sample}", begin.elapsed().as_secs())
}

/// The second table: how long pods of each kind have taken.
fn summary(times: BTreeMap<&str, Vec<Duration>>) -> String {
    let head = ("a pod that", "pods", "median s", "most s");
    let mut table = format!("{:<24} {:>5} {:>8} {:>8}\n", head.0, head.1, head.2, head.3);
    for (name, mut times) in times {
        times.sort_unstable();
        let median = times.get(times.len() / 2).copied().unwrap_or_default();
        let most = times.last().copied().unwrap_or_default();
        let (median, most) = (median.as_secs_f64(), most.as_secs_f64());
        let count = times.len();
        table += &format!("{name:<24} {count:>5} {median:>8.1} {most:>8.1}\n");
    }
    table
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [seconds, least] = arguments.as_slice() else {
        bail!("usage: nacre-soak SECONDS PODS, until both are reached");
    };
    let time = Duration::from_secs(seconds.parse().context("SECONDS is a number")?);
    let least: usize = least.parse().context("PODS is a number")?;
    let begin = Instant::now();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut first = None;
    let mut pods = 0;
    println!("{:>5} {:>6}  {}", "pods", "s", Sample::head());
    let last = loop {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let way = way(pods, state);
        let pod = Instant::now();
        // Its end waits until nothing is left, and fails otherwise.
        let mut scene = Scene::new();
        (way.end)(&mut scene, state).with_context(|| format!("pod {pods} {}", way.name))?;
        drop(scene);
        times.entry(way.name).or_default().push(pod.elapsed());
        pods += 1;
        let is_over = begin.elapsed() >= time && pods >= least;
        if pods % PODS_PER_ROW == 0 || is_over {
            let sample = Sample::take()?;
            println!("{}", row(pods, begin, &sample));
            if is_over {
                break sample;
            }
            if pods >= WARM_UP && first.is_none() {
                first = Some(sample);
            }
        }
    };
    print!("\n{}", summary(times));
    let first = first.context("too short a time to tell what grows")?;
    let grown = last.growth_since(&first).join("; ");
    ensure!(grown.is_empty(), "after {WARM_UP} and {pods} pods: {grown}");
    println!("{pods} pods, nothing left, nothing grew");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn times_are_a_table() {
        let seconds = |times: &[u64]| times.iter().copied().map(Duration::from_secs).collect();
        let times = BTreeMap::from([("panics", seconds(&[9, 1, 2])), ("exits", seconds(&[4]))]);
        let expected = "\
a pod that                pods median s   most s
exits                        1      4.0      4.0
panics                       3      2.0      9.0
";
        assert_eq!(summary(times), expected);
    }

    #[test]
    fn a_third_fails_and_containerd_is_left_alone_in_the_end() {
        let ways = |from: usize| (from..from + 90).map(|pods| way(pods, 5).name);
        let fails = |name: &&str| FAILURES.iter().any(|way| way.name == *name);
        assert_eq!(ways(WARM_UP).filter(fails).count(), 30);
        assert_eq!(ways(0).filter(|name| *name == RESTART.name).count(), 5);
        assert!(ways(WARM_UP).all(|name| name != RESTART.name));
        let all: BTreeSet<&str> = (0..100).map(|random| way(60, random).name).collect();
        assert_eq!(all.len(), ENDS.len());
    }
}
