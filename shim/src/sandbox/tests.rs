//! A machine whose agent is gone, late, or silent.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Mutex;

use async_trait::async_trait;
use nacre_protocol::vm::StopReason;
use nacre_vmm::vfio::Passthrough;
use tokio::time::{Instant, sleep};

use super::*;
use crate::machine::fake::FakeHost;
use crate::network::HostNic;
use crate::storage::HostBacking;
use crate::task::{TaskError, lock};

#[tokio::test(start_paused = true)]
async fn guest_without_an_agent_may_still_say_why() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    let machine = lock(&host.machine).clone().unwrap();
    let last_words = async {
        sleep(LAST_WORDS / 2).await;
        assert!(
            machine.end(Stop::Guest(StopReason::Panic)),
            "killed too soon"
        );
    };
    tokio::join!(sandbox.give_up(), last_words);
    assert_eq!(sandbox.stopped().await, Stop::Guest(StopReason::Panic));
}

#[tokio::test(start_paused = true)]
async fn guest_that_says_nothing_is_killed() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    let begin = Instant::now();
    sandbox.give_up().await;
    assert!(begin.elapsed() >= LAST_WORDS);
    // containerd is told of an end within that time.
    assert!(begin.elapsed() < Duration::from_secs(5));
    assert_eq!(sandbox.stopped().await, Stop::Died);
}

#[tokio::test(start_paused = true)]
async fn guest_that_hangs_may_still_say_where() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    lock(&host.machine).as_ref().unwrap().panics();
    let begin = Instant::now();
    sandbox.interrupt().await;
    assert!(begin.elapsed() < LAST_WORDS, "it is waited for in vain");
    assert_eq!(sandbox.stopped().await, Stop::Guest(StopReason::Panic));
}

#[tokio::test(start_paused = true)]
async fn guest_that_cannot_say_where_it_hangs_is_not_waited_for() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    let begin = Instant::now();
    sandbox.interrupt().await;
    // As above.
    let took = begin.elapsed();
    assert!(LAST_WORDS <= took && took < Duration::from_secs(5));
    let machine = lock(&host.machine).clone().unwrap();
    assert!(machine.end(Stop::Died), "it is another's to kill it");
}

#[tokio::test]
async fn guest_s_clock_is_kept_right() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    host.boot(&sandbox).await.unwrap();
    let machine = lock(&host.machine).clone().unwrap();
    let watch = sandbox.watch(Duration::from_secs(1));
    tokio::pin!(watch);
    for hours in [2, -2] {
        tokio::select! {
            () = &mut watch => panic!("it answers"),
            () = machine.clock_is_corrected_by(hours * 3600 * 1_000_000_000) => (),
        }
    }
}

/// In real time: a paused clock would not wait for answers under way.
#[tokio::test]
async fn guest_that_hangs_is_killed_in_time() {
    let timeout = Duration::from_secs(2);
    let host = FakeHost::scripted();
    let sandbox = host.open();
    host.boot(&sandbox).await.unwrap();
    let machine = lock(&host.machine).clone().unwrap();
    let watch = sandbox.watch(timeout);
    tokio::pin!(watch);
    tokio::select! {
        () = &mut watch => panic!("it answers"),
        () = machine.answers(2) => (),
    }
    machine.hang();
    let begin = Instant::now();
    let killed = tokio::time::timeout(30 * timeout, watch).await;
    killed.expect("the guest does not answer any more");
    let took = begin.elapsed();
    assert_eq!(sandbox.stopped().await, Stop::Hung);
    assert_eq!(*lock(&host.journal), ["interrupt"]);
    // It may have been asked and have answered just before.
    let least = timeout / 2 - Duration::from_millis(100) + LAST_WORDS;
    assert!(least <= took, "{took:?} of {timeout:?}");
    sandbox.watch(timeout).await;
}

#[tokio::test]
async fn shared_directory_comes_once_however_often_it_is_asked_for() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    let early = host.share(&sandbox).await.unwrap_err();
    assert!(matches!(early, SandboxError::Stopped), "{early}");
    host.boot(&sandbox).await.unwrap();
    let machine = lock(&host.machine).clone().unwrap();
    machine.refuses_cards(true);
    let full = host.share(&sandbox).await.unwrap_err().to_string();
    assert_eq!(full, "virtio-fs: no room");
    machine.refuses_cards(false);
    machine.refuses_network(1);
    let late = host.share(&sandbox).await.unwrap_err().to_string();
    assert!(late.contains("mount the shared directory"), "{late}");
    let (one, two) = tokio::join!(host.share(&sandbox), host.share(&sandbox));
    one.unwrap();
    two.unwrap();
    let journal = std::mem::take(&mut *lock(&host.journal));
    assert_eq!(journal, ["shared directory in 20", "guest mounts it"]);
}

