//! Task events to containerd.
//!
//! containerd wants them in order, so there is one queue and one task that
//! empties it over `TTRPC_ADDRESS`. Putting an event in the queue never blocks;
//! callers fix the order by the order of their calls. An event that cannot be
//! delivered after [`ATTEMPTS`] tries is logged and dropped: containerd learns
//! the state by asking.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task as tasks;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::topics;
use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

const ATTEMPTS: u32 = 5;
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// A task event with its topic.
pub trait TaskEvent: MessageFull {
    /// containerd's topic for it.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($event:ident => $topic:ident),* $(,)?) => {
        $(impl TaskEvent for tasks::$event {
            const TOPIC: &'static str = topics::$topic;
        })*
    };
}

topics! {
    TaskCreate => TASK_CREATE_EVENT_TOPIC,
    TaskStart => TASK_START_EVENT_TOPIC,
    TaskOOM => TASK_OOM_EVENT_TOPIC,
    TaskExit => TASK_EXIT_EVENT_TOPIC,
    TaskDelete => TASK_DELETE_EVENT_TOPIC,
    TaskExecAdded => TASK_EXEC_ADDED_EVENT_TOPIC,
    TaskExecStarted => TASK_EXEC_STARTED_EVENT_TOPIC,
    TaskPaused => TASK_PAUSED_EVENT_TOPIC,
    TaskResumed => TASK_RESUMED_EVENT_TOPIC,
}

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// The queue's near end; clones feed the same queue.
#[derive(Clone)]
pub struct Publisher {
    namespace: String,
    is_muted: bool,
    queue: mpsc::UnboundedSender<Item>,
}

impl Publisher {
    /// Starts a publisher to containerd's ttrpc socket `address` (a path, or
    /// empty: events go nowhere but the log).
    pub fn new(namespace: &str, address: &str) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        tokio::spawn(deliver(receiver, address.to_owned()));
        Self {
            namespace: namespace.to_owned(),
            is_muted: false,
            queue,
        }
    }

    /// One that publishes nothing, for what containerd does not know as a task.
    #[must_use]
    pub fn muted(&self) -> Self {
        Self {
            is_muted: true,
            ..self.clone()
        }
    }

    /// The containerd namespace events are published in.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Queues an event.
    pub fn publish<E: TaskEvent>(&self, event: &E) {
        if self.is_muted {
            return;
        }
        let packed = match pack(event) {
            Ok(packed) => packed,
            Err(error) => return warn!(topic = E::TOPIC, %error, "event not encodable"),
        };
        let envelope = Envelope {
            timestamp: Some(timestamp(SystemTime::now())).into(),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            event: Some(packed).into(),
            ..Default::default()
        };
        if self.queue.send(Item::Event(Box::new(envelope))).is_err() {
            warn!(topic = E::TOPIC, "event queue is gone");
        }
    }

    /// Returns when everything queued before was delivered or given up.
    pub async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            // An error means the queue's task is gone; nothing is left to wait for.
            let _ = flushed.await;
        }
    }
}

/// A message under its name, as containerd's `typeurl` reads it.
///
/// # Errors
///
/// When it cannot be encoded.
pub fn pack<M: MessageFull>(message: &M) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: M::descriptor().full_name().to_owned(),
        value: message.write_to_bytes()?,
        ..Default::default()
    })
}

/// A host time as protobuf has it; times before 1970 read as 1970.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

