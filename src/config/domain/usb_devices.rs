//! What a guest's user holds in the hand: input devices, USB hubs and redirected USB devices, smartcards.

use super::address::{DeviceInfo, VirtioOptions};
use super::chardevs::{CharSource, read_char_source};
use super::disks::VirtioModel;
use super::view::View;
use super::word::words;

words! {
    /// An input device.
    InputType {
        Mouse = "mouse",
        Tablet = "tablet",
        Keyboard = "keyboard",
        /// A device of the host's.
        Passthrough = "passthrough",
        /// A device of the host's, shared with it.
        Evdev = "evdev",
    }
}

words! {
    /// What an input device hangs on.
    InputBus {
        Ps2 = "ps2",
        Usb = "usb",
        Virtio = "virtio",
        None = "none",
    }
}

/// `<input>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// Alias and address.
    pub info: DeviceInfo,
    /// What it is.
    pub kind: InputType,
    /// `bus=`; always there once the domain is expanded.
    pub bus: Option<InputBus>,
    /// `model=`.
    pub model: Option<VirtioModel>,
    /// `<source evdev>` or `<source dev>`.
    pub source: Option<String>,
    /// `<source grab>`: `all`.
    pub grab: Option<String>,
    /// `<source repeat>`.
    pub repeat: Option<bool>,
    /// `<source grabToggle>`.
    pub grab_toggle: Option<String>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

/// `<hub type='usb'>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hub {
    /// Alias and address.
    pub info: DeviceInfo,
}

/// `<redirdev bus='usb'>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedirectedDevice {
    /// Alias, address, place in the boot order.
    pub info: DeviceInfo,
    /// Where it comes from.
    pub source: CharSource,
}

/// `<redirfilter><usbdev>`: what may be redirected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedirectionFilter {
    /// `class=`; any without it.
    pub class: Option<u64>,
    /// `vendor=`; any without it.
    pub vendor: Option<u64>,
    /// `product=`; any without it.
    pub product: Option<u64>,
    /// `version=`; any without it.
    pub version: Option<String>,
    /// Whether it is allowed.
    pub allow: bool,
}

/// `<smartcard>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smartcard {
    /// Alias and address.
    pub info: DeviceInfo,
    /// Whose card it is.
    pub mode: SmartcardMode,
}

/// Whose card a smartcard is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SmartcardMode {
    /// The one in the host's reader.
    Host,
    /// Emulated with certificates of a database.
    HostCertificates {
        /// Three of them.
        certificates: Vec<String>,
        /// The database.
        database: Option<String>,
    },
    /// Somebody's at the other end.
    Passthrough {
        /// Where.
        source: CharSource,
    },
}

pub(super) fn read_input(view: &View<'_>) -> Option<Input> {
    let kind = view.required_word("type");
    let source = view.one("source", |source| {
        (
            source
                .attribute("evdev")
                .or_else(|| source.attribute("dev")),
            source.attribute("grab"),
            source.switch("repeat"),
            source.attribute("grabToggle"),
        )
    });
    let (source, grab, repeat, grab_toggle) = source.unwrap_or_default();
    Some(Input {
        info: view.device_info(),
        bus: view.word("bus"),
        model: view.word("model"),
        source,
        grab,
        repeat,
        grab_toggle,
        virtio: view.virtio_driver(),
        kind: kind?,
    })
}

pub(super) fn read_hub(view: &View<'_>) -> Option<Hub> {
    if view.required("type") != "usb" {
        view.error("only USB hubs exist", None);
        return None;
    }
    Some(Hub {
        info: view.device_info(),
    })
}

pub(super) fn read_redirected_device(view: &View<'_>) -> Option<RedirectedDevice> {
    if view.required("bus") != "usb" {
        view.error("only USB devices can be redirected", None);
    }
    let info = view.device_info();
    let source = read_char_source(view)?;
    Some(RedirectedDevice { info, source })
}

pub(super) fn read_redirection_filter(view: &View<'_>) -> Vec<RedirectionFilter> {
    view.each("usbdev", |device| {
        let any = |name: &'static str| {
            if device.element().get(name) == Some("-1") {
                device.ignore(&[name]);
                return None;
            }
            device.hexadecimal(name)
        };
        RedirectionFilter {
            class: any("class"),
            vendor: any("vendor"),
            product: any("product"),
            version: device
                .attribute("version")
                .filter(|version| version != "-1"),
            allow: device.switch("allow").unwrap_or(true),
        }
    })
}

pub(super) fn read_smartcard(view: &View<'_>) -> Option<Smartcard> {
    let info = view.device_info();
    let mode = match view.required("mode").as_str() {
        "host" => SmartcardMode::Host,
        "host-certificates" => SmartcardMode::HostCertificates {
            certificates: view.each("certificate", View::required_text),
            database: view.child_text("database"),
        },
        "passthrough" => SmartcardMode::Passthrough {
            source: read_char_source(view)?,
        },
        other => {
            view.error(
                format!("mode {other:?} is none of host, host-certificates, passthrough"),
                None,
            );
            view.skip();
            return None;
        }
    };
    Some(Smartcard { info, mode })
}