#[tokio::test]
async fn shared_directory_of_the_boot_is_there() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    host.boot_with(&sandbox, true).await.unwrap();
    host.share(&sandbox).await.unwrap();
    assert_eq!(*lock(&host.journal), [""; 0]);
}

/// A machine whose agent makes its connection and says nothing on it.
struct Silent {
    near: Mutex<Option<UnixStream>>,
    _far: UnixStream,
    interrupts: AtomicU64,
}

#[async_trait]
impl Machine for Silent {
    fn pid(&self) -> u32 {
        0
    }

    async fn connect(&self, _port: u32) -> Result<UnixStream, MachineError> {
        Err(MachineError::Stopped(Stop::Died))
    }

    async fn agent(&self) -> Result<UnixStream, MachineError> {
        Ok(lock(&self.near).take().unwrap())
    }

    async fn resize(&self, growth_mib: u32) -> Result<u32, MachineError> {
        Ok(growth_mib)
    }

    async fn exchange(
        &self,
        _serial: &str,
        _backing: Option<&HostBacking>,
        _read_only: bool,
    ) -> Result<u64, MachineError> {
        Err(MachineError::Stopped(Stop::Died))
    }

    async fn plug(&self, _: &[u8], _: &Passthrough) -> Result<(), MachineError> {
        Err(MachineError::Stopped(Stop::Died))
    }

    async fn unplug(&self, _: &[u8]) -> Result<(), MachineError> {
        Err(MachineError::Stopped(Stop::Died))
    }

    async fn add_nic(&self, _: &HostNic) -> Result<u8, MachineError> {
        Err(MachineError::Stopped(Stop::Died))
    }

    async fn remove_nic(&self, _: u8, _: bool) -> Result<(), MachineError> {
        Err(MachineError::Stopped(Stop::Died))
    }

    async fn add_shared_dir(&self, _: &StdUnixStream) -> Result<u8, MachineError> {
        Err(MachineError::Stopped(Stop::Died))
    }

    async fn interrupt(&self) -> Result<(), MachineError> {
        self.interrupts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn stopped(&self) -> Stop {
        std::future::pending().await
    }

    fn kill(&self) {}
}

/// Attaches to an agent that is not there or says nothing, within 500 s; returns the
/// code and the words of what comes of it.
async fn attach(sandbox: &Sandbox) -> (ttrpc::Code, String) {
    let begin = Instant::now();
    let boot_timeout = Duration::from_secs(500);
    let room = Room {
        memory: MemorySize {
            boot_mib: 128,
            growth_mib: 0,
            is_pinned: false,
        },
        vcpus: VcpuCount { boot: 1, max: 1 },
        disks: SlotCounts::default(),
    };
    let request = ConfigureSandboxRequest::default();
    let attached = sandbox.attach(boot_timeout, &request, room).await;
    let seconds = begin.elapsed().as_secs();
    assert!((490..=510).contains(&seconds), "{seconds} s");
    let error = TaskError::from(attached.unwrap_err());
    match error.of_pod("p1") {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

#[tokio::test(start_paused = true)]
async fn guest_has_the_time_of_its_boot_to_be_set_up() {
    let (near, far) = UnixStream::pair().unwrap();
    let machine = Arc::new(Silent {
        near: Mutex::new(Some(near)),
        _far: far,
        interrupts: AtomicU64::new(0),
    });
    let sandbox = Sandbox::new(machine.clone());
    let (code, message) = attach(&sandbox).await;
    assert_eq!(code, ttrpc::Code::DEADLINE_EXCEEDED);
    let expected = "pod p1: guest: configure the sandbox: no answer within 500 s";
    assert_eq!(message, expected);
    assert_eq!(machine.interrupts.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn guest_whose_agent_does_not_come_is_not_waited_for() {
    let host = FakeHost::scripted();
    let sandbox = host.open();
    let machine = lock(&host.machine).clone().unwrap();
    // It comes, but to someone else.
    let _connection = machine.agent().await.unwrap();
    let (code, message) = attach(&sandbox).await;
    assert_eq!(code, ttrpc::Code::DEADLINE_EXCEEDED);
    let expected = "pod p1: the guest's agent did not answer within 500 s of the start";
    assert!(message.starts_with(expected), "{message}");
    assert_eq!(*lock(&host.journal), ["interrupt"]);
}
