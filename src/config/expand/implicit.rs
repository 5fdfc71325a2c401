//! What is there though nobody wrote it: balloon, USB controller, root bus, keyboard and mouse, the console of the first
//! serial port, q35's SATA and watchdog; and models and numbers where none were named.

use sha2::{Digest, Sha256};

use super::edit::{add_device, device, devices};
use super::knowledge::HostKnowledge;
use crate::config::domain::chardevs::{ConsoleTarget, SerialTarget};
use crate::config::domain::controllers::{ControllerKind, ControllerType, PciModel, ScsiModel};
use crate::config::domain::displays::GraphicsType;
use crate::config::domain::platform::{TpmBackend, WatchdogModel};
use crate::config::domain::usb_devices::{InputBus, InputType};
use crate::config::domain::{Domain, Problems, Word};
use crate::config::xml::{Document, Element};

pub(super) fn add(
    document: &mut Document,
    domain: &Domain,
    _knowledge: &HostKnowledge,
    _problems: &mut Problems,
) {
    if devices(document).is_none() {
        return;
    }
    name_disks(document, domain);
    number_controllers(document, domain);
    choose_models(document, domain);
    add_controllers(document, domain);
    name_interfaces(document, domain);
    add_console(document, domain);
    complete_ports(document);
    add_inputs(document, domain);
    add_video(document, domain);
    add_audio(document, domain);
    if domain.devices.balloon.is_none() {
        add_device(
            document,
            Element::new("memballoon").attribute("model", "virtio"),
        );
    }
    let is_itco = |watchdog: &WatchdogModel| *watchdog == WatchdogModel::Itco;
    let mut watchdogs = domain.devices.watchdogs.iter();
    if domain.is_q35() && !watchdogs.any(|watchdog| is_itco(&watchdog.model)) {
        let itco = Element::new("watchdog")
            .attribute("model", "itco")
            .attribute("action", "reset");
        add_device(document, itco);
    }
}

fn name_disks(document: &mut Document, domain: &Domain) {
    for (number, disk) in domain.devices.disks.iter().enumerate() {
        let Some(bus) = disk.bus else {
            continue;
        };
        let element = device(document, "disk", number);
        if let Some(target) = element.and_then(|disk| disk.find_mut("target"))
            && target.get("bus").is_none()
        {
            target.set("bus", bus.word());
        }
    }
}

/// A controller without an index gets the first that none of its type has.
fn number_controllers(document: &mut Document, domain: &Domain) {
    let controllers = &domain.devices.controllers;
    let mut taken: Vec<(ControllerType, u32)> = controllers
        .iter()
        .filter_map(|controller| Some((controller.kind.kind(), controller.index?)))
        .collect();
    for (number, controller) in controllers.iter().enumerate() {
        if controller.index.is_some() {
            continue;
        }
        let kind = controller.kind.kind();
        // The root bus is number 0, whether it is written or not.
        let is_root = matches!(
            controller.pci_model(),
            Some(PciModel::PciRoot | PciModel::PcieRoot)
        );
        let first = u32::from(kind == ControllerType::Pci && !is_root);
        let index = (first..).find(|index| !taken.contains(&(kind, *index)));
        let Some(index) = index else {
            continue;
        };
        taken.push((kind, index));
        if let Some(element) = device(document, "controller", number) {
            element.set("index", index);
        }
    }
}

fn choose_models(document: &mut Document, domain: &Domain) {
    for (number, controller) in domain.devices.controllers.iter().enumerate() {
        let model = match &controller.kind {
            ControllerKind::Usb { model: None, .. } => "piix3-uhci",
            ControllerKind::Scsi {
                model: None | Some(ScsiModel::Auto),
            } => "lsilogic",
            ControllerKind::Pci(pci) if pci.model.is_none() => match controller.index {
                Some(0) if domain.is_q35() => "pcie-root",
                Some(0) => "pci-root",
                _ if domain.is_q35() => "pcie-root-port",
                _ => "pci-bridge",
            },
            _ => continue,
        };
        if let Some(element) = device(document, "controller", number) {
            element.set("model", model);
        }
    }
    complete_videos(document, domain);
    for (number, input) in domain.devices.inputs.iter().enumerate() {
        if input.bus.is_some() {
            continue;
        }
        let bus = match input.kind {
            InputType::Tablet => InputBus::Usb,
            InputType::Passthrough => InputBus::Virtio,
            InputType::Evdev => InputBus::None,
            InputType::Mouse | InputType::Keyboard => InputBus::Ps2,
        };
        if let Some(element) = device(document, "input", number)
            && bus != InputBus::None
        {
            element.set("bus", bus.word());
        }
    }
    for (number, panic) in domain.devices.panics.iter().enumerate() {
        if let (None, Some(element)) = (panic.model, device(document, "panic", number)) {
            element.set("model", "isa");
        }
    }
    for (number, tpm) in domain.devices.tpms.iter().enumerate() {
        let Some(element) = device(document, "tpm", number) else {
            continue;
        };
        if tpm.model.is_none() {
            element.set(
                "model",
                if domain.is_q35() {
                    "tpm-crb"
                } else {
                    "tpm-tis"
                },
            );
        }
        if let TpmBackend::Emulator { version: None, .. } = tpm.backend
            && let Some(backend) = element.find_mut("backend")
        {
            backend.set("version", "2.0");
        }
    }
}

