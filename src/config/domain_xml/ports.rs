//! `<serial>`, `<parallel>`, `<console>`, `<channel>`: character devices.

use super::Story;
use super::devices::alias;
use crate::config::properties::Properties;
use crate::config::resources::{Resource, ResourceKind};
use crate::config::xml::Element;

impl Story<'_> {
    /// Serial and parallel ports, consoles, channels.
    pub(super) fn ports(&mut self) -> Vec<Element> {
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
            let Some((element, target)) = port_of(&device) else {
                continue;
            };
            let Some(chardev) = device.get("chardev") else {
                continue;
            };
            if let Some(written) = self.port(element, &chardev, target) {
                let written = written.children(alias(&device));
                found.push(written.children(self.address(&device)));
                let known = [
                    "driver", "id", "chardev", "index", "name", "bus", "addr", "nr", "port",
                ];
                self.tell(index, &device, &known);
            }
        }
        found
    }

    fn port(&mut self, element: &'static str, name: &str, target: Element) -> Option<Element> {
        let (kind, source, log) = match self.resources.find(ResourceKind::Chardev, name) {
            Some(resource) => {
                let (kind, source) = chardev_source(resource)?;
                let chardev = self.chardev_of(resource);
                (
                    kind,
                    source,
                    chardev.and_then(|(index, chardev)| self.log(index, &chardev)),
                )
            }
            None => return None,
        };
        Some(
            Element::new(element)
                .attribute("type", kind)
                .children(source)
                .children(log)
                .child(target),
        )
    }

    fn chardev_of(&self, resource: &Resource) -> Option<(usize, Properties)> {
        let index = resource.argument?;
        let argument = self.arguments.items.get(index)?;
        (argument.name() == Some("chardev")).then(|| (index, argument.properties()))
    }

    /// Tells a character device; its log, if it has one.
    fn log(&mut self, index: usize, chardev: &Properties) -> Option<Element> {
        let known = [
            "backend",
            "id",
            "path",
            "host",
            "port",
            "server",
            "wait",
            "append",
            "logfile",
            "logappend",
        ];
        // What SPICE calls it follows from what it is.
        let is_spice = chardev.get("backend").as_deref() == Some("spicevmc");
        let known = [&known[..], if is_spice { &["name"] } else { &[] }].concat();
        self.tell(index, chardev, &known);
        let file = chardev.get("logfile")?;
        let append = if chardev.is_on("logappend") {
            "on"
        } else {
            "off"
        };
        Some(
            Element::new("log")
                .attribute("file", file)
                .attribute("append", append),
        )
    }
}

/// What a device with a character device is to libvirt.
fn port_of(device: &Properties) -> Option<(&'static str, Element)> {
    let target = |kind: &str| Element::new("target").attribute("type", kind);
    let port = || device.get("index").or_else(|| Some("0".to_owned()));
    let name = device.get("name");
    Some(match device.get("driver")?.as_str() {
        "isa-serial" => (
            "serial",
            target("isa-serial").attribute_if("port", device.get("index")),
        ),
        "pci-serial" => ("serial", target("pci-serial")),
        "usb-serial" => ("serial", target("usb-serial")),
        "isa-parallel" => (
            "parallel",
            Element::new("target").attribute_if("port", port()),
        ),
        "virtconsole" => ("console", target("virtio")),
        "virtserialport" => ("channel", target("virtio").attribute_if("name", name)),
        _ => return None,
    })
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
        "spicevmc" => ("spicevmc", None),
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
