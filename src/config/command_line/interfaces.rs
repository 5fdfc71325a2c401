//! Network interfaces.

use serde_json::{Value, json};

use super::chardevs::Chardev;
use super::controllers::virtio_device;
use super::json::Json;
use super::line::{Line, id};
use super::{QmpCommand, SideCommand, SideKind, memory};
use crate::config::domain::Domain;
use crate::config::domain::chardevs::CharSource;
use crate::config::domain::disks::VirtioModel;
use crate::config::domain::interfaces::{
    Interface, InterfaceDriver, InterfaceSource, InterfaceType, PortForward, UserIp,
};
use crate::config::passt;

/// The bridge of libvirt's network `default`.
const DEFAULT_BRIDGE: (&str, &str) = ("default", "virbr0");

/// Adds the interfaces, each with its host's side.
pub(super) fn interfaces(line: &mut Line<'_>, domain: &Domain) {
    for interface in &domain.devices.interfaces {
        let netdev = format!("host{}", id(&interface.info));
        let has_netdev = backend(line, domain, interface, &netdev);
        frontend(line, interface, has_netdev.then_some(netdev));
        if interface.is_down {
            line.qmp_commands.push(QmpCommand {
                name: "set_link",
                arguments: json!({ "name": id(&interface.info), "up": false }),
            });
        }
    }
}

/// Adds the host's side; whether there is one.
fn backend(line: &mut Line<'_>, domain: &Domain, interface: &Interface, netdev: &str) -> bool {
    let info = &interface.info;
    let queues = interface.driver.queues.filter(|queues| *queues > 1);
    match &interface.source {
        InterfaceSource::User {
            ips,
            port_forwards,
            dev,
        } => {
            if interface.backend.is_passt {
                with_passt(line, interface, netdev, ips, port_forwards, dev.as_deref());
            } else {
                user(line, interface, netdev, ips, port_forwards);
            }
        }
        InterfaceSource::Network {
            name,
            bridge: Some(bridge),
        } if !name.is_empty() => {
            on_bridge(line, interface, netdev, bridge);
        }
        InterfaceSource::Network { name, .. } => {
            let (default, bridge) = DEFAULT_BRIDGE;
            if name == default {
                on_bridge(line, interface, netdev, bridge);
            } else {
                let why = format!(
                    "which bridge is behind the network {name:?} only libvirt knows; one of its name is used"
                );
                line.warning(info, why);
                on_bridge(line, interface, netdev, name);
            }
        }
        InterfaceSource::Bridge { name } => on_bridge(line, interface, netdev, name),
        InterfaceSource::Ethernet => tap(line, interface, netdev, interface.target.as_deref()),
        InterfaceSource::Direct { dev, .. } => {
            line.warning(
                info,
                "an interface that is straight on one of the host's has to be there, as a tap",
            );
            tap(
                line,
                interface,
                netdev,
                Some(interface.target.as_deref().unwrap_or(dev)),
            );
        }
        InterfaceSource::VhostUser {
            path,
            mode,
            reconnect,
        } => {
            memory::needs_sharing(line, domain, info);
            let source = CharSource::Unix {
                path: Some(path.clone()),
                mode: *mode,
                reconnect: *reconnect,
            };
            let chardev = Chardev::new(info, &source).add(line);
            let backend = Json::netdev("vhost-user", netdev).with("chardev", chardev);
            line.netdev(backend.with_some("queues", queues));
        }
        InterfaceSource::Socket {
            kind,
            address,
            port,
            local_address,
            local_port,
        } => {
            let place = |address: &Option<String>, port: &Option<u16>| {
                format!(
                    "{}:{}",
                    address.as_deref().unwrap_or_default(),
                    port.unwrap_or(0)
                )
            };
            let remote = place(address, port);
            let backend = Json::netdev("socket", netdev);
            line.netdev(match kind {
                InterfaceType::Server => backend.with("listen", remote),
                InterfaceType::Client => backend.with("connect", remote),
                InterfaceType::Mcast => backend
                    .with("mcast", remote)
                    .with_some("localaddr", local_address.as_deref()),
                _ => backend
                    .with("udp", remote)
                    .with("localaddr", place(local_address, local_port)),
            });
        }
        InterfaceSource::Vdpa { dev } => {
            let backend = Json::netdev("vhost-vdpa", netdev).with("vhostdev", dev.as_str());
            line.netdev(backend.with_some("queues", queues));
        }
        InterfaceSource::Null => return false,
    }
    true
}

