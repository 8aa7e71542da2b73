//! What a network namespace holds, read by rtnetlink(7), and the tc filters that
//! join an interface to its tap.

use std::collections::HashMap;
use std::net::IpAddr;

use futures::{Stream, TryStreamExt};
use nacre_protocol::agent;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::tc::TcHandle;
use rtnetlink::{Handle, IpVersion, LinkUnspec};

use super::{NetworkError, system};

/// Every protocol (linux/if_ether.h), in network order as tcm_info has it.
const ETH_P_ALL: u16 = 0x0003u16.to_be();
/// Handle of the ingress queueing discipline, `ffff:`.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// MTU where the kernel tells none.
const DEFAULT_MTU: u32 = 1500;

/// An interface a VM can stand in for.
#[derive(Debug, Clone)]
pub struct Link {
    /// Its index, which no other of its namespace has as long as it is there.
    pub index: u32,
    /// Its name now.
    pub name: String,
    /// Whether somebody has set it up.
    pub is_up: bool,
    /// Whether something takes the frames that come to it. The kernel forgets that of one that
    /// leaves the namespace, also if it comes back.
    pub is_joined: bool,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u16,
}

/// An interface as a VM sees it.
enum Found {
    /// It can stand in for it.
    Link(Link),
    /// It cannot; this is its name.
    Other(String),
    /// Nobody expects it to.
    Nothing,
}

impl Link {
    /// Name of its tap. Its own may be another's later, and be too long.
    pub(super) fn tap_name(&self) -> String {
        format!("tap_{}", self.index)
    }
}

/// A connection to the kernel, in the namespace of the thread that opened it.
pub(super) struct Netlink {
    handle: Handle,
}

type Names<'a> = HashMap<u32, &'a str>;

impl Netlink {
    /// Opens the connection; its task runs on the current runtime.
    pub fn open() -> Result<Self, NetworkError> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(system("open a netlink socket"))?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// The interfaces to hand over, by index, and the names of others that are up.
    pub async fn links(&self) -> Result<(Vec<Link>, Vec<String>), NetworkError> {
        let messages = collect("list interfaces", self.handle.link().get().execute()).await?;
        let (mut links, mut others) = (Vec::new(), Vec::new());
        for message in messages {
            match link(&message) {
                Found::Link(link) => links.push(link),
                Found::Other(name) => others.push(name),
                Found::Nothing => {}
            }
        }
        links.sort_by_key(|link| link.index);
        let hooks = collect("list ingress hooks", self.handle.qdisc().get().execute()).await?;
        for hook in hooks
            .iter()
            .filter(|hook| hook.header.parent == TcHandle::INGRESS)
        {
            let of_it = |link: &&mut Link| i32::try_from(link.index) == Ok(hook.header.index);
            if let Some(link) = links.iter_mut().find(of_it) {
                link.is_joined = true;
            }
        }
        Ok((links, others))
    }

    /// Redirects frames between `link` and the tap named `tap`, and sets the tap
    /// up.
    pub async fn join(&self, link: &Link, tap: &str) -> Result<(), NetworkError> {
        let request = self.handle.link().get().match_name(tap).execute();
        let messages = collect("find tap", request).await?;
        let index = messages.first().map(|message| message.header.index).ok_or(
            NetworkError::Interface {
                interface: tap.into(),
                what: "index",
            },
        )?;
        quiet(tap);
        let settings = LinkUnspec::new_with_index(index)
            .mtu(u32::from(link.mtu))
            .up()
            .build();
        let set = self.handle.link().set(settings).execute().await;
        set.map_err(refused("set up", tap))?;
        // The interface's own is the last: nothing of a failure stays with it.
        self.redirect(index, link.index, tap).await?;
        self.redirect(link.index, index, &link.name).await
    }

    /// Lets the namespace have the frames that come to `link` again.
    pub async fn part(&self, link: &Link) -> Result<(), NetworkError> {
        self.remove_hook(interface_index(link.index, &link.name)?)
            .await
            .map_err(refused("remove the ingress hook of", &link.name))
    }

    /// The same for all whose frames go to taps that are gone; the first error.
    pub async fn part_from_gone(&self) -> Result<(), NetworkError> {
        let (links, _) = self.links().await?;
        let mut result = Ok(());
        for link in links.iter().filter(|link| link.is_joined) {
            result = result.and(self.part_if_gone(link).await);
        }
        result
    }

    async fn part_if_gone(&self, link: &Link) -> Result<(), NetworkError> {
        let index = interface_index(link.index, &link.name)?;
        let request = self.handle.traffic_filter(index).get().ingress().execute();
        let filters = collect("list filters", request).await?;
        if filters.iter().any(super::release::leads_nowhere) {
            self.part(link).await?;
            tracing::info!(interface = link.name, "parted from a machine that is gone");
        }
        Ok(())
    }

