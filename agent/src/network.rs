//! The guest's network, as the shim found it in the pod's namespace, and what has
//! changed there since.
//!
//! Interfaces are found by their cards, whose places on the PCI bus both sides know. IPv6
//! addresses are set without duplicate address detection: the host's interface
//! has done it, and a tentative address would refuse connections for a second.
//!
//! What cannot be done does not keep the rest from being done.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use futures::TryStreamExt;
use nacre_protocol::agent::{Interface, Neighbor, NetworkConfig, Route, Rule};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::route::{RouteMessage, RouteScope};
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};

use crate::error::{Context, Error, Result};

mod card;
mod first;
mod rules;

use card::Card;
use first::FirstError;

const SYS: &str = "/sys";

/// A connection to the kernel's routing tables.
pub struct Network {
    handle: Handle,
    /// Indices by interface name, kept over the calls of one configuration.
    indices: HashMap<String, u32>,
}

/// Has the guest let go of a network card.
///
/// # Errors
///
/// `InvalidArgument` for what is no PCI address, else what the kernel says.
pub async fn remove_card(address: &str) -> Result<()> {
    card::remove(Path::new(SYS), address).await
}

impl Network {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Those of socket(2).
    pub fn connect() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().context("netlink socket")?;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            indices: HashMap::new(),
        })
    }

    /// Sets everything up, in the order in which things refer to each other.
    ///
    /// # Errors
    ///
    /// The first of several: `InvalidArgument` for addresses that do not parse, `NotFound` for
    /// interfaces that do not exist, else what the kernel says.
    pub async fn configure(&mut self, config: &NetworkConfig) -> Result<()> {
        let mut first = FirstError::default();
        let mut cards = Vec::new();
        for interface in &config.interfaces {
            let card = card::find(Path::new(SYS), &interface.card).await;
            cards.extend(first.of(card).map(|card| (interface, card)));
        }
        for (card, name) in in_the_way(&cards) {
            let link = LinkUnspec::new_with_index(card.index).name(name);
            let request = self.handle.link().set(link.build());
            first.of(netlink(request.execute().await, || {
                format!("interface {}", card.name)
            }));
        }
        for (interface, card) in &cards {
            first.of(self.set_interface(interface, card).await);
            for address in &interface.addresses {
                first.of(self.add_address(card.index, address).await);
            }
        }
        let (on_link, by_gateway) = by_dependence(&config.routes);
        for route in on_link.into_iter().chain(by_gateway) {
            first.of(self.add_route(route).await);
        }
        for rule in &config.rules {
            first.of(self.add_rule(rule).await);
        }
        for neighbor in &config.neighbors {
            first.of(self.add_neighbor(neighbor).await);
        }
        first.result()
    }

    /// Takes away what is `removed`, and sets up what is `added`.
    ///
    /// # Errors
    ///
    /// Those of [`Self::configure`].
    pub async fn update(&mut self, removed: &NetworkConfig, added: &NetworkConfig) -> Result<()> {
        let mut first = FirstError::default();
        first.of(self.take_away(removed).await);
        first.of(self.configure(added).await);
        first.result()
    }

    /// Takes away what is there of it, in the reverse order. Of interfaces that is
    /// their addresses.
    ///
    /// # Errors
    ///
    /// Those of [`Self::configure`], but not that something is gone.
    async fn take_away(&mut self, config: &NetworkConfig) -> Result<()> {
        let mut first = FirstError::default();
        for neighbor in &config.neighbors {
            first.of(unless_gone(self.remove_neighbor(neighbor).await));
        }
        for rule in &config.rules {
            first.of(unless_gone(self.remove_rule(rule).await));
        }
        let (on_link, by_gateway) = by_dependence(&config.routes);
        for route in by_gateway.into_iter().chain(on_link) {
            first.of(unless_gone(self.remove_route(route).await));
        }
        for interface in &config.interfaces {
            for address in &interface.addresses {
                first.of(unless_gone(
                    self.remove_address(&interface.card, address).await,
                ));
            }
        }
        first.result()
    }

    async fn set_interface(&mut self, interface: &Interface, card: &Card) -> Result<()> {
        let mac = parse_mac(&interface.mac)?;
        let index = card.index;
        let mut link = LinkUnspec::new_with_index(index);
        if card.mac != interface.mac {
            link = link.address(mac.into());
        }
        if !interface.name.is_empty() {
            link = link.name(&interface.name);
            self.indices.insert(interface.name.clone(), index);
        }
        if interface.mtu != 0 {
            link = link.mtu(interface.mtu);
        }
        let what = || format!("interface {} ({})", interface.name, interface.card);
        let request = self.handle.link().set(link.up().build());
        netlink(request.execute().await, what)
    }

    async fn add_address(&self, index: u32, address: &str) -> Result<()> {
        let (ip, prefix) = parse_cidr(address)?;
        let mut request = self.handle.address().add(index, ip, prefix).replace();
        if ip.is_ipv6() {
            let message = request.message_mut();
            message.header.flags |= AddressHeaderFlags::Nodad;
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        netlink(request.execute().await, || format!("address {address}"))
    }

    async fn remove_address(&self, card: &str, address: &str) -> Result<()> {
        let Some(card) = card::look(Path::new(SYS), card)? else {
            return Ok(());
        };
        let (ip, prefix) = parse_cidr(address)?;
        let addresses = self.handle.address();
        let message = addresses.add(card.index, ip, prefix).message_mut().clone();
        let request = addresses.del(message);
        netlink(request.execute().await, || format!("address {address}"))
    }

    async fn index_by_name(&mut self, name: &str) -> Result<u32> {
        if let Some(index) = self.indices.get(name) {
            return Ok(*index);
        }
        let mut links = self.handle.link().get().match_name(name).execute();
        let link = netlink(links.try_next().await, || format!("interface {name}"))?;
        let link = link.ok_or_else(|| Error::NotFound(format!("interface {name}")))?;
        self.indices.insert(name.to_owned(), link.header.index);
        Ok(link.header.index)
    }

    async fn add_route(&mut self, route: &Route) -> Result<()> {
        let message = self.route_message(route).await?;
        // The kernel has made the routes of the addresses' prefixes itself.
        let request = self.handle.route().add(message).replace();
        netlink(request.execute().await, || route_text(route))
    }

    async fn remove_route(&mut self, route: &Route) -> Result<()> {
        let message = self.route_message(route).await?;
        let request = self.handle.route().del(message);
        netlink(request.execute().await, || route_text(route))
    }

    async fn route_message(&mut self, route: &Route) -> Result<RouteMessage> {
        let index = match route.device.as_str() {
            "" => None,
            name => Some(self.index_by_name(name).await?),
        };
        route_message(route, index)
    }

    async fn add_rule(&self, rule: &Rule) -> Result<()> {
        let mut request = self.handle.rule().add();
        *request.message_mut() = rules::message(rule)?;
        let added = netlink(request.execute().await, || rule_text(rule));
        match added {
            Err(error) if error.has_errno(&[libc::EEXIST]) => Ok(()),
            added => added,
        }
    }

    async fn remove_rule(&self, rule: &Rule) -> Result<()> {
        let request = self.handle.rule().del(rules::message(rule)?);
        netlink(request.execute().await, || rule_text(rule))
    }

    async fn add_neighbor(&mut self, neighbor: &Neighbor) -> Result<()> {
        let address: IpAddr = parse_ip(&neighbor.address)?;
        let mac = parse_mac(&neighbor.mac)?;
        let index = self.index_by_name(&neighbor.device).await?;
        let request = self
            .handle
            .neighbours()
            .add(index, address)
            .link_layer_address(&mac)
            .replace();
        netlink(request.execute().await, || format!("neighbour {address}"))
    }

    async fn remove_neighbor(&mut self, neighbor: &Neighbor) -> Result<()> {
        let address: IpAddr = parse_ip(&neighbor.address)?;
        let index = self.index_by_name(&neighbor.device).await?;
        let neighbors = self.handle.neighbours();
        let message = neighbors.add(index, address).message_mut().clone();
        let request = neighbors.del(message);
        netlink(request.execute().await, || format!("neighbour {address}"))
    }
}

