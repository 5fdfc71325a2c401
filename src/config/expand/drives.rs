//! Disks on their controllers: addresses by the names of their targets, and the controllers that are needed.

use std::collections::BTreeMap;

use super::edit::{add_device, device, problem, set_address};
use super::knowledge::HostKnowledge;
use crate::config::domain::address::{Address, DriveAddress};
use crate::config::domain::controllers::{ControllerType, ScsiModel};
use crate::config::domain::disks::{Disk, DiskBus};
use crate::config::domain::{Domain, Problems, Word};
use crate::config::xml::{Document, Element};

/// As many controllers of one kind are added; more is a slip in an address.
const MOST_CONTROLLERS: u32 = 256;

pub(super) fn place(
    document: &mut Document,
    domain: &Domain,
    _knowledge: &HostKnowledge,
    problems: &mut Problems,
) {
    let mut taken: BTreeMap<(ControllerType, DriveAddress), u32> = BTreeMap::new();
    let mut names: BTreeMap<&str, u32> = BTreeMap::new();
    let mut needed: BTreeMap<ControllerType, u32> = BTreeMap::new();
    for (number, disk) in domain.devices.disks.iter().enumerate() {
        let info = &disk.info;
        if let Some(line) = names.insert(&disk.target, info.line) {
            let why = format!("target {} is that of line {line} too", disk.target);
            problems.error(problem(&info.path, info.line, why, None));
        }
        let Some(kind) = disk.bus.and_then(controller_type) else {
            continue;
        };
        let address = match info.address {
            Some(Address::Drive(address)) => address,
            Some(_) => {
                let why = "a disk on this bus needs an address of type drive";
                problems.error(problem(&info.path, info.line, why, None));
                continue;
            }
            None => {
                let Some(address) = by_name(disk, domain) else {
                    let why = format!("target {:?} tells no address", disk.target);
                    let try_ = "name the target sda, vda, hda, …";
                    problems.error(problem(&info.path, info.line, why, Some(try_)));
                    continue;
                };
                if let Some(element) = device(document, "disk", number) {
                    set_address(element, &Address::Drive(address));
                }
                address
            }
        };
        if let Some(why) = out_of_range(kind, address, domain) {
            problems.error(problem(&info.path, info.line, why, None));
        }
        if let Some(line) = taken.insert((kind, address), info.line) {
            let why = format!(
                "controller {}, bus {}, target {}, unit {} is taken by line {line}",
                address.controller, address.bus, address.target, address.unit
            );
            problems.error(problem(&info.path, info.line, why, None));
        }
        let most = needed.entry(kind).or_default();
        *most = (*most).max(address.controller);
    }
    for kind in [
        ControllerType::Scsi,
        ControllerType::Fdc,
        ControllerType::Ide,
        ControllerType::Sata,
    ] {
        if let Some(most) = needed.get(&kind) {
            add_controllers(document, domain, kind, *most, problems);
        }
    }
}

fn controller_type(bus: DiskBus) -> Option<ControllerType> {
    match bus {
        DiskBus::Ide => Some(ControllerType::Ide),
        DiskBus::Scsi => Some(ControllerType::Scsi),
        DiskBus::Sata => Some(ControllerType::Sata),
        DiskBus::Fdc => Some(ControllerType::Fdc),
        DiskBus::Virtio | DiskBus::Usb => None,
    }
}

fn by_name(disk: &Disk, _domain: &Domain) -> Option<DriveAddress> {
    let number = disk.target_number()?;
    let (controller, bus, unit) = match disk.bus? {
        DiskBus::Ide => (number / 4, number % 4 / 2, number % 2),
        DiskBus::Sata => (number / 6, 0, number % 6),
        DiskBus::Scsi => (number / 7, 0, number % 7),
        DiskBus::Fdc => (number / 2, 0, number % 2),
        DiskBus::Virtio | DiskBus::Usb => return None,
    };
    Some(DriveAddress {
        controller,
        bus,
        target: 0,
        unit,
    })
}

/// What no such controller has.
fn out_of_range(kind: ControllerType, address: DriveAddress, domain: &Domain) -> Option<String> {
    let is_virtio = || {
        let mut controllers = domain.devices.controllers.iter();
        let found = controllers.find(|one| {
            one.kind.kind() == ControllerType::Scsi && one.index == Some(address.controller)
        });
        let model = found.and_then(|controller| controller.scsi_model());
        matches!(
            model,
            Some(
                ScsiModel::VirtioScsi
                    | ScsiModel::VirtioTransitional
                    | ScsiModel::VirtioNonTransitional
            )
        )
    };
    let (buses, targets, units) = match kind {
        ControllerType::Ide => (2, 1, 2),
        ControllerType::Sata => (1, 1, 6),
        ControllerType::Fdc => (1, 1, 2),
        ControllerType::Scsi if is_virtio() => (1, 256, 16384),
        _ => (1, 256, 16),
    };
    let is_fine = address.bus < buses && address.target < targets && address.unit < units;
    (!is_fine).then(|| {
        format!(
            "bus {}, target {}, unit {} is no place on a controller of type {}",
            address.bus,
            address.target,
            address.unit,
            kind.word()
        )
    })
}

/// Adds the controllers of a type that are missing, up to `most`.
pub(super) fn add_controllers(
    document: &mut Document,
    domain: &Domain,
    kind: ControllerType,
    most: u32,
    problems: &mut Problems,
) {
    if most >= MOST_CONTROLLERS {
        let why = format!(
            "{most} is too high for the index of a controller of type {}",
            kind.word()
        );
        problems.error(problem("domain/devices", domain.devices.line, why, None));
        return;
    }
    for index in 0..=most {
        let mut controllers = domain.devices.controllers.iter();
        if controllers.any(|one| one.kind.kind() == kind && one.index == Some(index)) {
            continue;
        }
        let mut element = Element::new("controller")
            .attribute("type", kind.word())
            .attribute("index", index);
        if kind == ControllerType::Scsi {
            element.set("model", "lsilogic");
        }
        add_device(document, element);
    }
}
