//! Policy routing (ip-rule(8)).

use std::net::IpAddr;

use nacre_protocol::agent::Rule;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use super::parse_cidr;
use crate::error::{Error, Result};

/// The kernel's message for a rule.
pub(super) fn message(rule: &Rule) -> Result<RuleMessage> {
    let narrow = |value: u32, what: &str| {
        u8::try_from(value).map_err(|_| Error::InvalidArgument(format!("rule: {what} {value}")))
    };
    let mut message = RuleMessage::default();
    let header = &mut message.header;
    header.family = if rule.ipv6 {
        AddressFamily::Inet6
    } else {
        AddressFamily::Inet
    };
    header.tos = narrow(rule.tos, "TOS")?;
    header.action = RuleAction::from(narrow(rule.action, "action")?);
    if rule.invert {
        header.flags = RuleFlags::Invert;
    }
    let mut attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Table(rule.table),
    ];
    if let Some((ip, length)) = prefix(&rule.from, rule.ipv6)? {
        header.src_len = length;
        attributes.push(RuleAttribute::Source(ip));
    }
    if let Some((ip, length)) = prefix(&rule.to, rule.ipv6)? {
        header.dst_len = length;
        attributes.push(RuleAttribute::Destination(ip));
    }
    if !rule.input_device.is_empty() {
        attributes.push(RuleAttribute::Iifname(rule.input_device.clone()));
    }
    if !rule.output_device.is_empty() {
        attributes.push(RuleAttribute::Oifname(rule.output_device.clone()));
    }
    if rule.fw_mark != 0 || rule.fw_mask != 0 {
        attributes.push(RuleAttribute::FwMark(rule.fw_mark));
        attributes.push(RuleAttribute::FwMask(rule.fw_mask));
    }
    message.attributes = attributes;
    Ok(message)
}

fn prefix(text: &str, ipv6: bool) -> Result<Option<(IpAddr, u8)>> {
    if text.is_empty() {
        return Ok(None);
    }
    let (ip, length) = parse_cidr(text)?;
    if ip.is_ipv6() != ipv6 {
        let text = format!("rule: {text} is of the other family");
        return Err(Error::InvalidArgument(text));
    }
    Ok(Some((ip, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_s_conditions_are_all_there() {
        let rule = Rule {
            priority: 1000,
            from: "10.1.0.5/32".into(),
            input_device: "eth1".into(),
            fw_mark: 7,
            fw_mask: 255,
            table: 300,
            action: 1,
            invert: true,
            ..Rule::default()
        };
        let made = message(&rule).unwrap();
        assert_eq!(made.header.family, AddressFamily::Inet);
        assert_eq!(made.header.action, RuleAction::ToTable);
        assert_eq!(made.header.flags, RuleFlags::Invert);
        assert_eq!(made.header.src_len, 32);
        for attribute in [
            RuleAttribute::Priority(1000),
            RuleAttribute::Table(300),
            RuleAttribute::Source("10.1.0.5".parse().unwrap()),
            RuleAttribute::Iifname("eth1".into()),
            RuleAttribute::FwMark(7),
            RuleAttribute::FwMask(255),
        ] {
            assert!(made.attributes.contains(&attribute), "{attribute:?}");
        }
        let mixed = Rule { ipv6: true, ..rule };
        assert!(message(&mixed).is_err());
    }
}
