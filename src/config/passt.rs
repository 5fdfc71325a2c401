//! passt, which plays a user network beside QEMU: which NICs have one of their own, and how it is started.
//!
//! A NIC that is remapped to `passt` without a socket, or whose XML asks for passt, gets a process of its own that listens
//! in the guest's directory. Where it takes the place of QEMU's user network it plays the same addresses, so that the guest
//! finds its gateway where that was.
//!
//! Source: passt(1) of 2023 and later.

use core::net::Ipv4Addr;

use super::arguments::{Argument, Arguments};
use super::properties::Properties;
use super::resources::OWN_SLIRP_PREFIX;

/// A passt that one NIC has for itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnPasst {
    /// The network's id.
    pub id: String,
    /// Where it listens.
    pub socket: String,
    /// What tells it the addresses that the guest knows.
    pub addresses: Vec<String>,
}

/// What starts a passt for one guest: it ends when QEMU hangs up.
pub fn command(program: &str, socket: &str, is_root: bool) -> Vec<String> {
    let mut argv: Vec<String> = [program, "--foreground", "--one-off", "--socket", socket]
        .map(str::to_owned)
        .into();
    if is_root {
        // It would become `nobody`, who cannot go into the guest's directory; it locks itself in all the same.
        argv.extend(["--runas", "0"].map(str::to_owned));
    }
    argv
}

/// Where the passt of a network listens.
pub fn socket_in(directory: &str, id: &str) -> String {
    // An id is a name of letters, digits, `-`, `.` and `_`, so it cannot leave the directory.
    let id: String = id.chars().map(|c| if c == '/' { '_' } else { c }).collect();
    format!("{directory}/{id}.passt")
}

/// Gives those networks a socket in the guest's directory that are a stream to none.
pub fn give_sockets(arguments: &mut Arguments, directory: &str) {
    for argument in arguments.items.iter_mut().filter(|it| is_stream(it)) {
        let id = argument.properties().get("id").unwrap_or_default();
        if argument.properties().get("addr.path").as_deref() == Some("") {
            argument.edit(|net| net.set("addr.path", &socket_in(directory, &id)));
        }
    }
}

/// The networks that have a passt of their own in this directory.
pub fn own(arguments: &Arguments, directory: &str) -> Vec<OwnPasst> {
    let streams = arguments.items.iter().filter(|it| is_stream(it));
    let found = streams.filter_map(|argument| {
        let net = argument.properties();
        let id = net.get("id")?;
        let socket = socket_in(directory, &id);
        let is_own = net.get("addr.path").as_ref() == Some(&socket);
        is_own.then(|| OwnPasst {
            addresses: addresses_of(arguments, &id),
            id,
            socket,
        })
    });
    found.collect()
}

fn is_stream(argument: &Argument) -> bool {
    let net = argument.properties();
    argument.name() == Some("netdev")
        && net.get("type").as_deref() == Some("stream")
        && net.get("addr.type").as_deref() == Some("unix")
}

/// The addresses of the user network in whose place it is, if it is in such a place.
fn addresses_of(arguments: &Arguments, id: &str) -> Vec<String> {
    let before = format!("{OWN_SLIRP_PREFIX}{id}");
    let mut nets = arguments.options("netdev").map(|(_, net)| net.properties());
    let Some(net) = nets.find(|net| net.get("id").as_deref() == Some(&before)) else {
        return Vec::new();
    };
    let Some(plan) = AddressPlan::of(&net) else {
        return Vec::new();
    };
    let prefix = plan.prefix.to_string();
    [
        ("--address", plan.guest.to_string()),
        ("--netmask", prefix),
        ("--gateway", plan.gateway.to_string()),
        ("--dns-forward", plan.dns.to_string()),
    ]
    .into_iter()
    .flat_map(|(option, value)| [option.to_owned(), value])
    .collect()
}

/// Who has which address in a user network.
#[derive(Debug, PartialEq, Eq)]
struct AddressPlan {
    guest: Ipv4Addr,
    prefix: u32,
    gateway: Ipv4Addr,
    dns: Ipv4Addr,
}

impl AddressPlan {
    /// QEMU: the net's number 2 is the gateway, 3 the DNS, 15 and the following the guest; `10.0.2.0/24` if nothing is said.
    fn of(net: &Properties) -> Option<Self> {
        let whole = net.get("net").unwrap_or_else(|| "10.0.2.0/24".to_owned());
        let (base, mask) = whole.split_once('/').unwrap_or((&whole, "24"));
        let prefix = match mask.parse::<u32>() {
            Ok(prefix) => prefix,
            Err(_) => mask.parse::<Ipv4Addr>().ok()?.to_bits().leading_ones(),
        };
        let base = base.parse::<Ipv4Addr>().ok()?.to_bits();
        let base = base
            & u32::MAX
                .checked_shl(32_u32.checked_sub(prefix)?)
                .unwrap_or(0);
        let number = |key: &str, number: u32| match net.get(key) {
            Some(said) => said.parse().ok(),
            None => Some(Ipv4Addr::from_bits(base | number)),
        };
        Some(AddressPlan {
            guest: number("dhcpstart", 15)?,
            prefix,
            gateway: number("host", 2)?,
            dns: number("dns", 3)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(text: &str) -> Arguments {
        let words: Vec<&str> = std::iter::once("qemu")
            .chain(text.split_whitespace())
            .collect();
        Arguments::parse(&words).unwrap()
    }

    #[test]
    fn a_stream_to_nowhere_gets_a_socket_and_the_addresses_of_what_it_replaces() {
        let mut line = arguments(
            "-netdev user,id=vmstow-slirp-net0,restrict=on,net=192.168.7.0/24,host=192.168.7.9 \
             -netdev stream,server=off,addr.type=unix,addr.path=,id=net0 \
             -netdev stream,server=off,addr.type=unix,addr.path=/user/passt,id=net1",
        );
        give_sockets(&mut line, "/run/g");
        let own = own(&line, "/run/g");
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].socket, "/run/g/net0.passt");
        let words =
            "--address 192.168.7.15 --netmask 24 --gateway 192.168.7.9 --dns-forward 192.168.7.3";
        assert_eq!(own[0].addresses.join(" "), words);
    }

    #[test]
    fn addresses_are_those_that_qemu_would_give() {
        let plan = |text: &str| AddressPlan::of(&Properties::parse(text, Some("type")));
        let usual = plan("user").unwrap();
        let shown = (usual.guest.to_string(), usual.gateway.to_string());
        assert_eq!(shown, ("10.0.2.15".to_owned(), "10.0.2.2".to_owned()));
        let other = plan("user,net=10.1.0.5/255.255.0.0").unwrap();
        assert_eq!(
            (other.prefix, other.dns.to_string()),
            (16, "10.1.0.3".to_owned())
        );
        assert_eq!(plan("user,net=x"), None);
        assert_eq!(plan("user,net=10.0.0.0/99"), None);
    }
}
