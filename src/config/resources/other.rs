//! Networks, character devices, shares, firmware, TPMs and displays.

use super::{Backend, OWN_LOG_PREFIX, OWN_PREFIX, OWN_SLIRP_PREFIX, Resource, ResourceKind};
use crate::config::arguments::Arguments;
use crate::config::properties::Properties;

/// `-netdev`, `-nic` and the host side of `-net`.
pub(super) fn networks(arguments: &Arguments) -> Vec<Resource> {
    let mut found = Vec::new();
    for (index, argument) in arguments.items.iter().enumerate() {
        let name = argument.name().unwrap_or_default();
        if !matches!(name, "netdev" | "nic" | "net") {
            continue;
        }
        let net = argument.properties();
        let kind = net.get("type").unwrap_or_default();
        if kind == "none" || (name == "net" && kind == "nic") {
            continue;
        }
        let id = net
            .get("id")
            .unwrap_or_else(|| format!("nic{}", found.len()));
        if id.starts_with(OWN_SLIRP_PREFIX) {
            continue;
        }
        let device = device_with(arguments, "netdev", &id).filter(|_| name == "netdev");
        let frontend = match (name, &device) {
            ("netdev", device) => device.as_ref().and_then(|device| device.get("driver")),
            _ => net.get("model"),
        };
        found.push(Resource {
            frontend,
            aliases: other_id(device.as_ref(), &id),
            ..Resource::new(ResourceKind::Nic, id, index, net_backend(kind, &net))
        });
    }
    found
}

/// The first `-device` that uses `id` as its `key`.
fn device_with(arguments: &Arguments, key: &str, id: &str) -> Option<Properties> {
    let mut devices = arguments.options("device");
    devices.find_map(|(_, device)| {
        let device = device.properties();
        (device.get(key).as_deref() == Some(id)).then_some(device)
    })
}

/// The id of the device in front of a backend, by which the backend can be called too.
fn other_id(device: Option<&Properties>, id: &str) -> Vec<String> {
    let own = device.and_then(|device| device.get("id"));
    own.filter(|own| own != id).into_iter().collect()
}

fn net_backend(kind: String, net: &Properties) -> Backend {
    let interface = match kind.as_str() {
        "bridge" => net.get("br").or_else(|| Some("br0".to_owned())),
        _ => net.get("ifname"),
    };
    let forwards = net.leaves().into_iter();
    let forwards = forwards.filter(|(key, _)| key == "hostfwd" || key.starts_with("hostfwd."));
    let listens = forwards.filter_map(|(_, rule)| forwarded(&rule)).collect();
    Backend {
        interface,
        path: net.get_any(&["addr.path", "sock", "vhostdev", "smb", "tftp"]),
        host: net.get_any(&["connect", "addr.host", "mcast", "udp"]),
        port: net.get("addr.port"),
        is_server: net.is_on("server") || net.get("listen").is_some(),
        listens,
        ..Backend::of_type(kind)
    }
}

/// The host's side of `tcp:127.0.0.1:2222-:22`.
fn forwarded(rule: &str) -> Option<String> {
    let (host, _) = rule.split_once('-')?;
    let (protocol, address) = host.split_once(':')?;
    let protocol = if protocol.is_empty() { "tcp" } else { protocol };
    Some(format!("{protocol}:{address}"))
}

/// `-chardev` and the short forms of `-serial`, `-parallel` and `-debugcon`; monitors' are left out.
pub(super) fn chardevs(arguments: &Arguments) -> Vec<Resource> {
    let mut found: Vec<Resource> = arguments
        .options("chardev")
        .filter_map(|(index, argument)| named_chardev(arguments, index, &argument.properties()))
        .collect();
    for port in ["serial", "parallel", "debugcon"] {
        for (number, (index, argument)) in arguments.options(port).enumerate() {
            let value = argument.value().unwrap_or_default();
            let id = format!("{port}{number}");
            match value.strip_prefix("chardev:") {
                Some(named) => attach(&mut found, named, &id),
                None => found.push(Resource {
                    frontend: Some(id.clone()),
                    ..Resource::new(ResourceKind::Chardev, id, index, short_backend(value))
                }),
            }
        }
    }
    if arguments.has_implicit_terminal() {
        found.push(Resource {
            frontend: Some("serial0".to_owned()),
            argument: None,
            ..Resource::new(
                ResourceKind::Chardev,
                "serial0",
                0,
                Backend::of_type("stdio"),
            )
        });
    }
    found
}

