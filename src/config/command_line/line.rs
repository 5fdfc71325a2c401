//! The command line while it grows.

use std::collections::BTreeMap;

use super::controllers::usb_id;
use super::json::{Json, Pairs};
use super::{CommandContext, QmpCommand, SideCommand};
use crate::config::arguments::Argument;
use crate::config::domain::{DeviceInfo, PciAddress};
use crate::config::error::Unmodelled;

/// Arguments so far, what they need beside QEMU, and what stands against them.
pub(super) struct Line<'a> {
    /// Where and as what the guest is started.
    pub(super) context: &'a CommandContext,
    /// `q35` or `i440fx`.
    pub(super) is_q35: bool,
    /// Whether the host's CPU runs the guest.
    pub(super) is_kvm: bool,
    /// The ids of PCI controllers by their index.
    pub(super) buses: BTreeMap<u32, String>,
    /// The ids of virtio-serial controllers by their index.
    pub(super) serial_controllers: BTreeMap<u32, String>,
    /// Properties that are set over those of a device, by its id; what is left names no device.
    pub(super) overrides: BTreeMap<String, Vec<(String, Option<serde_json::Value>)>>,
    /// The arguments.
    pub(super) items: Vec<Argument>,
    /// Processes that serve the guest.
    pub(super) side_commands: Vec<SideCommand>,
    /// Environment variables of QEMU.
    pub(super) environment: Vec<(String, String)>,
    /// What QEMU is told before the guest runs.
    pub(super) qmp_commands: Vec<QmpCommand>,
    /// What is not as the domain says.
    pub(super) warnings: Vec<Unmodelled>,
    /// What cannot be as the domain says.
    pub(super) errors: Vec<Unmodelled>,
}

impl Line<'_> {
    /// Adds `-name value`.
    pub(super) fn option(&mut self, name: &str, value: impl Into<String>) {
        self.items.push(Argument::with_value(name, value));
    }

    /// Adds `-name value`, the value being pairs.
    pub(super) fn pairs(&mut self, name: &str, value: Pairs) {
        self.option(name, value.write());
    }

    /// Adds `-name`.
    pub(super) fn switch(&mut self, name: &str) {
        self.items.push(Argument::switch(name));
    }

    /// Adds `-global driver.property=value`.
    pub(super) fn global(&mut self, driver: &str, property: &str, value: impl ToString) {
        let value = value.to_string();
        self.option("global", format!("{driver}.{property}={value}"));
    }

    /// Adds an object.
    pub(super) fn object(&mut self, object: Json) {
        self.option("object", object.write());
    }

    /// Adds a block node.
    pub(super) fn node(&mut self, node: Json) {
        self.option("blockdev", node.write());
    }

    /// Adds the host's side of a network interface.
    pub(super) fn netdev(&mut self, netdev: Json) {
        self.option("netdev", netdev.write());
    }

    /// Adds a device that has no alias of its own.
    pub(super) fn plain_device(&mut self, device: Json) {
        self.option("device", device.write());
    }

    /// Adds a device with its id, its place on the PCI bus, its place in the boot order and its option ROM.
    pub(super) fn device(&mut self, device: Json, info: &DeviceInfo) {
        let mut device = device.with("id", id(info));
        if let Some(address) = info.pci() {
            self.place(&mut device, address, info);
        }
        device.set_some("bootindex", info.boot_index);
        device.set_some("acpi-index", info.acpi_index);
        if let Some(rom) = &info.rom {
            device.set_some("rombar", rom.bar.map(u32::from));
            device.set_some("romfile", rom.file.as_deref());
            if rom.enabled == Some(false) {
                device.set("romfile", "");
            }
        }
        self.overridden(device, info);
    }

    /// As [`Line::device`], of a device on a USB bus.
    pub(super) fn usb_device(&mut self, device: Json, info: &DeviceInfo) {
        let mut device = device;
        if let Some(address) = info.usb() {
            device.set("bus", format!("{}.0", usb_id(address.bus)));
            if !address.port.is_empty() {
                device.set("port", address.port_name());
            }
        }
        self.device(device, info);
    }

    /// As [`Line::device`], of a device that has no id.
    pub(super) fn companion(&mut self, device: Json, info: &DeviceInfo) {
        let mut device = device;
        if let Some(address) = info.pci() {
            self.place(&mut device, address, info);
        }
        self.overridden(device, info);
    }

    fn overridden(&mut self, mut device: Json, info: &DeviceInfo) {
        for (property, value) in self.overrides.remove(id(info)).unwrap_or_default() {
            match value {
                Some(value) => device.set(&property, value),
                None => device.remove(&property),
            }
        }
        self.plain_device(device);
    }

    fn place(&mut self, device: &mut Json, address: PciAddress, info: &DeviceInfo) {
        let Some(bus) = self.buses.get(&address.bus) else {
            let why = format!("there is no PCI controller with index {}", address.bus);
            return self.error(info, why, None);
        };
        device.set("bus", bus.as_str());
        device.set("addr", pci_place(address));
        if address.multifunction == Some(true) {
            device.set("multifunction", true);
        }
    }

    /// Something that cannot be as the domain says.
    pub(super) fn error(&mut self, info: &DeviceInfo, why: impl Into<String>, try_: Option<&str>) {
        self.errors.push(problem(&info.path, info.line, why, try_));
    }

    /// Something that is not as the domain says, the guest being the same.
    pub(super) fn warning(&mut self, info: &DeviceInfo, why: impl Into<String>) {
        self.warnings
            .push(problem(&info.path, info.line, why, None));
    }

    /// As [`Line::error`], of an element that is no device.
    pub(super) fn error_at(
        &mut self,
        path: &str,
        line: u32,
        why: impl Into<String>,
        try_: Option<&str>,
    ) {
        self.errors.push(problem(path, line, why, try_));
    }

    /// As [`Line::warning`], of an element that is no device.
    pub(super) fn warning_at(&mut self, path: &str, line: u32, why: impl Into<String>) {
        self.warnings.push(problem(path, line, why, None));
    }
}

fn problem(path: &str, line: u32, why: impl Into<String>, try_: Option<&str>) -> Unmodelled {
    Unmodelled {
        path: path.to_owned(),
        line,
        why: why.into(),
        try_: try_.map(str::to_owned),
    }
}

/// A device's name to QEMU.
pub(super) fn id(info: &DeviceInfo) -> &str {
    info.alias.as_deref().unwrap_or_default()
}

/// `0x2`, or `0x1f.0x2` on another function than the first.
fn pci_place(address: PciAddress) -> String {
    match address.function {
        0 => format!("{:#x}", address.slot),
        function => format!("{:#x}.{function:#x}", address.slot),
    }
}
