//! Disks, CD-ROM and floppy drives as the guest sees them.

use super::controllers::{self, virtio_device};
use super::disk_nodes;
use super::json::{Json, on_off};
use super::line::{Line, id};
use crate::config::domain::Domain;
use crate::config::domain::address::DriveAddress;
use crate::config::domain::controllers::{ControllerKind, ScsiModel};
use crate::config::domain::disks::{CacheMode, Disk, DiskBus, DiskDevice, ErrorPolicy};

/// Whether it is a floppy drive.
pub(super) fn is_floppy(disk: &Disk) -> bool {
    disk.device == DiskDevice::Floppy
}

/// Adds the disks, each with its nodes. Nodes are numbered from the last disk to the first.
pub(super) fn disks(line: &mut Line<'_>, domain: &Domain) {
    let disks = &domain.devices.disks;
    let mut firsts = vec![1; disks.len()];
    let mut next = 1;
    for (first, disk) in firsts.iter_mut().zip(disks).rev() {
        *first = next;
        next += disk.image.as_ref().map_or(0, disk_nodes::depth);
    }
    for (first, disk) in firsts.into_iter().zip(disks) {
        let drive = disk
            .image
            .as_ref()
            .map(|image| disk_nodes::image(line, disk, image, first));
        if drive.is_none() && !matches!(disk.device, DiskDevice::Cdrom | DiskDevice::Floppy) {
            line.error(&disk.info, "a disk needs a <source>", None);
        }
        add(line, domain, disk, drive.as_deref());
    }
}

fn add(line: &mut Line<'_>, domain: &Domain, disk: &Disk, drive: Option<&str>) {
    let is_lun = disk.device == DiskDevice::Lun;
    let place = disk.info.drive().unwrap_or(DriveAddress {
        controller: 0,
        bus: 0,
        target: 0,
        unit: 0,
    });
    let device = match disk.bus {
        Some(DiskBus::Virtio) if !is_lun => virtio_block(disk),
        Some(DiskBus::Scsi) => match scsi(line, domain, disk, place) {
            Some(device) => device,
            None => return,
        },
        Some(DiskBus::Ide) if !is_lun => Json::device(hd_or_cd(disk, "ide-hd", "ide-cd"))
            .with("bus", format!("ide.{}", place.bus))
            .with("unit", place.unit),
        Some(DiskBus::Sata) if !is_lun => Json::device(hd_or_cd(disk, "ide-hd", "ide-cd")).with(
            "bus",
            format!("{}.{}", sata_id(line, domain, place), place.unit),
        ),
        Some(DiskBus::Usb) if !is_lun => {
            Json::device("usb-storage").with_some("removable", disk.removable)
        }
        Some(DiskBus::Fdc) if !is_lun => Json::device("floppy").with("unit", place.unit),
        _ => {
            let why = "a LUN of the host's can be handed on by a SCSI controller only";
            return line.error(&disk.info, why, Some("use bus='scsi'"));
        }
    };
    let device = common(device, disk).with_some("drive", drive);
    match disk.bus {
        Some(DiskBus::Usb) => line.usb_device(device, &disk.info),
        // Its place in the boot order is the controller's property.
        Some(DiskBus::Fdc) => {
            let mut info = disk.info.clone();
            info.boot_index = None;
            line.device(device, &info);
        }
        _ => line.device(device, &disk.info),
    }
}

fn hd_or_cd(disk: &Disk, hd: &'static str, cd: &'static str) -> &'static str {
    if disk.device == DiskDevice::Cdrom {
        cd
    } else {
        hd
    }
}

fn sata_id(line: &Line<'_>, domain: &Domain, place: DriveAddress) -> String {
    if line.is_q35 && place.controller == 0 {
        return "ide".to_owned();
    }
    let found = controllers::id_of(domain, place.controller, |kind| {
        matches!(kind, ControllerKind::Sata)
    });
    found.unwrap_or_else(|| format!("sata{}", place.controller))
}

fn virtio_block(disk: &Disk) -> Json {
    let driver = &disk.driver;
    let mut device = virtio_device("virtio-blk", disk.model, driver.virtio)
        .with_some("ioeventfd", driver.ioeventfd)
        .with_some("event_idx", driver.event_idx)
        .with_some("num-queues", driver.queues)
        .with_some("queue-size", driver.queue_size)
        .with_some(
            "iothread",
            driver.iothread.map(|thread| format!("iothread{thread}")),
        );
    if !driver.iothreads.is_empty() {
        let mapping = driver.iothreads.iter().map(|(thread, queues)| {
            Json::empty()
                .with("iothread", format!("iothread{thread}"))
                .with_some("vqs", (!queues.is_empty()).then(|| queues.clone()))
                .into_value()
        });
        device.set("iothread-vq-mapping", mapping.collect::<Vec<_>>());
    }
    device
}