fn named_chardev(arguments: &Arguments, index: usize, chardev: &Properties) -> Option<Resource> {
    let id = chardev.get("id")?;
    if is_monitor_only(arguments, &id) || is_of_tpm(arguments, &id) {
        return None;
    }
    let own = id
        .strip_prefix(OWN_LOG_PREFIX)
        .or_else(|| id.strip_prefix(OWN_PREFIX));
    let shown = own.unwrap_or(&id).to_owned();
    let device = device_with(arguments, "chardev", &id);
    let mut aliases: Vec<String> = own.map(|_| id.clone()).into_iter().collect();
    aliases.extend(other_id(device.as_ref(), &shown));
    let backend = chardev_backend(chardev);
    Some(Resource {
        aliases,
        frontend: device.and_then(|device| device.get("driver")),
        ..Resource::new(ResourceKind::Chardev, shown, index, backend)
    })
}

fn attach(found: &mut [Resource], chardev: &str, port: &str) {
    let is_it = |resource: &&mut Resource| {
        resource.id == chardev || resource.aliases.iter().any(|alias| alias == chardev)
    };
    if let Some(resource) = found.iter_mut().find(is_it) {
        resource.frontend = Some(port.to_owned());
        if resource.id != port {
            resource.aliases.push(port.to_owned());
        }
    }
}

/// Whether a character device leads to a TPM emulator, which is a resource itself.
fn is_of_tpm(arguments: &Arguments, chardev: &str) -> bool {
    let mut tpms = arguments.options("tpmdev");
    tpms.any(|(_, tpm)| tpm.properties().get("chardev").as_deref() == Some(chardev))
}

/// Whether a character device serves monitors and nothing else.
pub(in crate::config) fn is_monitor_only(arguments: &Arguments, chardev: &str) -> bool {
    let mut serves_monitor = false;
    for argument in &arguments.items {
        let name = argument.name().unwrap_or_default();
        let is_monitor = matches!(name, "mon" | "monitor" | "qmp" | "qmp-pretty");
        if name == "chardev" || !refers_to(argument, chardev) {
            continue;
        }
        if !is_monitor {
            return false;
        }
        serves_monitor = true;
    }
    serves_monitor
}

/// Whether the argument uses the character device: `chardev=ID` or `chardev:ID`.
fn refers_to(argument: &crate::config::Argument, chardev: &str) -> bool {
    let value = argument.value().unwrap_or_default();
    let short = value.strip_prefix("mon:").unwrap_or(value);
    short.strip_prefix("chardev:") == Some(chardev)
        || argument.properties().get("chardev").as_deref() == Some(chardev)
}

fn chardev_backend(chardev: &Properties) -> Backend {
    let is_server = chardev.is_on("server");
    let host = chardev.get("host");
    let port = chardev.get("port");
    let listens = match (&port, is_server) {
        (Some(port), true) => vec![format!(
            "tcp:{}:{port}",
            host.as_deref().unwrap_or_default()
        )],
        _ => Vec::new(),
    };
    Backend {
        path: chardev.get("path"),
        host,
        port,
        is_server,
        listens,
        ..Backend::of_type(chardev.get("backend").unwrap_or_default())
    }
}

/// `file:/x`, `unix:/s,server=on`, `tcp::4444,server`, `pty`, `null`, `/dev/ttyS0`.
fn short_backend(value: &str) -> Backend {
    let value = value.strip_prefix("mon:").unwrap_or(value);
    if value.starts_with("/dev/") {
        return Backend {
            path: Some(value.to_owned()),
            ..Backend::of_type("serial")
        };
    }
    let (kind, rest) = value.split_once(':').unwrap_or((value, ""));
    let properties = Properties::parse(rest, Some("address"));
    let address = properties.get("address").unwrap_or_default();
    let is_server = properties.is_on("server");
    match kind {
        // Everything behind `file:` is the path, commas and all.
        "file" | "pipe" => Backend {
            path: Some(rest.to_owned()),
            ..Backend::of_type(kind)
        },
        "unix" => Backend {
            path: Some(address),
            is_server,
            ..Backend::of_type("socket")
        },
        "tcp" | "telnet" | "websocket" => Backend {
            listens: if is_server {
                vec![format!("tcp:{address}")]
            } else {
                Vec::new()
            },
            port: address.rsplit_once(':').map(|(_, port)| port.to_owned()),
            host: address.rsplit_once(':').map(|(host, _)| host.to_owned()),
            is_server,
            ..Backend::of_type("socket")
        },
        _ => Backend::of_type(kind),
    }
}

