//! The network cards of a running machine, which follow the pod's network namespace.
//!
//! ```text
//! something has changed there -> look
//!   an interface is gone:         the guest lets go of its card, which is taken out
//!   one is up that has no card:   joined to a tap, a card put in
//!   else what the guest has
//!   differs from what it should:  the agent is told
//! ```
//! So an interface that a plugin adds to a running pod comes with its addresses, routes,
//! rules and neighbours, whichever it gets when, and goes when the plugin takes it away.
//! It comes when it is up, as plugins rename before that.
//!
//! Cards are put in at bus 0, where nothing tells the guest; it looks there when the
//! agent is told of an interface whose card it does not know. The guest's own hot-plug
//! would take a root port for each card there may ever be, found and driven at every
//! boot, and so would empty cards; this takes nothing before a card comes, and there may
//! be as many as the bus has slots.

use std::collections::HashSet;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use nacre_protocol::agent::{NetworkConfig, RemoveCardRequest, UpdateNetworkRequest};
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::vm::slot_address;
use tracing::{info, warn};

use super::{SandboxError, blocking};
use crate::error::chain;
use crate::machine::Machine;
use crate::network::follow::{Changes, difference, forget};
use crate::network::{self, Link, NetworkError, PodNetwork, Seen};
use crate::task::agent_message;

/// Time the guest has to let go of a card, or to be told what has changed.
const GUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// A machine's cards and what its guest knows of them.
#[derive(Debug)]
pub struct Cards {
    cards: Vec<Card>,
    given: NetworkConfig,
}

#[derive(Debug)]
struct Card {
    /// Of the interface it stands for.
    index: u32,
    /// On bus 0.
    slot: u8,
}

impl Cards {
    /// Those of a machine that boots with `network`, in slots from `first_slot` on.
    pub fn new(network: PodNetwork, first_slot: u8) -> Self {
        let indices = network.nics.iter().map(|nic| nic.index);
        let cards = indices
            .zip(first_slot..=u8::MAX)
            .map(|(index, slot)| Card { index, slot });
        let cards: Vec<_> = cards.collect();
        let mut given = network.config;
        for (interface, card) in given.interfaces.iter_mut().zip(&cards) {
            interface.card = slot_address(card.slot);
        }
        Self { cards, given }
    }

    /// What the guest is to be given first.
    pub fn given(&self) -> &NetworkConfig {
        &self.given
    }

    fn has(&self, link: &Link) -> bool {
        self.cards.iter().any(|card| card.index == link.index)
    }

    /// What the guest should have of `seen`: all of the interfaces with cards, and the
    /// rules.
    fn wanted(&self, seen: Seen) -> NetworkConfig {
        let mut wanted = seen.config;
        for (interface, link) in wanted.interfaces.iter_mut().zip(&seen.links) {
            let card = self.cards.iter().find(|card| card.index == link.index);
            interface.card = card.map_or_else(String::new, |card| slot_address(card.slot));
        }
        wanted.interfaces.retain(|one| !one.card.is_empty());
        let names = wanted.interfaces.iter().map(|one| one.name.clone());
        let names: HashSet<String> = names.collect();
        wanted.routes.retain(|one| names.contains(&one.device));
        wanted.neighbors.retain(|one| names.contains(&one.device));
        wanted
    }
}

/// What keeps a running machine's cards in step.
pub struct Follower {
    /// The pod's namespace.
    pub netns: Arc<File>,
    /// Queue pairs of a card.
    pub queues: u16,
    /// The machine,
    pub machine: Arc<dyn Machine>,
    /// its agent,
    pub agent: AgentClient,
    /// and what both have now.
    pub cards: Cards,
}

impl Follower {
    /// Follows the namespace until the machine is dead. What goes wrong is logged.
    pub async fn follow(mut self) {
        let machine = self.machine.clone();
        let kept_up = tokio::select! {
            kept_up = self.keep_up() => kept_up,
            _ = machine.stopped() => return,
        };
        if let Err(error) = kept_up {
            let error = chain(&error);
            warn!(error, "changes of the pod's network do not reach the guest");
        }
    }

