//! Network interfaces.

use super::address::{DeviceInfo, VirtioOptions};
use super::chardevs::{CharSource, SocketMode};
use super::view::View;
use super::word::words;

words! {
    /// What a network interface hangs on.
    InterfaceType {
        User = "user",
        Network = "network",
        Bridge = "bridge",
        Ethernet = "ethernet",
        Direct = "direct",
        VhostUser = "vhostuser",
        Server = "server",
        Client = "client",
        Mcast = "mcast",
        Udp = "udp",
        Vdpa = "vdpa",
        Null = "null",
        Internal = "internal",
        Hostdev = "hostdev",
        Vds = "vds",
    }
}

/// `<interface>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Alias, address, place in the boot order.
    pub info: DeviceInfo,
    /// What it hangs on.
    pub source: InterfaceSource,
    /// `<mac address>`; `None` if there is none.
    pub mac: Option<String>,
    /// `<model type>`: `virtio`, `e1000e`, …; always there once the domain is expanded.
    pub model: Option<String>,
    /// `<target dev>`: the host's name for it.
    pub target: Option<String>,
    /// `<target managed>`: whether the host's side is made for it.
    pub is_managed: Option<bool>,
    /// `<driver>`.
    pub driver: InterfaceDriver,
    /// `<mtu size>`: virtio tells it to the guest.
    pub mtu: Option<u32>,
    /// `<link state>`: whether it is down.
    pub is_down: bool,
    /// `<script path>`.
    pub script: Option<String>,
    /// `<downscript path>`.
    pub down_script: Option<String>,
    /// `<tune><sndbuf>`.
    pub sndbuf: Option<u64>,
    /// `<backend>`.
    pub backend: InterfaceBackend,
}

/// What a network interface hangs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InterfaceSource {
    /// A network of its own, behind QEMU or passt.
    User {
        /// Addresses in it: family, address, prefix.
        ips: Vec<UserIp>,
        /// Ports of the host, with passt.
        port_forwards: Vec<PortForward>,
        /// `<source dev>` of passt.
        dev: Option<String>,
    },
    /// A network of libvirt's.
    Network {
        /// Its name.
        name: String,
        /// The bridge behind it, where a running guest's XML tells it.
        bridge: Option<String>,
    },
    /// A bridge of the host's.
    Bridge {
        /// Its name.
        name: String,
    },
    /// A tap of the host's.
    Ethernet,
    /// Straight on an interface of the host's.
    Direct {
        /// Its name.
        dev: String,
        /// `vepa`, `bridge`, `private`, `passthrough`.
        mode: Option<String>,
    },
    /// A switch in another process.
    VhostUser {
        /// The socket.
        path: String,
        /// Who waits at it.
        mode: SocketMode,
        /// `<reconnect>` in seconds.
        reconnect: Option<u32>,
    },
    /// Frames over a socket between QEMUs.
    Socket {
        /// Server, client, mcast or udp.
        kind: InterfaceType,
        /// The address.
        address: Option<String>,
        /// The port.
        port: Option<u16>,
        /// The local address of UDP.
        local_address: Option<String>,
        /// The local port of UDP.
        local_port: Option<u16>,
    },
    /// A device that does vDPA.
    Vdpa {
        /// `/dev/vhost-vdpa-0`.
        dev: String,
    },
    /// On nothing.
    Null,
}

/// `<ip>` of a user network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserIp {
    /// Whether it is IPv6.
    pub is_v6: bool,
    /// The address.
    pub address: String,
    /// The length of the network's part.
    pub prefix: Option<u32>,
}

/// `<portForward>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortForward {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The host's address.
    pub address: Option<String>,
    /// The host's interface.
    pub dev: Option<String>,
    /// First port, last port, where they go to in the guest, whether they are left out.
    pub ranges: Vec<(u16, u16, Option<u16>, bool)>,
}