/// `-fsdev` and `-virtfs`.
pub(super) fn shares(arguments: &Arguments) -> Vec<Resource> {
    let mut found = Vec::new();
    for option in ["fsdev", "virtfs"] {
        for (index, argument) in arguments.options(option) {
            let share = argument.properties();
            let id = share
                .get_any(&["id", "mount_tag"])
                .unwrap_or_else(|| format!("share{}", found.len()));
            let backend = Backend {
                path: share.get("path"),
                ..Backend::of_type(share.get("fsdriver").unwrap_or_default())
            };
            found.push(Resource {
                frontend: share.get("mount_tag"),
                read_only: share.is_on("readonly"),
                ..Resource::new(ResourceKind::Share, id, index, backend)
            });
        }
    }
    found
}

/// `-bios`, `-option-rom`, `-kernel`, `-initrd`, `-dtb`, `-shim`.
pub(super) fn firmware_and_kernel(arguments: &Arguments) -> Vec<Resource> {
    let mut found = Vec::new();
    for (index, argument) in arguments.items.iter().enumerate() {
        let kind = match argument.name() {
            Some("bios" | "option-rom") => ResourceKind::Firmware,
            Some("kernel" | "initrd" | "dtb" | "shim") => ResourceKind::Kernel,
            _ => continue,
        };
        let id = argument.name().unwrap_or_default();
        let path = argument.value().unwrap_or_default();
        found.push(Resource {
            read_only: true,
            ..Resource::new(kind, id, index, Backend::file(path))
        });
    }
    found
}

/// `-tpmdev`.
pub(super) fn tpms(arguments: &Arguments) -> Vec<Resource> {
    let tpms = arguments.options("tpmdev").map(|(index, argument)| {
        let tpm = argument.properties();
        let chardev = tpm.get("chardev");
        let socket = chardev.as_deref().and_then(|id| socket_of(arguments, id));
        let backend = Backend {
            path: tpm.get("path").or(socket),
            host: chardev,
            ..Backend::of_type(tpm.get("type").unwrap_or_default())
        };
        let id = tpm.get("id").unwrap_or_default();
        let mut devices = arguments.options("device").map(|(_, it)| it.properties());
        let device = devices.find(|device| device.get("tpmdev").as_ref() == Some(&id));
        let names = device.and_then(|device| device.get("id"));
        Resource {
            aliases: names.into_iter().collect(),
            ..Resource::new(ResourceKind::Tpm, id, index, backend)
        }
    });
    tpms.collect()
}

/// The path of a character device.
fn socket_of(arguments: &Arguments, chardev: &str) -> Option<String> {
    let mut chardevs = arguments.options("chardev");
    let found = chardevs.find(|(_, it)| it.properties().get("id").as_deref() == Some(chardev));
    found?.1.properties().get("path")
}

/// `-vnc`, `-display vnc=` and `-spice`.
pub(super) fn displays(arguments: &Arguments) -> Vec<Resource> {
    let mut found = Vec::new();
    for (index, argument) in arguments.items.iter().enumerate() {
        let properties = argument.properties();
        let backend = match argument.name() {
            Some("vnc") => vnc_backend(&properties.get("vnc").unwrap_or_default()),
            Some("display") => match properties.get("vnc") {
                Some(address) => vnc_backend(&address),
                None => continue,
            },
            Some("spice") => spice_backend(&properties),
            _ => continue,
        };
        let id = format!("display{}", found.len());
        found.push(Resource::new(ResourceKind::Display, id, index, backend));
    }
    found
}

/// `127.0.0.1:1` is TCP port 5901; `unix:/path` a socket.
fn vnc_backend(address: &str) -> Backend {
    if let Some(path) = address.strip_prefix("unix:") {
        return Backend {
            path: Some(path.to_owned()),
            is_server: true,
            ..Backend::of_type("vnc")
        };
    }
    let listen = address.rsplit_once(':').and_then(|(host, display)| {
        let port = display.parse::<u16>().ok()?.checked_add(5900)?;
        Some(format!("tcp:{host}:{port}"))
    });
    Backend {
        is_server: true,
        listens: listen.into_iter().collect(),
        ..Backend::of_type("vnc")
    }
}

fn spice_backend(spice: &Properties) -> Backend {
    let host = spice.get("addr").unwrap_or_default();
    let ports = ["port", "tls-port"]
        .into_iter()
        .filter_map(|key| spice.get(key));
    Backend {
        path: Some(host.clone()).filter(|_| spice.is_on("unix")),
        is_server: true,
        listens: ports.map(|port| format!("tcp:{host}:{port}")).collect(),
        ..Backend::of_type("spice")
    }
}
