//! Devices of the host's in the guest. They can be run, and they forbid saving.

use super::address::DeviceInfo;
use super::view::View;
use super::word::words;

words! {
    /// What a device of the host's is.
    HostdevType {
        Pci = "pci",
        Usb = "usb",
        Mdev = "mdev",
        Scsi = "scsi",
        ScsiHost = "scsi_host",
    }
}

/// `<hostdev mode='subsystem'>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostdev {
    /// Alias, address, place in the boot order.
    pub info: DeviceInfo,
    /// Which it is.
    pub source: HostdevSource,
    /// `managed=`: whether the host's driver is to be taken off it.
    pub managed: Option<bool>,
    /// `display=` of mdev.
    pub display: Option<bool>,
    /// `ramfb=` of mdev.
    pub ramfb: Option<bool>,
    /// `<readonly/>`.
    pub read_only: bool,
    /// `<shareable/>`.
    pub shareable: bool,
}

/// Which device of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostdevSource {
    /// A PCI device.
    Pci {
        /// `0000:01:00.0`.
        address: String,
    },
    /// A USB device, by what it is or by where it is.
    Usb {
        /// Vendor and product.
        id: Option<(u64, u64)>,
        /// Bus and device.
        place: Option<(u32, u32)>,
        /// `startupPolicy=`.
        startup_policy: Option<String>,
    },
    /// A mediated device.
    Mdev {
        /// Its UUID.
        uuid: String,
        /// `model=`: `vfio-pci`.
        model: String,
    },
    /// A SCSI device.
    Scsi {
        /// `scsi_host0`.
        adapter: String,
        /// Bus, target, unit.
        place: (u32, u32, u32),
    },
    /// A whole SCSI host.
    ScsiHost {
        /// Its WWPN.
        wwpn: String,
    },
}

impl HostdevSource {
    /// What it is, for people: `PCI device 0000:01:00.0`.
    pub fn describe(&self) -> String {
        match self {
            HostdevSource::Pci { address } => format!("PCI device {address}"),
            HostdevSource::Usb {
                id: Some((vendor, product)),
                ..
            } => {
                format!("USB device {vendor:04x}:{product:04x}")
            }
            HostdevSource::Usb { place, .. } => {
                let (bus, device) = place.unwrap_or_default();
                format!("USB device at bus {bus}, device {device}")
            }
            HostdevSource::Mdev { uuid, .. } => format!("mediated device {uuid}"),
            HostdevSource::Scsi { adapter, .. } => format!("SCSI device on {adapter}"),
            HostdevSource::ScsiHost { wwpn } => format!("SCSI host {wwpn}"),
        }
    }
}

pub(super) fn read_hostdev(view: &View<'_>) -> Option<Hostdev> {
    let mode = view.attribute("mode");
    if mode.as_deref().is_some_and(|mode| mode != "subsystem") {
        view.error("only devices of mode subsystem are QEMU's", None);
    }
    view.ignore(&["sgio", "rawio"]);
    view.ignore_elements(&["driver", "teaming"]);
    let kind = view.required_word::<HostdevType>("type");
    let source = kind.and_then(|kind| read_source(view, kind));
    let Some(source) = source else {
        view.skip();
        return None;
    };
    Some(Hostdev {
        info: view.device_info(),
        source,
        managed: view.switch("managed"),
        display: view.switch("display"),
        ramfb: view.switch("ramfb"),
        read_only: view.has("readonly"),
        shareable: view.has("shareable"),
    })
}

fn read_source(view: &View<'_>, kind: HostdevType) -> Option<HostdevSource> {
    let model = view.attribute("model");
    let source = view.one_some("source", |source| {
        source.ignore(&["writeFiltering"]);
        match kind {
            HostdevType::Pci => source.one("address", |address| {
                address.ignore(&["type"]);
                let part = |name| address.number::<u32>(name).unwrap_or(0);
                let (domain, bus, slot, function) =
                    (part("domain"), part("bus"), part("slot"), part("function"));
                HostdevSource::Pci {
                    address: format!("{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"),
                }
            }),
            HostdevType::Usb => {
                let vendor = source.one_some("vendor", |vendor| vendor.hexadecimal("id"));
                let product = source.one_some("product", |product| product.hexadecimal("id"));
                Some(HostdevSource::Usb {
                    id: vendor.zip(product),
                    place: source.one_some("address", |address| {
                        address.ignore(&["port"]);
                        address.number("bus").zip(address.number("device"))
                    }),
                    startup_policy: source.attribute("startupPolicy"),
                })
            }
            HostdevType::Mdev => source.one("address", |address| HostdevSource::Mdev {
                uuid: address.required("uuid"),
                model: model.clone().unwrap_or_else(|| "vfio-pci".to_owned()),
            }),
            HostdevType::Scsi => {
                let adapter = source.one("adapter", |adapter| adapter.required("name"));
                let place = source.one("address", |address| {
                    let part = |name| address.number(name).unwrap_or(0);
                    (part("bus"), part("target"), part("unit"))
                });
                if adapter.is_none() {
                    source.error("only SCSI devices of an <adapter> can be used", None);
                    source.skip();
                }
                Some(HostdevSource::Scsi {
                    adapter: adapter?,
                    place: place.unwrap_or_default(),
                })
            }
            HostdevType::ScsiHost => {
                source.ignore(&["protocol"]);
                Some(HostdevSource::ScsiHost {
                    wwpn: source.required("wwpn"),
                })
            }
        }
    });
    if source.is_none() {
        view.error("it needs a <source> that names the device", None);
    }
    source
}