/// Models of video devices, and how much memory and how many heads they have.
fn complete_videos(document: &mut Document, domain: &Domain) {
    let has_primary = domain.devices.videos.iter().any(|video| video.is_primary);
    for number in 0..domain.devices.videos.len() {
        let Some(element) = device(document, "video", number) else {
            continue;
        };
        if element.find("model").is_none() {
            element.insert(0, Element::new("model"));
        }
        let Some(model) = element.find_mut("model") else {
            continue;
        };
        if model.get("type").is_none() {
            model.set("type", "cirrus");
        }
        let kind = model.get("type").unwrap_or_default().to_owned();
        let defaults: &[(&'static str, u32)] = match kind.as_str() {
            "none" => continue,
            "qxl" => &[
                ("ram", 65536),
                ("vram", 65536),
                ("vgamem", 16384),
                ("heads", 1),
            ],
            "vga" | "cirrus" | "vmvga" | "bochs" => &[("vram", 16384), ("heads", 1)],
            _ => &[("heads", 1)],
        };
        for (name, value) in defaults {
            if model.get(name).is_none() {
                model.set(name, value);
            }
        }
        if number == 0 && !has_primary {
            model.set("primary", "yes");
        }
    }
}

/// USB, q35's SATA and the root bus.
fn add_controllers(document: &mut Document, domain: &Domain) {
    let has = |kind: ControllerType, index: u32| {
        let mut controllers = domain.devices.controllers.iter();
        controllers.any(|one| {
            one.kind.kind() == kind
                && (one.index == Some(index) || one.index.is_none() && index == 0)
        })
    };
    let controller = |kind: ControllerType| {
        Element::new("controller")
            .attribute("type", kind.word())
            .attribute("index", 0)
    };
    if !domain.is_q35() && !domain.is_i440fx() {
        return;
    }
    if !has(ControllerType::Usb, 0) {
        let model = if domain.is_q35() {
            "qemu-xhci"
        } else {
            "piix3-uhci"
        };
        add_device(
            document,
            controller(ControllerType::Usb).attribute("model", model),
        );
    }
    if domain.is_q35() && !has(ControllerType::Sata, 0) {
        add_device(document, controller(ControllerType::Sata));
    }
    let is_root =
        |model: Option<PciModel>| matches!(model, Some(PciModel::PciRoot | PciModel::PcieRoot));
    let mut controllers = domain.devices.controllers.iter();
    let has_root = controllers.any(|one| is_root(one.pci_model()))
        || domain
            .devices
            .controllers
            .iter()
            .any(|one| one.kind.kind() == ControllerType::Pci && one.index == Some(0));
    if !has_root {
        let model = if domain.is_q35() {
            "pcie-root"
        } else {
            "pci-root"
        };
        add_device(
            document,
            controller(ControllerType::Pci).attribute("model", model),
        );
    }
}

/// Models, and MAC addresses: always the same for the same guest, unlike those of others.
fn name_interfaces(document: &mut Document, domain: &Domain) {
    for (number, interface) in domain.devices.interfaces.iter().enumerate() {
        let Some(element) = device(document, "interface", number) else {
            continue;
        };
        if interface.mac.is_none() {
            let identity = domain
                .uuid
                .map_or_else(|| domain.name.clone(), |uuid| uuid.to_string());
            let mac = made_up_mac(&identity, number);
            match element.find_mut("mac") {
                Some(old) => old.set("address", mac),
                None => element.insert(0, Element::new("mac").attribute("address", mac)),
            }
        }
        if interface.model.is_none() {
            match element.find_mut("model") {
                Some(old) => old.set("type", "rtl8139"),
                None => element.push(Element::new("model").attribute("type", "rtl8139")),
            }
        }
    }
}

/// In QEMU's own range.
fn made_up_mac(identity: &str, number: usize) -> String {
    let mut hash = Sha256::new();
    hash.update(identity.as_bytes());
    hash.update(b"\0mac\0");
    hash.update(number.to_string().as_bytes());
    let digest = hash.finalize();
    let byte = |at: usize| digest.get(at).copied().unwrap_or_default();
    format!("52:54:00:{:02x}:{:02x}:{:02x}", byte(0), byte(1), byte(2))
}

/// The first console is the first serial port: each makes the other.
fn add_console(document: &mut Document, domain: &Domain) {
    let serials = &domain.devices.serials;
    let consoles = &domain.devices.consoles;
    let is_serial = |target: Option<ConsoleTarget>| !matches!(target, Some(ConsoleTarget::Virtio));
    match (serials.first(), consoles.first()) {
        (None, Some(console)) if is_serial(console.target) => {
            let Some(element) = device(document, "console", 0) else {
                return;
            };
            let mut serial = element.clone();
            serial.name = "serial".into();
            serial.line = 0;
            serial.remove(|child| matches!(&*child.name, "target" | "alias" | "address"));
            let target = Element::new("target")
                .attribute("type", "isa-serial")
                .attribute("port", 0);
            serial.push(target);
            let Some(devices) = devices(document) else {
                return;
            };
            let place = devices.elements().position(|child| child.name == "console");
            devices.insert(place.unwrap_or(0), serial);
        }
        (Some(first), None) if matches!(first.target, Some(SerialTarget::Isa) | None) => {
            let Some(serial) = device(document, "serial", 0) else {
                return;
            };
            let mut console = serial.clone();
            console.name = "console".into();
            console.line = 0;
            console.remove(|child| matches!(&*child.name, "target" | "alias" | "address"));
            console.push(
                Element::new("target")
                    .attribute("type", "serial")
                    .attribute("port", 0),
            );
            let Some(devices) = devices(document) else {
                return;
            };
            let place = devices
                .elements()
                .enumerate()
                .filter(|(_, child)| child.name == "serial")
                .last();
            let place = place.map_or(0, |(place, _)| place + 1);
            devices.insert(place, console);
        }
        _ => {}
    }
}

/// Targets of serial and parallel ports and consoles.
fn complete_ports(document: &mut Document) {
    let Some(devices) = document.root.find_mut("devices") else {
        return;
    };
    for kind in ["serial", "parallel", "console"] {
        let ports = devices
            .elements_mut()
            .filter(|element| element.name == kind);
        for (number, element) in ports.enumerate() {
            if element.find("target").is_none() {
                element.push(Element::new("target"));
            }
            let has_pci = element
                .find("address")
                .and_then(|address| address.get("type"))
                == Some("pci");
            let has_usb = element
                .find("address")
                .and_then(|address| address.get("type"))
                == Some("usb");
            let Some(target) = element.find_mut("target") else {
                continue;
            };
            if kind != "parallel" && target.get("type").is_none() {
                let word = match kind {
                    "console" => "serial",
                    _ if has_pci => "pci-serial",
                    _ if has_usb => "usb-serial",
                    _ => "isa-serial",
                };
                target.set("type", word);
            }
            if target.get("port").is_none() {
                target.set("port", number);
            }
            if kind != "serial" {
                continue;
            }
            let model = match target.get("type") {
                Some("pci-serial") => "pci-serial",
                Some("usb-serial") => "usb-serial",
                Some("isa-debug") => "isa-debugcon",
                _ => "isa-serial",
            };
            if target.find("model").is_none() {
                target.push(Element::new("model").attribute("name", model));
            }
        }
    }
}

/// A PS/2 mouse and keyboard, unless the domain goes without.
fn add_inputs(document: &mut Document, domain: &Domain) {
    if domain.features.ps2 == Some(false) {
        return;
    }
    for kind in [InputType::Mouse, InputType::Keyboard] {
        let mut inputs = domain.devices.inputs.iter();
        let is_there = inputs
            .any(|input| input.kind == kind && matches!(input.bus, Some(InputBus::Ps2) | None));
        if !is_there {
            let element = Element::new("input")
                .attribute("type", kind.word())
                .attribute("bus", "ps2");
            add_device(document, element);
        }
    }
}

fn add_video(document: &mut Document, domain: &Domain) {
    if domain.devices.graphics.is_empty() || !domain.devices.videos.is_empty() {
        return;
    }
    let model = Element::new("model")
        .attribute("type", "cirrus")
        .attribute("vram", 16384)
        .attribute("heads", 1)
        .attribute("primary", "yes");
    add_device(document, Element::new("video").child(model));
}

fn add_audio(document: &mut Document, domain: &Domain) {
    let devices = &domain.devices;
    if !devices.audios.is_empty() {
        return;
    }
    let kind = match devices.graphics.first().map(|graphics| graphics.kind) {
        Some(GraphicsType::Spice) => "spice",
        Some(GraphicsType::Sdl) => "sdl",
        _ => "none",
    };
    let element = Element::new("audio")
        .attribute("id", 1)
        .attribute("type", kind);
    add_device(document, element);
}