/// Cards that have the name another is to get, for the kernel has named them as it
/// found them, and other names for them.
fn in_the_way<'a>(cards: &'a [(&Interface, Card)]) -> impl Iterator<Item = (&'a Card, String)> {
    cards.iter().filter_map(move |(interface, card)| {
        let mut others = cards.iter().filter(|(one, _)| one.card != interface.card);
        let is_wanted = others.any(|(other, _)| other.name == card.name);
        is_wanted.then(|| (card, format!("card{}", card.index)))
    })
}

/// Routes on link, and those through gateways, which are reached by the former.
fn by_dependence(routes: &[Route]) -> (Vec<&Route>, Vec<&Route>) {
    routes.iter().partition(|route| route.gateway.is_empty())
}

/// Of what is to be taken away it is no error that it is not there.
fn unless_gone(result: Result<()>) -> Result<()> {
    const GONE: [libc::c_int; 4] = [libc::ENODEV, libc::ENOENT, libc::ESRCH, libc::EADDRNOTAVAIL];
    match result {
        Err(Error::NotFound(_)) => Ok(()),
        Err(error) if error.has_errno(&GONE) => Ok(()),
        result => result,
    }
}

fn route_text(route: &Route) -> String {
    let destination = match route.destination.as_str() {
        "" => "default",
        destination => destination,
    };
    format!(
        "route {destination} via {:?} dev {}",
        route.gateway, route.device
    )
}