/// `<driver>` of a network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceDriver {
    /// `name=`: whether the kernel does it (`vhost`, true) or QEMU (`qemu`).
    pub is_vhost: Option<bool>,
    /// `txmode=`: `timer` or `iothread`.
    pub tx_mode: Option<String>,
    /// `queues=`.
    pub queues: Option<u32>,
    /// `rx_queue_size=`.
    pub rx_queue_size: Option<u32>,
    /// `tx_queue_size=`.
    pub tx_queue_size: Option<u32>,
    /// `ioeventfd=`.
    pub ioeventfd: Option<bool>,
    /// `event_idx=`.
    pub event_idx: Option<bool>,
    /// `rss=`.
    pub rss: Option<bool>,
    /// `rss_hash_report=`.
    pub rss_hash_report: Option<bool>,
    /// `<host>`: offloads by libvirt's name and whether they are on.
    pub host_offloads: Vec<(&'static str, bool)>,
    /// `<guest>`.
    pub guest_offloads: Vec<(&'static str, bool)>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

/// `<backend>` of a network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceBackend {
    /// `type=passt`.
    pub is_passt: bool,
    /// `tap=`: another `/dev/net/tun`.
    pub tap: Option<String>,
    /// `vhost=`: another `/dev/vhost-net`.
    pub vhost: Option<String>,
    /// `logFile=` of passt.
    pub log_file: Option<String>,
}

pub(super) fn read_interface(view: &View<'_>) -> Option<Interface> {
    const HOST_NETWORK: &str = "it is for the host's side of the network to set up";
    view.ignore(&["trustGuestRxFilters", "managed"]);
    view.leave_out_elements(
        &[
            "bandwidth",
            "vlan",
            "virtualport",
            "filterref",
            "port",
            "coalesce",
            "teaming",
            "route",
        ],
        HOST_NETWORK,
    );
    view.ignore_elements(&["guest", "actual"]);
    let kind = view.required_word("type");
    let target = view.one("target", |target| {
        (target.attribute("dev"), target.switch("managed"))
    });
    let (target, is_managed) = target.unwrap_or_default();
    let backend = view.one("backend", |backend| InterfaceBackend {
        is_passt: match backend.attribute("type").as_deref() {
            Some("passt") => true,
            Some("default") | None => false,
            Some(other) => {
                backend.error(format!("type {other:?} is none of default, passt"), None);
                false
            }
        },
        tap: backend.attribute("tap"),
        vhost: backend.attribute("vhost"),
        log_file: backend.attribute("logFile"),
    });
    let Some(source) = kind.and_then(|kind| read_source(view, kind)) else {
        view.skip();
        return None;
    };
    Some(Interface {
        info: view.device_info(),
        source,
        mac: view.one_some("mac", |mac| {
            mac.ignore(&["type", "check", "currentAddress"]);
            let address = mac.attribute("address");
            if address.as_deref().is_some_and(|address| !is_mac(address)) {
                mac.error(
                    "address is not six hexadecimal bytes with colons between",
                    None,
                );
            }
            address
        }),
        model: view.one_some("model", |model| model.attribute("type")),
        target,
        is_managed,
        driver: view.one("driver", read_driver).unwrap_or_default(),
        mtu: view.one_some("mtu", |mtu| mtu.number("size")),
        is_down: view
            .one_some("link", |link| link.attribute("state"))
            .as_deref()
            == Some("down"),
        script: view.one_some("script", |script| script.attribute("path")),
        down_script: view.one_some("downscript", |script| script.attribute("path")),
        sndbuf: view.one_some("tune", |tune| tune.one_some("sndbuf", View::text_number)),
        backend: backend.unwrap_or_default(),
    })
}

fn is_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    let is_byte = |byte: &&str| {
        (1..=2).contains(&byte.len()) && byte.bytes().all(|digit| digit.is_ascii_hexdigit())
    };
    bytes.len() == 6 && bytes.iter().all(is_byte)
}

