//! Graphics on the host's side, video devices on the guest's.

use serde_json::json;

use super::controllers::with_virtio;
use super::json::{Json, Pairs};
use super::line::Line;
use super::{QmpCommand, sound};
use crate::config::domain::Domain;
use crate::config::domain::displays::{Graphics, GraphicsType, Listen, Video, VideoModel};

/// The port of VNC display 0.
const VNC_PORT: u16 = 5900;
/// As many displays are tried where one is to be chosen.
const DISPLAYS_TRIED: u16 = 99;
/// Where graphics listen that do not say where.
const LOCAL: &str = "127.0.0.1";

/// The value of `-display`: nothing that needs a window or a terminal.
pub(super) fn display(domain: &Domain) -> String {
    let mut all = domain.devices.graphics.iter();
    let found = all.find(|it| matches!(it.kind, GraphicsType::EglHeadless | GraphicsType::Dbus));
    match found {
        Some(it) if it.kind == GraphicsType::EglHeadless => Pairs::new("egl-headless")
            .with_some("rendernode", it.render_node.as_deref())
            .write(),
        Some(it) => Pairs::new("dbus")
            .with_switch("p2p", it.p2p)
            .with_some("addr", it.address.as_deref())
            .with_switch("gl", it.gl)
            .with_some("rendernode", it.render_node.as_deref())
            .write(),
        None => "none".to_owned(),
    }
}

/// Adds the displays that others connect to.
pub(super) fn graphics(line: &mut Line<'_>, domain: &Domain) {
    for graphics in &domain.devices.graphics {
        match graphics.kind {
            GraphicsType::Vnc => vnc(line, domain, graphics),
            GraphicsType::Spice => spice(line, graphics),
            GraphicsType::EglHeadless | GraphicsType::Dbus => {}
            GraphicsType::Sdl => {
                line.warning_at(
                    &graphics.path,
                    graphics.line,
                    "no window is opened: the guest runs in the background",
                );
            }
            GraphicsType::Rdp | GraphicsType::Desktop => {
                line.error_at(
                    &graphics.path,
                    graphics.line,
                    "QEMU has no such display",
                    Some("use type='vnc'"),
                );
            }
        }
    }
}

fn vnc(line: &mut Line<'_>, domain: &Domain, graphics: &Graphics) {
    if let Some(keymap) = &graphics.keymap {
        line.option("k", keymap.as_str());
    }
    let mut value = match place(line, graphics, "vnc") {
        Place::Nowhere => return line.option("vnc", "none"),
        Place::Socket(path) => Pairs::new(&format!("unix:{path}")),
        Place::Host(host) => match graphics.port {
            None => {
                let first = line.context.first_display_port.saturating_sub(VNC_PORT);
                Pairs::new(&format!("{host}:{first}"))
                    .with("to", first.saturating_add(DISPLAYS_TRIED))
            }
            Some(port) => match port.checked_sub(VNC_PORT) {
                Some(display) => Pairs::new(&format!("{host}:{display}")),
                None => {
                    return line.error_at(
                        &graphics.path,
                        graphics.line,
                        "a VNC port is at least 5900",
                        None,
                    );
                }
            },
        },
    };
    match graphics.websocket {
        Some(Some(port)) => value.push("websocket", port),
        Some(None) => value.push("websocket", "on"),
        None => {}
    }
    if graphics.password.is_some() {
        value.push("password", "on");
    }
    value = value
        .with_some("share", graphics.share_policy.as_deref())
        .with_switch("power-control", graphics.power_control)
        .with_some("audiodev", sound::audiodev(domain, graphics.audio));
    line.pairs("vnc", value);
    password(line, graphics, "vnc");
}

fn spice(line: &mut Line<'_>, graphics: &Graphics) {
    let mut value = Pairs::new("");
    match place(line, graphics, "spice") {
        Place::Nowhere => {
            value.push("port", 0);
        }
        Place::Socket(path) => {
            value.push("unix", "on");
            value.push("addr", path);
        }
        Place::Host(host) => {
            value.push(
                "port",
                graphics.port.unwrap_or(line.context.first_display_port),
            );
            value.push("addr", host.trim_matches(['[', ']']));
        }
    }
    let wants_tls = graphics.channels.iter().any(|(_, mode)| mode == "secure");
    if graphics.tls_port.is_some()
        || wants_tls
        || graphics.default_mode.as_deref() == Some("secure")
    {
        line.error_at(
            &graphics.path,
            graphics.line,
            "TLS needs certificates, which are not modelled",
            Some("take tlsPort away"),
        );
    }
    if graphics.default_mode.as_deref() == Some("insecure") {
        value.push("plaintext-channel", "default");
    }
    for (name, _) in graphics
        .channels
        .iter()
        .filter(|(_, mode)| mode == "insecure")
    {
        value.push("plaintext-channel", name);
    }
    value = match graphics.password {
        Some(_) => value.with("disable-ticketing", "off"),
        None => value.with("disable-ticketing", "on"),
    };
    let words = [
        ("image-compression", graphics.image_compression.as_deref()),
        ("jpeg-wan-compression", graphics.jpeg_compression.as_deref()),
        (
            "zlib-glz-wan-compression",
            graphics.zlib_compression.as_deref(),
        ),
        ("streaming-video", graphics.streaming.as_deref()),
    ];
    for (name, word) in words {
        value = value.with_some(name, word);
    }
    value = value
        .with_switch("playback-compression", graphics.playback_compression)
        .with_switch(
            "agent-mouse",
            graphics.mouse.as_deref().map(|mode| mode == "client"),
        )
        .with_switch("disable-copy-paste", graphics.clipboard.map(|is_on| !is_on))
        .with_switch(
            "disable-agent-file-xfer",
            graphics.file_transfer.map(|is_on| !is_on),
        )
        .with_switch("gl", graphics.gl.filter(|is_on| *is_on))
        .with_some(
            "rendernode",
            graphics
                .render_node
                .as_deref()
                .filter(|_| graphics.gl == Some(true)),
        )
        .with("seamless-migration", "on");
    line.pairs("spice", value);
    password(line, graphics, "spice");
}

