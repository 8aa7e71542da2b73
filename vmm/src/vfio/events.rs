//! What the host says of a device while a guest has it: an uncorrectable error, or
//! that it wants the device back because it is unplugged or unbound.
//!
//! Either ends the machine, with a sentence that names the device. A guest left
//! with a dead device would hang in its driver, and a host that waits for its
//! device would hang with it.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::access::{Access, Irq};
use crate::stop::{Outcome, Stop};
use crate::worker::{Poller, Worker};

/// Something that may happen to a device.
pub struct Watched {
    event: EventFd,
    message: String,
}

/// Has the device at `address` signal what it can.
///
/// # Errors
///
/// The kernel's.
pub fn arm(address: &str, device: &dyn Access) -> io::Result<Vec<Watched>> {
    let mut watched = Vec::new();
    for (irq, what) in [
        (Irq::Error, "had an error it cannot recover from"),
        (Irq::Request, "is taken back by the host"),
    ] {
        if device.irq_count(irq)? == 0 {
            continue;
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        device.set_irqs(irq, 0, &[Some(&event)])?;
        watched.push(Watched {
            event,
            message: format!("PCI device {address} {what}"),
        });
    }
    Ok(watched)
}

/// Ends the machine when one of them happens. The thread gives back how often it woke for
/// nothing.
///
/// # Errors
///
/// When there is no thread or event for it.
pub fn watch(watched: Vec<Watched>, stop: Arc<Stop>) -> io::Result<Worker<u64>> {
    Worker::spawn("vfio", move |poller| {
        let mut polls = 0;
        if let Err(error) = run(poller, &watched, &stop, &mut polls) {
            stop.set(Outcome::Failed(format!("watching PCI devices: {error}")));
        }
        polls
    })
}

fn run(mut poller: Poller, watched: &[Watched], stop: &Stop, polls: &mut u64) -> io::Result<()> {
    for (token, watched) in (0..).zip(watched) {
        poller.add(&watched.event, EventSet::IN, token)?;
    }
    while let Some(ready) = poller.wait(-1)? {
        let first = ready
            .first()
            .and_then(|event| usize::try_from(event.data()).ok());
        if let Some(watched) = first.and_then(|at| watched.get(at)) {
            stop.set(Outcome::Failed(watched.message.clone()));
            break;
        }
        *polls += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio::mock::{Mock, wait_for};

    #[test]
    fn what_happens_to_a_device_ends_the_machine_by_its_name() {
        for (irq, what) in [
            (Irq::Request, "is taken back by the host"),
            (Irq::Error, "had an error it cannot recover from"),
        ] {
            let mocks = [Mock::default(), Mock::default()];
            let addresses = ["0000:01:00.0", "0000:02:00.0"];
            let armed = mocks.iter().zip(addresses);
            let watched = armed.flat_map(|(mock, address)| arm(address, mock).unwrap());
            let stop = Arc::new(Stop::new().unwrap());
            let worker = watch(watched.collect(), stop.clone()).unwrap();
            assert!(mocks[1].signal(irq, 0));
            wait_for(stop.event());
            assert_eq!(worker.stop(), Some(0));
            let message = format!("PCI device 0000:02:00.0 {what}");
            assert_eq!(stop.outcome(), Some(&Outcome::Failed(message)));
        }
    }

    #[test]
    fn nothing_happens_to_a_machine_whose_devices_are_well() {
        let watched = arm("0000:01:00.0", &Mock::default()).unwrap();
        let stop = Arc::new(Stop::new().unwrap());
        let worker = watch(watched, stop.clone()).unwrap();
        assert_eq!(worker.stop(), Some(0));
        assert_eq!(stop.outcome(), None);
    }

    #[test]
    fn only_what_the_device_has_is_watched() {
        let mock = Mock::default();
        mock.state().no_events = true;
        assert!(arm("0000:01:00.0", &mock).unwrap().is_empty());
    }
}
