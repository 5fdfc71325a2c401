//! What becomes of the argument behind a network.

use super::Target;
use crate::config::arguments::{Argument, Arguments};
use crate::config::properties::{Properties, escape};
use crate::config::resources::{OWN_SLIRP_PREFIX, Resource};

/// Replaces the backend and keeps the id and all that describes the NIC.
///
/// The stream of a guest with a user network holds a `slirp` section, which nothing but a user network can load. So where
/// another backend takes its place, a user network stays that leads nowhere and has no NIC.
pub(super) fn set_network(
    arguments: &mut Arguments,
    index: usize,
    resource: &Resource,
    target: &Target,
) -> Option<()> {
    let argument = arguments.items.get(index)?;
    let before = argument.properties();
    let replaced = replaced(argument, target)?;
    *arguments.items.get_mut(index)? = replaced;
    let was_user = before.get("type").as_deref() == Some("user");
    if was_user && !matches!(target, Target::UserNetwork(_)) {
        let heir = slirp_heir(&before, &resource.id);
        arguments.items.insert(index, heir);
    }
    Some(())
}

fn replaced(argument: &Argument, target: &Target) -> Option<Argument> {
    const NIC_KEYS: [&str; 8] = [
        "id", "model", "mac", "macaddr", "name", "addr", "vectors", "netdev",
    ];
    const TAP_KEYS: [&str; 2] = ["vhost", "queues"];
    let before = argument.properties();
    let option = argument.name()?;
    let mut value = match target {
        Target::Tap(name) => format!("tap,ifname={},script=no,downscript=no", escape(name)),
        Target::Bridge(name) => format!("bridge,br={}", escape(name)),
        // `-nic` and `-net` have no way to say where a socket is that would not be taken for a NIC's property.
        Target::Passt(_) if option != "netdev" => return None,
        Target::Passt(socket) => {
            let socket = escape(socket);
            format!("stream,server=off,addr.type=unix,addr.path={socket}")
        }
        _ => target.to_string(),
    };
    let keeps_tap =
        matches!(target, Target::Tap(_)) && before.get("type").as_deref() == Some("tap");
    for (key, kept) in before.leaves() {
        let is_nic = NIC_KEYS.contains(&key.as_str()) && (option != "netdev" || key == "id");
        if is_nic || (keeps_tap && TAP_KEYS.contains(&key.as_str())) {
            value.push_str(&format!(",{key}={}", escape(&kept)));
        }
    }
    Some(Argument::with_value(option, value))
}

/// The user network that loads what the stream holds of the one that is gone; with the same addresses, since the state
/// is held against them.
fn slirp_heir(before: &Properties, id: &str) -> Argument {
    const ADDRESSES: [&str; 11] = [
        "net",
        "host",
        "dhcpstart",
        "dns",
        "ipv4",
        "ipv6",
        "ipv6-net",
        "ipv6-prefix",
        "ipv6-prefixlen",
        "ipv6-host",
        "ipv6-dns",
    ];
    let mut value = format!("user,id={OWN_SLIRP_PREFIX}{},restrict=on", escape(id));
    for (key, kept) in before.leaves() {
        if ADDRESSES.contains(&key.as_str()) {
            value.push_str(&format!(",{key}={}", escape(&kept)));
        }
    }
    let heir = Argument::with_value("netdev", value);
    match before {
        Properties::Json(_) => as_json(&heir),
        Properties::Pairs { .. } => heir,
    }
}

/// The same in JSON: QEMU makes networks given so before all others, and the order is the state's.
fn as_json(argument: &Argument) -> Argument {
    let leaves = argument.properties().leaves().into_iter();
    let members = leaves.map(|(key, value)| {
        let value = match value.as_str() {
            "on" => true.into(),
            "off" => false.into(),
            _ => serde_json::Value::String(value),
        };
        (key, value)
    });
    let object: serde_json::Map<String, serde_json::Value> = members.collect();
    Argument::with_value("netdev", serde_json::Value::Object(object).to_string())
}