    async fn remove_hook(&self, index: i32) -> Result<(), rtnetlink::Error> {
        let mut delete = self.handle.qdisc().del(index);
        delete.message_mut().header.parent = TcHandle::INGRESS;
        delete.execute().await
    }

    async fn redirect(&self, from: u32, to: u32, name: &str) -> Result<(), NetworkError> {
        let index = interface_index(from, name)?;
        let add = || self.handle.qdisc().add(index).ingress().execute();
        if let Err(error) = add().await {
            if !is_existing(&error) {
                return Err(refused("add an ingress hook to", name)(error));
            }
            // Left by an earlier VM of this namespace, with a filter that points
            // to a tap that is gone.
            self.remove_hook(index)
                .await
                .map_err(refused("remove the old ingress hook of", name))?;
            add()
                .await
                .map_err(refused("add an ingress hook to", name))?;
        }
        self.handle
            .traffic_filter(index)
            .add()
            .parent(INGRESS_HANDLE)
            .priority(1)
            .protocol(ETH_P_ALL)
            .redirect(to)
            .map_err(refused("describe a redirect from", name))?
            .execute()
            .await
            .map_err(refused("redirect frames from", name))
    }

    /// The interfaces with their addresses. Link-local IPv6 addresses are left
    /// out: the guest's kernel makes the same ones from the same MAC address.
    pub async fn interfaces(&self, links: &[Link]) -> Result<Vec<agent::Interface>, NetworkError> {
        let messages = collect("list addresses", self.handle.address().get().execute()).await?;
        Ok(links
            .iter()
            .map(|link| agent::Interface {
                mac: mac_text(&link.mac),
                name: link.name.clone(),
                mtu: u32::from(link.mtu),
                addresses: messages
                    .iter()
                    .filter(|message| message.header.index == link.index)
                    .filter_map(address)
                    .collect(),
                ..Default::default()
            })
            .collect())
    }

    /// The routes of all tables, those without a gateway first: a gateway must
    /// be reachable when a route through it is added.
    pub async fn routes(&self, links: &[Link]) -> Result<Vec<agent::Route>, NetworkError> {
        let names = names(links);
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut request = RouteMessage::default();
            request.header.address_family = family;
            let request = self.handle.route().get(request).execute();
            let messages = collect("list routes", request).await?;
            routes.extend(messages.iter().filter_map(|message| route(message, &names)));
        }
        routes.sort_by_key(|route| !route.gateway.is_empty());
        Ok(routes)
    }

    /// The rules that are not the kernel's own, first to last.
    pub async fn rules(&self) -> Result<Vec<agent::Rule>, NetworkError> {
        let mut rules = Vec::new();
        for version in [IpVersion::V4, IpVersion::V6] {
            let request = self.handle.rule().get(version).execute();
            let messages = match collect("list rules", request).await {
                Err(NetworkError::Netlink { source, .. }) if is_without(&source) => continue,
                messages => messages?,
            };
            rules.extend(messages.iter().filter_map(super::rules::rule));
        }
        Ok(rules)
    }

    /// Neighbours that were put there to stay; the guest learns the others.
    pub async fn neighbors(&self, links: &[Link]) -> Result<Vec<agent::Neighbor>, NetworkError> {
        let names = names(links);
        let request = self.handle.neighbours().get().execute();
        let messages = collect("list neighbours", request).await?;
        Ok(messages
            .iter()
            .filter_map(|message| neighbor(message, &names))
            .collect())
    }
}

/// Keeps the tap from announcing itself: it is a wire, and router solicitations
/// of the namespace would reach the guest.
fn quiet(tap: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6");
    if let Err(error) = std::fs::write(&path, "1")
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(tap, %error, "cannot turn off IPv6 on a tap");
    }
}

async fn collect<T>(
    action: &'static str,
    stream: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, NetworkError> {
    stream.try_collect().await.map_err(refused(action, ""))
}

fn refused(action: &'static str, interface: &str) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let interface = interface.to_owned();
    move |source| NetworkError::Netlink {
        action,
        interface,
        source,
    }
}

fn interface_index(index: u32, name: &str) -> Result<i32, NetworkError> {
    i32::try_from(index).map_err(|_| NetworkError::Interface {
        interface: name.into(),
        what: "index",
    })
}

fn is_existing(error: &rtnetlink::Error) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message)
        if message.raw_code() == -libc::EEXIST)
}

/// Whether the host's kernel has no such rules at all: not the family
/// (`ipv6.disable=1`), or no policy routing in it.
fn is_without(error: &rtnetlink::Error) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message)
        if matches!(-message.raw_code(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP))
}

