use super::*;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nacre_protocol::vm::{FdIndex, Iommu, Jail, Nic, StopReason};

use crate::machine::tests::{await_end, parts};
use crate::virtio::fs;
use crate::virtio::vsock::Vsock;

#[test]
fn first_request_must_be_boot() {
    let (mut near, far) = Channel::pair().unwrap();
    let (stream, _other) = UnixStream::pair().unwrap();
    let mut fds = FdList::default();
    let stream = fds.push(stream.as_fd());
    near.send(&Request::Connect { port: 1, stream }, &fds)
        .unwrap();
    assert_eq!(run(far.into()), ExitCode::FAILURE);
    let (event, _) = near.recv::<Event>().unwrap();
    assert!(matches!(event, Event::Failed { .. }), "{event:?}");
}

#[test]
fn closed_channel_ends_the_monitor() {
    let (near, far) = Channel::pair().unwrap();
    drop(near);
    assert_eq!(run(far.into()), ExitCode::FAILURE);
}

#[test]
fn guest_calls_reach_the_shim_with_their_stream() {
    let (mut near, far) = Channel::pair().unwrap();
    let (calls, caller) = Calls::new().unwrap();
    let (mut guest, shim) = UnixStream::pair().unwrap();
    caller.call(1024, shim.into());
    assert_eq!(wait_for([input(borrow(&calls.event))]).unwrap(), [true]);
    calls.report(&far).unwrap();
    let (event, mut fds) = near.recv::<Event>().unwrap();
    let Event::Dialed { port: 1024, stream } = event else {
        panic!("{event:?}");
    };
    guest.write_all(b"hello").unwrap();
    drop(guest);
    let mut text = String::new();
    File::from(fds.take(stream).unwrap())
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "hello");
}

#[test]
fn calls_beyond_the_queue_are_refused() {
    let (calls, caller) = Calls::new().unwrap();
    for _ in 0..=MAX_CALLS {
        let (stream, _) = UnixStream::pair().unwrap();
        caller.call(1024, stream.into());
    }
    assert_eq!(calls.queue.try_iter().count(), MAX_CALLS);
}

#[test]
fn machine_without_slots_says_so() {
    let (mut near, far) = Channel::pair().unwrap();
    let answers = Answers::new().unwrap();
    plug(None, &answers, 7, Job::Unplug(vec![0]));
    answers.report(&far).unwrap();
    let (event, _) = near.recv::<Event>().unwrap();
    let result = Err("the machine has no slots for PCI devices".into());
    assert_eq!(event, Event::Answered { number: 7, result });
}

/// A shim whose machine runs.
struct Shim {
    near: Channel,
    far: Channel,
    running: Running,
    peers: Peers,
}

impl Shim {
    fn new(running: Running) -> Self {
        let (near, far) = Channel::pair().unwrap();
        let (_, dialer) = Vsock::new(3, |_, _| ()).unwrap();
        let answers = Answers::new().unwrap();
        let peers = Peers {
            dialer,
            file_server: None,
            resizer: None,
            exchanges: Exchanges::new(HashMap::new(), answers.answerer()),
            answers,
        };
        Self {
            near,
            far,
            running,
            peers,
        }
    }

    /// The answer to a request, whose number is 7.
    fn ask(&mut self, request: &Request, fds: &FdList<'_>) -> Result<u64, String> {
        self.near.send(request, fds).unwrap();
        obey(&mut self.far, &self.running, &mut self.peers).unwrap();
        self.peers.answers.report(&self.far).unwrap();
        let (event, _) = self.near.recv::<Event>().unwrap();
        let Event::Answered { number: 7, result } = event else {
            panic!("{event:?}");
        };
        result
    }

    fn add(&mut self, tap: BorrowedFd<'_>) -> Result<u64, String> {
        let mut fds = FdList::default();
        let nic = Nic {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            taps: vec![fds.push(tap)],
            vhost: Vec::new(),
        };
        self.ask(&Request::AddNic { number: 7, nic }, &fds)
    }

    fn share(&mut self, socket: BorrowedFd<'_>) -> Result<u64, String> {
        let mut fds = FdList::default();
        let dir = SharedDir {
            tag: "shared".into(),
            socket: fds.push(socket),
        };
        self.ask(&Request::AddSharedDir { number: 7, dir }, &fds)
    }

    fn remove(&mut self, slot: u8, is_let_go: bool) -> Result<u64, String> {
        let remove = Request::RemoveNic {
            number: 7,
            slot,
            is_let_go,
        };
        self.ask(&remove, &FdList::default())
    }
}