/// Passwords are told by QMP: arguments can be read by everybody.
fn password(line: &mut Line<'_>, graphics: &Graphics, protocol: &str) {
    let Some(password) = &graphics.password else {
        return;
    };
    line.qmp_commands.push(QmpCommand {
        name: "set_password",
        arguments: json!({ "protocol": protocol, "password": password }),
    });
    let Some(text) = &graphics.password_valid_to else {
        return;
    };
    let time = text.parse::<jiff::civil::DateTime>();
    let time = time.and_then(|time| time.to_zoned(jiff::tz::TimeZone::UTC));
    match time {
        Ok(time) => line.qmp_commands.push(QmpCommand {
            name: "expire_password",
            arguments: json!({ "protocol": protocol, "time": time.timestamp().as_second().to_string() }),
        }),
        Err(_) => {
            let why = format!("passwdValidTo {text:?} is no date like 2030-01-31T12:00:00");
            line.error_at(&graphics.path, graphics.line, why, None);
        }
    }
}

enum Place {
    /// An address, of IPv6 in brackets.
    Host(String),
    Socket(String),
    Nowhere,
}

/// Where a display listens: at the first place that is named.
fn place(line: &mut Line<'_>, graphics: &Graphics, file: &str) -> Place {
    let host = |address: &str| match address.contains(':') {
        true => Place::Host(format!("[{address}]")),
        false => Place::Host(address.to_owned()),
    };
    match graphics.listens.first() {
        None => host(LOCAL),
        Some(Listen::Address(address)) => host(address.as_deref().unwrap_or(LOCAL)),
        Some(Listen::Network(_, Some(address))) => host(address),
        Some(Listen::Network(name, None)) => {
            let why = format!(
                "which address the network {name:?} has only libvirt knows; it listens at {LOCAL}"
            );
            line.warning_at(&graphics.path, graphics.line, why);
            host(LOCAL)
        }
        Some(Listen::Socket(Some(path))) => Place::Socket(path.clone()),
        Some(Listen::Socket(None)) => {
            Place::Socket(format!("{}/{file}.sock", line.context.directory))
        }
        Some(Listen::None) => Place::Nowhere,
    }
}

/// Adds the video devices.
pub(super) fn videos(line: &mut Line<'_>, videos: &[Video]) {
    for (number, video) in videos.iter().enumerate() {
        let is_primary =
            video.is_primary || (number == 0 && !videos.iter().any(|video| video.is_primary));
        if let Some(device) = video_device(line, video, is_primary) {
            line.device(device, &video.info);
        }
    }
}

fn video_device(line: &mut Line<'_>, video: &Video, is_primary: bool) -> Option<Json> {
    if video.is_vhost_user {
        line.error(
            &video.info,
            "a GPU in another process is not modelled",
            None,
        );
        return None;
    }
    let mib = |size: Option<u64>| size.map(|size| size >> 20);
    let device = match (video.model?, is_primary) {
        (VideoModel::None, _) => return None,
        (VideoModel::Vga, true) => Json::device("VGA").with_some("vgamem_mb", mib(video.vram)),
        (VideoModel::Vga, false) => {
            Json::device("secondary-vga").with_some("vgamem_mb", mib(video.vram))
        }
        (VideoModel::Cirrus, _) => Json::device("cirrus-vga"),
        (VideoModel::Vmvga, _) => {
            Json::device("vmware-svga").with_some("vgamem_mb", mib(video.vram))
        }
        (VideoModel::Qxl, _) => Json::device(if is_primary { "qxl-vga" } else { "qxl" })
            .with_some("max_outputs", video.heads)
            .with_some("ram_size", video.ram)
            .with_some("vram_size", video.vram)
            .with_some("vram64_size_mb", mib(video.vram64))
            .with_some("vgamem_mb", mib(video.vgamem)),
        (VideoModel::Virtio, _) => {
            let driver = match (is_primary, video.accel_3d == Some(true)) {
                (true, false) => "virtio-vga",
                (true, true) => "virtio-vga-gl",
                (false, false) => "virtio-gpu-pci",
                (false, true) => "virtio-gpu-gl-pci",
            };
            let device = Json::device(driver)
                .with_some("max_outputs", video.heads)
                .with_some("blob", video.blob);
            with_virtio(device, video.virtio)
        }
        (VideoModel::Bochs, _) => Json::device("bochs-display").with_some("vgamem", video.vram),
        (VideoModel::Ramfb, _) => Json::device("ramfb"),
    };
    let (x, y) = video.resolution.unzip();
    Some(
        device
            .with_some("edid", video.edid)
            .with_some("xres", x)
            .with_some("yres", y),
    )
}
