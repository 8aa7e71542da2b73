//! `make soak`: one pod after another lives and ends, in every way a pod may, for a
//! time and for a number of pods. A third of them fails on purpose. What is left after each
//! fails at once; what grows over many is printed as a table and fails at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nacre_tests::{Changed, KILL_AGENT, Scene, run, run_with_input};

/// Pods until everything that is made once was made.
const WARM_UP: usize = 50;
/// Pods between two rows of the table.
const PODS_PER_ROW: usize = 10;

/// How a pod ends.
struct Way {
    name: &'static str,
    end: fn(&mut Scene) -> Result<()>,
}

/// Until [`WARM_UP`], and every so many pods: a containerd that is new would hide what the
/// one before it had lost.
const RESTART: Way = Way {
    name: "outlives containerd",
    end: outlives_containerd,
};

/// On purpose.
const FAILURES: [Way; 3] = [
    Way {
        name: "fails",
        end: |scene| exits(scene, &["sh", "-c", "exit 3"], 3),
    },
    Way {
        name: "has no command",
        end: |scene| exits(scene, &["no-such-command"], 1),
    },
    Way {
        name: "has no bind source",
        end: cannot_start,
    },
];

const ENDS: [Way; 8] = [
    Way {
        name: "exits",
        end: |scene| exits(scene, &["true"], 0),
    },
    Way {
        name: "is killed",
        end: is_killed,
    },
    Way {
        name: "loses its shim",
        end: |scene| loses(scene, shim_of),
    },
    Way {
        name: "loses its monitor",
        end: |scene| loses(scene, monitor_of),
    },
    Way {
        name: "loses its file server",
        end: |scene| loses(scene, |_, _| only("virtiofsd")),
    },
    Way {
        name: "loses its agent",
        end: loses_its_agent,
    },
    Way {
        name: "loses its processes",
        end: |scene| asks_for(scene, "i"),
    },
    Way {
        name: "panics",
        end: |scene| asks_for(scene, "c"),
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

/// A process of the pod is killed.
fn loses(scene: &mut Scene, which: fn(&Scene, &str) -> Result<String>) -> Result<()> {
    let id = scene.start_sleeper(&["--cni"]);
    let pid = which(scene, &id)?;
    run("kill", &["-9", &pid]);
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

fn monitor_of(scene: &Scene, id: &str) -> Result<String> {
    let said = scene.ctr(&["task", "ls"]);
    let mut rows = said.stdout.lines().map(str::split_whitespace);
    let pid = rows.find_map(|mut row| (row.next() == Some(id)).then(|| row.next())?);
    pid.map(str::to_owned)
        .with_context(|| format!("no {id} in {said:#?}"))
}

fn shim_of(scene: &Scene, id: &str) -> Result<String> {
    let monitor = monitor_of(scene, id)?;
    let status = fs::read_to_string(format!("/proc/{monitor}/status"))?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:\t"));
    Ok(parent.context("no parent")?.to_owned())
}

/// The one process of a program.
fn only(program: &str) -> Result<String> {
    let pids = run("pidof", &[program]).stdout;
    ensure!(pids.split_whitespace().count() == 1, "{program}: {pids:?}");
    Ok(pids.trim().to_owned())
}

/// What must not grow.
struct Sample {
    pods: usize,
    seconds: u64,
    values: [u64; COLUMNS.len()],
}

const COLUMNS: [&str; 9] = [
    "containerd fds",
    "threads",
    "RSS MiB",
    "host MiB",
    "files",
    "mounts",
    "interfaces",
    "cgroups",
    "processes",
];

impl Sample {
    fn take(pods: usize, begin: Instant) -> Result<Self> {
        let pid = only("containerd")?;
        let count = |path: String| -> Result<u64> {
            let entries = fs::read_dir(&path).with_context(|| path)?;
            Ok(u64::try_from(entries.count())?)
        };
        let rss_kib = kib(&format!("/proc/{pid}/status"), "VmRSS:")?;
        let memory = |name| kib("/proc/meminfo", name);
        let used_kib = memory("MemTotal:")?.saturating_sub(memory("MemAvailable:")?);
        // Open, unused, most.
        let files = fs::read_to_string("/proc/sys/fs/file-nr")?;
        let files = files.split_whitespace().next().context("no count")?;
        let lines = |text: String| u64::try_from(text.lines().count());
        let all = fs::read_dir("/proc")?.filter_map(Result::ok);
        let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
        let processes = all.filter(|entry| entry.file_name().to_str().is_some_and(is_process));
        Ok(Self {
            pods,
            seconds: begin.elapsed().as_secs(),
            values: [
                count(format!("/proc/{pid}/fd"))?,
                count(format!("/proc/{pid}/task"))?,
                rss_kib / 1024,
                used_kib / 1024,
                files.parse()?,
                lines(fs::read_to_string("/proc/self/mountinfo")?)?,
                interfaces()?,
                lines(run("find", &["/sys/fs/cgroup", "-type", "d"]).stdout)?,
                u64::try_from(processes.count())?,
            ],
        })
    }

    fn print(&self) {
        let cells = self.values.iter().zip(COLUMNS);
        let cells: Vec<String> = cells
            .map(|(value, name)| format!("{value:>width$}", width = name.len()))
            .collect();
        println!("{:>5} {:>6}  {}", self.pods, self.seconds, cells.join("  "));
    }
}

/// Network interfaces in all namespaces: a pod's taps are in its own.
fn interfaces() -> Result<u64> {
    // The first two lines are a table's head (proc_pid_net(5)).
    let rows = |text: &str| text.lines().skip(2).count();
    let mut seen = BTreeSet::new();
    let mut count = 0;
    for process in fs::read_dir("/proc")?.filter_map(Result::ok) {
        // It may be gone, or be no process.
        let path = process.path();
        if let Ok(namespace) = fs::metadata(path.join("ns/net"))
            && let Ok(table) = fs::read_to_string(path.join("net/dev"))
            && seen.insert(namespace.ino())
        {
            count += rows(&table);
        }
    }
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if seen.insert(entry.metadata()?.ino()) {
            let namespace = format!("--net={}", entry.path().display());
            count += rows(&run("nsenter", &[namespace.as_str(), "cat", "/proc/net/dev"]).stdout);
        }
    }
    Ok(u64::try_from(count)?)
}

/// A line of a file of proc(5) that counts KiB.
fn kib(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.split_whitespace().next());
    Ok(value
        .with_context(|| format!("no {name} in {path}"))?
        .parse()?)
}

/// Fails if anything has grown: by more than a part and a few where the kernel or
/// Go decides how much there is, by anything at all otherwise.
fn check(first: &Sample, last: &Sample) -> Result<()> {
    for ((before, after), name) in first.values.iter().zip(last.values).zip(COLUMNS) {
        let slack = match name {
            "containerd fds" | "threads" | "processes" => before / 10 + 4,
            "RSS MiB" => before / 4 + 8,
            "host MiB" => before / 5 + 64,
            "files" => before / 10 + 64,
            _ => 0,
        };
        if after > before + slack {
            bail!(
                "{name}: {before} after {} pods, {after} after {}",
                first.pods,
                last.pods
            );
        }
    }
    Ok(())
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
    println!("{:>5} {:>6}  {}", "pods", "s", COLUMNS.join("  "));
    let last = loop {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let way = way(pods, state);
        let pod = Instant::now();
        // Its end waits until nothing is left, and fails otherwise.
        let mut scene = Scene::new();
        (way.end)(&mut scene).with_context(|| format!("pod {pods} {}", way.name))?;
        drop(scene);
        times.entry(way.name).or_default().push(pod.elapsed());
        pods += 1;
        let is_over = begin.elapsed() >= time && pods >= least;
        if pods % PODS_PER_ROW == 0 || is_over {
            let sample = Sample::take(pods, begin)?;
            sample.print();
            if is_over {
                break sample;
            }
            if pods >= WARM_UP && first.is_none() {
                first = Some(sample);
            }
        }
    };
    println!(
        "\n{:<24} {:>5} {:>8} {:>8}",
        "a pod that", "pods", "median s", "most s"
    );
    for (name, mut times) in times {
        times.sort_unstable();
        let median = times.get(times.len() / 2).copied().unwrap_or_default();
        let most = times.last().copied().unwrap_or_default();
        let (median, most) = (median.as_secs_f64(), most.as_secs_f64());
        println!("{name:<24} {:>5} {median:>8.1} {most:>8.1}", times.len());
    }
    let first = first.context("too short a time to tell what grows")?;
    check(&first, &last)?;
    println!("{pods} pods, nothing left, nothing grew");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT_50: [u64; COLUMNS.len()] = [100, 20, 40, 400, 1000, 60, 4, 30, 90];

    fn growth(values: [u64; COLUMNS.len()]) -> Result<()> {
        let sample = |pods, values| Sample {
            pods,
            seconds: 0,
            values,
        };
        check(&sample(50, AT_50), &sample(300, values))
    }

    #[test]
    fn what_grows_with_the_pods_fails_by_its_name() {
        growth(AT_50).expect("it is flat");
        growth([0; COLUMNS.len()]).expect("it shrinks");
        for (index, name) in COLUMNS.into_iter().enumerate() {
            let mut values = AT_50;
            // One for each pod in between.
            values[index] += 250;
            let error = growth(values).expect_err(name).to_string();
            let expected = format!("{name}: {} after 50 pods", AT_50[index]);
            assert!(error.starts_with(&expected), "{error}");
        }
        // What nobody but nacre makes may not grow at all.
        for (index, name) in COLUMNS.into_iter().enumerate() {
            let mut values = AT_50;
            values[index] += 1;
            let counted = ["mounts", "interfaces", "cgroups"].contains(&name);
            assert_eq!(growth(values).is_err(), counted, "{name}");
        }
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
