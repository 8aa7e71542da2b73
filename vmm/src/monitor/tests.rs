use super::*;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use nacre_protocol::vm::{FdIndex, Iommu, Jail};

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
        kernel: FdIndex(1),
        initrd: FdIndex(2),
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