#[test]
fn shim_is_told_where_cards_are_and_why_one_is_not() {
    // jmp to itself
    let Some(parts) = parts(&[0xeb, 0xfe], 1) else {
        return;
    };
    let Some(tap) = net::tests::tap() else { return };
    let mut shim = Shim::new(Machine::new(parts).unwrap().start().unwrap());
    assert_eq!(
        [shim.add(tap.as_fd()), shim.add(tap.as_fd())],
        [Ok(1), Ok(2)]
    );
    let null = File::open("/dev/null").unwrap();
    let no_tap = shim.add(null.as_fd()).unwrap_err();
    assert!(no_tap.contains("tap"), "{no_tap}");
    assert_eq!(shim.remove(1, true), Ok(1));
    let gone = Err("no virtio device of type 1 is in slot 1 of bus 0".into());
    assert_eq!(shim.remove(1, true), gone);
    assert_eq!(shim.add(tap.as_fd()), Ok(1));
    assert_eq!(shim.remove(1, false), Ok(1));
    assert_eq!(shim.add(tap.as_fd()), Ok(3), "the guest has 1 yet");
    shim.running.stop();
}

#[test]
fn shared_directory_comes_once_and_its_end_is_the_machine_s() {
    // jmp to itself
    let Some(parts) = parts(&[0xeb, 0xfe], 1) else {
        return;
    };
    let mut shim = Shim::new(Machine::new(parts).unwrap().start().unwrap());
    let (near, far) = UnixStream::pair().unwrap();
    drop(near);
    let gone = shim.share(far.as_fd()).unwrap_err();
    assert!(gone.starts_with("shared directory: vhost-user"), "{gone}");
    assert_eq!(shim.share(fs::tests::back_end().as_fd()), Ok(1));
    let again = shim.share(fs::tests::back_end().as_fd());
    assert_eq!(again, Err("the machine has a shared directory".into()));

    let server = shim.peers.file_server.as_ref().unwrap();
    let server = UnixStream::from(server.try_clone().unwrap());
    let (calls, _caller) = Calls::new().unwrap();
    // As it does when its process ends.
    server.shutdown(std::net::Shutdown::Both).unwrap();
    let outcome = wait(&mut shim.far, &shim.running, &mut shim.peers, &calls).unwrap();
    let said = "the file server of the shared directory has ended";
    assert!(matches!(&outcome, Outcome::Failed(message) if message == said));
    shim.running.stop();
}

#[test]
fn guest_that_hangs_is_interrupted_on_request() {
    // jmp to itself, with interrupts off and no table for any. KVM looks whose APIC is which
    // when there is a further one, or a guest sets its own.
    let Some(parts) = parts(&[0xeb, 0xfe], 2) else {
        return;
    };
    let mut shim = Shim::new(Machine::new(parts).unwrap().start().unwrap());
    let interrupt = Request::Interrupt;
    shim.near.send(&interrupt, &FdList::default()).unwrap();
    obey(&mut shim.far, &shim.running, &mut shim.peers).unwrap();
    let outcome = await_end(&shim.running);
    assert_eq!(outcome, Outcome::Stopped(StopReason::TripleFault));
    shim.running.stop();
}

#[test]
fn hangup_is_no_message() {
    let (near, mut far) = UnixStream::pair().unwrap();
    far.write_all(b"answer").unwrap();
    let ready = wait_for([input(near.as_fd()), hangup(near.as_fd())]);
    assert_eq!(ready.unwrap(), [true, false]);
    drop(far);
    assert_eq!(wait_for([hangup(near.as_fd())]).unwrap(), [true]);
}

#[test]
fn memory_of_a_guest_with_devices_is_locked_and_does_not_grow() {
    let mut config = VmConfig {
        sandbox_id: "pod".into(),
        jail: Jail { uid: 1, gid: 1 },
        kvm: FdIndex(0),
        vcpus: 1,
        memory: Memory {
            size_mib: 64,
            growth_mib: 128,
            hugepages: false,
        },
        kernel: NamedFd {
            fd: FdIndex(1),
            path: "/boot/vmlinux".into(),
        },
        initrd: NamedFd {
            fd: FdIndex(2),
            path: "/boot/initrd.img".into(),
        },
        cmdline: String::new(),
        disks: Vec::new(),
        nics: Vec::new(),
        passthrough: None,
        pci_slots: 0,
        pci: nacre_protocol::vm::PciOptions::default(),
        shared_dir: None,
        console: None,
    };
    assert_eq!(pinned_bytes(&config).unwrap(), None);
    config.pci_slots = 1;
    assert!(pinned_bytes(&config).is_err());
    config.pci_slots = 0;
    config.passthrough = Some(nacre_protocol::vm::Passthrough {
        iommu: Iommu::Iommufd(FdIndex(3)),
        devices: Vec::new(),
    });
    let error = pinned_bytes(&config).unwrap_err().to_string();
    assert!(error.starts_with("128 MiB of memory"), "{error}");
    config.memory.growth_mib = 0;
    assert_eq!(pinned_bytes(&config).unwrap(), Some(64 * MIB));
}
