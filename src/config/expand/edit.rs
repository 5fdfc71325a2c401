//! Changing a domain's document: finding devices in it, adding devices, writing addresses.

use crate::config::domain::address::{Address, PciAddress};
use crate::config::error::Unmodelled;
use crate::config::xml::{Document, Element};

/// `<devices>`; made if it is not there.
pub(super) fn devices(document: &mut Document) -> Option<&mut Element> {
    child(&mut document.root, "devices")
}

/// The first element of this name; made if it is not there.
pub(super) fn child<'a>(parent: &'a mut Element, name: &'static str) -> Option<&'a mut Element> {
    if parent.find(name).is_none() {
        parent.push(Element::new(name));
    }
    parent.find_mut(name)
}

/// The `number`-th device of this name, from 0, as the lists of the model count.
pub(super) fn device<'a>(
    document: &'a mut Document,
    name: &str,
    number: usize,
) -> Option<&'a mut Element> {
    document.root.find_mut("devices")?.nth_mut(name, number)
}

/// Adds a device behind the others of its name, at the end if it is the first.
pub(super) fn add_device(document: &mut Document, element: Element) {
    let Some(devices) = devices(document) else {
        return;
    };
    let place = devices
        .elements()
        .enumerate()
        .filter(|(_, other)| other.name == element.name)
        .map(|(place, _)| place + 1)
        .last();
    match place {
        Some(place) => devices.insert(place, element),
        None => devices.push(element),
    }
}

/// Gives a device an address, in the place of one that only says of which kind it is to be.
pub(super) fn set_address(element: &mut Element, address: &Address) {
    let written = address_element(address);
    match element.find_mut("address") {
        Some(old) => {
            for attribute in written.attributes {
                let name = attribute.name.clone();
                if old.get(&name).is_none() {
                    old.attributes.push(attribute);
                } else if old.get(&name) != Some(attribute.value())
                    && let Some(old) = old.attributes.iter_mut().find(|old| old.name == name)
                {
                    *old = attribute;
                }
            }
        }
        None => element.push(written),
    }
}

/// An address in libvirt's form.
fn address_element(address: &Address) -> Element {
    let element = Element::new("address");
    match address {
        Address::Pci(pci) => {
            let multifunction = pci
                .multifunction
                .map(|is_on| if is_on { "on" } else { "off" });
            element
                .attribute("type", "pci")
                .attribute("domain", format!("{:#06x}", pci.domain))
                .attribute("bus", format!("{:#04x}", pci.bus))
                .attribute("slot", format!("{:#04x}", pci.slot))
                .attribute("function", format!("{:#x}", pci.function))
                .attribute_if("multifunction", multifunction)
        }
        Address::Drive(drive) => element
            .attribute("type", "drive")
            .attribute("controller", drive.controller)
            .attribute("bus", drive.bus)
            .attribute("target", drive.target)
            .attribute("unit", drive.unit),
        Address::Usb(usb) => element
            .attribute("type", "usb")
            .attribute("bus", usb.bus)
            .attribute("port", usb.port_name()),
        Address::VirtioSerial(port) => element
            .attribute("type", "virtio-serial")
            .attribute("controller", port.controller)
            .attribute("bus", port.bus)
            .attribute_if("port", port.port),
        Address::Ccid(ccid) => element
            .attribute("type", "ccid")
            .attribute("controller", ccid.controller)
            .attribute("slot", ccid.slot),
        Address::Isa(isa) => element
            .attribute("type", "isa")
            .attribute_if("iobase", isa.iobase.map(|base| format!("{base:#x}")))
            .attribute_if("irq", isa.irq.map(|irq| format!("{irq:#x}"))),
        Address::Dimm(dimm) => element
            .attribute("type", "dimm")
            .attribute_if("slot", dimm.slot)
            .attribute_if("base", dimm.base.map(|base| format!("{base:#x}"))),
    }
}

/// Something that stands against the domain.
pub(super) fn problem(
    path: &str,
    line: u32,
    why: impl Into<String>,
    try_: Option<&str>,
) -> Unmodelled {
    Unmodelled {
        path: path.to_owned(),
        line,
        why: why.into(),
        try_: try_.map(str::to_owned),
    }
}

/// A PCI address as people write it: `0000:00:1f.2`.
pub(super) fn shown(address: &PciAddress) -> String {
    format!(
        "{:04x}:{:02x}:{:02x}.{:x}",
        address.domain, address.bus, address.slot, address.function
    )
}