fn read_source(view: &View<'_>, kind: InterfaceType) -> Option<InterfaceSource> {
    let named = |attribute: &'static str| {
        view.one("source", |source| {
            source.ignore(&["portgroup", "portid"]);
            source.required(attribute)
        })
        .or_else(|| {
            view.error("it needs a <source>", None);
            None
        })
    };
    match kind {
        InterfaceType::User => Some(InterfaceSource::User {
            ips: view.each("ip", |ip| UserIp {
                is_v6: ip.attribute("family").as_deref() == Some("ipv6"),
                address: ip.required("address"),
                prefix: ip.number("prefix"),
            }),
            port_forwards: view.each("portForward", read_port_forward),
            dev: view.one_some("source", |source| source.attribute("dev")),
        }),
        InterfaceType::Network => {
            let source = view.one("source", |source| {
                source.ignore(&["portgroup", "portid"]);
                (source.required("network"), source.attribute("bridge"))
            });
            if source.is_none() {
                view.error("it needs a <source>", None);
            }
            let (name, bridge) = source?;
            Some(InterfaceSource::Network { name, bridge })
        }
        InterfaceType::Bridge => Some(InterfaceSource::Bridge {
            name: named("bridge")?,
        }),
        InterfaceType::Ethernet => {
            view.ignore_elements(&["ip", "source"]);
            Some(InterfaceSource::Ethernet)
        }
        InterfaceType::Direct => {
            let source = view.one("source", |source| {
                (source.required("dev"), source.attribute("mode"))
            });
            if source.is_none() {
                view.error("it needs a <source>", None);
            }
            let (dev, mode) = source?;
            Some(InterfaceSource::Direct { dev, mode })
        }
        InterfaceType::VhostUser => {
            let source = view.one("source", CharSource::read_unix);
            if source.is_none() {
                view.error("it needs a <source>", None);
            }
            let (path, mode, reconnect) = source?;
            Some(InterfaceSource::VhostUser {
                path,
                mode,
                reconnect,
            })
        }
        InterfaceType::Server
        | InterfaceType::Client
        | InterfaceType::Mcast
        | InterfaceType::Udp => {
            let source = view.one("source", |source| {
                let local = source.one("local", |local| {
                    (local.attribute("address"), local.number("port"))
                });
                (
                    source.attribute("address"),
                    source.number("port"),
                    local.unwrap_or_default(),
                )
            });
            let (address, port, (local_address, local_port)) = source.unwrap_or_default();
            Some(InterfaceSource::Socket {
                kind,
                address,
                port,
                local_address,
                local_port,
            })
        }
        InterfaceType::Vdpa => Some(InterfaceSource::Vdpa { dev: named("dev")? }),
        InterfaceType::Null => Some(InterfaceSource::Null),
        InterfaceType::Hostdev => {
            view.error(
                "a network device of the host in the guest cannot be saved, and is not modelled",
                Some("use another type of interface"),
            );
            None
        }
        InterfaceType::Internal | InterfaceType::Vds => {
            view.error(
                "this type of interface is not QEMU's",
                Some("use type user, bridge, network or ethernet"),
            );
            None
        }
    }
}

fn read_port_forward(view: &View<'_>) -> PortForward {
    PortForward {
        protocol: view.required("proto"),
        address: view.attribute("address"),
        dev: view.attribute("dev"),
        ranges: view.each_some("range", |range| {
            range.required("start");
            let start = range.number("start")?;
            let end = range.number("end").unwrap_or(start);
            Some((
                start,
                end,
                range.number("to"),
                range.switch("exclude") == Some(true),
            ))
        }),
    }
}

fn read_driver(view: &View<'_>) -> InterfaceDriver {
    let tx_mode = view.attribute("txmode");
    if tx_mode
        .as_deref()
        .is_some_and(|mode| !matches!(mode, "timer" | "iothread"))
    {
        view.error("txmode is none of timer, iothread", None);
    }
    InterfaceDriver {
        is_vhost: match view.attribute("name").as_deref() {
            Some("vhost") => Some(true),
            Some("qemu") => Some(false),
            Some(other) => {
                view.error(format!("name {other:?} is none of qemu, vhost"), None);
                None
            }
            None => None,
        },
        tx_mode,
        queues: view.number("queues"),
        rx_queue_size: view.number("rx_queue_size"),
        tx_queue_size: view.number("tx_queue_size"),
        ioeventfd: view.switch("ioeventfd"),
        event_idx: view.switch("event_idx"),
        rss: view.switch("rss"),
        rss_hash_report: view.switch("rss_hash_report"),
        host_offloads: view.one("host", read_offloads).unwrap_or_default(),
        guest_offloads: view.one("guest", read_offloads).unwrap_or_default(),
        virtio: view.virtio_options(),
    }
}

fn read_offloads(view: &View<'_>) -> Vec<(&'static str, bool)> {
    const OFFLOADS: [&str; 7] = ["csum", "gso", "tso4", "tso6", "ecn", "ufo", "mrg_rxbuf"];
    OFFLOADS
        .into_iter()
        .filter_map(|name| Some((name, view.switch(name)?)))
        .collect()
}
