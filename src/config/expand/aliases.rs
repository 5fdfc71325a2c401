//! Aliases: what QEMU calls each device.

use std::collections::BTreeMap;

use super::edit::{device, problem};
use crate::config::ConfigError;
use crate::config::domain::controllers::{Controller, ControllerKind, UsbModel};
use crate::config::domain::disks::{Disk, DiskBus};
use crate::config::domain::memory::MemoryModel;
use crate::config::domain::{DeviceInfo, Domain};
use crate::config::xml::{Document, Element};

/// Names every device that has no alias. Two of the same are an error.
pub(super) fn name(document: &mut Document, domain: &Domain) -> Result<(), ConfigError> {
    let all = wanted(domain);
    let mut taken: BTreeMap<String, u32> = BTreeMap::new();
    let mut errors = Vec::new();
    for one in &all {
        let Some(alias) = &one.info.alias else {
            continue;
        };
        let is_companion = one.alias.is_none();
        // The first console is the first serial port, the functions of a USB controller are one.
        if is_companion {
            continue;
        }
        if let Some(line) = taken.insert(alias.clone(), one.info.line) {
            let why = format!("alias {alias:?} is that of line {line} too");
            errors.push(problem(&one.info.path, one.info.line, why, None));
        }
    }
    if !errors.is_empty() {
        return Err(ConfigError::Unsupported { elements: errors });
    }
    for one in all {
        let (None, Some(alias)) = (&one.info.alias, one.alias) else {
            continue;
        };
        let alias = match alias {
            Wanted::Exactly(alias) => {
                let line = taken.get(&alias).copied();
                if let Some(line) = line {
                    let why = format!("its alias {alias:?} is that of line {line}");
                    let elements = vec![problem(&one.info.path, one.info.line, why, None)];
                    return Err(ConfigError::Unsupported { elements });
                }
                alias
            }
            Wanted::Numbered(prefix, number) => {
                let mut numbers = number..;
                let free = numbers.find(|number| !taken.contains_key(&format!("{prefix}{number}")));
                format!("{prefix}{}", free.unwrap_or(number))
            }
        };
        taken.insert(alias.clone(), one.info.line);
        if let Some(element) = device(document, one.name, one.number) {
            let place = element.elements().position(|child| child.name == "address");
            let place = place.unwrap_or_else(|| element.elements().count());
            match element.find_mut("alias") {
                Some(old) => old.set("name", alias),
                None => element.insert(place, Element::new("alias").attribute("name", alias)),
            }
        }
    }
    Ok(())
}

enum Wanted {
    /// This one.
    Exactly(String),
    /// This one with the number, or the next that is free.
    Numbered(&'static str, usize),
}

struct Named<'a> {
    name: &'static str,
    number: usize,
    info: &'a DeviceInfo,
    /// `None` for what QEMU is not told of by a name of its own.
    alias: Option<Wanted>,
}

fn wanted(domain: &Domain) -> Vec<Named<'_>> {
    let devices = &domain.devices;
    let mut all: Vec<Named<'_>> = Vec::new();
    for (number, controller) in devices.controllers.iter().enumerate() {
        let alias = controller_alias(controller, domain).map(Wanted::Exactly);
        all.push(Named {
            name: "controller",
            number,
            info: &controller.info,
            alias,
        });
    }
    for (number, disk) in devices.disks.iter().enumerate() {
        let alias = disk_alias(disk).map(Wanted::Exactly);
        all.push(Named {
            name: "disk",
            number,
            info: &disk.info,
            alias,
        });
    }
    numbered(
        &mut all,
        "filesystem",
        "fs",
        devices.shares.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "interface",
        "net",
        devices.interfaces.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "smartcard",
        "smartcard",
        devices.smartcards.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "serial",
        "serial",
        devices.serials.iter().map(|one| &one.device.info),
    );
    numbered(
        &mut all,
        "parallel",
        "parallel",
        devices.parallels.iter().map(|one| &one.device.info),
    );
    numbered(
        &mut all,
        "channel",
        "channel",
        devices.channels.iter().map(|one| &one.device.info),
    );
    numbered(
        &mut all,
        "input",
        "input",
        devices.inputs.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "tpm",
        "tpm",
        devices.tpms.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "sound",
        "sound",
        devices.sounds.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "video",
        "video",
        devices.videos.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "hostdev",
        "hostdev",
        devices.hostdevs.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "redirdev",
        "redir",
        devices.redirected.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "hub",
        "hub",
        devices.hubs.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "watchdog",
        "watchdog",
        devices.watchdogs.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "memballoon",
        "balloon",
        devices.balloon.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "rng",
        "rng",
        devices.rngs.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "panic",
        "panic",
        devices.panics.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "shmem",
        "shmem",
        devices.shared_memories.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "iommu",
        "iommu",
        devices.iommu.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "vsock",
        "vsock",
        devices.vsock.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "crypto",
        "crypto",
        devices.crypto_devices.iter().map(|one| &one.info),
    );
    numbered(
        &mut all,
        "pstore",
        "pstore",
        devices.persistent_stores.iter().map(|one| &one.info),
    );
    consoles(&mut all, domain);
    modules(&mut all, domain);
    all
}