fn user(
    line: &mut Line<'_>,
    interface: &Interface,
    netdev: &str,
    ips: &[UserIp],
    forwards: &[PortForward],
) {
    let mut backend = Json::netdev("user", netdev);
    for ip in ips {
        let prefix = ip.prefix.unwrap_or(if ip.is_v6 { 64 } else { 24 });
        if ip.is_v6 {
            backend.set("ipv6-prefix", ip.address.as_str());
            backend.set("ipv6-prefixlen", prefix);
        } else {
            backend.set("net", format!("{}/{prefix}", ip.address));
        }
    }
    let mut rules: Vec<Value> = Vec::new();
    for forward in forwards {
        if forward.dev.is_some() {
            line.error(
                &interface.info,
                "only passt takes the ports of one interface",
                Some("use <backend type='passt'/>"),
            );
        }
        let address = forward.address.as_deref().unwrap_or_default();
        for (first, last, to, is_left_out) in &forward.ranges {
            if *is_left_out {
                line.error(
                    &interface.info,
                    "only passt can leave out ports",
                    Some("use <backend type='passt'/>"),
                );
                continue;
            }
            for port in *first..=*last {
                let guest = to.unwrap_or(*first).saturating_add(port - first);
                let rule = format!("{}:{address}:{port}-:{guest}", forward.protocol);
                rules.push(json!({ "str": rule }));
            }
        }
    }
    line.netdev(backend.with_some("hostfwd", (!rules.is_empty()).then_some(rules)));
}

fn with_passt(
    line: &mut Line<'_>,
    interface: &Interface,
    netdev: &str,
    ips: &[UserIp],
    forwards: &[PortForward],
    dev: Option<&str>,
) {
    let alias = id(&interface.info);
    let socket = passt::socket_in(&line.context.directory, alias);
    let mut argv = passt::command(&line.context.passt, &socket, line.context.is_root);
    let mut add = |option: &str, value: String| argv.extend([option.to_owned(), value]);
    if let Some(file) = &interface.backend.log_file {
        add("--log-file", file.clone());
    }
    if let Some(dev) = dev {
        add("--interface", dev.to_owned());
    }
    for ip in ips {
        add("--address", ip.address.clone());
        if let Some(prefix) = ip.prefix.filter(|_| !ip.is_v6) {
            add("--netmask", prefix.to_string());
        }
    }
    for forward in forwards {
        let option = if forward.protocol == "udp" {
            "--udp-ports"
        } else {
            "--tcp-ports"
        };
        add(option, forwarded(forward));
    }
    line.side_commands.push(SideCommand {
        kind: SideKind::Passt,
        alias: alias.to_owned(),
        argv,
        socket: socket.clone(),
        directories: Vec::new(),
    });
    let address = Json::empty().with("type", "unix").with("path", socket);
    line.netdev(
        Json::netdev("stream", netdev)
            .with_json("addr", address)
            .with("server", false),
    );
}

/// `127.0.0.1%eth0/2022-2030:22-30,~2025`
fn forwarded(forward: &PortForward) -> String {
    let mut place = forward.address.clone().unwrap_or_default();
    if let Some(dev) = &forward.dev {
        place.push_str(&format!("%{dev}"));
    }
    let ranges = forward.ranges.iter().map(|(first, last, to, is_left_out)| {
        let span = |first: u16, last: u16| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        };
        let mut range = if *is_left_out {
            "~".to_owned()
        } else {
            String::new()
        };
        range.push_str(&span(*first, *last));
        if let Some(to) = to {
            range.push_str(&format!(":{}", span(*to, to.saturating_add(last - first))));
        }
        range
    });
    let ranges: Vec<String> = ranges.collect();
    let ranges = if ranges.is_empty() {
        "all".to_owned()
    } else {
        ranges.join(",")
    };
    if place.is_empty() {
        ranges
    } else {
        format!("{place}/{ranges}")
    }
}

