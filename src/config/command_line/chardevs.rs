//! Serial and parallel ports, consoles, channels, and what stands behind any character device.

use super::controllers;
use super::json::{Json, Pairs};
use super::line::{Line, id};
use crate::config::domain::DeviceInfo;
use crate::config::domain::Devices;
use crate::config::domain::chardevs::{
    Channel, ChannelTarget, CharDevice, CharSource, Console, ConsoleTarget, Serial, SerialTarget,
    SocketMode, TcpProtocol,
};

/// The channel that SPICE's agent has in the guest.
const SPICE_AGENT: &str = "com.redhat.spice.0";

/// What a character device is to be called, and whose it is.
pub(super) struct Chardev<'a> {
    /// Alias, path and line of the device it is behind.
    pub(super) info: &'a DeviceInfo,
    /// What stands behind it.
    pub(super) source: &'a CharSource,
    /// The name for a socket that has no path, or for a log.
    pub(super) file: &'a str,
    /// `<log>`.
    pub(super) log: Option<&'a (String, Option<bool>)>,
    /// Whether a terminal that nobody looks at is logged.
    pub(super) is_logged: bool,
    /// What SPICE calls it.
    pub(super) spice: &'static str,
    /// Whether it is a parallel port.
    pub(super) is_parallel: bool,
}

impl<'a> Chardev<'a> {
    /// One that is not logged.
    pub(super) fn new(info: &'a DeviceInfo, source: &'a CharSource) -> Self {
        Chardev {
            info,
            source,
            file: id(info),
            log: None,
            is_logged: false,
            spice: "vdagent",
            is_parallel: false,
        }
    }

    fn of(device: &'a CharDevice) -> Self {
        Chardev {
            log: device.log.as_ref(),
            ..Chardev::new(&device.info, &device.source)
        }
    }

    fn logged(self) -> Self {
        Chardev {
            is_logged: true,
            ..self
        }
    }

    /// Adds it; its id.
    pub(super) fn add(&self, line: &mut Line<'_>) -> String {
        let name = format!("char{}", id(self.info));
        let mut value = self.backend(line, &name);
        let own = (
            format!("{}/{}.log", line.context.directory, id(self.info)),
            Some(true),
        );
        let is_terminal = matches!(self.source, CharSource::Pty { .. });
        let log = self.log.or((self.is_logged && is_terminal).then_some(&own));
        if let Some((path, append)) = log {
            value = value
                .with("logfile", path)
                .with_switch("logappend", Some(append.unwrap_or(true)));
        }
        line.pairs("chardev", value);
        name
    }

    fn backend(&self, line: &mut Line<'_>, name: &str) -> Pairs {
        let of = |kind: &str| Pairs::new(kind).with("id", name);
        match self.source {
            CharSource::Null => of("null"),
            CharSource::Vc => of("vc"),
            CharSource::Pty { .. } => of("pty"),
            CharSource::Device { path } => of(if self.is_parallel {
                "parallel"
            } else {
                "serial"
            })
            .with("path", path),
            CharSource::File { path, append } => of("file")
                .with("path", path)
                .with_switch("append", Some(append.unwrap_or(true))),
            CharSource::Pipe { path } => of("pipe").with("path", path),
            CharSource::Stdio => of("stdio"),
            CharSource::Udp {
                connect: (host, port),
                bind,
            } => {
                let value = of("udp")
                    .with("host", host.as_deref().unwrap_or("127.0.0.1"))
                    .with("port", port.as_deref().unwrap_or("0"));
                match bind {
                    Some((host, port)) => value
                        .with("localaddr", host.as_deref().unwrap_or_default())
                        .with("localport", port.as_deref().unwrap_or("0")),
                    None => value,
                }
            }
            CharSource::Tcp {
                mode,
                host,
                service,
                protocol,
                tls,
                reconnect,
            } => {
                if *tls == Some(true) || matches!(protocol, TcpProtocol::Tls | TcpProtocol::Telnets)
                {
                    line.error(
                        self.info,
                        "TLS needs certificates, which are not modelled",
                        None,
                    );
                }
                let is_telnet = *protocol == TcpProtocol::Telnet;
                let value = of("socket")
                    .with("host", host)
                    .with("port", service)
                    .with_switch("telnet", is_telnet.then_some(true));
                socket(value, *mode, *reconnect)
            }
            CharSource::Unix {
                path,
                mode,
                reconnect,
            } => {
                let made_up = format!("{}/{}.sock", line.context.directory, self.file);
                let path = path.as_deref().unwrap_or(&made_up);
                socket(of("socket").with("path", path), *mode, *reconnect)
            }
            CharSource::SpiceVmc => of("spicevmc").with("name", self.spice),
            CharSource::SpicePort { channel } => of("spiceport").with("name", channel),
            CharSource::QemuVdagent {
                clipboard,
                is_mouse_of_client,
            } => of("qemu-vdagent")
                .with("name", "vdagent")
                .with_switch("clipboard", *clipboard)
                .with_switch("mouse", *is_mouse_of_client),
            CharSource::Dbus { channel } => of("dbus").with("name", channel),
        }
    }
}