fn scsi(line: &mut Line<'_>, domain: &Domain, disk: &Disk, place: DriveAddress) -> Option<Json> {
    let mut controllers = domain.devices.controllers.iter();
    let is_it = |kind: &ControllerKind| matches!(kind, ControllerKind::Scsi { .. });
    let controller = controllers
        .find(|controller| controller.index == Some(place.controller) && is_it(&controller.kind));
    let Some(controller) = controller else {
        line.error(
            &disk.info,
            format!("there is no SCSI controller {}", place.controller),
            None,
        );
        return None;
    };
    let driver = match disk.device {
        DiskDevice::Lun => "scsi-block",
        _ => hd_or_cd(disk, "scsi-hd", "scsi-cd"),
    };
    let bus = id(&controller.info);
    let device = match controller.scsi_model() {
        // Controllers whose targets have no units.
        Some(ScsiModel::LsiLogic) | None => Json::device(driver)
            .with("bus", format!("{bus}.{}", place.bus))
            .with("scsi-id", place.unit),
        Some(_) => Json::device(driver)
            .with("bus", format!("{bus}.0"))
            .with("channel", place.bus)
            .with("scsi-id", place.target)
            .with("lun", place.unit),
    };
    // The guest reads it in the page of identifications, where it has always been the drive's old name.
    let identification = disk
        .serial
        .clone()
        .unwrap_or_else(|| format!("drive-{}", id(&disk.info)));
    let is_lun = disk.device == DiskDevice::Lun;
    Some(
        device
            .with_some("device_id", (!is_lun).then_some(identification))
            .with_some("vendor", disk.vendor.as_deref())
            .with_some("product", disk.product.as_deref()),
    )
}

/// What disks on all buses are told.
fn common(device: Json, disk: &Disk) -> Json {
    let is_drive = !is_floppy(disk);
    let has_identity = is_drive && disk.device != DiskDevice::Lun;
    let write_cache = match disk.driver.cache {
        None | Some(CacheMode::Default) => None,
        Some(CacheMode::WriteThrough | CacheMode::DirectSync) => Some(false),
        Some(CacheMode::None | CacheMode::WriteBack | CacheMode::Unsafe) => Some(true),
    };
    let wwn = disk
        .wwn
        .as_deref()
        .and_then(|wwn| u64::from_str_radix(wwn.trim_start_matches("0x"), 16).ok());
    let (write_error, read_error) = (disk.driver.error_policy, disk.driver.read_error_policy);
    let mut device = device
        .with_some("serial", disk.serial.as_deref().filter(|_| has_identity))
        .with_some("wwn", wwn)
        .with_some("rotation_rate", disk.rotation_rate)
        .with_some("logical_block_size", disk.logical_block_size)
        .with_some("physical_block_size", disk.physical_block_size)
        .with_some("discard_granularity", disk.discard_granularity)
        .with_some("share-rw", disk.shareable.then_some(true))
        .with_some("write-cache", write_cache.filter(|_| is_drive).map(on_off))
        .with_some("werror", write_error.map(policy))
        // A full disk is no error of reading.
        .with_some(
            "rerror",
            read_error
                .or(write_error.filter(|it| *it != ErrorPolicy::Enospace))
                .map(policy),
        );
    if let Some(geometry) = &disk.geometry {
        device = device
            .with("cyls", geometry.cylinders)
            .with("heads", geometry.heads)
            .with("secs", geometry.sectors)
            .with_some("bios-chs-trans", geometry.translation.as_deref());
    }
    device
}

fn policy(policy: ErrorPolicy) -> &'static str {
    match policy {
        ErrorPolicy::Stop => "stop",
        ErrorPolicy::Report => "report",
        ErrorPolicy::Ignore => "ignore",
        ErrorPolicy::Enospace => "enospc",
    }
}

/// `<iotune>` as the limits of a throttle group: `total_bytes_sec_max` → `bps-total-max`.
pub(super) fn throttle_limits(io_tune: &[(&'static str, u64)]) -> Json {
    let mut limits = Json::empty();
    for (name, value) in io_tune {
        if *name == "size_iops_sec" {
            limits.set("iops-size", *value);
            continue;
        }
        let (direction, rest) = name.split_once('_').unwrap_or((name, ""));
        let unit = if rest.starts_with("bytes") {
            "bps"
        } else {
            "iops"
        };
        let suffix = match rest.split_once("_sec") {
            Some((_, "_max")) => "-max",
            Some((_, "_max_length")) => "-max-length",
            _ => "",
        };
        limits.set(&format!("{unit}-{direction}{suffix}"), *value);
    }
    limits
}