fn numbered<'a>(
    all: &mut Vec<Named<'a>>,
    name: &'static str,
    prefix: &'static str,
    infos: impl Iterator<Item = &'a DeviceInfo>,
) {
    for (number, info) in infos.enumerate() {
        all.push(Named {
            name,
            number,
            info,
            alias: Some(Wanted::Numbered(prefix, number)),
        });
    }
}

/// The first console is the first serial port under another name.
fn consoles<'a>(all: &mut Vec<Named<'a>>, domain: &'a Domain) {
    use crate::config::domain::chardevs::ConsoleTarget;
    for (number, console) in domain.devices.consoles.iter().enumerate() {
        let is_virtio = console.target == Some(ConsoleTarget::Virtio);
        let alias = is_virtio.then_some(Wanted::Numbered("console", number));
        all.push(Named {
            name: "console",
            number,
            info: &console.device.info,
            alias,
        });
    }
}

fn modules<'a>(all: &mut Vec<Named<'a>>, domain: &'a Domain) {
    for (number, module) in domain.devices.memory_modules.iter().enumerate() {
        let prefix = match module.model {
            MemoryModel::Dimm => "dimm",
            MemoryModel::Nvdimm => "nvdimm",
            MemoryModel::VirtioMem => "virtiomem",
            MemoryModel::VirtioPmem => "virtiopmem",
        };
        let earlier = domain.devices.memory_modules.iter().take(number);
        let place = earlier.filter(|other| other.model == module.model).count();
        let alias = Some(Wanted::Numbered(prefix, place));
        all.push(Named {
            name: "memory",
            number,
            info: &module.info,
            alias,
        });
    }
}

fn controller_alias(controller: &Controller, domain: &Domain) -> Option<String> {
    let index = controller.index.unwrap_or(0);
    let alias = match &controller.kind {
        ControllerKind::Pci(_) if index == 0 && domain.is_q35() => "pcie.0".to_owned(),
        ControllerKind::Pci(_) => format!("pci.{index}"),
        // A companion shares the name of its master and is not told of by it.
        ControllerKind::Usb {
            master: Some(_), ..
        }
        | ControllerKind::Usb {
            model: Some(UsbModel::None),
            ..
        } => {
            return None;
        }
        ControllerKind::Usb { .. } if index == 0 => "usb".to_owned(),
        ControllerKind::Usb { .. } => format!("usb{index}"),
        ControllerKind::Scsi { .. } => format!("scsi{index}"),
        ControllerKind::Ide { .. } if index == 0 => "ide".to_owned(),
        ControllerKind::Ide { .. } => format!("ide{index}"),
        ControllerKind::Sata if index == 0 && domain.is_q35() => "ide".to_owned(),
        ControllerKind::Sata => format!("sata{index}"),
        ControllerKind::Fdc => format!("fdc{index}"),
        ControllerKind::VirtioSerial { .. } => format!("virtio-serial{index}"),
        ControllerKind::Ccid => format!("ccid{index}"),
    };
    Some(alias)
}

fn disk_alias(disk: &Disk) -> Option<String> {
    let prefix = match disk.bus? {
        DiskBus::Virtio => return Some(format!("virtio-disk{}", disk.target_number()?)),
        DiskBus::Usb => return Some(format!("usb-disk{}", disk.target_number()?)),
        DiskBus::Ide => "ide",
        DiskBus::Sata => "sata",
        DiskBus::Scsi => "scsi",
        DiskBus::Fdc => "fdc",
    };
    let drive = disk.info.drive()?;
    Some(match disk.bus? {
        DiskBus::Scsi => format!(
            "{prefix}{}-{}-{}-{}",
            drive.controller, drive.bus, drive.target, drive.unit
        ),
        _ => format!("{prefix}{}-{}-{}", drive.controller, drive.bus, drive.unit),
    })
}
