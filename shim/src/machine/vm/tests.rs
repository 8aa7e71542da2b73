use super::*;
use std::fs::File;
use std::io::{Read, Write};
use std::process::Command;

use nacre_protocol::vm::StopReason;

/// A machine whose monitor is `sleep`, and the monitor's end of its channel.
/// The machine reaps it.
#[allow(clippy::zombie_processes)]
fn with_stand_in() -> (VmMachine, Channel) {
    let child = Command::new("sleep").arg("60").spawn().unwrap();
    VmMachine::with_stand_in(child.id())
}

#[tokio::test]
async fn events_reach_their_waiters() {
    let (machine, mut monitor) = with_stand_in();
    let (shim_end, mut guest_end) = StdUnixStream::pair().unwrap();
    let mut fds = FdList::default();
    let stream = fds.push(shim_end.as_fd());
    monitor
        .send(
            &Event::Dialed {
                port: AGENT_PORT,
                stream,
            },
            &fds,
        )
        .unwrap();
    drop(shim_end);
    let agent = machine.agent().await.unwrap();
    drop(agent);
    let mut rest = String::new();
    guest_end.read_to_string(&mut rest).unwrap();

    let stream = machine.connect(7).await.unwrap();
    let (request, _fds) = monitor.recv::<Request>().unwrap();
    assert!(matches!(request, Request::Connect { port: 7, .. }));
    drop(stream);

    let reason = StopReason::Panic;
    monitor
        .send(&Event::Stopped(reason), &FdList::default())
        .unwrap();
    assert_eq!(machine.stopped().await, Stop::Guest(reason));
}

#[tokio::test]
async fn last_words_of_a_monitor_that_has_not_read_everything_are_heard() {
    let (machine, monitor) = with_stand_in();
    machine.connect(7).await.unwrap();
    let reason = StopReason::Panic;
    monitor
        .send(&Event::Stopped(reason), &FdList::default())
        .unwrap();
    drop(monitor);
    assert_eq!(machine.stopped().await, Stop::Guest(reason));
}