/// On a bridge, by QEMU's helper.
fn on_bridge(line: &mut Line<'_>, interface: &Interface, netdev: &str, bridge: &str) {
    if interface.driver.queues.is_some_and(|queues| queues > 1) {
        line.warning(
            &interface.info,
            "on a bridge it has one queue; several need a tap",
        );
    }
    line.netdev(Json::netdev("bridge", netdev).with("br", bridge));
}

fn tap(line: &mut Line<'_>, interface: &Interface, netdev: &str, name: Option<&str>) {
    let script = |path: &Option<String>| path.clone().unwrap_or_else(|| "no".to_owned());
    let backend = Json::netdev("tap", netdev)
        .with_some("ifname", name)
        .with("script", script(&interface.script))
        .with("downscript", script(&interface.down_script))
        .with_some(
            "vhost",
            (interface.driver.is_vhost == Some(true)).then_some(true),
        )
        .with_some("sndbuf", interface.sndbuf)
        .with_some(
            "queues",
            interface.driver.queues.filter(|queues| *queues > 1),
        );
    line.netdev(backend);
}

fn frontend(line: &mut Line<'_>, interface: &Interface, netdev: Option<String>) {
    let model = interface.model.as_deref().unwrap_or("rtl8139");
    let virtio = match model {
        "virtio" | "virtio-net" => Some(VirtioModel::Virtio),
        "virtio-transitional" => Some(VirtioModel::VirtioTransitional),
        "virtio-non-transitional" => Some(VirtioModel::VirtioNonTransitional),
        _ => None,
    };
    let device = match virtio {
        Some(model) => {
            let device = virtio_device("virtio-net", Some(model), interface.driver.virtio);
            virtio_options(device, &interface.driver).with_some("host_mtu", interface.mtu)
        }
        None if is_name(model) => Json::device(model),
        None => {
            return line.error(
                &interface.info,
                format!("{model:?} is no model of a network interface"),
                None,
            );
        }
    };
    let device = device
        .with_some("netdev", netdev)
        .with_some("mac", interface.mac.as_deref());
    if model == "usb-net" {
        line.usb_device(device, &interface.info);
    } else {
        line.device(device, &interface.info);
    }
}

fn is_name(model: &str) -> bool {
    !model.is_empty()
        && model
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

fn virtio_options(device: Json, driver: &InterfaceDriver) -> Json {
    let tx = driver
        .tx_mode
        .as_deref()
        .map(|mode| if mode == "timer" { "timer" } else { "bh" });
    let queues = driver.queues.filter(|queues| *queues > 1);
    let mut device = device
        .with_some("tx", tx)
        .with_some("ioeventfd", driver.ioeventfd)
        .with_some("event_idx", driver.event_idx)
        .with_some("mq", queues.map(|_| true))
        // Two for each pair of queues, one for control, one for the configuration.
        .with_some(
            "vectors",
            queues.map(|queues| queues.saturating_mul(2).saturating_add(2)),
        )
        .with_some("rx_queue_size", driver.rx_queue_size)
        .with_some("tx_queue_size", driver.tx_queue_size)
        .with_some("rss", driver.rss)
        .with_some("hash", driver.rss_hash_report);
    for (name, is_on) in &driver.host_offloads {
        let property = match *name {
            "csum" | "gso" | "mrg_rxbuf" => (*name).to_owned(),
            name => format!("host_{name}"),
        };
        device.set(&property, *is_on);
    }
    for (name, is_on) in &driver.guest_offloads {
        device.set(&format!("guest_{name}"), *is_on);
    }
    device
}
