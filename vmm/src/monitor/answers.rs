//! Answers to requests that take time. Whoever has done what a request asks for gives the
//! answer to an [`Answerer`], on whatever thread; the main thread hears of it through an
//! event and passes it on to the shim.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use nacre_protocol::channel::{Channel, FdList};
use nacre_protocol::vm::Event;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::MonitorError;

/// The main thread's side.
pub struct Answers {
    queue: Receiver<Event>,
    answerer: Answerer,
}

/// The side of those who answer.
#[derive(Clone)]
pub struct Answerer {
    queue: Sender<Event>,
    event: Arc<EventFd>,
}

impl Answers {
    /// None yet.
    ///
    /// # Errors
    ///
    /// Those of eventfd(2).
    pub fn new() -> io::Result<Self> {
        let (sender, queue) = channel();
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let answerer = Answerer {
            queue: sender,
            event,
        };
        Ok(Self { queue, answerer })
    }

    /// Readable when there are answers to report.
    pub fn event(&self) -> &EventFd {
        &self.answerer.event
    }

    /// For who is to answer.
    pub fn answerer(&self) -> Answerer {
        self.answerer.clone()
    }

    /// Tells the shim of the answers there are.
    ///
    /// # Errors
    ///
    /// Those of the channel and of the event.
    pub fn report(&self, channel: &Channel) -> Result<(), MonitorError> {
        self.event().read()?;
        for answer in self.queue.try_iter() {
            channel.send(&answer, &FdList::default())?;
        }
        Ok(())
    }
}

impl Answerer {
    /// Answers the request with this number.
    pub fn answer(&self, number: u64, result: Result<u64, String>) {
        // Without a receiver the monitor is about to exit.
        if self.queue.send(Event::Answered { number, result }).is_ok()
            && let Err(error) = self.event.write(1)
        {
            tracing::error!(number, %error, "the answer to a request is lost");
        }
    }
}
