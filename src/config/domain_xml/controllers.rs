//! `<controller>`, and the addresses of devices behind them.

use std::collections::BTreeMap;

use super::Story;
use super::devices::{VIRTIO_PROPERTIES, alias, virtio_attributes};
use crate::config::properties::Properties;
use crate::config::xml::Element;

impl Story<'_> {
    pub(super) fn controllers(&mut self) -> Vec<Element> {
        let mut found = Vec::new();
        let mut has_usb = self.take("usb").is_some();
        if has_usb {
            found.push(
                Element::new("controller")
                    .attribute("type", "usb")
                    .attribute("index", 0),
            );
        }
        for (index, device, kind, model, number) in self.numbered_controllers() {
            has_usb |= kind == "usb";
            let element = Element::new("controller")
                .attribute("type", kind)
                .attribute("index", number)
                .attribute_if("model", Some(model).filter(|model| !model.is_empty()));
            let ports = match (device.get("p2"), device.get("p3")) {
                (Some(p2), Some(p3)) if p2 == p3 => Some(p2),
                _ => device.get("max_ports"),
            };
            let target = ["chassis", "port", "chassis_nr", "hotplug"]
                .iter()
                .any(|key| device.get(key).is_some());
            let target = target.then(|| {
                Element::new("target")
                    .attribute_if("chassisNr", device.get("chassis_nr"))
                    .attribute_if("chassis", device.get("chassis"))
                    .attribute_if("port", device.get("port"))
                    .attribute_if("hotplug", device.get("hotplug"))
            });
            let driver = Element::new("driver")
                .attribute_if("queues", device.get("num_queues"))
                .attribute_if("cmd_per_lun", device.get("cmd_per_lun"))
                .attribute_if("max_sectors", device.get("max_sectors"))
                .attribute_if("ioeventfd", device.get("ioeventfd"));
            let driver = virtio_attributes(driver, &device);
            found.push(
                element
                    .attribute_if("ports", ports)
                    .attribute_if("vectors", device.get("vectors"))
                    .children(target)
                    .children((!driver.attributes.is_empty()).then_some(driver))
                    // Devices know a USB bus by its controller's index.
                    .children(alias(&device).filter(|_| kind != "usb"))
                    .children(self.address(&device)),
            );
            let known = [&PROPERTIES[..], &VIRTIO_PROPERTIES].concat();
            self.tell(index, &device, &known);
        }
        if !has_usb {
            let none = Element::new("controller")
                .attribute("type", "usb")
                .attribute("index", 0);
            found.push(none.attribute("model", "none"));
        }
        found
    }

    /// Every controller among the devices: argument, properties, type, model, index.
    fn numbered_controllers(&self) -> Vec<(usize, Properties, &'static str, &'static str, u32)> {
        let mut numbers: BTreeMap<&'static str, u32> = BTreeMap::new();
        if self.arguments.has("usb") {
            numbers.insert("usb", 1);
        }
        let mut found = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let Some((_, kind, model)) = CONTROLLERS.iter().find(|known| known.0 == driver) else {
                continue;
            };
            // Index 0 is the machine's own.
            let first = u32::from(*kind == "pci" || (*kind == "sata" && self.is_q35()));
            let number = numbers.entry(kind).or_insert(first);
            found.push((index, device, *kind, *model, *number));
            *number += 1;
        }
        found
    }

    /// The address of a device, as far as its arguments tell it.
    pub(super) fn address(&self, device: &Properties) -> Option<Element> {
        if device.get("addr").is_some() {
            return self.pci_address(device);
        }
        let bus = device.get("bus")?;
        let (id, number) = bus.rsplit_once('.')?;
        let address = |kind: &str| Element::new("address").attribute("type", kind);
        let drive = |controller: u32, bus: &str, target: &str, unit: &str| {
            let address = address("drive").attribute("controller", controller);
            let address = address.attribute("bus", bus).attribute("target", target);
            Some(address.attribute("unit", unit))
        };
        let controllers = self.numbered_controllers();
        let controller = controllers
            .iter()
            .find(|controller| controller.1.get("id").as_deref() == Some(id));
        let Some((_, _, kind, model, index)) = controller else {
            let unit = device.get("unit").unwrap_or_else(|| "0".to_owned());
            return match id {
                "ide" if self.is_q35() => drive(0, "0", "0", number),
                "ide" => drive(0, number, "0", &unit),
                "usb-bus" if self.arguments.has("usb") => {
                    let port = device.get("port")?;
                    Some(address("usb").attribute("bus", 0).attribute("port", port))
                }
                _ => None,
            };
        };
        match *kind {
            "usb" => {
                let port = device.get("port")?;
                Some(
                    address("usb")
                        .attribute("bus", index)
                        .attribute("port", port),
                )
            }
            "virtio-serial" => {
                let port = device.get("nr")?;
                let address = address("virtio-serial").attribute("controller", index);
                Some(address.attribute("bus", 0).attribute("port", port))
            }
            "sata" => drive(*index, "0", "0", number),
            "scsi" => {
                let get = |key: &str| device.get(key).unwrap_or_else(|| "0".to_owned());
                match *model {
                    "lsilogic" => drive(*index, number, "0", &get("scsi-id")),
                    _ => drive(*index, &get("channel"), &get("scsi-id"), &get("lun")),
                }
            }
            _ => None,
        }
    }

    /// A PCI address: `addr=0x4` or `addr=2.1` on the root bus or behind a controller that has an id.
    fn pci_address(&self, device: &Properties) -> Option<Element> {
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
    fn pci_bus(&self, name: &str) -> Option<u32> {
        if matches!(name, "pci.0" | "pcie.0") {
            return Some(0);
        }
        let controllers = self.numbered_controllers().into_iter();
        let mut buses = controllers.filter(|controller| controller.2 == "pci");
        let found = buses.find(|controller| controller.1.get("id").as_deref() == Some(name));
        found.map(|controller| controller.4)
    }
}

/// Properties that a controller's element tells.
const PROPERTIES: [&str; 17] = [
    "driver",
    "id",
    "bus",
    "addr",
    "multifunction",
    "chassis",
    "chassis_nr",
    "port",
    "hotplug",
    "p2",
    "p3",
    "max_ports",
    "vectors",
    "num_queues",
    "cmd_per_lun",
    "max_sectors",
    "ioeventfd",
];

const CONTROLLERS: [(&str, &str, &str); 16] = [
    ("pcie-root-port", "pci", "pcie-root-port"),
    ("pci-bridge", "pci", "pci-bridge"),
    ("pcie-pci-bridge", "pci", "pcie-to-pci-bridge"),
    ("i82801b11-bridge", "pci", "dmi-to-pci-bridge"),
    ("x3130-upstream", "pci", "pcie-switch-upstream-port"),
    ("xio3130-downstream", "pci", "pcie-switch-downstream-port"),
    ("qemu-xhci", "usb", "qemu-xhci"),
    ("nec-usb-xhci", "usb", "nec-xhci"),
    ("piix3-usb-uhci", "usb", "piix3-uhci"),
    ("usb-ehci", "usb", "ehci"),
    ("ahci", "sata", ""),
    ("virtio-scsi-pci", "scsi", "virtio-scsi"),
    ("lsi", "scsi", "lsilogic"),
    ("virtio-serial-pci", "virtio-serial", ""),
    ("virtio-serial", "virtio-serial", ""),
    ("usb-ccid", "ccid", ""),
];
