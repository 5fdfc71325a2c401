//! Where a device sits: its address, its alias, its place in the boot order.

use super::view::View;
use super::word::words;

/// Where a device sits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Address {
    /// On a PCI bus.
    Pci(PciAddress),
    /// On a disk controller.
    Drive(DriveAddress),
    /// On a USB bus.
    Usb(UsbAddress),
    /// On a virtio-serial controller.
    VirtioSerial(VirtioSerialAddress),
    /// On a smartcard reader.
    Ccid(CcidAddress),
    /// On the ISA bus.
    Isa(IsaAddress),
    /// Among the memory modules.
    Dimm(DimmAddress),
}

/// A PCI address. Bus `n` is the bus of the PCI controller with index `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The PCI domain; only 0 exists.
    pub domain: u32,
    /// The controller's index.
    pub bus: u32,
    /// Up to 31.
    pub slot: u32,
    /// Up to 7.
    pub function: u32,
    /// Whether function 0 says that there are others.
    pub multifunction: Option<bool>,
}

/// The address of a disk on its controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DriveAddress {
    /// The controller's index.
    pub controller: u32,
    /// Its bus: IDE has two.
    pub bus: u32,
    /// The SCSI target.
    pub target: u32,
    /// The unit; of a SCSI target its LUN.
    pub unit: u32,
}

/// The address of a USB device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsbAddress {
    /// The controller's index.
    pub bus: u32,
    /// The port, and the ports of the hubs behind it; empty if none was given.
    pub port: Vec<u32>,
}

impl UsbAddress {
    /// `1.2`, as QEMU and libvirt write it.
    pub fn port_name(&self) -> String {
        let ports: Vec<String> = self.port.iter().map(u32::to_string).collect();
        ports.join(".")
    }
}

/// The address of a port of a virtio-serial controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtioSerialAddress {
    /// The controller's index.
    pub controller: u32,
    /// Always 0.
    pub bus: u32,
    /// The port; `None` if none was given.
    pub port: Option<u32>,
}

/// The address of a smartcard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CcidAddress {
    /// The reader's index.
    pub controller: u32,
    /// Its slot.
    pub slot: u32,
}

/// The address of a device on the ISA bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IsaAddress {
    /// The first port.
    pub iobase: Option<u64>,
    /// The interrupt.
    pub irq: Option<u64>,
}

/// The address of a memory module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DimmAddress {
    /// Its slot.
    pub slot: Option<u32>,
    /// Its place in the guest's memory.
    pub base: Option<u64>,
}

words! {
    /// The kinds of address that are read.
    AddressKind {
        Pci = "pci",
        Drive = "drive",
        Usb = "usb",
        VirtioSerial = "virtio-serial",
        Ccid = "ccid",
        Isa = "isa",
        Dimm = "dimm",
        Unassigned = "unassigned",
    }
}

/// What every device has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The line of its element.
    pub line: u32,
    /// Where it stands: `domain/devices/disk[2]`.
    pub path: String,
    /// Its name to QEMU; always there once the domain is expanded, except on devices that QEMU is not told of.
    pub alias: Option<String>,
    /// Where it sits; always there once the domain is expanded, for the kinds of device that have one.
    pub address: Option<Address>,
    /// `<boot order>`, from 1.
    pub boot_order: Option<u32>,
    /// QEMU's bootindex, computed from `boot_order` or `<os><boot dev>`.
    pub boot_index: Option<u32>,
    /// Its option ROM.
    pub rom: Option<Rom>,
    /// The index in the name that systemd gives a network interface, and the like.
    pub acpi_index: Option<u32>,
}

impl DeviceInfo {
    /// Its address on a PCI bus.
    pub fn pci(&self) -> Option<PciAddress> {
        match self.address {
            Some(Address::Pci(address)) => Some(address),
            _ => None,
        }
    }

    /// Its address on a disk controller.
    pub fn drive(&self) -> Option<DriveAddress> {
        match self.address {
            Some(Address::Drive(address)) => Some(address),
            _ => None,
        }
    }

    /// Its address on a USB bus.
    pub fn usb(&self) -> Option<&UsbAddress> {
        match &self.address {
            Some(Address::Usb(address)) => Some(address),
            _ => None,
        }
    }

    /// Its port of a virtio-serial controller.
    pub fn virtio_serial(&self) -> Option<VirtioSerialAddress> {
        match self.address {
            Some(Address::VirtioSerial(address)) => Some(address),
            _ => None,
        }
    }

    /// Its place on the ISA bus.
    pub fn isa(&self) -> Option<IsaAddress> {
        match self.address {
            Some(Address::Isa(address)) => Some(address),
            _ => None,
        }
    }

    /// Its place among the memory modules.
    pub fn dimm(&self) -> Option<DimmAddress> {
        match self.address {
            Some(Address::Dimm(address)) => Some(address),
            _ => None,
        }
    }

    /// Its slot of a smartcard reader.
    pub fn ccid(&self) -> Option<CcidAddress> {
        match self.address {
            Some(Address::Ccid(address)) => Some(address),
            _ => None,
        }
    }
}

