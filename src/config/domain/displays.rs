//! What is seen: graphics on the host's side, video devices on the guest's.

use super::address::{DeviceInfo, VirtioOptions};
use super::view::View;
use super::word::words;

words! {
    /// How the screen is shown on the host.
    GraphicsType {
        Vnc = "vnc",
        Spice = "spice",
        Sdl = "sdl",
        EglHeadless = "egl-headless",
        Dbus = "dbus",
        Rdp = "rdp",
        Desktop = "desktop",
    }
}

/// `<graphics>`. No part of the guest: what it sees are the video devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Graphics {
    /// The line of its element.
    pub line: u32,
    /// Where it stands.
    pub path: String,
    /// How the screen is shown.
    pub kind: GraphicsType,
    /// `port=`; `None` for -1 and for `autoport`.
    pub port: Option<u16>,
    /// `tlsPort=` of SPICE; as `port`.
    pub tls_port: Option<u16>,
    /// `websocket=` of VNC; `Some(None)` if one is to be chosen.
    pub websocket: Option<Option<u16>>,
    /// `autoport=`.
    pub autoport: Option<bool>,
    /// `passwd=`.
    pub password: Option<String>,
    /// `passwdValidTo=`.
    pub password_valid_to: Option<String>,
    /// `keymap=`.
    pub keymap: Option<String>,
    /// `sharePolicy=`: `allow-exclusive`, `force-shared`, `ignore`.
    pub share_policy: Option<String>,
    /// `powerControl=` of VNC.
    pub power_control: Option<bool>,
    /// `defaultMode=` of SPICE: `secure`, `insecure`, `any`.
    pub default_mode: Option<String>,
    /// `display=` of SDL.
    pub display: Option<String>,
    /// `xauth=` of SDL.
    pub xauth: Option<String>,
    /// `fullscreen=` of SDL.
    pub is_full_screen: Option<bool>,
    /// `p2p=` of D-Bus.
    pub p2p: Option<bool>,
    /// `address=` of D-Bus.
    pub address: Option<String>,
    /// Where it listens.
    pub listens: Vec<Listen>,
    /// `<gl enable>`.
    pub gl: Option<bool>,
    /// `<gl rendernode>`.
    pub render_node: Option<String>,
    /// `<audio id>`.
    pub audio: Option<u32>,
    /// `<channel>` of SPICE: name and mode.
    pub channels: Vec<(String, String)>,
    /// `<image compression>` of SPICE.
    pub image_compression: Option<String>,
    /// `<jpeg compression>` of SPICE.
    pub jpeg_compression: Option<String>,
    /// `<zlib compression>` of SPICE.
    pub zlib_compression: Option<String>,
    /// `<playback compression>` of SPICE.
    pub playback_compression: Option<bool>,
    /// `<streaming mode>` of SPICE.
    pub streaming: Option<String>,
    /// `<mouse mode>` of SPICE.
    pub mouse: Option<String>,
    /// `<clipboard copypaste>` of SPICE.
    pub clipboard: Option<bool>,
    /// `<filetransfer enable>` of SPICE.
    pub file_transfer: Option<bool>,
}

/// Where graphics listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// At an address of the host's; at its own if there is none.
    Address(Option<String>),
    /// At the address of a network of libvirt's: its name, and the address where a running guest's XML tells it.
    Network(String, Option<String>),
    /// At a unix socket; one is made up if there is none.
    Socket(Option<String>),
    /// Nowhere.
    None,
}

words! {
    /// A video device.
    VideoModel {
        Vga = "vga",
        Cirrus = "cirrus",
        Vmvga = "vmvga",
        Qxl = "qxl",
        Virtio = "virtio",
        Bochs = "bochs",
        Ramfb = "ramfb",
        /// The guest has none.
        None = "none",
    }
}

/// `<video>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Video {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is; always there once the domain is expanded.
    pub model: Option<VideoModel>,
    /// Whether it is the primary one; exactly the first is, once the domain is expanded.
    pub is_primary: bool,
    /// `ram=` in bytes.
    pub ram: Option<u64>,
    /// `vram=` in bytes.
    pub vram: Option<u64>,
    /// `vram64=` in bytes.
    pub vram64: Option<u64>,
    /// `vgamem=` in bytes.
    pub vgamem: Option<u64>,
    /// `heads=`.
    pub heads: Option<u32>,
    /// `blob=`.
    pub blob: Option<bool>,
    /// `edid=`.
    pub edid: Option<bool>,
    /// `<acceleration accel3d>`.
    pub accel_3d: Option<bool>,
    /// `<acceleration rendernode>`.
    pub render_node: Option<String>,
    /// `<resolution>`: x and y.
    pub resolution: Option<(u32, u32)>,
    /// `<driver name>`: whether another process does it (`vhostuser`).
    pub is_vhost_user: bool,
    /// `<driver vgaconf>`: `io`, `on`, `off`.
    pub vga_configuration: Option<String>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