fn rule_text(rule: &Rule) -> String {
    format!("rule {} to table {}", rule.priority, rule.table)
}

fn netlink<T, D: std::fmt::Display>(
    result: std::result::Result<T, rtnetlink::Error>,
    what: impl FnOnce() -> D,
) -> Result<T> {
    result.map_err(|error| match error {
        rtnetlink::Error::NetlinkError(message) => Error::Io {
            what: what().to_string(),
            source: message.to_io(),
        },
        other => Error::Internal(format!("{}: {other}", what())),
    })
}

fn route_message(route: &Route, device: Option<u32>) -> Result<RouteMessage> {
    let invalid = |error: &dyn std::fmt::Display| Error::InvalidArgument(format!("route: {error}"));
    let (destination, prefix) = match route.destination.as_str() {
        "" if is_ipv6(route) => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0),
        "" => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        cidr => parse_cidr(cidr)?,
    };
    let scope = u8::try_from(route.scope).map_err(|error| invalid(&error))?;
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination, prefix)
        .map_err(|error| invalid(&error))?
        .scope(RouteScope::from(scope));
    if !route.gateway.is_empty() {
        let gateway = parse_ip(&route.gateway)?;
        builder = builder.gateway(gateway).map_err(|error| invalid(&error))?;
    }
    if !route.source.is_empty() {
        let source = parse_ip(&route.source)?;
        builder = builder
            .pref_source(source)
            .map_err(|error| invalid(&error))?;
    }
    if let Some(index) = device {
        builder = builder.output_interface(index);
    }
    if route.table != 0 {
        builder = builder.table_id(route.table);
    }
    if route.metric != 0 {
        builder = builder.priority(route.metric);
    }
    Ok(builder.build())
}

fn is_ipv6(route: &Route) -> bool {
    route.ipv6 || route.gateway.contains(':')
}

fn parse_ip(text: &str) -> Result<IpAddr> {
    text.parse()
        .map_err(|_| Error::InvalidArgument(format!("IP address {text:?}")))
}

/// "10.88.0.5/16"; without a slash, the one address.
fn parse_cidr(text: &str) -> Result<(IpAddr, u8)> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address = parse_ip(address)?;
    let max = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix
        .map_or(Ok(max), str::parse)
        .ok()
        .filter(|prefix| *prefix <= max);
    let prefix = prefix.ok_or_else(|| Error::InvalidArgument(format!("CIDR {text:?}")))?;
    Ok((address, prefix))
}

fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| Error::InvalidArgument(format!("MAC address {text:?}")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use netlink_packet_route::AddressFamily;
    use netlink_packet_route::route::RouteAttribute;

    #[test]
    fn addresses() {
        assert_eq!(parse_mac("02:00:00:00:00:0a").unwrap(), [2, 0, 0, 0, 0, 10]);
        assert!(parse_mac("02:00").is_err() && parse_mac("").is_err());
        assert_eq!(
            parse_cidr("10.88.0.5/16").unwrap(),
            ("10.88.0.5".parse().unwrap(), 16)
        );
        assert_eq!(parse_cidr("fd00::1").unwrap().1, 128);
        assert!(parse_cidr("10.0.0.1/33").is_err() && parse_cidr("x/1").is_err());
    }

    #[test]
    fn default_routes_of_both_families() {
        let route = |gateway: &str| Route {
            gateway: gateway.into(),
            ..Route::default()
        };
        let v4 = route_message(&route("10.88.0.1"), Some(2)).unwrap();
        assert_eq!(v4.header.address_family, AddressFamily::Inet);
        assert_eq!(v4.header.destination_prefix_length, 0);
        assert!(v4.attributes.contains(&RouteAttribute::Oif(2)));
        let v6 = route_message(&route("fe80::1"), Some(2)).unwrap();
        assert_eq!(v6.header.address_family, AddressFamily::Inet6);
    }

    #[test]
    fn table_scope_source_and_metric() {
        let route = Route {
            destination: "10.1.0.0/24".into(),
            source: "10.1.0.7".into(),
            scope: 253,
            table: 1000,
            metric: 50,
            ..Route::default()
        };
        let message = route_message(&route, None).unwrap();
        assert_eq!(message.header.scope, RouteScope::Link);
        assert!(message.attributes.contains(&RouteAttribute::Table(1000)));
        assert!(message.attributes.contains(&RouteAttribute::Priority(50)));
    }

    #[test]
    fn cards_get_out_of_each_other_s_way() {
        let interface = |card: &str, name: &str| Interface {
            card: card.into(),
            name: name.into(),
            ..Interface::default()
        };
        let card = |index, name: &str| Card {
            index,
            name: name.into(),
            mac: String::new(),
        };
        let interfaces = [
            interface("3", "net1"),
            interface("4", "eth1"),
            interface("5", "eth0"),
        ];
        let cards = [card(2, "eth0"), card(3, "eth1"), card(4, "eth2")];
        let cards: Vec<_> = interfaces.iter().zip(cards).collect();
        let moved = in_the_way(&cards);
        let moved: Vec<_> = moved.map(|(card, name)| (card.index, name)).collect();
        assert_eq!(moved, [(2, "card2".to_owned())]);
    }

    #[test]
    fn what_is_gone_need_not_be_taken_away() {
        let failed = |errno| -> Result<()> {
            let failed: std::io::Result<()> = Err(std::io::Error::from_raw_os_error(errno));
            failed.context("route")
        };
        assert!(unless_gone(failed(libc::ESRCH)).is_ok());
        assert!(unless_gone(Err(Error::NotFound("interface".into()))).is_ok());
        assert!(unless_gone(failed(libc::EPERM)).is_err());
    }

    /// In a network namespace of its own.
    #[test]
    fn what_cannot_be_done_keeps_nothing_from_being_done() {
        let worker = std::thread::spawn(|| {
            if let Err(errno) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
                eprintln!("skipped: no network namespace: {errno}");
                return;
            }
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build().unwrap();
            runtime.block_on(half_of_what_is_told_can_be_done());
        });
        worker.join().unwrap();
    }

    async fn half_of_what_is_told_can_be_done() {
        let mut network = Network::connect().unwrap();
        let rule = Rule {
            priority: 700,
            table: 300,
            action: 1,
            ..Rule::default()
        };
        let config = NetworkConfig {
            routes: vec![Route {
                device: "none".into(),
                ..Route::default()
            }],
            rules: vec![rule],
            neighbors: vec![Neighbor {
                address: "nowhere".into(),
                ..Neighbor::default()
            }],
            ..NetworkConfig::default()
        };
        let error = network.configure(&config).await.unwrap_err().full();
        assert!(error.contains("interface none"), "the first: {error}");
        assert!(has_rule(&network, 700).await);
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = Arc::new(file.reopen().unwrap());
        let subscriber = tracing_subscriber::fmt().with_writer(log).finish();
        let logging = tracing::subscriber::set_default(subscriber);
        let error = network.update(&config, &config).await;
        drop(logging);
        let error = error.unwrap_err().full();
        assert!(error.contains("nowhere"), "of what was removed: {error}");
        let log = std::fs::read_to_string(file.path()).unwrap();
        assert!(log.contains("interface none"), "of what was added: {log}");
        assert!(has_rule(&network, 700).await, "taken away and added again");
        network.take_away(&config).await.unwrap_err();
        assert!(!has_rule(&network, 700).await);
    }

    async fn has_rule(network: &Network, priority: u32) -> bool {
        let rules = network.handle.rule().get(rtnetlink::IpVersion::V4);
        let rules: Vec<_> = rules.execute().try_collect().await.unwrap();
        let wanted = netlink_packet_route::rule::RuleAttribute::Priority(priority);
        rules.iter().any(|rule| rule.attributes.contains(&wanted))
    }

    #[test]
    fn mixed_families_are_refused() {
        let route = Route {
            destination: "10.1.0.0/24".into(),
            source: "fd00::1".into(),
            ..Route::default()
        };
        assert!(route_message(&route, None).is_err());
    }
}
