//! Input devices, USB hubs and redirected USB devices, smartcards.

use super::chardevs::Chardev;
use super::controllers::virtio_device;
use super::json::Json;
use super::line::{Line, id};
use crate::config::domain::Devices;
use crate::config::domain::usb_devices::{
    Hub, Input, InputBus, InputType, RedirectionFilter, Smartcard, SmartcardMode,
};

/// Adds the hubs, those that others hang on first.
pub(super) fn hubs(line: &mut Line<'_>, hubs: &[Hub]) {
    let mut hubs: Vec<&Hub> = hubs.iter().collect();
    hubs.sort_by_key(|hub| hub.info.usb().map_or(0, |address| address.port.len()));
    for hub in hubs {
        line.usb_device(Json::device("usb-hub"), &hub.info);
    }
}

/// Adds the input devices; those on PS/2 are part of the machine.
pub(super) fn inputs(line: &mut Line<'_>, inputs: &[Input]) {
    for input in inputs {
        let source = input.source.as_deref();
        match (input.kind, input.bus) {
            (InputType::Evdev, _) => {
                let object = Json::object("input-linux", id(&input.info))
                    .with_some("evdev", source)
                    .with_some("repeat", input.repeat)
                    .with_some("grab_all", input.grab.as_deref().map(|grab| grab == "all"))
                    .with_some("grab-toggle", input.grab_toggle.as_deref());
                line.object(object);
            }
            (InputType::Passthrough, _) => {
                let device = virtio_device("virtio-input-host", input.model, input.virtio);
                line.device(device.with_some("evdev", source), &input.info);
            }
            (_, Some(InputBus::Ps2 | InputBus::None) | None) => {}
            (kind, Some(InputBus::Usb)) => {
                let driver = match kind {
                    InputType::Keyboard => "usb-kbd",
                    InputType::Tablet => "usb-tablet",
                    _ => "usb-mouse",
                };
                line.usb_device(Json::device(driver), &input.info);
            }
            (kind, Some(InputBus::Virtio)) => {
                let name = match kind {
                    InputType::Keyboard => "virtio-keyboard",
                    InputType::Tablet => "virtio-tablet",
                    _ => "virtio-mouse",
                };
                line.device(virtio_device(name, input.model, input.virtio), &input.info);
            }
        }
    }
}

/// Adds the USB devices that come from elsewhere.
pub(super) fn redirected(line: &mut Line<'_>, devices: &Devices) {
    let rules: Vec<String> = devices.redirection_filter.iter().filter_map(rule).collect();
    if rules.len() < devices.redirection_filter.len() {
        line.error_at(
            "domain/devices/redirfilter",
            devices.line,
            "the version of a device is two numbers with a dot between",
            None,
        );
    }
    let filter = (!rules.is_empty()).then(|| rules.join("|"));
    for device in &devices.redirected {
        let chardev = Chardev {
            spice: "usbredir",
            ..Chardev::new(&device.info, &device.source)
        }
        .add(line);
        let device_json = Json::device("usb-redir")
            .with("chardev", chardev)
            .with_some("filter", filter.as_deref());
        line.usb_device(device_json, &device.info);
    }
}

/// `class:vendor:product:version:allow`, -1 being any.
fn rule(filter: &RedirectionFilter) -> Option<String> {
    let any = |number: Option<u64>, width: usize| match number {
        Some(number) => format!("0x{number:0width$x}"),
        None => "-1".to_owned(),
    };
    let version = match &filter.version {
        Some(version) => {
            let (major, minor) = version.split_once('.')?;
            let (major, minor): (u8, u8) = (major.parse().ok()?, minor.parse().ok()?);
            format!("0x{major:02}{minor:02}")
        }
        None => "-1".to_owned(),
    };
    Some(format!(
        "{}:{}:{}:{version}:{}",
        any(filter.class, 2),
        any(filter.vendor, 4),
        any(filter.product, 4),
        u8::from(filter.allow)
    ))
}

/// Adds the smartcards.
pub(super) fn smartcards(line: &mut Line<'_>, smartcards: &[Smartcard]) {
    for smartcard in smartcards {
        let info = &smartcard.info;
        let device = match &smartcard.mode {
            SmartcardMode::Host => {
                Json::device("ccid-card-emulated").with("backend", "nss-emulated")
            }
            SmartcardMode::HostCertificates {
                certificates,
                database,
            } => {
                if certificates.len() != 3 {
                    line.error(info, "it needs three certificates", None);
                }
                let device = Json::device("ccid-card-emulated")
                    .with("backend", "certificates")
                    .with("db", database.as_deref().unwrap_or("/etc/pki/nssdb"));
                (1..)
                    .zip(certificates)
                    .fold(device, |device, (number, certificate)| {
                        device.with(&format!("cert{number}"), certificate.as_str())
                    })
            }
            SmartcardMode::Passthrough { source } => {
                let chardev = Chardev {
                    spice: "smartcard",
                    ..Chardev::new(info, source)
                }
                .add(line);
                Json::device("ccid-card-passthru").with("chardev", chardev)
            }
        };
        let reader = info.ccid().map_or(0, |address| address.controller);
        line.device(device.with("bus", format!("ccid{reader}.0")), info);
    }
}
