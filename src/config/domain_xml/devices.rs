//! `<devices>`.

use std::collections::BTreeMap;

use super::Story;
use crate::config::properties::Properties;
use crate::config::resources::{Resource, ResourceKind};
use crate::config::xml::Element;

/// A `-device` argument.
pub(super) type Device = (usize, Properties);

impl Story<'_> {
    pub(super) fn devices(&mut self) -> Element {
        let emulator = Element::with_text("emulator", &self.facts.emulator);
        let disks = self.disks();
        let controllers = self.controllers();
        let interfaces = self.interfaces();
        let ports = self.ports();
        let inputs = self.simple("input", &INPUTS, |element, _| element);
        let graphics = self.graphics();
        let videos = self.videos();
        let rngs = self.rngs();
        let balloon = self.balloon();
        Element::new("devices")
            .child(emulator)
            .children(disks)
            .children(controllers)
            .children(interfaces)
            .children(ports)
            .children(inputs)
            .children(graphics)
            .children(videos)
            .children(rngs)
            .child(balloon)
    }

    fn all_devices(&self) -> Vec<Device> {
        let devices = self.arguments.options("device");
        devices
            .map(|(index, device)| (index, device.properties()))
            .collect()
    }

    pub(super) fn device_with(&self, key: &str, value: &str) -> Option<Device> {
        let mut devices = self.all_devices().into_iter();
        devices.find(|(_, device)| device.get(key).as_deref() == Some(value))
    }

    fn controllers(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        let mut indexes: BTreeMap<&'static str, u32> = BTreeMap::new();
        let mut has_usb = self.take("usb").is_some();
        if has_usb {
            found.push(
                Element::new("controller")
                    .attribute("type", "usb")
                    .attribute("index", 0),
            );
            indexes.insert("usb", 1);
        }
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let Some((_, kind, model)) = CONTROLLERS.iter().find(|known| known.0 == driver) else {
                continue;
            };
            has_usb |= *kind == "usb";
            let first = u32::from(*kind == "pci" || (*kind == "sata" && self.is_q35()));
            let number = indexes.entry(kind).or_insert(first);
            let element = Element::new("controller")
                .attribute("type", kind)
                .attribute("index", *number)
                .attribute_if("model", Some(*model).filter(|model| !model.is_empty()));
            *number += 1;
            let target = device.get_any(&["chassis", "port"]).map(|_| {
                Element::new("target")
                    .attribute_if("chassis", device.get("chassis"))
                    .attribute_if("port", device.get("port"))
            });
            found.push(
                element
                    .children(target)
                    .children(alias(&device))
                    .children(self.address(&device)),
            );
            self.tell(
                index,
                &device,
                &[
                    "driver",
                    "id",
                    "bus",
                    "addr",
                    "multifunction",
                    "chassis",
                    "port",
                ],
            );
        }
        if !has_usb {
            let none = Element::new("controller")
                .attribute("type", "usb")
                .attribute("index", 0);
            found.push(none.attribute("model", "none"));
        }
        found
    }

    fn interfaces(&mut self) -> Vec<Element> {
        let resources = self.resources;
        let mut found = Vec::new();
        for resource in resources.of(ResourceKind::Nic) {
            let Some(index) = resource.argument else {
                continue;
            };
            let Some(argument) = self.arguments.items.get(index) else {
                continue;
            };
            let (kind, source) = match resource.backend.kind.as_str() {
                "user" => ("user", None),
                "bridge" => (
                    "bridge",
                    Some(
                        Element::new("source")
                            .attribute_if("bridge", resource.backend.interface.as_ref()),
                    ),
                ),
                "tap" => ("ethernet", None),
                _ => continue,
            };
            let net = argument.properties();
            let device = match argument.name() {
                Some("netdev") => match self.device_with("netdev", &resource.id) {
                    Some(device) => Some(device),
                    None => continue,
                },
                _ => None,
            };
            let frontend = device.as_ref().map_or(&net, |(_, device)| device);
            let model = frontend
                .get_any(&["driver", "model"])
                .map(|model| nic_model(&model).to_owned());
            let target = resource
                .backend
                .interface
                .as_ref()
                .filter(|_| kind == "ethernet");
            let mac = frontend.get_any(&["mac", "macaddr"]);
            found.push(
                Element::new("interface")
                    .attribute("type", kind)
                    .children(mac.map(|mac| Element::new("mac").attribute("address", mac)))
                    .children(source)
                    .children(target.map(|name| {
                        Element::new("target")
                            .attribute("dev", name)
                            .attribute("managed", "no")
                    }))
                    .children(model.map(|model| Element::new("model").attribute("type", model)))
                    .children(boot_order(frontend))
                    .children(alias(frontend).filter(|_| device.is_some()))
                    .children(self.address(frontend).filter(|_| device.is_some())),
            );
            self.tell(
                index,
                &net,
                &["type", "id", "br", "ifname", "model", "mac", "macaddr"],
            );
            if let Some((index, device)) = device {
                self.tell(
                    index,
                    &device,
                    &["driver", "id", "netdev", "mac", "bus", "addr", "bootindex"],
                );
            }
        }
        found
    }

    /// Serial and parallel ports and consoles.
    fn ports(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        for (option, element) in [("serial", "serial"), ("parallel", "parallel")] {
            let ports: Vec<(usize, String)> = self
                .arguments
                .options(option)
                .map(|(index, argument)| (index, argument.value().unwrap_or_default().to_owned()))
                .collect();
            for (number, (index, value)) in ports.into_iter().enumerate() {
                let named = value.strip_prefix("chardev:").map(str::to_owned);
                let name = named.unwrap_or_else(|| format!("{option}{number}"));
                let port = Element::new("target").attribute("port", number);
                if let Some(written) = self.port(element, &name, port) {
                    self.told.insert(index);
                    found.push(written);
                }
            }
        }
        if self.arguments.has_implicit_terminal() {
            let port = Element::new("target").attribute("port", 0);
            found.extend(self.port("serial", "serial0", port));
        }
        for (index, device) in self.all_devices() {
            let (element, target) = match device.get("driver").as_deref() {
                Some("isa-serial") => (
                    "serial",
                    Element::new("target").attribute("type", "isa-serial"),
                ),
                Some("virtconsole") => (
                    "console",
                    Element::new("target").attribute("type", "virtio"),
                ),
                _ => continue,
            };
            let Some(chardev) = device.get("chardev") else {
                continue;
            };
            if let Some(written) = self.port(element, &chardev, target) {
                found.push(written.children(alias(&device)));
                self.tell(index, &device, &["driver", "id", "chardev", "index"]);
            }
        }
        found
    }

    fn port(&mut self, element: &'static str, name: &str, target: Element) -> Option<Element> {
        let resource = self.resources.find(ResourceKind::Chardev, name)?;
        let (kind, source) = chardev_source(resource)?;
        if let Some(index) = resource.argument
            && let Some(argument) = self.arguments.items.get(index)
            && argument.name() == Some("chardev")
        {
            let known = [
                "backend", "id", "path", "host", "port", "server", "wait", "append",
            ];
            self.tell(index, &argument.properties(), &known);
        }
        Some(
            Element::new(element)
                .attribute("type", kind)
                .children(source)
                .child(target),
        )
    }

    fn graphics(&mut self) -> Vec<Element> {
        let resources = self.resources;
        let mut found = Vec::new();
        for resource in resources.of(ResourceKind::Display) {
            let Some(index) = resource.argument else {
                continue;
            };
            let port = resource
                .backend
                .listens
                .first()
                .and_then(|listen| listen.rsplit_once(':'));
            let element = Element::new("graphics").attribute("type", &resource.backend.kind);
            let element = match (&resource.backend.path, port) {
                (Some(path), _) => element.child(
                    Element::new("listen")
                        .attribute("type", "socket")
                        .attribute("socket", path),
                ),
                (None, Some((host, port))) => {
                    let host = host.strip_prefix("tcp:").unwrap_or(host);
                    let host = if host.is_empty() { "0.0.0.0" } else { host };
                    let listen = Element::new("listen")
                        .attribute("type", "address")
                        .attribute("address", host);
                    element
                        .attribute("port", port)
                        .attribute("autoport", "no")
                        .child(listen)
                }
                (None, None) => continue,
            };
            let Some(argument) = self.arguments.items.get(index) else {
                continue;
            };
            self.tell(
                index,
                &argument.properties(),
                &["vnc", "type", "port", "addr", "unix"],
            );
            found.push(element);
        }
        found
    }

    /// Without `-nodefaults` and `-vga` QEMU has a standard VGA, unless a VGA is among the devices.
    fn videos(&mut self) -> Vec<Element> {
        let video = |model: &str| {
            Element::new("video").child(Element::new("model").attribute("type", model))
        };
        let default = if self.arguments.has("nodefaults") {
            "none"
        } else {
            "std"
        };
        let vga = self.arguments.last_value("vga").unwrap_or(default);
        let vga = VGAS
            .iter()
            .find(|known| known.0 == vga)
            .map(|known| known.1);
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            if let Some((_, model)) = VIDEOS.iter().find(|known| known.0 == driver) {
                let written = video(model).children(alias(&device));
                found.push(written.children(self.address(&device)));
                self.tell(index, &device, &["driver", "id", "bus", "addr"]);
            }
        }
        let is_given = self.arguments.has("vga");
        match vga {
            Some("none") if found.is_empty() => found.push(video("none")),
            Some("none") | None => {}
            Some(model) if is_given || found.is_empty() => found.insert(0, video(model)),
            Some(_) => {}
        }
        if is_given && vga.is_some() {
            self.take("vga");
        }
        found
    }

    fn rngs(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let object = device.get("rng").and_then(|id| self.object(&id));
            let (true, Some((object_index, object))) = (driver.starts_with("virtio-rng"), object)
            else {
                continue;
            };
            let backend = match object.get("qom-type").as_deref() {
                Some("rng-builtin") => Element::new("backend").attribute("model", "builtin"),
                Some("rng-random") => {
                    let path = object
                        .get("filename")
                        .unwrap_or_else(|| "/dev/urandom".to_owned());
                    Element::with_text("backend", path).attribute("model", "random")
                }
                _ => continue,
            };
            let rng = Element::new("rng")
                .attribute("model", "virtio")
                .child(backend);
            found.push(rng.children(alias(&device)).children(self.address(&device)));
            self.tell(index, &device, &["driver", "id", "rng", "bus", "addr"]);
            self.tell(object_index, &object, &["qom-type", "id", "filename"]);
        }
        found
    }

    fn object(&self, id: &str) -> Option<Device> {
        let objects = self.arguments.options("object");
        let mut objects = objects.map(|(index, object)| (index, object.properties()));
        objects.find(|(_, object)| object.get("id").as_deref() == Some(id))
    }

    /// A PCI address: `addr=0x4` or `addr=2.1` on the root bus or behind a controller that has an id.
    pub(super) fn address(&self, device: &Properties) -> Option<Element> {
        let addr = device.get("addr")?;
        let (slot, function) = addr.split_once('.').unwrap_or((&addr, "0"));
        let slot = u8::from_str_radix(slot.trim_start_matches("0x"), 16).ok()?;
        let function = u8::from_str_radix(function.trim_start_matches("0x"), 16).ok()?;
        let bus = self.pci_bus(device.get("bus").as_deref().unwrap_or("pci.0"))?;
        let multifunction = device.is_on("multifunction").then_some("on");
        let written = Element::new("address")
            .attribute("type", "pci")
            .attribute("domain", "0x0000")
            .attribute("bus", format!("{bus:#04x}"))
            .attribute("slot", format!("{slot:#04x}"))
            .attribute("function", format!("{function:#x}"));
        Some(written.attribute_if("multifunction", multifunction))
    }

    /// libvirt's number of a PCI bus: 0 for the root bus, else the index of the controller with that id.
    fn pci_bus(&self, name: &str) -> Option<usize> {
        if matches!(name, "pci.0" | "pcie.0") {
            return Some(0);
        }
        let devices = self.all_devices().into_iter();
        let mut controllers = devices.filter(|(_, device)| {
            let driver = device.get("driver").unwrap_or_default();
            CONTROLLERS
                .iter()
                .any(|known| known.0 == driver && known.1 == "pci")
        });
        let found = controllers.position(|(_, device)| device.get("id").as_deref() == Some(name));
        found?.checked_add(1)
    }

    /// libvirt adds a balloon unless it is told not to.
    fn balloon(&mut self) -> Element {
        let found = self.simple("memballoon", &BALLOONS, |element, _| element);
        let none = Element::new("memballoon").attribute("model", "none");
        found.into_iter().next().unwrap_or(none)
    }

    /// Devices that need no more than a row of a table.
    fn simple(
        &mut self,
        element: &'static str,
        table: &[Row],
        finish: impl Fn(Element, &Properties) -> Element,
    ) -> Vec<Element> {
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let Some((_, attributes)) = table.iter().find(|row| row.0 == driver) else {
                continue;
            };
            let written = attributes
                .iter()
                .fold(Element::new(element), |written, (name, value)| {
                    written.attribute(name, value)
                });
            let written = written
                .children(alias(&device))
                .children(self.address(&device));
            found.push(finish(written, &device));
            self.tell(index, &device, &["driver", "id", "bus", "addr"]);
        }
        found
    }
}

