//! The network cards of a running machine, which follow the pod's network namespace.
//!
//! ```text
//! something has changed there -> look
//!   an interface is gone:         the guest lets go of its card, which is taken out
//!   one was gone meanwhile:       joined to its tap again
//!   one is up that has no card:   joined to a tap, a card put in
//!   else what the guest has
//!   differs from what it should:  the agent is told
//! ```
//! So an interface that a plugin adds to a running pod comes with its addresses, routes,
//! rules and neighbours, whichever it gets when, and goes when the plugin takes it away.
//! It comes when it is up, as plugins rename before that.
//!
//! What the guest does not do of what it is told is in doubt: it is told all again, a second
//! later and then more and more seldom, and all that it may have and should not is taken
//! away from it. What it says and how often is its own affair, so only the first of several
//! refusals of what it is told is a line in the log. Of cards that are put in and taken out each
//! is: there are no more of those than interfaces come and go.
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

use nacre_protocol::agent::{Interface, NetworkConfig, RemoveCardRequest, UpdateNetworkRequest};
use nacre_protocol::agent_ttrpc::AgentClient;
use nacre_protocol::vm::slot_address;
use tracing::{debug, info, warn};

use super::{SandboxError, blocking};
use crate::error::chain;
use crate::machine::Machine;
use crate::network::follow::{self, Changes, forget, lack, surplus};
use crate::network::{self, HostNic, Link, NetworkError, PodNetwork, Seen};
use crate::task::agent_message;

/// Time the guest has to let go of a card, or to be told what has changed.
const GUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Until what it did not do is tried again, the first time;
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// each time twice as long, but no longer than this.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A machine's cards and what its guest knows of them.
#[derive(Debug)]
pub struct Cards {
    cards: Vec<Card>,
    /// What the guest has,
    given: NetworkConfig,
    /// and what it may have, which is more after it refused something.
    possible: NetworkConfig,
    /// Interfaces that the machine does not get.
    others: HashSet<String>,
}

#[derive(Debug)]
struct Card {
    /// Of the interface it stands for.
    index: u32,
    /// On bus 0.
    slot: u8,
    /// That it was made with.
    mtu: u16,
    /// Whether it is known that its interface's is larger by now.
    is_outgrown: bool,
}

impl Card {
    fn new(nic: &HostNic, slot: u8) -> Self {
        Self {
            index: nic.index,
            slot,
            mtu: nic.mtu,
            is_outgrown: false,
        }
    }

    /// Has the guest's interface have no larger MTU than the card, which its kernel would
    /// refuse (virtio 1.2, 5.1.4.2).
    fn bound(&mut self, interface: &mut Interface) {
        let most = u32::from(self.mtu);
        if interface.mtu > most && !self.is_outgrown {
            let (name, mtu) = (&interface.name, interface.mtu);
            warn!(name, mtu, most, "the guest's network card keeps its MTU");
            self.is_outgrown = true;
        }
        interface.mtu = interface.mtu.min(most);
    }
}