pub(super) fn read_graphics(view: &View<'_>) -> Option<Graphics> {
    let kind = view.required_word("type");
    view.ignore(&["connected", "multiUser", "replaceUser"]);
    view.ignore_elements(&["alias"]);
    let text = |element: &'static str, attribute: &'static str| {
        view.one_some(element, |one| one.attribute(attribute))
    };
    let port = |name: &'static str| {
        let value = view.attribute(name)?;
        match value.as_str() {
            "-1" | "0" => None,
            value => {
                let port = value.parse();
                if port.is_err() {
                    view.error(format!("{name} {value:?} is not a port"), None);
                }
                port.ok()
            }
        }
    };
    let has_websocket = view.element().get("websocket").is_some();
    let gl = view.one("gl", |gl| (gl.switch("enable"), gl.attribute("rendernode")));
    let (gl, render_node) = gl.unwrap_or_default();
    let autoport = view.switch("autoport");
    let is_chosen = autoport == Some(true);
    let mut listens = view.each_some("listen", read_listen);
    let listen = view.attribute("listen");
    let socket = view.attribute("socket");
    if listens.is_empty() {
        listens = match (socket, listen) {
            (Some(path), _) => vec![Listen::Socket(Some(path))],
            (None, Some(address)) => vec![Listen::Address(Some(address))],
            (None, None) => Vec::new(),
        };
    }
    Some(Graphics {
        line: view.line(),
        path: view.path().to_owned(),
        port: port("port").filter(|_| !is_chosen),
        tls_port: port("tlsPort").filter(|_| !is_chosen),
        websocket: has_websocket.then(|| port("websocket")),
        autoport,
        password: view.attribute("passwd"),
        password_valid_to: view.attribute("passwdValidTo"),
        keymap: view.attribute("keymap"),
        share_policy: view.attribute("sharePolicy"),
        power_control: view.switch("powerControl"),
        default_mode: view.attribute("defaultMode"),
        display: view.attribute("display"),
        xauth: view.attribute("xauth"),
        is_full_screen: view.switch("fullscreen"),
        p2p: view.switch("p2p"),
        address: view.attribute("address"),
        listens,
        gl,
        render_node,
        audio: view.one_some("audio", |audio| audio.number("id")),
        channels: view.each("channel", |channel| {
            (channel.required("name"), channel.required("mode"))
        }),
        image_compression: text("image", "compression"),
        jpeg_compression: text("jpeg", "compression"),
        zlib_compression: text("zlib", "compression"),
        playback_compression: view.one_some("playback", |playback| playback.switch("compression")),
        streaming: text("streaming", "mode"),
        mouse: text("mouse", "mode"),
        clipboard: view.one_some("clipboard", |clipboard| clipboard.switch("copypaste")),
        file_transfer: view.one_some("filetransfer", |transfer| transfer.switch("enable")),
        kind: kind?,
    })
}

fn read_listen(view: &View<'_>) -> Option<Listen> {
    match view.required("type").as_str() {
        "address" => Some(Listen::Address(view.attribute("address"))),
        "network" => Some(Listen::Network(
            view.required("network"),
            view.attribute("address"),
        )),
        "socket" => Some(Listen::Socket(view.attribute("socket"))),
        "none" => Some(Listen::None),
        other => {
            view.error(
                format!("type {other:?} is none of address, network, socket, none"),
                None,
            );
            None
        }
    }
}

pub(super) fn read_video(view: &View<'_>) -> Video {
    let driver = view.one("driver", |driver| {
        let name = driver.attribute("name");
        (
            name.as_deref() == Some("vhostuser"),
            driver.attribute("vgaconf"),
            driver.virtio_options(),
        )
    });
    let (is_vhost_user, vga_configuration, virtio) = driver.unwrap_or_default();
    let mut video = Video {
        info: view.device_info(),
        model: None,
        is_primary: false,
        ram: None,
        vram: None,
        vram64: None,
        vgamem: None,
        heads: None,
        blob: None,
        edid: None,
        accel_3d: None,
        render_node: None,
        resolution: None,
        is_vhost_user,
        vga_configuration,
        virtio,
    };
    let model = view.one("model", |model| {
        let kib = |name| {
            model
                .number::<u64>(name)
                .and_then(|kib| kib.checked_mul(1024))
        };
        let acceleration = model.one("acceleration", |acceleration| {
            acceleration.leave_out(&["accel2d"], "QEMU has no such switch");
            (
                acceleration.switch("accel3d"),
                acceleration.attribute("rendernode"),
            )
        });
        let (accel_3d, render_node) = acceleration.unwrap_or_default();
        Video {
            model: model.word("type"),
            is_primary: model.switch("primary") == Some(true),
            ram: kib("ram"),
            vram: kib("vram"),
            vram64: kib("vram64"),
            vgamem: kib("vgamem"),
            heads: model.number("heads"),
            blob: model.switch("blob"),
            edid: model.switch("edid"),
            accel_3d,
            render_node,
            resolution: model.one_some("resolution", |resolution| {
                Some((resolution.number("x")?, resolution.number("y")?))
            }),
            info: DeviceInfo::default(),
            is_vhost_user: false,
            vga_configuration: None,
            virtio,
        }
    });
    if let Some(model) = model {
        video = Video {
            info: video.info,
            is_vhost_user: video.is_vhost_user,
            vga_configuration: video.vga_configuration,
            ..model
        };
    }
    video
}