/// The next request must be a resize; how far.
async fn resize_request(monitor: &mut AsyncFd<ChannelHolder>) -> u32 {
    loop {
        let mut guard = monitor.readable_mut().await.unwrap();
        match guard.get_inner_mut().0.recv::<Request>() {
            Ok((Request::Resize { growth_mib }, _)) => return growth_mib,
            Err(ChannelError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
            }
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn resize_returns_when_the_guest_is_there_or_stops_on_its_way() {
    let (machine, monitor) = with_stand_in();
    set_nonblocking(monitor.as_fd()).unwrap();
    let mut monitor = register(ChannelHolder(monitor)).unwrap();
    let report = |monitor: &AsyncFd<ChannelHolder>, growth_mib| {
        let event = Event::Resized { growth_mib };
        let sent = monitor.get_ref().0.send(&event, &FdList::default());
        sent.unwrap();
    };
    let guest = async {
        assert_eq!(resize_request(&mut monitor).await, 8);
        report(&monitor, 4);
        report(&monitor, 8);
        assert_eq!(resize_request(&mut monitor).await, 0);
        report(&monitor, 4);
    };
    let shim = async {
        assert_eq!(machine.resize(8).await.unwrap(), 8);
        assert_eq!(machine.resize(0).await.unwrap(), 4, "no nearer");
    };
    tokio::join!(guest, shim);
    drop(monitor);
    machine.kill();
    assert_eq!(machine.stopped().await, Stop::Died);
    assert!(machine.resize(8).await.is_err(), "the machine is gone");
}

/// The next request must be to exchange a disk; which, and the request's number.
fn exchange_request(monitor: &mut Channel) -> (String, u64) {
    match monitor.recv::<Request>().unwrap().0 {
        Request::Exchange { number, serial, .. } => (serial, number),
        other => panic!("{other:?}"),
    }
}

fn answer(monitor: &Channel, number: u64, result: Result<u64, String>) {
    let event = Event::Answered { number, result };
    monitor.send(&event, &FdList::default()).unwrap();
}

#[tokio::test]
async fn a_disk_that_stays_busy_keeps_nobody_waiting() {
    let (machine, mut monitor) = with_stand_in();
    let monitor = tokio::task::spawn_blocking(move || {
        // In any order.
        let first = HashMap::from([(); 2].map(|()| exchange_request(&mut monitor)));
        answer(&monitor, first["idle"], Ok(512));
        let (disk, again) = exchange_request(&mut monitor);
        assert_eq!(disk, "busy");
        answer(&monitor, 1000, Ok(1));
        answer(&monitor, first["busy"], Err("late".into()));
        answer(&monitor, again, Ok(4096));
        exchange_request(&mut monitor);
    });
    let idle = async {
        let size = machine.exchange("idle", None, false).await.unwrap();
        (size, Instant::now())
    };
    let begin = Instant::now();
    let (busy, (size, at)) = tokio::join!(machine.exchange("busy", None, false), idle);
    let busy = busy.unwrap_err();
    assert!(matches!(busy, MachineError::DiskBusy { .. }), "{busy}");
    assert_eq!(size, 512);
    assert!(at < begin + EXCHANGE_LIMIT, "it waits for the other");
    let again = machine.exchange("busy", None, false).await;
    assert_eq!(again.unwrap(), 4096, "not the late answer");
    let (last, ()) = tokio::join!(machine.exchange("idle", None, false), async {
        machine.kill();
    });
    assert!(matches!(last, Err(MachineError::Stopped(_))), "{last:?}");
    monitor.await.unwrap();
}

#[tokio::test]
async fn exchanges_are_answered_with_a_size_or_a_reason() {
    let (machine, mut monitor) = with_stand_in();
    let shim = tokio::spawn(async move {
        let file = || File::open("/dev/null").unwrap();
        let whole = HostBacking::Whole(file());
        let size = machine.exchange("slot0", Some(&whole), true).await;
        let layers = HostBacking::Partitions(vec![file(), file()]);
        let size = size.and(machine.exchange("root0", Some(&layers), true).await);
        let refused = machine.exchange("slot1", None, false).await;
        machine.kill();
        let dead = machine.exchange("slot0", None, false).await;
        (size.unwrap(), refused.unwrap_err(), dead.is_err())
    });
    let monitor = tokio::task::spawn_blocking(move || {
        let (request, mut fds) = monitor.recv::<Request>().unwrap();
        let Request::Exchange {
            number,
            backing: DiskBacking::Whole(file),
            read_only: true,
            ..
        } = request
        else {
            panic!("{request:?}");
        };
        fds.take(file).unwrap();
        answer(&monitor, number, Ok(512));
        let (request, mut fds) = monitor.recv::<Request>().unwrap();
        let Request::Exchange {
            number,
            backing: DiskBacking::Partitions(files),
            ..
        } = request
        else {
            panic!("{request:?}");
        };
        assert_eq!(files.len(), 2);
        for file in files {
            fds.take(file).unwrap();
        }
        answer(&monitor, number, Ok(4096));
        let (disk, second) = exchange_request(&mut monitor);
        assert_eq!(disk, "slot1");
        answer(&monitor, second, Err("broken".into()));
    });
    let (size, refused, dead) = shim.await.unwrap();
    monitor.await.unwrap();
    assert_eq!(size, 4096);
    assert_eq!(refused.to_string(), "disk slot1: broken");
    assert!(dead);
}

#[tokio::test]
async fn devices_are_plugged_in_or_it_is_said_why_not() {
    let (machine, mut monitor) = with_stand_in();
    let dev = tempfile::tempdir().unwrap();
    std::fs::write(dev.path().join("iommu"), "").unwrap();
    let devices = nacre_vmm::vfio::open::by_iommufd(dev.path(), &[]).unwrap();
    let shim = tokio::spawn(async move {
        let refused = machine.plug(&[0, 1], &devices).await.unwrap_err();
        let unplugged = machine.unplug(&[2]).await;
        machine.kill();
        let dead = machine.unplug(&[2]).await.unwrap_err();
        (refused.to_string(), unplugged, dead)
    });
    let monitor = tokio::task::spawn_blocking(move || {
        let (request, mut fds) = monitor.recv::<Request>().unwrap();
        let Request::Plug {
            number,
            slots,
            devices,
        } = request
        else {
            panic!("{request:?}");
        };
        assert_eq!(slots, [0, 1]);
        Passthrough::take(&devices, &mut fds).unwrap();
        answer(&monitor, number, Err("too large".into()));
        let (request, _) = monitor.recv::<Request>().unwrap();
        let Request::Unplug { number, slots } = request else {
            panic!("{request:?}");
        };
        assert_eq!(slots, [2]);
        answer(&monitor, number, Ok(1));
    });
    let (refused, unplugged, dead) = shim.await.unwrap();
    monitor.await.unwrap();
    assert_eq!(refused, "too large");
    unplugged.unwrap();
    assert!(!matches!(dead, MachineError::Slots(_)), "{dead}");
}

#[tokio::test]
async fn network_cards_are_answered_with_a_slot_or_a_reason() {
    let (machine, mut monitor) = with_stand_in();
    let shim = tokio::spawn(async move {
        let nic = HostNic {
            index: 3,
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1400,
            taps: vec![File::open("/dev/null").unwrap().into()],
            vhost: Vec::new(),
        };
        let slot = machine.add_nic(&nic).await;
        let mad = machine.add_nic(&nic).await;
        let refused = machine.remove_nic(9, false).await;
        let late = machine.remove_nic(9, true).await;
        let wrong = [mad.unwrap_err(), refused.unwrap_err(), late.unwrap_err()];
        (slot.unwrap(), wrong.map(|error| error.to_string()))
    });
    let monitor = tokio::task::spawn_blocking(move || {
        let answers: [Result<u64, String>; 2] = [Ok(8), Ok(1 << 40)];
        for result in answers {
            let (request, mut fds) = monitor.recv::<Request>().unwrap();
            let Request::AddNic { number, nic } = request else {
                panic!("{request:?}");
            };
            assert_eq!((nic.mac[5], nic.mtu, nic.vhost.len()), (1, 1400, 0));
            fds.take(nic.taps[0]).unwrap();
            answer(&monitor, number, result);
        }
        let (request, _) = monitor.recv::<Request>().unwrap();
        let Request::RemoveNic {
            number,
            slot: 9,
            is_let_go: false,
        } = request
        else {
            panic!("{request:?}");
        };
        answer(&monitor, number, Err("not there".into()));
        // It is there, and says nothing to the last.
        monitor
    });
    let (slot, [mad, refused, late]) = shim.await.unwrap();
    monitor.await.unwrap();
    assert_eq!(late, "network card: the monitor does not answer within 1 s");
    assert_eq!(slot, 8);
    assert_eq!(mad, "network card: no slot 1099511627776");
    assert_eq!(refused, "network card: not there");
}

#[tokio::test]
async fn shared_directory_is_answered_alike() {
    let (machine, mut monitor) = with_stand_in();
    let (mut file_server, near) = StdUnixStream::pair().unwrap();
    let shim = tokio::spawn(async move {
        let slot = machine.add_shared_dir(&near).await.unwrap();
        let again = machine.add_shared_dir(&near).await.unwrap_err();
        (slot, again.to_string())
    });
    let monitor = tokio::task::spawn_blocking(move || {
        for result in [Ok(9), Err("there is one".into())] {
            let (request, mut fds) = monitor.recv::<Request>().unwrap();
            let Request::AddSharedDir { number, dir } = request else {
                panic!("{request:?}");
            };
            assert_eq!(dir.tag, "shared");
            let mut socket = StdUnixStream::from(fds.take(dir.socket).unwrap());
            socket.write_all(b"to the server").unwrap();
            answer(&monitor, number, result);
        }
        monitor
    });
    let said = shim.await.unwrap();
    assert_eq!(said, (9, "virtio-fs: there is one".into()));
    monitor.await.unwrap();
    let mut text = String::new();
    file_server.read_to_string(&mut text).unwrap();
    assert_eq!(text, "to the serverto the server");
}

#[tokio::test]
async fn guest_is_asked_where_it_hangs_as_long_as_there_is_one() {
    let (machine, mut monitor) = with_stand_in();
    machine.interrupt().await.unwrap();
    let (request, _) = monitor.recv::<Request>().unwrap();
    assert_eq!(request, Request::Interrupt);
    machine.kill();
    drop(monitor);
    machine.stopped().await;
    let gone = machine.interrupt().await.unwrap_err();
    assert!(matches!(gone, MachineError::Stopped(Stop::Died)), "{gone}");
}

#[tokio::test]
async fn death_resolves_every_wait() {
    let (machine, monitor) = with_stand_in();
    machine.kill();
    drop(monitor);
    assert_eq!(machine.stopped().await, Stop::Died);
    assert!(matches!(
        machine.agent().await,
        Err(MachineError::Stopped(_))
    ));
    assert!(machine.connect(7).await.is_err());
    machine.kill();
}