fn names(links: &[Link]) -> Names<'_> {
    links
        .iter()
        .map(|link| (link.index, link.name.as_str()))
        .collect()
}

/// An interface if it is one of those CNI plugins make for pods. Others (the
/// loopback, our own taps, a kernel's fallback tunnels, a device moved in whole) stay.
fn link(message: &LinkMessage) -> Found {
    let mut name = String::new();
    let mut mac = None;
    let mut mtu = DEFAULT_MTU;
    let (mut is_known, mut is_tap) = (false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok(),
            LinkAttribute::Mtu(value) => mtu = *value,
            LinkAttribute::LinkInfo(infos) => {
                is_known = infos.iter().any(is_pod_kind);
                is_tap = infos.contains(&LinkInfo::Kind(InfoKind::Tun));
            }
            _ => {}
        }
    }
    let is_up = message.header.flags.contains(LinkFlags::Up);
    if !is_known || message.header.link_layer_type != LinkLayerType::Ether {
        let is_expected = !is_tap && !message.header.flags.contains(LinkFlags::Loopback);
        return if is_up && is_expected {
            Found::Other(name)
        } else {
            Found::Nothing
        };
    }
    match (mac, u16::try_from(mtu)) {
        (Some(mac), Ok(mtu)) => Found::Link(Link {
            index: message.header.index,
            is_up,
            is_joined: false,
            mac,
            mtu,
            name,
        }),
        _ if is_up => Found::Other(name),
        _ => Found::Nothing,
    }
}

fn is_pod_kind(info: &LinkInfo) -> bool {
    matches!(
        info,
        LinkInfo::Kind(InfoKind::Veth | InfoKind::MacVlan | InfoKind::IpVlan)
    )
}

fn address(message: &AddressMessage) -> Option<String> {
    if message.header.scope == AddressScope::Link && message.header.family == AddressFamily::Inet6 {
        return None;
    }
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
        message.attributes.iter().find_map(wanted)
    };
    // On a point-to-point link "address" is the peer's and "local" is ours.
    let ip = find(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    })
    .or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })?;
    Some(format!("{ip}/{}", message.header.prefix_len))
}

/// A route to give to the guest: unicast, by one of our interfaces, and not one
/// the kernel makes by itself when an address is added.
fn route(message: &RouteMessage, names: &Names<'_>) -> Option<agent::Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.protocol == RouteProtocol::Kernel {
        return None;
    }
    let mut table = u32::from(header.table);
    let mut route = agent::Route {
        scope: u32::from(u8::from(header.scope)),
        ipv6: header.address_family == AddressFamily::Inet6,
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                let length = header.destination_prefix_length;
                route.destination = format!("{}/{length}", ip(to)?);
            }
            RouteAttribute::Gateway(address) => route.gateway = ip(address)?.to_string(),
            RouteAttribute::PrefSource(address) => route.source = ip(address)?.to_string(),
            RouteAttribute::Oif(index) => route.device = (*names.get(index)?).into(),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::MultiPath(_) | RouteAttribute::Via(_) | RouteAttribute::Encap(_) => {
                tracing::warn!(?message, "route with several paths or a tunnel: left out");
                return None;
            }
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        route.table = table;
    }
    (!route.device.is_empty()).then_some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn neighbor(message: &NeighbourMessage, names: &Names<'_>) -> Option<agent::Neighbor> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbor = agent::Neighbor {
        device: (*names.get(&message.header.ifindex)?).into(),
        ..Default::default()
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => {
                neighbor.address = ip.to_string();
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => {
                neighbor.address = ip.to_string();
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                neighbor.mac = mac_text(bytes.as_slice().try_into().ok()?);
            }
            _ => {}
        }
    }
    (!neighbor.address.is_empty() && !neighbor.mac.is_empty()).then_some(neighbor)
}

fn mac_text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The others are the VM's all the same.
    #[test]
    fn interface_that_no_card_can_stand_for_is_a_stranger() {
        let found = |mac: &[u8], mtu, flags| {
            let mut message = LinkMessage::default();
            message.header.link_layer_type = LinkLayerType::Ether;
            message.header.flags = flags;
            message.attributes = vec![
                LinkAttribute::IfName("net1".into()),
                LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth)]),
                LinkAttribute::Address(mac.to_vec()),
                LinkAttribute::Mtu(mtu),
            ];
            link(&message)
        };
        let up = LinkFlags::Up;
        assert!(matches!(found(&[2; 6], 65535, up), Found::Link(link) if link.mtu == 65535));
        assert!(matches!(found(&[2; 6], 65536, up), Found::Other(name) if name == "net1"));
        assert!(matches!(found(&[2; 8], 1500, up), Found::Other(_)));
        assert!(matches!(
            found(&[], 1500, LinkFlags::empty()),
            Found::Nothing
        ));
    }
}
