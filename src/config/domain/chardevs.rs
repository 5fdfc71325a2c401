//! Character devices: serial and parallel ports, consoles, channels.

use super::address::DeviceInfo;
use super::view::View;
use super::word::words;

words! {
    /// What stands behind a character device.
    CharType {
        Null = "null",
        Vc = "vc",
        Pty = "pty",
        Dev = "dev",
        File = "file",
        Pipe = "pipe",
        Stdio = "stdio",
        Udp = "udp",
        Tcp = "tcp",
        Unix = "unix",
        SpiceVmc = "spicevmc",
        SpicePort = "spiceport",
        Nmdm = "nmdm",
        QemuVdagent = "qemu-vdagent",
        Dbus = "dbus",
    }
}

words! {
    /// Who waits at a socket.
    SocketMode {
        /// QEMU does.
        Bind = "bind",
        /// QEMU connects.
        Connect = "connect",
    }
}

words! {
    /// What is spoken over TCP.
    TcpProtocol {
        Raw = "raw",
        Telnet = "telnet",
        Telnets = "telnets",
        Tls = "tls",
    }
}

/// What stands behind a character device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CharSource {
    /// Nothing.
    Null,
    /// QEMU's own window.
    Vc,
    /// A new pseudo terminal.
    Pty {
        /// The one it was the last time.
        path: Option<String>,
    },
    /// A device of the host's.
    Device {
        /// Its path.
        path: String,
    },
    /// A file.
    File {
        /// Its path.
        path: String,
        /// `append=`.
        append: Option<bool>,
    },
    /// Named pipes.
    Pipe {
        /// Their path.
        path: String,
    },
    /// QEMU's own standard input and output.
    Stdio,
    /// UDP.
    Udp {
        /// Where it sends to: host and port.
        connect: (Option<String>, Option<String>),
        /// Where it listens.
        bind: Option<(Option<String>, Option<String>)>,
    },
    /// TCP.
    Tcp {
        /// Who waits.
        mode: SocketMode,
        /// The host.
        host: String,
        /// The port, or its name.
        service: String,
        /// What is spoken.
        protocol: TcpProtocol,
        /// `tls=`.
        tls: Option<bool>,
        /// `<reconnect>` in seconds.
        reconnect: Option<u32>,
    },
    /// A unix socket.
    Unix {
        /// Its path; `None` if one is to be made up.
        path: Option<String>,
        /// Who waits.
        mode: SocketMode,
        /// `<reconnect>` in seconds.
        reconnect: Option<u32>,
    },
    /// The SPICE agent's channel or a USB redirection.
    SpiceVmc,
    /// A port of SPICE's.
    SpicePort {
        /// Its name.
        channel: String,
    },
    /// QEMU plays the SPICE agent's client.
    QemuVdagent {
        /// `<clipboard copypaste>`.
        clipboard: Option<bool>,
        /// `<mouse mode>`: `client` is true.
        is_mouse_of_client: Option<bool>,
    },
    /// D-Bus.
    Dbus {
        /// The channel's name.
        channel: String,
    },
}

/// What every character device has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CharDevice {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What stands behind it.
    pub source: CharSource,
    /// `<log>`: the file, and whether it is added to.
    pub log: Option<(String, Option<bool>)>,
}

/// `<serial>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serial {
    /// What every character device has.
    pub device: CharDevice,
    /// `<target type>`; `isa-serial` without it on x86. Always there once the domain is expanded.
    pub target: Option<SerialTarget>,
    /// `<target><model name>`; always there once the domain is expanded.
    pub model: Option<String>,
    /// `<target port>`; always there once the domain is expanded.
    pub port: Option<u32>,
}

words! {
    /// What a serial port hangs on.
    SerialTarget {
        Isa = "isa-serial",
        Pci = "pci-serial",
        Usb = "usb-serial",
        IsaDebug = "isa-debug",
    }
}

/// `<parallel>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parallel {
    /// What every character device has.
    pub device: CharDevice,
    /// `<target port>`; always there once the domain is expanded.
    pub port: Option<u32>,
}

/// `<console>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Console {
    /// What every character device has.
    pub device: CharDevice,
    /// `<target type>`; serial without it. Always there once the domain is expanded.
    pub target: Option<ConsoleTarget>,
    /// `<target port>`; always there once the domain is expanded.
    pub port: Option<u32>,
}

words! {
    /// What a console is.
    ConsoleTarget {
        /// The first serial port; no device of its own.
        Serial = "serial",
        Virtio = "virtio",
    }
}

