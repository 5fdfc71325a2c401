//! The boot order: `<boot order>` of devices, or `<os><boot dev>`, as QEMU's bootindex.

use std::collections::BTreeMap;

use super::Domain;
use super::disks::{DiskDevice, in_order};
use super::os::BootDevice;
use super::view::View;

/// Gives each device that is booted from its place.
pub(super) fn compute(domain: &mut Domain, view: &View<'_>) {
    let mut orders: BTreeMap<u32, u32> = BTreeMap::new();
    let devices = &mut domain.devices;
    let infos = devices
        .disks
        .iter_mut()
        .map(|disk| &mut disk.info)
        .chain(
            devices
                .interfaces
                .iter_mut()
                .map(|interface| &mut interface.info),
        )
        .chain(devices.hostdevs.iter_mut().map(|hostdev| &mut hostdev.info))
        .chain(devices.redirected.iter_mut().map(|device| &mut device.info));
    for info in infos {
        let Some(order) = info.boot_order else {
            continue;
        };
        info.boot_index = Some(order);
        if let Some(line) = orders.insert(order, info.line) {
            view.error(
                format!(
                    "line {} has boot order {order}, as line {line} has",
                    info.line
                ),
                None,
            );
        }
    }
    if !orders.is_empty() {
        if !domain.os.boot.is_empty() {
            view.error(
                "it has both <boot order> in devices and <boot dev> in <os>",
                Some("keep one of them"),
            );
        }
        return;
    }
    // Where nothing is said the first disk is booted from.
    let said = match domain.os.boot.is_empty() {
        true => vec![BootDevice::Disk],
        false => domain.os.boot.clone(),
    };
    for (place, device) in (1..).zip(said) {
        give(domain, device, place);
    }
}

/// The first device of a kind is booted from.
fn give(domain: &mut Domain, device: BootDevice, place: u32) {
    let wanted = match device {
        BootDevice::Network => {
            if let Some(interface) = domain.devices.interfaces.first_mut() {
                interface.info.boot_index.get_or_insert(place);
            }
            return;
        }
        BootDevice::Disk => [DiskDevice::Disk, DiskDevice::Lun],
        BootDevice::Cdrom => [DiskDevice::Cdrom; 2],
        BootDevice::Floppy => [DiskDevice::Floppy; 2],
    };
    let order = in_order(&domain.devices.disks);
    let is_wanted = |number: &usize| {
        let disk = domain.devices.disks.get(*number);
        disk.is_some_and(|disk| wanted.contains(&disk.device))
    };
    let found = order.into_iter().find(is_wanted);
    if let Some(disk) = found.and_then(|number| domain.devices.disks.get_mut(number)) {
        disk.info.boot_index.get_or_insert(place);
    }
}
