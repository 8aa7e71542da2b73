//! A device's thread: an epoll loop that ends when it is told to.
//!
//! A [`Worker`] owns the thread and gets back from it, when it stops, whatever
//! the thread was given to work with, so that a device that was reset can be
//! activated again.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Token of the stop event; a worker's own tokens must differ.
const STOP_TOKEN: u64 = u64::MAX;
const MAX_EVENTS: usize = 32;

/// The epoll instance of a worker thread.
pub struct Poller {
    epoll: Epoll,
    stop: EventFd,
    events: [EpollEvent; MAX_EVENTS],
}

impl Poller {
    fn new(stop: EventFd) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            stop.as_raw_fd(),
            EpollEvent::new(EventSet::IN, STOP_TOKEN),
        )?;
        Ok(Self {
            epoll,
            stop,
            events: [EpollEvent::default(); MAX_EVENTS],
        })
    }

    /// Watches `fd`; its events carry `token`.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn add(&self, fd: &impl AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        debug_assert_ne!(token, STOP_TOKEN);
        self.control(ControlOperation::Add, fd.as_raw_fd(), events, token)
    }

    /// Changes what is watched for on `fd`.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn modify(&self, fd: &impl AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), events, token)
    }

    /// Stops watching `fd`.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EventSet::empty(),
            0,
        )
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        events: EventSet,
        token: u64,
    ) -> io::Result<()> {
        self.epoll
            .ctl(operation, fd, EpollEvent::new(events, token))
    }

    /// Waits for events, at most `timeout_ms` (-1: without limit). `None` means
    /// that the worker has been told to stop.
    ///
    /// # Errors
    ///
    /// Those of epoll_wait(2); an interruption by a signal is no error.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<Option<&[EpollEvent]>> {
        let count = match self.epoll.wait(timeout_ms, &mut self.events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let ready = self.events.get(..count).unwrap_or_default();
        if ready.iter().any(|event| event.data() == STOP_TOKEN) {
            return Ok(None);
        }
        Ok(Some(ready))
    }

    /// The event that ends the worker, for tests and for loops of their own.
    #[must_use]
    pub fn stop_event(&self) -> &EventFd {
        &self.stop
    }
}

/// A running worker thread that returns a `T` when it stops.
pub struct Worker<T> {
    stop: EventFd,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread called `name` (15 bytes at most, prctl(2)) that runs
    /// `body` until [`Poller::wait`] returns `None`.
    ///
    /// # Errors
    ///
    /// When no event, epoll instance or thread can be had.
    pub fn spawn<F>(name: &str, body: F) -> io::Result<Self>
    where
        F: FnOnce(Poller) -> T + Send + 'static,
    {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let poller = Poller::new(stop.try_clone()?)?;
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || body(poller))?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread and returns what it gives back; `None` if it panicked.
    pub fn stop(self) -> Option<T> {
        if let Err(error) = self.stop.write(1) {
            tracing::error!(%error, "worker cannot be told to stop");
            return None;
        }
        self.thread.join().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_sees_events_and_returns_its_value() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let inside = event.try_clone().unwrap();
        let (seen, sees) = std::sync::mpsc::channel();
        let worker = Worker::spawn("test", move |mut poller| {
            poller.add(&inside, EventSet::IN, 7).unwrap();
            let mut count = 0u32;
            while let Some(ready) = poller.wait(-1).unwrap() {
                for event in ready {
                    seen.send(event.data()).unwrap();
                    inside.read().unwrap();
                    count += 1;
                }
            }
            count
        })
        .unwrap();
        event.write(1).unwrap();
        assert_eq!(sees.recv().unwrap(), 7);
        assert_eq!(worker.stop(), Some(1));
    }
}
