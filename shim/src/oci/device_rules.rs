//! Device rules of a spec (OCI runtime spec, "Allowed Device list"): followed in their
//! order, so that a later one counts for more.

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

/// What a rule is about that does not say it.
const ALL_ACCESS: &str = "rwm";

/// The rules of a spec.
pub fn of(linux: &Linux) -> &[LinuxDeviceCgroup] {
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_deref());
    rules.unwrap_or_default()
}

/// Whether rules allow whatever there is, as a privileged container's do. containerd
/// lists all nodes of the host in the spec of such a one, unasked.
pub fn allow_everything(rules: &[LinuxDeviceCgroup]) -> bool {
    rules.iter().any(|rule| {
        let access = access_of(rule);
        rule.allow()
            && kind(rule) == LinuxDeviceType::A
            && number(rule.major()).is_none()
            && number(rule.minor()).is_none()
            && ALL_ACCESS.chars().all(|letter| access.contains(letter))
    })
}

/// Whether a rule allows this very device, and no other.
pub fn is_own(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let numbers = (Some(device.major()), Some(device.minor()));
    rule.allow() && rule.typ() == Some(device.typ()) && (rule.major(), rule.minor()) == numbers
}

/// What rules let a container do with a device: of "rwm" what is allowed.
pub fn access(rules: &[LinuxDeviceCgroup], device: &LinuxDevice) -> String {
    let mut allowed = String::new();
    for rule in rules.iter().filter(|rule| covers(rule, device)) {
        let access = access_of(rule);
        if rule.allow() {
            allowed.push_str(access);
        } else {
            allowed.retain(|letter| !access.contains(letter));
        }
    }
    let letters = ALL_ACCESS.chars();
    letters.filter(|letter| allowed.contains(*letter)).collect()
}

/// Whether a rule has major or minor for itself; a missing or negative one is any.
pub fn number(value: Option<i64>) -> Option<i64> {
    value.filter(|value| *value >= 0)
}

/// A rule's type; without one it is about all.
pub fn kind(rule: &LinuxDeviceCgroup) -> LinuxDeviceType {
    rule.typ().unwrap_or_default()
}

fn covers(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let is = |wanted: Option<i64>, has: i64| number(wanted).is_none_or(|wanted| wanted == has);
    (kind(rule) == LinuxDeviceType::A || kind(rule) == device.typ())
        && is(rule.major(), device.major())
        && is(rule.minor(), device.minor())
}

fn access_of(rule: &LinuxDeviceCgroup) -> &str {
    rule.access().as_deref().unwrap_or(ALL_ACCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn disk() -> LinuxDevice {
        let disk = json!({"path": "/dev/sda1", "type": "b", "major": 8, "minor": 1});
        serde_json::from_value(disk).unwrap()
    }

    fn access_by(rules: &Value) -> String {
        let rules: Vec<_> = serde_json::from_value(rules.clone()).unwrap();
        access(&rules, &disk())
    }

    #[test]
    fn numbers_and_types_left_out_are_any() {
        let by = |rule: Value| access_by(&json!([rule]));
        let own = json!({"allow": true, "type": "b", "major": 8, "minor": 1, "access": "wr"});
        assert_eq!(by(own), "rw");
        let minors = json!({"allow": true, "type": "b", "major": 8, "access": "rw"});
        assert_eq!(by(minors), "rw");
        let minors = json!({"allow": true, "type": "b", "major": 8, "minor": -1, "access": "r"});
        assert_eq!(by(minors), "r");
        assert_eq!(by(json!({"allow": true})), "rwm");
        for other in [
            json!({"allow": true, "type": "c", "major": 8, "minor": 1, "access": "rwm"}),
            json!({"allow": true, "type": "b", "major": 9, "access": "rwm"}),
            json!({"allow": true, "type": "b", "major": 8, "minor": 2, "access": "rwm"}),
            json!({"allow": true, "type": "b", "major": 8, "minor": 1, "access": ""}),
        ] {
            assert_eq!(by(other.clone()), "", "{other}");
        }
    }

    #[test]
    fn the_later_rule_counts() {
        let all = json!({"allow": true, "access": "rwm"});
        let none = json!({"allow": false, "access": "rwm"});
        let no_write = json!({"allow": false, "type": "b", "major": 8, "minor": 1, "access": "w"});
        assert_eq!(access_by(&json!([none, all, no_write])), "rm");
        assert_eq!(access_by(&json!([all, none])), "");
    }
}
