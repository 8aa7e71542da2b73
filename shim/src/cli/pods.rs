//! `nacre ps` and `nacre logs`, and finding a pod: those below the run directory, see
//! [`crate::rundir`] for its layout.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::{CliError, table};
use crate::devices::{Address, Claims, DeviceError};
use crate::rundir::{Proc, RunDir, State, check_id};

const STATE_FILE: &str = "state.json";
const LOG_FILE: &str = "log";
const CONSOLE_FILE: &str = "console";
/// Ticks per second of proc(5) times; fixed in the kernel's interface.
const TICKS_PER_SECOND: u64 = 100;

/// A pod on this host.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) id: String,
    dir: PathBuf,
    pub(super) state: State,
}

/// Prints a table of the pods.
pub(super) fn list(run_dir: &Path, out: &mut impl Write) -> Result<(), CliError> {
    sweep(run_dir)?;
    let uptime = uptime_ticks();
    let claims = Claims::of(run_dir).by_pod().map_err(DeviceError::from)?;
    let mut rows = vec![
        [
            "POD",
            "NAMESPACE",
            "PID",
            "STATE",
            "UPTIME",
            "VCPUS",
            "MEMORY",
            "DEVICES",
        ]
        .map(str::to_owned),
    ];
    rows.extend(pods(run_dir)?.iter().map(|pod| {
        let owner = format!("{}/{}", pod.namespace, pod.id);
        let devices = claims.get(&owner).map(Vec::as_slice);
        row(pod, uptime, devices.unwrap_or_default())
    }));
    table::print(out, &rows).map_err(CliError::Write)
}

/// What of a pod's log is wanted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wanted {
    /// The guest's console instead.
    pub console: bool,
    /// What is yet to come, too, until the pod is gone.
    pub follow: bool,
}

/// Prints a pod's log or console.
pub(super) fn logs(
    run_dir: &Path,
    pod: &str,
    wanted: Wanted,
    out: &mut impl Write,
) -> Result<(), CliError> {
    let file = if wanted.console {
        CONSOLE_FILE
    } else {
        LOG_FILE
    };
    let path = find(run_dir, pod)?.dir.join(file);
    let read = |source| CliError::Read {
        path: path.clone(),
        source,
    };
    let mut log = fs::File::open(&path).map_err(read)?;
    if !wanted.follow {
        return io::copy(&mut log, out).map(drop).map_err(CliError::Write);
    }
    let changes = Changes::of(&path).map_err(read)?;
    loop {
        // Before the rest is read, or the end could be missed.
        let is_gone = log.metadata().map_err(read)?.nlink() == 0;
        io::copy(&mut log, out)
            .and_then(|_| out.flush())
            .map_err(CliError::Write)?;
        if is_gone {
            return Ok(());
        }
        changes.wait().map_err(read)?;
    }
}

/// Tells when a file was written or removed (inotify(7)).
struct Changes(Inotify);

impl Changes {
    fn of(path: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
        // A file that is removed while it is open changes its link count.
        let what = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB;
        inotify.add_watch(path, what)?;
        Ok(Self(inotify))
    }

    fn wait(&self) -> io::Result<()> {
        loop {
            match self.0.read_events() {
                Err(Errno::EINTR) => (),
                events => {
                    events?;
                    return Ok(());
                }
            }
        }
    }
}

/// Where a pod of this host is, or what is left of one.
#[derive(Debug)]
pub(super) struct PodPlace {
    pub(super) namespace: String,
    pub(super) id: String,
    dir: PathBuf,
}

/// All of them, by namespace and id.
pub(super) fn places(run_dir: &Path) -> Result<Vec<PodPlace>, CliError> {
    let mut places = Vec::new();
    // What else is there has no containerd identifiers for names.
    for (namespace, dir) in directories(run_dir)? {
        if check_id(&namespace).is_err() {
            continue;
        }
        places.extend(directories(&dir)?.into_iter().map(|(id, dir)| PodPlace {
            namespace: namespace.clone(),
            id,
            dir,
        }));
    }
    places.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    Ok(places)
}