fn socket(value: Pairs, mode: SocketMode, reconnect: Option<u32>) -> Pairs {
    match mode {
        SocketMode::Bind => value.with("server", "on").with("wait", "off"),
        SocketMode::Connect => value.with_some("reconnect", reconnect),
    }
}

/// Adds serial ports, parallel ports, channels and consoles.
pub(super) fn ports(line: &mut Line<'_>, devices: &Devices) {
    for port in &devices.serials {
        serial(line, port);
    }
    for parallel in &devices.parallels {
        let chardev = Chardev {
            is_parallel: true,
            ..Chardev::of(&parallel.device).logged()
        }
        .add(line);
        let device = Json::device("isa-parallel")
            .with("chardev", chardev)
            .with_some("index", parallel.port);
        line.device(device, &parallel.device.info);
    }
    for one in &devices.channels {
        channel(line, one);
    }
    for (number, one) in devices.consoles.iter().enumerate() {
        console(line, one, number == 0 && !devices.serials.is_empty());
    }
}

fn serial(line: &mut Line<'_>, serial: &Serial) {
    let info = &serial.device.info;
    let chardev = Chardev::of(&serial.device).logged().add(line);
    let device = |driver| Json::device(driver).with("chardev", chardev);
    let isa = info.isa();
    match serial.target {
        Some(SerialTarget::Isa) | None => {
            let device = device("isa-serial")
                .with_some("index", serial.port)
                .with_some("iobase", isa.and_then(|isa| isa.iobase))
                .with_some("irq", isa.and_then(|isa| isa.irq));
            line.device(device, info);
        }
        Some(SerialTarget::Pci) => line.device(device("pci-serial"), info),
        Some(SerialTarget::Usb) => line.usb_device(device("usb-serial"), info),
        Some(SerialTarget::IsaDebug) => {
            let iobase = isa.and_then(|isa| isa.iobase);
            line.device(device("isa-debugcon").with_some("iobase", iobase), info);
        }
    }
}

/// The first console of a guest with serial ports is its first serial port.
fn console(line: &mut Line<'_>, console: &Console, is_first_serial: bool) {
    let info = &console.device.info;
    match console.target {
        Some(ConsoleTarget::Virtio) => {
            let chardev = Chardev::of(&console.device).logged().add(line);
            let device = Json::device("virtconsole").with("chardev", chardev);
            port(line, device, info);
        }
        Some(ConsoleTarget::Serial) | None if is_first_serial => {}
        Some(ConsoleTarget::Serial) | None => {
            let why = "only the first console can be a serial port";
            line.error(
                info,
                why,
                Some("make it a <serial>, or <target type='virtio'/>"),
            );
        }
    }
}

fn channel(line: &mut Line<'_>, channel: &Channel) {
    let info = &channel.device.info;
    match &channel.target {
        ChannelTarget::Virtio { name, .. } => {
            let is_spice = channel.device.source == CharSource::SpiceVmc;
            let name = name.as_deref().or(is_spice.then_some(SPICE_AGENT));
            // What looks like a path shall not leave the directory.
            let file = name.unwrap_or(id(info)).replace('/', "_");
            let chardev = Chardev {
                file: &file,
                ..Chardev::of(&channel.device)
            }
            .add(line);
            let device = Json::device("virtserialport")
                .with("chardev", chardev)
                .with_some("name", name);
            port(line, device, info);
        }
        ChannelTarget::GuestForward { address, port } => {
            let chardev = Chardev::of(&channel.device).add(line);
            let rule = format!("tcp:{address}:{port}-chardev:{chardev}");
            let rule = Json::empty().with("str", rule).into_value();
            line.netdev(Json::netdev("user", id(info)).with("guestfwd", vec![rule]));
        }
    }
}

/// Adds a port of a virtio-serial controller.
fn port(line: &mut Line<'_>, device: Json, info: &DeviceInfo) {
    // Without an address QEMU takes the first free port, as libvirt lets it for consoles.
    let device = match info.virtio_serial() {
        Some(address) => {
            let bus = controllers::virtio_serial_id(line, address.controller);
            device
                .with("bus", format!("{bus}.0"))
                .with_some("nr", address.port)
        }
        None => device,
    };
    line.device(device, info);
}
