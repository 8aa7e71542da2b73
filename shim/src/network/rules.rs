//! Rules that say which routing table a packet is looked up in (ip-rule(8)), as
//! source-based routing of several interfaces needs them.

use std::net::IpAddr;

use nacre_protocol::agent;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};

/// A rule to give to the guest: one the kernel has not made by itself, all of whose
/// conditions the guest can have.
pub(super) fn rule(message: &RuleMessage) -> Option<agent::Rule> {
    let header = &message.header;
    let mut rule = agent::Rule {
        ipv6: header.family == AddressFamily::Inet6,
        table: u32::from(header.table),
        action: u32::from(u8::from(header.action)),
        tos: u32::from(header.tos),
        invert: header.flags.contains(RuleFlags::Invert),
        ..Default::default()
    };
    let prefix = |ip: &IpAddr, length| format!("{ip}/{length}");
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(RouteProtocol::Kernel) => return None,
            RuleAttribute::Source(ip) => rule.from = prefix(ip, header.src_len),
            RuleAttribute::Destination(ip) => rule.to = prefix(ip, header.dst_len),
            RuleAttribute::Iifname(name) => rule.input_device.clone_from(name),
            RuleAttribute::Oifname(name) => rule.output_device.clone_from(name),
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::FwMark(mark) => rule.fw_mark = *mark,
            RuleAttribute::FwMask(mask) => rule.fw_mask = *mask,
            RuleAttribute::Table(table) => rule.table = *table,
            // What the kernel says where there is none.
            RuleAttribute::Protocol(_)
            | RuleAttribute::SuppressPrefixLen(u32::MAX)
            | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            _ => {
                tracing::warn!(
                    ?message,
                    "rule with a condition that is not passed: left out"
                );
                return None;
            }
        }
    }
    Some(rule)
}