/// A driver and the attributes of its element.
type Row = (&'static str, &'static [(&'static str, &'static str)]);

const INPUTS: [Row; 3] = [
    ("usb-tablet", &[("type", "tablet"), ("bus", "usb")]),
    ("usb-mouse", &[("type", "mouse"), ("bus", "usb")]),
    ("usb-kbd", &[("type", "keyboard"), ("bus", "usb")]),
];

const BALLOONS: [Row; 2] = [
    ("virtio-balloon-pci", &[("model", "virtio")]),
    ("virtio-balloon", &[("model", "virtio")]),
];

const CONTROLLERS: [(&str, &str, &str); 12] = [
    ("pcie-root-port", "pci", "pcie-root-port"),
    ("pci-bridge", "pci", "pci-bridge"),
    ("pcie-pci-bridge", "pci", "pcie-to-pci-bridge"),
    ("qemu-xhci", "usb", "qemu-xhci"),
    ("nec-usb-xhci", "usb", "nec-xhci"),
    ("piix3-usb-uhci", "usb", "piix3-uhci"),
    ("usb-ehci", "usb", "ehci"),
    ("ahci", "sata", ""),
    ("virtio-scsi-pci", "scsi", "virtio-scsi"),
    ("lsi", "scsi", "lsilogic"),
    ("virtio-serial-pci", "virtio-serial", ""),
    ("virtio-serial", "virtio-serial", ""),
];

