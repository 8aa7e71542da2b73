//! What a pod's machine has of its network namespace: cards that follow it, and the
//! loopback.

use std::sync::Arc;

use tracing::warn;

use super::super::cards::{Cards, Follower};
use super::super::{Sandbox, SandboxError, blocking};
use super::VmHost;
use super::netns::NetNs;
use crate::error::chain;
use crate::machine::VmMachine;
use crate::network::loopback::{self, Loopback};
use crate::network::{self, PodNetwork};

impl VmHost {
    /// Joins what is in the namespace now to taps.
    pub(super) async fn join_network(&self, netns: &NetNs) -> Result<PodNetwork, SandboxError> {
        let netns = netns.another()?;
        let queues = self.config.net_queues;
        Ok(blocking(move || network::prepare(&netns, queues)).await?)
    }

    /// Has the cards of a machine that has booted follow the namespace from now on.
    pub(super) async fn follow(
        &self,
        netns: NetNs,
        machine: Arc<VmMachine>,
        sandbox: &Sandbox,
        cards: Cards,
    ) -> Result<(), SandboxError> {
        let netns = blocking(move || network::unmounted(&netns.file)).await?;
        let follower = Follower {
            netns: Arc::new(netns),
            queues: self.config.net_queues,
            machine,
            agent: sandbox.agent().ok_or(SandboxError::Stopped)?.clone(),
            cards,
        };
        tokio::spawn(follower.follow());
        Ok(())
    }
}

/// A host that cannot do this has pods without port-forward.
pub(super) async fn listen(netns: &NetNs) -> Result<Option<Loopback>, SandboxError> {
    let netns = netns.another()?;
    let listening = blocking(move || loopback::listen(&netns)).await;
    Ok(listening
        .inspect_err(|error| {
            warn!(
                error = chain(error),
                "no port-forward to the pod's loopback"
            );
        })
        .ok())
}