/// `<channel>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    /// What every character device has.
    pub device: CharDevice,
    /// What it is to the guest.
    pub target: ChannelTarget,
}

/// What a channel is to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelTarget {
    /// A named port of virtio-serial.
    Virtio {
        /// `org.qemu.guest_agent.0`.
        name: Option<String>,
        /// Whether somebody in the guest had it open.
        is_connected: Option<bool>,
    },
    /// An address in QEMU's user network.
    GuestForward {
        /// The address.
        address: String,
        /// The port.
        port: String,
    },
}

impl CharSource {
    /// Path, mode and seconds until a new try, of a `<source>` that is a unix socket.
    pub(super) fn read_unix(source: &View<'_>) -> (String, SocketMode, Option<u32>) {
        source.ignore_elements(&["seclabel"]);
        let kind = source.attribute("type");
        if kind.as_deref().is_some_and(|kind| kind != "unix") {
            source.error("only unix sockets can be used here", None);
        }
        (
            source.required("path"),
            read_unix_mode(source),
            source.one_some("reconnect", read_reconnect),
        )
    }

    /// Its word in XML.
    pub fn kind(&self) -> CharType {
        match self {
            CharSource::Null => CharType::Null,
            CharSource::Vc => CharType::Vc,
            CharSource::Pty { .. } => CharType::Pty,
            CharSource::Device { .. } => CharType::Dev,
            CharSource::File { .. } => CharType::File,
            CharSource::Pipe { .. } => CharType::Pipe,
            CharSource::Stdio => CharType::Stdio,
            CharSource::Udp { .. } => CharType::Udp,
            CharSource::Tcp { .. } => CharType::Tcp,
            CharSource::Unix { .. } => CharType::Unix,
            CharSource::SpiceVmc => CharType::SpiceVmc,
            CharSource::SpicePort { .. } => CharType::SpicePort,
            CharSource::QemuVdagent { .. } => CharType::QemuVdagent,
            CharSource::Dbus { .. } => CharType::Dbus,
        }
    }
}

/// Sockets of vhost-user are QEMU's as `server`, somebody else's as `client`.
fn read_unix_mode(source: &View<'_>) -> SocketMode {
    let mode = match source.element().get("mode") {
        Some("server") => SocketMode::Bind,
        Some("client") => SocketMode::Connect,
        _ => return source.word("mode").unwrap_or(SocketMode::Connect),
    };
    source.ignore(&["mode"]);
    mode
}

fn read_reconnect(view: &View<'_>) -> Option<u32> {
    let timeout = view.number("timeout");
    if view.switch("enabled") == Some(false) {
        return None;
    }
    timeout
}

/// Reads `type=`, `<source>`, `<protocol>` and `<log>`, with which any element can have a character device behind it.
pub(super) fn read_char_source(view: &View<'_>) -> Option<CharSource> {
    let kind = view.required_word::<CharType>("type");
    // `tty=` is what old libvirt wrote beside `<source path>`.
    view.ignore(&["tty"]);
    let no_source = || {
        view.error("it needs a <source>", None);
        None
    };
    let path = |name: &'static str| {
        view.one("source", |source| {
            source.ignore_elements(&["seclabel"]);
            source.required(name)
        })
        .or_else(no_source)
    };
    match kind? {
        CharType::Null => Some(CharSource::Null),
        CharType::Vc => Some(CharSource::Vc),
        CharType::Pty => Some(CharSource::Pty {
            path: view.one_some("source", |source| {
                source.ignore_elements(&["seclabel"]);
                source.attribute("path")
            }),
        }),
        CharType::Dev => Some(CharSource::Device {
            path: path("path")?,
        }),
        CharType::Pipe => Some(CharSource::Pipe {
            path: path("path")?,
        }),
        CharType::File => {
            let source = view.one("source", |source| {
                source.ignore_elements(&["seclabel"]);
                (source.required("path"), source.switch("append"))
            });
            let (path, append) = source.or_else(|| {
                view.error("it needs a <source>", None);
                None
            })?;
            Some(CharSource::File { path, append })
        }
        CharType::Stdio => Some(CharSource::Stdio),
        CharType::Udp => read_udp(view),
        CharType::Tcp => read_tcp(view),
        CharType::Unix => {
            let source = view.one("source", |source| {
                source.ignore_elements(&["seclabel"]);
                (
                    source.attribute("path"),
                    source.word("mode").unwrap_or(SocketMode::Connect),
                    source.one_some("reconnect", read_reconnect),
                )
            });
            let (path, mode, reconnect) = source.unwrap_or((None, SocketMode::Bind, None));
            Some(CharSource::Unix {
                path,
                mode,
                reconnect,
            })
        }
        CharType::SpiceVmc => Some(CharSource::SpiceVmc),
        CharType::SpicePort => Some(CharSource::SpicePort {
            channel: path("channel")?,
        }),
        CharType::Dbus => Some(CharSource::Dbus {
            channel: path("channel")?,
        }),
        CharType::QemuVdagent => {
            let source = view.one("source", |source| {
                let clipboard =
                    source.one_some("clipboard", |clipboard| clipboard.switch("copypaste"));
                let mouse = source.one_some("mouse", |mouse| mouse.attribute("mode"));
                (clipboard, mouse.map(|mode| mode == "client"))
            });
            let (clipboard, is_mouse_of_client) = source.unwrap_or_default();
            Some(CharSource::QemuVdagent {
                clipboard,
                is_mouse_of_client,
            })
        }
        CharType::Nmdm => {
            view.error(
                "null modem devices are FreeBSD's",
                Some("use type='pty' or type='unix'"),
            );
            None
        }
    }
}

