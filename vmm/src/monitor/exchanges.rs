//! Exchanges of disks' bytes, each with a thread of its own: it waits until the disk has
//! no request under way, and a device of the host may keep one for long. The main thread
//! hears of the answers through an event.
//!
//! There are as many threads as exchanges that the shim has not got an answer to: one
//! for each disk at most.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nacre_protocol::channel::{Channel, FdList};
use nacre_protocol::vm::Event;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::MonitorError;
use crate::virtio::block::{Backing, Exchanger};

/// The disks whose bytes can be exchanged, on the main thread's side.
pub struct Exchanges {
    slots: HashMap<String, Arc<Exchanger>>,
    answers: Receiver<Event>,
    answerer: Answerer,
}

/// The side of an exchange's thread.
#[derive(Clone)]
struct Answerer {
    queue: Sender<Event>,
    event: Arc<EventFd>,
}

impl Exchanges {
    /// For disks by their serial numbers.
    ///
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub fn new(slots: HashMap<String, Exchanger>) -> io::Result<Self> {
        let (queue, answers) = channel();
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let slots = slots.into_iter();
        Ok(Self {
            slots: slots.map(|(serial, slot)| (serial, slot.into())).collect(),
            answers,
            answerer: Answerer { queue, event },
        })
    }

    /// Readable when there are answers to report.
    pub fn answered(&self) -> &EventFd {
        &self.answerer.event
    }

    /// Begins an exchange.
    pub fn start(&self, number: u64, serial: &str, read_only: bool, backing: Backing) {
        let Some(slot) = self.slots.get(serial).cloned() else {
            let refusal = Err(format!("no empty disk {serial}"));
            return self.answerer.answer(number, refusal);
        };
        let answerer = self.answerer.clone();
        let exchange = move || {
            let result = slot.exchange(read_only, backing);
            answerer.answer(number, result.map_err(|error| error.to_string()));
        };
        let thread = std::thread::Builder::new().name("exchange".into());
        if let Err(error) = thread.spawn(exchange) {
            let refusal = Err(format!("no thread to wait for it: {error}"));
            self.answerer.answer(number, refusal);
        }
    }

    /// Tells the shim of the answers there are.
    ///
    /// # Errors
    ///
    /// Those of the channel and of the event.
    pub fn report(&self, channel: &Channel) -> Result<(), MonitorError> {
        self.answered().read()?;
        for answer in self.answers.try_iter() {
            channel.send(&answer, &FdList::default())?;
        }
        Ok(())
    }
}

impl Answerer {
    fn answer(&self, number: u64, result: Result<u64, String>) {
        let answer = Event::Answer { number, result };
        // Without a receiver the monitor is about to exit.
        if self.queue.send(answer).is_ok()
            && let Err(error) = self.event.write(1)
        {
            tracing::error!(%error, "the answer to an exchange is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::File;
    use std::time::Duration;

    use crate::monitor::{borrow, input, wait_for};
    use crate::virtio::block::Block;

    fn file_of(bytes: u64) -> Backing {
        let file: File = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Backing::Whole(file)
    }

    /// The next answer as the shim hears it, when there is one.
    fn next(exchanges: &Exchanges, (near, far): &mut (Channel, Channel)) -> Event {
        let event = borrow(exchanges.answered());
        while !wait_for([input(event)]).unwrap()[0] {}
        exchanges.report(far).unwrap();
        near.recv::<Event>().unwrap().0
    }

    #[test]
    fn an_exchange_that_waits_for_requests_keeps_no_other_waiting() {
        let [busy, idle] = ["busy", "idle"].map(|serial| {
            Block::new(serial, false, Backing::Empty, 1)
                .unwrap()
                .exchanger()
        });
        let slots = HashMap::from([("busy".to_owned(), busy.clone()), ("idle".to_owned(), idle)]);
        let exchanges = Exchanges::new(slots).unwrap();
        let mut ends = Channel::pair().unwrap();
        let (done, others) = std::sync::mpsc::channel();
        let thread = busy.while_busy(|| {
            let thread = std::thread::spawn(move || {
                exchanges.start(1, "busy", true, file_of(512));
                exchanges.start(2, "idle", true, file_of(1024));
                done.send(next(&exchanges, &mut ends)).unwrap();
                exchanges.start(3, "idle", true, file_of(100));
                done.send(next(&exchanges, &mut ends)).unwrap();
                exchanges.start(4, "none", true, Backing::Empty);
                done.send(next(&exchanges, &mut ends)).unwrap();
                next(&exchanges, &mut ends)
            });
            let answer = || others.recv_timeout(Duration::from_secs(20)).unwrap();
            let (number, result) = (2, Ok(1024));
            assert_eq!(answer(), Event::Answer { number, result });
            for refused in [3, 4] {
                let Event::Answer { number, result } = answer() else {
                    panic!("not an answer");
                };
                assert_eq!((number, result.is_err()), (refused, true));
            }
            thread
        });
        let (number, result) = (1, Ok(512));
        assert_eq!(thread.join().unwrap(), Event::Answer { number, result });
    }
}