/// Cleans up after those of which nothing runs any more.
pub(super) fn sweep(run_dir: &Path) -> Result<(), CliError> {
    for PodPlace { namespace, id, .. } in places(run_dir)? {
        let owner = Path::new(&namespace).join(id);
        RunDir::bury(run_dir, &owner).map_err(DeviceError::from)?;
    }
    Ok(())
}

/// The pods with a readable state, by namespace and id.
pub(super) fn pods(run_dir: &Path) -> Result<Vec<Pod>, CliError> {
    let mut pods = Vec::new();
    for PodPlace { namespace, id, dir } in places(run_dir)? {
        let Ok(text) = fs::read(dir.join(STATE_FILE)) else {
            continue;
        };
        match serde_json::from_slice(&text) {
            Ok(state) => pods.push(Pod {
                namespace,
                id,
                dir,
                state,
            }),
            Err(error) => eprintln!("nacre: {}: {error}", dir.join(STATE_FILE).display()),
        }
    }
    Ok(pods)
}

/// Directories in a directory, with their names; none if it is not there.
fn directories(dir: &Path) -> Result<Vec<(String, PathBuf)>, CliError> {
    let read = |source| CliError::Read {
        path: dir.into(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(read)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(read)?;
        if entry.file_type().map_err(read)?.is_dir() {
            let name = entry.file_name().to_string_lossy().into_owned();
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// The pod of a name, or the only one whose name starts so.
pub(super) fn find(run_dir: &Path, name: &str) -> Result<Pod, CliError> {
    let mut pods = pods(run_dir)?;
    if let Some(index) = pods.iter().position(|pod| pod.id == name) {
        return Ok(pods.swap_remove(index));
    }
    pods.retain(|pod| pod.id.starts_with(name));
    match (pods.pop(), pods.is_empty()) {
        (Some(pod), true) => Ok(pod),
        (None, _) => Err(CliError::NoPod(name.into())),
        (Some(_), false) => Err(CliError::Ambiguous(name.into())),
    }
}

fn row(pod: &Pod, uptime: u64, devices: &[Address]) -> [String; 8] {
    let dash = || "-".to_owned();
    let [pid, state, age, vcpus, memory] = match pod.state.monitor {
        None => [dash(), "starting".into(), dash(), dash(), dash()],
        Some(monitor) if monitor.is_alive() => [
            monitor.pid.to_string(),
            "running".into(),
            duration(age_seconds(monitor, uptime)),
            pod.state.vcpus.map_or_else(dash, |vcpus| vcpus.to_string()),
            resident_mib(monitor.pid).map_or_else(dash, |mib| format!("{mib} MiB")),
        ],
        Some(_) => [dash(), "stopped".into(), dash(), dash(), dash()],
    };
    [
        pod.id.clone(),
        pod.namespace.clone(),
        pid,
        state,
        age,
        vcpus,
        memory,
        table::list(devices),
    ]
}

/// Whole seconds: rounded once, so that a pod never looks older than it is.
fn age_seconds(process: Proc, uptime: u64) -> u64 {
    uptime.saturating_sub(process.start_time) / TICKS_PER_SECOND
}

/// The host's, from proc(5) uptime: seconds with two decimals, which are ticks.
fn uptime_ticks() -> u64 {
    fs::read_to_string("/proc/uptime")
        .ok()
        .and_then(|text| text.split(' ').next()?.replace('.', "").parse().ok())
        .unwrap_or(0)
}

/// What the VM occupies on the host, guest memory it never touched not counted.
fn resident_mib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024)
}

/// "42s", "3m", "5h", "12d": the coarsest unit that is at least one.
fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    /// A run directory with one pod whose monitor is this test's process.
    fn run_dir(ids: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("uids")).unwrap();
        for id in ids {
            let pod = dir.path().join("k8s.io").join(id);
            fs::create_dir_all(&pod).unwrap();
            let state = State {
                monitor: Proc::of(std::process::id()),
                ..State::default()
            };
            fs::write(pod.join(STATE_FILE), serde_json::to_vec(&state).unwrap()).unwrap();
            fs::write(pod.join(LOG_FILE), format!("log of {id}\n")).unwrap();
        }
        dir
    }

    fn list_text(dir: &Path) -> String {
        let mut out = Vec::new();
        list(dir, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// 8.2 s old, across nine ends of a second.
    #[test]
    fn age_is_rounded_once() {
        let process = Proc {
            pid: 1,
            start_time: 10_090,
        };
        assert_eq!(age_seconds(process, 10_910), 8);
        // In ticks, as processes' starts are: seconds or nothing would lie before its own.
        let itself = Proc::of(std::process::id()).unwrap();
        let uptime = uptime_ticks();
        assert!(uptime >= itself.start_time, "{itself:?} {uptime}");
        assert!(age_seconds(itself, uptime) < 3600, "{itself:?} {uptime}");
    }

    #[test]
    fn running_pods_are_listed() {
        let dir = run_dir(&["abc"]);
        let text = list_text(dir.path());
        let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(&row[..2], ["abc", "k8s.io"]);
        assert_eq!(row[2], std::process::id().to_string());
        assert_eq!(row[3], "running");
    }

    #[test]
    fn pods_are_listed_with_their_devices() {
        let dir = run_dir(&["abc", "xyz"]);
        let pod = RunDir::new(dir.path(), "k8s.io", "abc").unwrap();
        let devices = ["0000:02:00.0", "0000:01:00.0"].map(|text| text.parse::<Address>().unwrap());
        Claims::of(dir.path()).claim(&pod, &devices).unwrap();
        let text = list_text(dir.path());
        let column = |line: usize| text.lines().nth(line).unwrap().split("  ").last().unwrap();
        let columns = [0, 1, 2].map(|line| column(line).trim());
        assert_eq!(columns, ["DEVICES", "0000:01:00.0,0000:02:00.0", "-"]);
    }

    #[test]
    fn what_is_left_of_dead_pods_is_cleaned_up() {
        let dir = run_dir(&["abc", "xyz"]);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let dead = State {
            monitor: Proc::of(child.id()),
            ..State::default()
        };
        child.wait().unwrap();
        let pod = RunDir::new(dir.path(), "k8s.io", "xyz").unwrap();
        pod.save(&dead).unwrap();
        let text = list_text(dir.path());
        assert!(text.contains("abc") && !text.contains("xyz"), "{text}");
        assert!(!pod.path().exists());
    }

    #[test]
    fn no_run_directory_means_no_pods() {
        assert_eq!(list_text(Path::new("/nonexistent")).lines().count(), 1);
    }

    #[test]
    fn logs_take_a_unique_start_of_a_name() {
        let dir = run_dir(&["abc", "abd", "xyz"]);
        let text = |pod: &str| {
            let mut out = Vec::new();
            logs(dir.path(), pod, Wanted::default(), &mut out)
                .map(|()| String::from_utf8(out).unwrap())
        };
        assert_eq!(text("x").unwrap(), "log of xyz\n");
        assert_eq!(text("abd").unwrap(), "log of abd\n");
        assert!(matches!(text("ab"), Err(CliError::Ambiguous(_))));
        assert!(matches!(text("q"), Err(CliError::NoPod(_))));
    }

    #[test]
    fn logs_are_followed_until_the_pod_is_gone() {
        let dir = run_dir(&["abc"]);
        let (mut read, mut write) = io::pipe().unwrap();
        let path = dir.path().to_owned();
        let follower = std::thread::spawn(move || {
            let wanted = Wanted {
                follow: true,
                ..Wanted::default()
            };
            logs(&path, "abc", wanted, &mut write)
        });
        let mut expect = |text: &str| {
            let mut bytes = vec![0; text.len()];
            read.read_exact(&mut bytes).unwrap();
            assert_eq!(String::from_utf8(bytes).unwrap(), text);
        };
        expect("log of abc\n");
        let pod = dir.path().join("k8s.io/abc");
        let mut log = File::options().append(true).open(pod.join(LOG_FILE));
        let log = log.as_mut().unwrap();
        for line in ["one\n", "two\n"] {
            log.write_all(line.as_bytes()).unwrap();
            expect(line);
        }
        log.write_all(b"last\n").unwrap();
        fs::remove_dir_all(pod).unwrap();
        expect("last\n");
        follower.join().unwrap().unwrap();
        assert_eq!(read.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn durations_are_short() {
        let texts = [5, 61, 7200, 200_000].map(duration);
        assert_eq!(texts, ["5s", "1m", "2h", "2d"]);
    }
}