const VGAS: [(&str, &str); 6] = [
    ("std", "vga"),
    ("cirrus", "cirrus"),
    ("vmware", "vmvga"),
    ("qxl", "qxl"),
    ("virtio", "virtio"),
    ("none", "none"),
];

const VIDEOS: [(&str, &str); 7] = [
    ("VGA", "vga"),
    ("cirrus-vga", "cirrus"),
    ("vmware-svga", "vmvga"),
    ("qxl-vga", "qxl"),
    ("virtio-vga", "virtio"),
    ("virtio-gpu-pci", "virtio"),
    ("bochs-display", "bochs"),
];

fn nic_model(driver: &str) -> &str {
    match driver {
        "virtio-net-pci" | "virtio-net" => "virtio",
        other => other,
    }
}

pub(super) fn boot_order(device: &Properties) -> Option<Element> {
    let order = device.get("bootindex")?.parse::<u32>().ok()?;
    // libvirt counts from 1, QEMU from 0.
    Some(Element::new("boot").attribute("order", order.saturating_add(1)))
}

/// libvirt takes an id of somebody else's choice only with this prefix.
pub(super) fn alias(device: &Properties) -> Option<Element> {
    let id = device.get("id")?;
    let legal = id
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    legal.then(|| Element::new("alias").attribute("name", format!("ua-{id}")))
}

/// libvirt's type of a character device, and its source.
fn chardev_source(resource: &Resource) -> Option<(&'static str, Option<Element>)> {
    let backend = &resource.backend;
    let path = backend.path.as_ref();
    let mode = if backend.is_server { "bind" } else { "connect" };
    Some(match backend.kind.as_str() {
        "file" => {
            let source = Element::new("source")
                .attribute("path", path?)
                .attribute("append", "on");
            ("file", Some(source))
        }
        "pty" => ("pty", None),
        "null" => ("null", None),
        "vc" => ("vc", None),
        "stdio" => ("stdio", None),
        "serial" => ("dev", Some(Element::new("source").attribute("path", path?))),
        "socket" => match path {
            Some(path) => (
                "unix",
                Some(
                    Element::new("source")
                        .attribute("mode", mode)
                        .attribute("path", path),
                ),
            ),
            None => {
                let source = Element::new("source").attribute("mode", mode);
                let source = source.attribute("host", backend.host.as_deref().unwrap_or_default());
                (
                    "tcp",
                    Some(source.attribute("service", backend.port.as_deref()?)),
                )
            }
        },
        _ => return None,
    })
}
