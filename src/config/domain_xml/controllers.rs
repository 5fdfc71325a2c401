//! `<controller>`, and the addresses of devices behind them.

use std::collections::BTreeMap;

use super::Story;
use super::devices::{VIRTIO_PROPERTIES, alias, iothread, virtio_attributes};
use crate::config::properties::Properties;
use crate::config::xml::Element;

/// A controller: its argument, properties, type, model, index.
type NumberedController = (usize, Properties, &'static str, &'static str, u32);

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
            let first_port = device.get("firstport");
            let master = first_port.map(|port| Element::new("master").attribute("startport", port));
            let ports = match (device.get("p2"), device.get("p3")) {
                (Some(p2), Some(p3)) if p2 == p3 => Some(p2),
                _ => device.get("max_ports"),
            };
            let target = ["chassis", "port", "chassis_nr", "hotplug", "bus_nr"]
                .iter()
                .any(|key| kind == "pci" && device.get(key).is_some());
            let target = target.then(|| {
                Element::new("target")
                    .attribute_if("chassisNr", device.get("chassis_nr"))
                    .attribute_if("chassis", device.get("chassis"))
                    .attribute_if("port", device.get("port"))
                    .attribute_if("hotplug", device.get("hotplug"))
                    .attribute_if("busNr", device.get("bus_nr"))
                    .children(
                        device
                            .get("numa_node")
                            .map(|node| Element::with_text("node", node)),
                    )
            });
            let driver = Element::new("driver")
                .attribute_if("queues", device.get("num_queues"))
                .attribute_if("cmd_per_lun", device.get("cmd_per_lun"))
                .attribute_if("max_sectors", device.get("max_sectors"))
                .attribute_if("ioeventfd", device.get("ioeventfd"))
                .attribute_if("iothread", iothread(&device));
            let driver = virtio_attributes(driver, &device);
            found.push(
                element
                    .attribute_if("ports", ports)
                    .attribute_if("vectors", device.get("vectors"))
                    .children(target)
                    .children(master)
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
    fn numbered_controllers(&self) -> Vec<NumberedController> {
        let mut numbers: BTreeMap<&'static str, u32> = BTreeMap::new();
        if self.arguments.has("usb") {
            numbers.insert("usb", 1);
        }
        let mut found: Vec<NumberedController> = Vec::new();
        for (index, device) in self.all_devices() {
            let driver = device.get("driver").unwrap_or_default();
            let Some((_, kind, model)) = CONTROLLERS.iter().find(|known| known.0 == driver) else {
                continue;
            };
            // A companion is a part of its master.
            if let Some(bus) = device.get("masterbus") {
                let id_of = |device: &Properties| device.get("id").map(|id| format!("{id}.0"));
                let mut masters = found.iter();
                let master = masters.find(|one| id_of(&one.1).as_ref() == Some(&bus));
                if let Some(number) = master.map(|master| master.4) {
                    found.push((index, device, *kind, *model, number));
                    continue;
                }
            }
            if let Some(number) = self.own_number(&device, kind) {
                found.push((index, device, *kind, *model, number));
                continue;
            }
            // Index 0 is the machine's own.
            let first = u32::from(*kind == "pci" || (*kind == "sata" && self.is_q35()));
            let number = numbers.entry(kind).or_insert(first);
            found.push((index, device, *kind, *model, *number));
            *number += 1;
        }
        found
    }

    /// The number in the id of a bridge, where all bridges are called as libvirt calls them: its bus is known by it.
    fn own_number(&self, device: &Properties, kind: &str) -> Option<u32> {
        let number = |id: Option<String>| id?.strip_prefix("pci.")?.parse::<u32>().ok();
        let is_bridge = |device: &Properties| {
            let driver = device.get("driver").unwrap_or_default();
            CONTROLLERS
                .iter()
                .any(|known| known.0 == driver && known.1 == "pci")
        };
        let devices = self.all_devices().into_iter();
        let mut bridges = devices.filter(|(_, device)| is_bridge(device));
        let all_have_one =
            bridges.all(|(_, bridge)| number(bridge.get("id")).is_some_and(|number| number > 0));
        number(device.get("id")).filter(|_| kind == "pci" && all_have_one)
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
const PROPERTIES: [&str; 22] = [
    "bus_nr",
    "numa_node",
    "iothread",
    "masterbus",
    "firstport",
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

const CONTROLLERS: [(&str, &str, &str); 30] = [
    ("pxb", "pci", "pci-expander-bus"),
    ("pxb-pcie", "pci", "pcie-expander-bus"),
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
    ("piix4-usb-uhci", "usb", "piix4-uhci"),
    ("vt82c686b-usb-uhci", "usb", "vt82c686b-uhci"),
    ("pci-ohci", "usb", "pci-ohci"),
    ("ich9-usb-ehci1", "usb", "ich9-ehci1"),
    ("ich9-usb-uhci1", "usb", "ich9-uhci1"),
    ("ich9-usb-uhci2", "usb", "ich9-uhci2"),
    ("ich9-usb-uhci3", "usb", "ich9-uhci3"),
    ("ahci", "sata", ""),
    ("virtio-scsi-pci", "scsi", "virtio-scsi"),
    ("lsi", "scsi", "lsilogic"),
    ("mptsas1068", "scsi", "lsisas1068"),
    ("megasas", "scsi", "lsisas1078"),
    ("pvscsi", "scsi", "vmpvscsi"),
    (
        "virtio-scsi-pci-transitional",
        "scsi",
        "virtio-transitional",
    ),
    (
        "virtio-scsi-pci-non-transitional",
        "scsi",
        "virtio-non-transitional",
    ),
    ("virtio-serial-pci", "virtio-serial", ""),
    ("virtio-serial", "virtio-serial", ""),
    ("usb-ccid", "ccid", ""),
];