/// `<rom>`: the option ROM of a PCI device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rom {
    /// The line of its element.
    pub line: u32,
    /// Whether there is one at all.
    pub enabled: Option<bool>,
    /// Whether the guest sees it in the PCI configuration.
    pub bar: Option<bool>,
    /// A file that holds it, instead of QEMU's own.
    pub file: Option<String>,
}

/// What every virtio device may have in `<driver>`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VirtioOptions {
    /// `iommu`: behind the guest's IOMMU.
    pub iommu: Option<bool>,
    /// `ats`: address translation services.
    pub ats: Option<bool>,
    /// `packed`: packed virtqueues.
    pub packed: Option<bool>,
    /// `page_per_vq`: a page of notifications for each queue.
    pub page_per_vq: Option<bool>,
}

impl View<'_> {
    /// Reads what every device has.
    pub(super) fn device_info(&self) -> DeviceInfo {
        DeviceInfo {
            line: self.line(),
            path: self.path().to_owned(),
            alias: self.one_some("alias", |alias| alias.attribute("name")),
            address: self.one_some("address", read_address),
            boot_order: self.one_some("boot", |boot| {
                let order = boot.number("order");
                if order == Some(0) {
                    boot.error("the order starts from 1", None);
                }
                order
            }),
            boot_index: None,
            rom: self.one("rom", |rom| Rom {
                line: rom.line(),
                enabled: rom.switch("enabled"),
                bar: rom.switch("bar"),
                file: rom.attribute("file"),
            }),
            acpi_index: self.one_some("acpi", |acpi| acpi.number("index")),
        }
    }

    /// Reads what every virtio device may have in its `<driver>`.
    pub(super) fn virtio_options(&self) -> VirtioOptions {
        VirtioOptions {
            iommu: self.switch("iommu"),
            ats: self.switch("ats"),
            packed: self.switch("packed"),
            page_per_vq: self.switch("page_per_vq"),
        }
    }

    /// Reads a `<driver>` that has nothing else.
    pub(super) fn virtio_driver(&self) -> VirtioOptions {
        self.one("driver", View::virtio_options).unwrap_or_default()
    }
}

fn read_address(view: &View<'_>) -> Option<Address> {
    match view.required_word::<AddressKind>("type") {
        Some(AddressKind::Pci) => pci_address(view).map(Address::Pci),
        Some(AddressKind::Drive) => Some(Address::Drive(DriveAddress {
            controller: view.number("controller").unwrap_or(0),
            bus: view.number("bus").unwrap_or(0),
            target: view.number("target").unwrap_or(0),
            unit: view.number("unit").unwrap_or(0),
        })),
        Some(AddressKind::Usb) => Some(Address::Usb(UsbAddress {
            bus: view.number("bus").unwrap_or(0),
            port: usb_port(view),
        })),
        Some(AddressKind::VirtioSerial) => Some(Address::VirtioSerial(VirtioSerialAddress {
            controller: view.number("controller").unwrap_or(0),
            bus: view.number("bus").unwrap_or(0),
            port: view.number("port"),
        })),
        Some(AddressKind::Ccid) => Some(Address::Ccid(CcidAddress {
            controller: view.number("controller").unwrap_or(0),
            slot: view.number("slot").unwrap_or(0),
        })),
        Some(AddressKind::Isa) => Some(Address::Isa(IsaAddress {
            iobase: view.hexadecimal("iobase"),
            irq: view.hexadecimal("irq"),
        })),
        Some(AddressKind::Dimm) => Some(Address::Dimm(DimmAddress {
            slot: view.number("slot"),
            base: view.number("base"),
        })),
        Some(AddressKind::Unassigned) => {
            view.error(
                "a device that is kept out of the guest cannot be modelled",
                Some("take the device away"),
            );
            None
        }
        None => {
            view.skip();
            None
        }
    }
}

/// A PCI address with nothing but its kind means that one is to be chosen.
fn pci_address(view: &View<'_>) -> Option<PciAddress> {
    let places = ["domain", "bus", "slot", "function"];
    let is_given = places.iter().any(|name| view.element().get(name).is_some());
    let address = PciAddress {
        domain: view.number("domain").unwrap_or(0),
        bus: view.number("bus").unwrap_or(0),
        slot: view.number("slot").unwrap_or(0),
        function: view.number("function").unwrap_or(0),
        multifunction: view.switch("multifunction"),
    };
    if address.domain != 0 {
        view.error("there is only PCI domain 0", None);
    }
    if address.bus > 255 || address.slot > 31 || address.function > 7 {
        view.error(
            "a PCI address goes up to bus 255, slot 31, function 7",
            None,
        );
    }
    is_given.then_some(address)
}

fn usb_port(view: &View<'_>) -> Vec<u32> {
    let Some(text) = view.attribute("port") else {
        return Vec::new();
    };
    let ports: Option<Vec<u32>> = text.split('.').map(|port| port.parse().ok()).collect();
    let ports = ports.unwrap_or_default();
    if ports.is_empty() || ports.len() > 4 || ports.iter().any(|port| !(1..=255).contains(port)) {
        view.error(
            format!("USB port {text:?} is not up to four numbers from 1 with dots between"),
            None,
        );
    }
    ports
}