async fn deliver(mut queue: mpsc::UnboundedReceiver<Item>, address: String) {
    let mut client = None;
    while let Some(item) = queue.recv().await {
        match item {
            Item::Event(envelope) if address.is_empty() => {
                debug!(topic = envelope.topic, "no containerd to tell");
            }
            Item::Event(envelope) => forward(&mut client, &address, *envelope).await,
            Item::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

async fn forward(client: &mut Option<EventsClient>, address: &str, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest {
        envelope: Some(envelope).into(),
        ..Default::default()
    };
    for attempt in 1..=ATTEMPTS {
        match try_forward(client, address, &request).await {
            Ok(()) => return debug!(topic, "event published"),
            Err(error) => {
                warn!(topic, attempt, %error, "event not delivered");
                *client = None;
            }
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn try_forward(
    client: &mut Option<EventsClient>,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let connected = match client {
        Some(connected) => connected,
        None => {
            let url = if address.contains("://") {
                address.to_owned()
            } else {
                format!("unix://{address}")
            };
            let connection = ttrpc::asynchronous::Client::connect(&url).await?;
            client.insert(EventsClient::new(connection))
        }
    };
    let context = ttrpc::context::with_duration(FORWARD_TIMEOUT);
    connected.forward(context, request).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::Message;
    use ttrpc::Code;
    use ttrpc::asynchronous::{Server, TtrpcContext};
    use ttrpc::error::get_rpc_status;

    use super::*;

    /// A containerd that takes an event when it was told it so many times.
    struct Slow {
        refusals: u32,
        told: AtomicU32,
        taken: mpsc::UnboundedSender<Envelope>,
    }

    #[async_trait]
    impl Events for Slow {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let told = self.told.fetch_add(1, Ordering::Relaxed);
            if told % (self.refusals + 1) < self.refusals {
                return Err(get_rpc_status(Code::UNAVAILABLE, "not now"));
            }
            self.taken.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::new())
        }
    }

    async fn serve(address: &Path, refusals: u32) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (taken, events) = mpsc::unbounded_channel();
        let told = AtomicU32::new(0);
        let slow = Arc::new(Slow {
            refusals,
            told,
            taken,
        });
        let mut server = Server::new()
            .bind(&format!("unix://{}", address.display()))
            .unwrap()
            .register_service(create_events(slow));
        server.start().await.unwrap();
        (server, events)
    }

    fn publish(publisher: &Publisher, containers: &[&str]) {
        for container_id in containers {
            publisher.publish(&tasks::TaskPaused {
                container_id: (*container_id).into(),
                ..Default::default()
            });
        }
    }

    /// The containers that were told of, in that order.
    async fn taken(
        publisher: &Publisher,
        events: &mut mpsc::UnboundedReceiver<Envelope>,
    ) -> Vec<String> {
        publisher.flush().await;
        let mut containers = Vec::new();
        while let Ok(envelope) = events.try_recv() {
            let event = tasks::TaskPaused::parse_from_bytes(&envelope.event.value);
            containers.push(event.unwrap().container_id);
        }
        containers
    }

    #[tokio::test]
    async fn what_is_not_taken_is_told_again_in_its_order() {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("s");
        let (_server, mut events) = serve(&address, ATTEMPTS - 1).await;
        let publisher = Publisher::new("test", address.to_str().unwrap());
        publish(&publisher, &["a", "b"]);
        assert_eq!(taken(&publisher, &mut events).await, ["a", "b"]);
    }

    /// As of a containerd that is restarted.
    #[tokio::test]
    async fn a_connection_that_ends_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("s");
        let (mut server, mut events) = serve(&address, 0).await;
        let publisher = Publisher::new("test", address.to_str().unwrap());
        publish(&publisher, &["before"]);
        assert_eq!(taken(&publisher, &mut events).await, ["before"]);
        server.shutdown().await.unwrap();
        // Unless the server has done so.
        let _ = std::fs::remove_file(&address);
        publish(&publisher, &["meanwhile"]);
        let (_server, mut events) = serve(&address, 0).await;
        assert_eq!(taken(&publisher, &mut events).await, ["meanwhile"]);
    }

    #[tokio::test]
    async fn nobody_to_tell_holds_up_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let address = directory.path().join("nobody");
        for address in [address.to_str().unwrap(), ""] {
            let publisher = Publisher::new("test", address);
            publish(&publisher, &["a"]);
            let late = Duration::from_secs(10);
            let flushed = tokio::time::timeout(late, publisher.flush()).await;
            flushed.expect("it is given up");
        }
    }
}
