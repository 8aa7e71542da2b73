//! Exchanges of disks' bytes, each with a thread of its own: it waits until the disk has
//! no request under way, and a device of the host may keep one for long.
//!
//! There are as many threads as exchanges that the shim has not got an answer to: one for
//! each disk, and one more each time that the shim asks again for a disk that is busy.

use std::collections::HashMap;
use std::sync::Arc;

use super::answers::Answerer;
use crate::virtio::block::{Backing, Exchanger};

/// The disks whose bytes can be exchanged.
pub struct Exchanges {
    slots: HashMap<String, Arc<Exchanger>>,
    answerer: Answerer,
}

impl Exchanges {
    /// For disks by their serial numbers.
    pub fn new(slots: HashMap<String, Exchanger>, answerer: Answerer) -> Self {
        let slots = slots.into_iter();
        Self {
            slots: slots.map(|(serial, slot)| (serial, slot.into())).collect(),
            answerer,
        }
    }

    /// Begins an exchange.
    pub fn start(&self, number: u64, serial: &str, read_only: bool, backing: Backing) {
        let Some(slot) = self.slots.get(serial).cloned() else {
            let refusal = Err(format!("no empty disk {serial}"));
            return self.answerer.answer(number, refusal);
        };
        let answerer = self.answerer.clone();
        let exchange = move || {
            let result = slot.exchange(number, read_only, backing);
            answerer.answer(number, result.map_err(|error| error.to_string()));
        };
        let thread = std::thread::Builder::new().name("exchange".into());
        if let Err(error) = thread.spawn(exchange) {
            let refusal = Err(format!("no thread to wait for it: {error}"));
            self.answerer.answer(number, refusal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs::File;
    use std::time::Duration;

    use nacre_protocol::channel::Channel;
    use nacre_protocol::vm::Event;

    use crate::monitor::answers::Answers;
    use crate::monitor::{borrow, input, wait_for};
    use crate::virtio::block::Block;

    fn file_of(bytes: u64) -> Backing {
        let file: File = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Backing::Whole(file)
    }

    /// The next answer as the shim hears it, when there is one.
    fn next(answers: &Answers, (near, far): &mut (Channel, Channel)) -> Event {
        let event = borrow(answers.event());
        while !wait_for([input(event)]).unwrap()[0] {}
        answers.report(far).unwrap();
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
        let answers = Answers::new().unwrap();
        let exchanges = Exchanges::new(slots, answers.answerer());
        let mut ends = Channel::pair().unwrap();
        let (done, others) = std::sync::mpsc::channel();
        let thread = busy.while_busy(|| {
            let thread = std::thread::spawn(move || {
                exchanges.start(1, "busy", true, file_of(512));
                exchanges.start(2, "idle", true, file_of(1024));
                done.send(next(&answers, &mut ends)).unwrap();
                exchanges.start(3, "idle", true, file_of(100));
                done.send(next(&answers, &mut ends)).unwrap();
                exchanges.start(4, "none", true, Backing::Empty);
                done.send(next(&answers, &mut ends)).unwrap();
                next(&answers, &mut ends)
            });
            let answer = || others.recv_timeout(Duration::from_secs(20)).unwrap();
            let (number, result) = (2, Ok(1024));
            assert_eq!(answer(), Event::Answered { number, result });
            for refused in [3, 4] {
                let Event::Answered { number, result } = answer() else {
                    panic!("not an answer");
                };
                assert_eq!((number, result.is_err()), (refused, true));
            }
            thread
        });
        let (number, result) = (1, Ok(512));
        assert_eq!(thread.join().unwrap(), Event::Answered { number, result });
    }
}
