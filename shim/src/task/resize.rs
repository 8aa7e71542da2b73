//! Limits that change: those of a container in the guest, and with them the
//! machine's memory, its vCPUs and the pod's limits on the host.
//!
//! ```text
//! raised:   host's limits -> machine grows -> container's limits
//! lowered:  container's limits -> machine shrinks -> host's limits
//! ```
//! In this order nothing is ever allowed more memory than what is around it has. Of processor
//! time the host allows less at once: a machine that waits for its own is only slower.
//!
//! A machine has no fewer vCPUs than it booted with, as with memory, and no more than
//! `max_vcpus`: a CPU limit is the most a container may use, so one beyond that is no error.

use std::sync::Arc;

use futures::FutureExt;
use tokio::sync::MutexGuard;

use super::TaskError;
use super::container::Container;
use super::pod::{Entry, Pod};
use super::process::lock;
use crate::cgroup::Limits;
use crate::error::chain;
#[cfg(doc)]
use crate::sandbox::Sandbox;
use crate::sandbox::Wanted;

/// What is known by whoever has the turn to change the machine's size.
#[derive(Default)]
pub(super) struct Turn {
    /// Whether machine and host are not what the containers' limits make them, as the last
    /// change failed.
    is_unfit: bool,
}

/// Takes back the room of containers that are gone. Nobody waits for that: what
/// goes wrong is logged.
pub(super) async fn take_room(pod: Arc<Pod>) {
    let mut turn = pod.resizing.lock().await;
    if lock(&pod.containers).is_empty() {
        return;
    }
    if let Err(error) = pod.fit(&mut turn).await {
        tracing::warn!(
            error = chain(&error),
            "a container's room is not taken back"
        );
    }
}

impl Pod {
    /// Changes a container's limits.
    ///
    /// # Errors
    ///
    /// `Spec` for resources that are none; `TooLarge` and `NotGrown` for memory the
    /// machine cannot have; `NoVcpus`; the guest's refusal. The limits are as before then.
    /// Those of [`Sandbox::resize`] for a machine that does not shrink: the limits are the new
    /// ones, and whoever asks for them again has it shrink again.
    pub async fn update(&self, id: &str, json: &[u8]) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let resources = container.parse_resources(json)?;
        let mut turn = self.resizing.lock().await;
        let before = container.limits();
        let after = before.updated_by(&resources);
        let more = before.or_more(after);
        let change = async {
            if more != before {
                self.allow(&mut turn, &container, more).await?;
            }
            container.update(&resources).await
        };
        let result = change.await;
        let limits = if result.is_ok() { after } else { before };
        if container.limits() == limits && !turn.is_unfit {
            return result;
        }
        let fitted = self.allow(&mut turn, &container, limits).await;
        result.and(fitted)
    }

    /// Changes what is around a container to what it may use now.
    async fn allow(
        &self,
        turn: &mut MutexGuard<'_, Turn>,
        container: &Container,
        limits: Limits,
    ) -> Result<(), TaskError> {
        container.set_limits(limits);
        self.fit(turn).await
    }

    /// Makes room for a container that joins a booted machine.
    ///
    /// # Errors
    ///
    /// Those of [`Sandbox::resize`].
    pub(super) async fn make_room(
        self: &Arc<Self>,
        container: &Container,
    ) -> Result<(), TaskError> {
        let mut turn = self.resizing.lock().await;
        self.count(container, true);
        let fitted = self.fit(&mut turn).await;
        if fitted.is_err() {
            self.count(container, false);
            // Of what it was to have, the machine may have got a part.
            tokio::spawn(take_room(self.clone()));
        }
        fitted
    }

    /// Whether a container that is being created counts for the pod's size.
    pub(super) fn count(&self, container: &Container, counts: bool) {
        let mut containers = lock(&self.containers);
        if let Some(Entry::Creating(creation)) = containers.get_mut(&container.config().id) {
            let counts = counts && !container.is_sandbox();
            creation.limits = counts.then(|| Box::new(container.limits()));
        }
    }

    /// Makes the machine and the host's limits what the containers may use
    /// together, those that are being created among them.
    async fn fit(&self, turn: &mut MutexGuard<'_, Turn>) -> Result<(), TaskError> {
        let booted = self
            .sandbox
            .get()
            .filter(|sandbox| sandbox.agent().is_some());
        let Some(sandbox) = booted else {
            return Ok(());
        };
        let limits = lock(&self.containers)
            .values()
            .filter_map(Entry::limits)
            .collect::<Vec<_>>();
        let wanted = Wanted {
            memory_mib: self.host.memory_of(&limits),
            vcpus: self.host.vcpus_of(&limits),
        };
        let limit = |memory_mib| self.host.set_limits(&limits, memory_mib).boxed();
        turn.is_unfit = true;
        let resized = sandbox.resize(wanted, limit).await;
        turn.is_unfit = resized.is_err();
        // It may have come a part of the way.
        self.host.note_vcpus(sandbox.vcpus());
        Ok(resized?)
    }
}