    async fn keep_up(&mut self) -> Result<(), NetworkError> {
        let changes = Changes::of(&self.netns)?;
        let mut complained = Complained::default();
        loop {
            if let Err(error) = self.catch_up(&mut complained).await {
                let error = chain(&error);
                warn!(error, "the guest's network is not as the pod's");
            }
            changes
                .next()
                .await
                .map_err(|source| NetworkError::System {
                    action: "hear of changes of the pod's network",
                    source,
                })?;
        }
    }

    async fn catch_up(&mut self, complained: &mut Complained) -> Result<(), SandboxError> {
        let netns = self.netns.clone();
        let seen = blocking(move || network::look(&netns)).await?;
        complained.of(&seen);
        self.take_out(&seen).await;
        for link in &seen.links {
            // One that was refused is not tried again at its own tap's coming and going.
            let is_new = !self.cards.has(link) && !complained.refused.contains(&link.index);
            if link.is_up
                && is_new
                && let Err(error) = self.put_in(link).await
            {
                let (interface, error) = (&link.name, chain(&error));
                warn!(interface, error, "the guest does not get an interface");
                complained.refused.insert(link.index);
            }
        }
        self.tell(seen).await
    }

    async fn take_out(&mut self, seen: &Seen) {
        let is_there = |card: &Card| seen.links.iter().any(|link| link.index == card.index);
        let cards = std::mem::take(&mut self.cards.cards);
        let (kept, gone): (_, Vec<Card>) = cards.into_iter().partition(is_there);
        self.cards.cards = kept;
        for Card { slot, .. } in gone {
            let card = slot_address(slot);
            forget(&mut self.cards.given, &card);
            let request = RemoveCardRequest {
                card: card.clone(),
                ..Default::default()
            };
            let context = ttrpc::context::with_duration(GUEST_TIMEOUT);
            if let Err(error) = self.agent.remove_card(context, &request).await {
                let error = agent_message(&error);
                warn!(card, error, "the guest does not let go of its network card");
            }
            match self.machine.remove_nic(slot).await {
                Ok(()) => info!(card, "network card taken out"),
                Err(error) => warn!(card, error = chain(&error), "network card not taken out"),
            }
        }
    }

    async fn put_in(&mut self, link: &Link) -> Result<(), SandboxError> {
        let (netns, queues) = (self.netns.clone(), self.queues);
        let joined = link.clone();
        let nic = blocking(move || network::join(&netns, &joined, queues)).await?;
        let slot = self.machine.add_nic(&nic).await?;
        info!(interface = link.name, slot, "network card put in");
        let index = link.index;
        self.cards.cards.push(Card { index, slot });
        Ok(())
    }

    /// Tells the agent what has changed. What it does not take, it is told again with
    /// the next change.
    async fn tell(&mut self, seen: Seen) -> Result<(), SandboxError> {
        let wanted = self.cards.wanted(seen);
        let (removed, added) = difference(&self.cards.given, &wanted);
        let nothing = NetworkConfig::default();
        if removed == nothing && added == nothing {
            return Ok(());
        }
        let request = UpdateNetworkRequest {
            removed: Some(removed).into(),
            added: Some(added).into(),
            ..Default::default()
        };
        let context = ttrpc::context::with_duration(GUEST_TIMEOUT);
        let told = self.agent.update_network(context, &request).await;
        told.map_err(|answer| SandboxError::Agent {
            what: "change the network",
            answer,
        })?;
        self.cards.given = wanted;
        Ok(())
    }
}

/// What was said once already.
#[derive(Default)]
struct Complained {
    /// Interfaces no machine gets.
    others: HashSet<String>,
    /// Those that this one did not get, by their indices, which are not used again.
    refused: HashSet<u32>,
}

impl Complained {
    fn of(&mut self, seen: &Seen) {
        let new = seen.others.iter();
        network::complain(new.filter(|other| !self.others.contains(*other)));
        self.others = seen.others.iter().cloned().collect();
    }
}

#[cfg(test)]
mod tests;