fn read_udp(view: &View<'_>) -> Option<CharSource> {
    let ends = view.each("source", |source| {
        let is_bind = source.word::<SocketMode>("mode") == Some(SocketMode::Bind);
        (
            is_bind,
            (source.attribute("host"), source.attribute("service")),
        )
    });
    let mut connect = (None, None);
    let mut bind = None;
    for (is_bind, end) in ends {
        if is_bind {
            bind = Some(end);
        } else {
            connect = end;
        }
    }
    Some(CharSource::Udp { connect, bind })
}

fn read_tcp(view: &View<'_>) -> Option<CharSource> {
    let protocol = view.one_some("protocol", |protocol| protocol.required_word("type"));
    let source = view.one("source", |source| {
        source.ignore(&["tlsFromConfig"]);
        CharSource::Tcp {
            mode: source.word("mode").unwrap_or(SocketMode::Connect),
            host: source.required("host"),
            service: source.required("service"),
            protocol: protocol.unwrap_or(TcpProtocol::Raw),
            tls: source.switch("tls"),
            reconnect: source.one_some("reconnect", read_reconnect),
        }
    });
    if source.is_none() {
        view.error("it needs a <source>", None);
    }
    source
}

fn read_device(view: &View<'_>) -> Option<CharDevice> {
    let info = view.device_info();
    let log = view.one("log", |log| (log.required("file"), log.switch("append")));
    let Some(source) = read_char_source(view) else {
        view.skip();
        return None;
    };
    Some(CharDevice { info, source, log })
}

pub(super) fn read_serial(view: &View<'_>) -> Option<Serial> {
    let device = read_device(view)?;
    let target = view.one("target", |target| {
        let model = target.one_some("model", |model| model.attribute("name"));
        (target.word("type"), model, target.number("port"))
    });
    let (target, model, port) = target.unwrap_or_default();
    Some(Serial {
        device,
        target,
        model,
        port,
    })
}

pub(super) fn read_parallel(view: &View<'_>) -> Option<Parallel> {
    let device = read_device(view)?;
    Some(Parallel {
        device,
        port: view.one_some("target", |target| {
            target.ignore(&["type"]);
            target.number("port")
        }),
    })
}

pub(super) fn read_console(view: &View<'_>) -> Option<Console> {
    let device = read_device(view)?;
    let target = view.one("target", |target| {
        (target.word("type"), target.number("port"))
    });
    let (target, port) = target.unwrap_or_default();
    Some(Console {
        device,
        target,
        port,
    })
}

pub(super) fn read_channel(view: &View<'_>) -> Option<Channel> {
    let device = read_device(view)?;
    let target = view.one_some("target", |target| match target.required("type").as_str() {
        "virtio" => {
            let state = target.attribute("state");
            Some(ChannelTarget::Virtio {
                name: target.attribute("name"),
                is_connected: state.map(|state| state == "connected"),
            })
        }
        "guestfwd" => Some(ChannelTarget::GuestForward {
            address: target.required("address"),
            port: target.required("port"),
        }),
        other => {
            target.error(format!("type {other:?} is none of virtio, guestfwd"), None);
            target.skip();
            None
        }
    });
    if view.element().find("target").is_none() {
        view.error("a channel needs a <target>", None);
    }
    Some(Channel {
        device,
        target: target?,
    })
}