impl Cards {
    /// Those of a machine that boots with `network`, in slots from `first_slot` on.
    pub fn new(network: PodNetwork, first_slot: u8) -> Self {
        let nics = network.nics.iter().zip(first_slot..=u8::MAX);
        let cards: Vec<_> = nics.map(|(nic, slot)| Card::new(nic, slot)).collect();
        let mut given = network.config;
        for (interface, card) in given.interfaces.iter_mut().zip(&cards) {
            interface.card = slot_address(card.slot);
        }
        let possible = given.clone();
        Self {
            cards,
            given,
            possible,
            others: network.others.into_iter().collect(),
        }
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
    fn wanted(&mut self, seen: Seen) -> NetworkConfig {
        let mut wanted = seen.config;
        for (interface, link) in wanted.interfaces.iter_mut().zip(&seen.links) {
            let mut cards = self.cards.iter_mut();
            if let Some(card) = cards.find(|card| card.index == link.index) {
                interface.card = slot_address(card.slot);
                card.bound(interface);
            }
        }
        wanted.interfaces.retain(|one| !one.card.is_empty());
        let names = wanted.interfaces.iter().map(|one| one.name.clone());
        let names: HashSet<String> = names.collect();
        wanted.routes.retain(|one| names.contains(&one.device));
        wanted.neighbors.retain(|one| names.contains(&one.device));
        wanted
    }

    /// The guest is told to have `added` as well: until it says that it has, it may have any
    /// part of it, and of what it had.
    fn doubt(&mut self, added: &NetworkConfig) {
        follow::join(&mut self.possible, added);
        self.given = NetworkConfig::default();
    }

    /// It has this.
    fn trust(&mut self, config: NetworkConfig) {
        self.possible.clone_from(&config);
        self.given = config;
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
        let mut complained = Complained {
            others: std::mem::take(&mut self.cards.others),
            refused: HashSet::new(),
        };
        let mut pause = None;
        let changes = loop {
            let netns = self.netns.clone();
            match blocking(move || Changes::of(&netns)).await {
                Ok(changes) => break changes,
                Err(error) => pause = Some(behind(&error.into(), pause)),
            }
            tokio::time::sleep(pause.unwrap_or_default()).await;
        };
        loop {
            pause = match self.catch_up(&mut complained).await {
                Ok(()) => None,
                Err(error) => Some(behind(&error, pause)),
            };
            tokio::select! {
                heard = changes.next() => heard.map_err(|source| NetworkError::System {
                    action: "hear of changes of the pod's network",
                    source,
                })?,
                () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => (),
            }
        }
    }

    async fn catch_up(&mut self, complained: &mut Complained) -> Result<(), SandboxError> {
        let netns = self.netns.clone();
        let seen = blocking(move || network::look(&netns)).await?;
        complained.of(&seen);
        if self.take_out(&seen).await {
            complained.refused.clear();
        }
        let rejoined = self.rejoin(&seen).await;
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
        let told = self.tell(seen).await;
        rejoined.and(told)
    }

    /// Joins interfaces to their cards that are no more.
    async fn rejoin(&self, seen: &Seen) -> Result<(), SandboxError> {
        let parted = |link: &&Link| self.cards.has(link) && !link.is_joined;
        for link in seen.links.iter().filter(parted) {
            let (netns, parted) = (self.netns.clone(), link.clone());
            blocking(move || network::rejoin(&netns, &parted)).await?;
            info!(interface = link.name, "joined to its card again");
        }
        Ok(())
    }

    /// Takes out the cards of interfaces that are gone; whether there were some.
    async fn take_out(&mut self, seen: &Seen) -> bool {
        let is_there = |card: &Card| seen.links.iter().any(|link| link.index == card.index);
        let cards = std::mem::take(&mut self.cards.cards);
        let (kept, gone): (_, Vec<Card>) = cards.into_iter().partition(is_there);
        self.cards.cards = kept;
        let is_any = !gone.is_empty();
        for Card { slot, .. } in gone {
            let card = slot_address(slot);
            forget(&mut self.cards.given, &card);
            forget(&mut self.cards.possible, &card);
            let request = RemoveCardRequest {
                card: card.clone(),
                ..Default::default()
            };
            let context = ttrpc::context::with_duration(GUEST_TIMEOUT);
            let let_go = self.agent.remove_card(context, &request).await;
            if let Err(error) = &let_go {
                let error = agent_message(error);
                warn!(card, error, "the guest does not let go of its network card");
            }
            match self.machine.remove_nic(slot, let_go.is_ok()).await {
                Ok(()) => info!(card, "network card taken out"),
                Err(error) => warn!(card, error = chain(&error), "network card not taken out"),
            }
        }
        is_any
    }

    async fn put_in(&mut self, link: &Link) -> Result<(), SandboxError> {
        let (netns, queues) = (self.netns.clone(), self.queues);
        let joined = link.clone();
        let nic = blocking(move || network::join(&netns, &joined, queues)).await?;
        match self.machine.add_nic(&nic).await {
            Ok(slot) => {
                info!(interface = link.name, slot, "network card put in");
                self.cards.cards.push(Card::new(&nic, slot));
                Ok(())
            }
            Err(error) => {
                let (netns, parted) = (self.netns.clone(), link.clone());
                if let Err(error) = blocking(move || network::part(&netns, &parted)).await {
                    let (interface, error) = (&link.name, chain(&error));
                    warn!(interface, error, "frames to an interface are lost");
                }
                Err(error.into())
            }
        }
    }

    /// Tells the agent what has changed.
    async fn tell(&mut self, seen: Seen) -> Result<(), SandboxError> {
        let wanted = self.cards.wanted(seen);
        let removed = surplus(&self.cards.possible, &wanted);
        let added = lack(&self.cards.given, &wanted);
        let nothing = NetworkConfig::default();
        if removed == nothing && added == nothing {
            return Ok(());
        }
        self.cards.doubt(&added);
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
        self.cards.trust(wanted);
        Ok(())
    }
}

/// Says that the guest's network is not as the pod's, after a pause since the last failure if
/// that was one, too; how long the next one is.
fn behind(error: &SandboxError, pause: Option<Duration>) -> Duration {
    let error = chain(error);
    match pause {
        None => {
            warn!(
                error,
                "the guest's network is not as the pod's; tried again"
            );
            FIRST_PAUSE
        }
        Some(pause) => {
            debug!(error, "the guest's network is still not as the pod's");
            (pause * 2).min(LONGEST_PAUSE)
        }
    }
}

/// What was said once already.
struct Complained {
    /// Interfaces no machine gets.
    others: HashSet<String>,
    /// Those that this one did not get, by their indices, as long as they are up and it has no
    /// more room than then.
    refused: HashSet<u32>,
}

impl Complained {
    fn of(&mut self, seen: &Seen) {
        let new = seen.others.iter();
        network::complain(new.filter(|other| !self.others.contains(*other)));
        self.others = seen.others.iter().cloned().collect();
        let is_up = |index: &u32| {
            let mut links = seen.links.iter();
            links.any(|link| link.index == *index && link.is_up)
        };
        self.refused.retain(is_up);
    }
}

#[cfg(test)]
mod tests;
