//! Every device that sits on a PCI bus, in the order in which places are given.

use super::buses::Connect;
use crate::config::domain::chardevs::SerialTarget;
use crate::config::domain::controllers::{
    Controller, ControllerKind, PciModel, ScsiModel, UsbModel, VirtioSerialModel,
    in_order as in_order_of_index,
};
use crate::config::domain::disks::{DiskBus, VirtioModel, in_order};
use crate::config::domain::displays::VideoModel;
use crate::config::domain::hostdevs::HostdevSource;
use crate::config::domain::memory::MemoryModel;
use crate::config::domain::platform::{BalloonModel, IommuModel, PanicModel, WatchdogModel};
use crate::config::domain::sound::SoundModel;
use crate::config::domain::usb_devices::InputBus;
use crate::config::domain::{Address, DeviceInfo, Domain};

/// A device that sits on a PCI bus.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request<'a> {
    /// The name of its element.
    pub(super) name: &'static str,
    /// Which of them, from 0.
    pub(super) number: usize,
    /// What every device has.
    pub(super) info: &'a DeviceInfo,
    /// What it needs.
    pub(super) connect: Connect,
    /// Where chipsets have it.
    pub(super) special: Special,
}

/// Devices that chipsets have at places of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Special {
    /// None of them.
    None,
    /// The first IDE controller.
    Ide,
    /// The first SATA controller.
    Sata,
    /// The first UHCI controller.
    Uhci,
    /// A function of an ICH9 USB controller: the controller's index, its function.
    Ich9Usb(u32, u32),
    /// The first ICH9 sound device.
    Ich9Sound,
    /// A bridge of the root complex.
    DmiBridge,
    /// The primary video device.
    Video,
}

/// Every device on a PCI bus.
pub(super) fn requests(domain: &Domain) -> Vec<Request<'_>> {
    let mut all = Vec::new();
    controllers(domain, true, &mut all);
    let devices = &domain.devices;
    for (number, share) in devices.shares.iter().enumerate() {
        push(
            &mut all,
            "filesystem",
            number,
            &share.info,
            virtio(share.model),
        );
    }
    for (number, interface) in devices.interfaces.iter().enumerate() {
        let connect = match interface.model.as_deref() {
            Some("usb-net") => continue,
            Some("rtl8139" | "e1000" | "vmxnet3" | "virtio-transitional") | None => {
                Connect::Conventional
            }
            Some(_) => Connect::Express,
        };
        push(&mut all, "interface", number, &interface.info, connect);
    }
    for (number, sound) in devices.sounds.iter().enumerate() {
        let connect = match sound.model {
            SoundModel::Sb16 | SoundModel::Pcspk | SoundModel::Usb => continue,
            SoundModel::Virtio => Connect::Express,
            SoundModel::Es1370
            | SoundModel::Ac97
            | SoundModel::Ich6
            | SoundModel::Ich7
            | SoundModel::Ich9 => Connect::Conventional,
        };
        let is_first = devices
            .sounds
            .iter()
            .position(|one| one.model == SoundModel::Ich9)
            == Some(number);
        let special = if is_first {
            Special::Ich9Sound
        } else {
            Special::None
        };
        all.push(Request {
            name: "sound",
            number,
            info: &sound.info,
            connect,
            special,
        });
    }
    controllers(domain, false, &mut all);
    for number in in_order(&devices.disks) {
        let Some(disk) = devices.disks.get(number) else {
            continue;
        };
        if disk.bus == Some(DiskBus::Virtio) {
            push(&mut all, "disk", number, &disk.info, virtio(disk.model));
        }
    }
    for (number, hostdev) in devices.hostdevs.iter().enumerate() {
        if matches!(
            hostdev.source,
            HostdevSource::Pci { .. } | HostdevSource::Mdev { .. } | HostdevSource::ScsiHost { .. }
        ) {
            push(&mut all, "hostdev", number, &hostdev.info, Connect::Express);
        }
    }
    if let Some(balloon) = &devices.balloon {
        let connect = match balloon.model {
            BalloonModel::None => None,
            BalloonModel::VirtioTransitional => Some(Connect::Conventional),
            BalloonModel::Virtio | BalloonModel::VirtioNonTransitional => Some(Connect::Express),
        };
        if let Some(connect) = connect {
            push(&mut all, "memballoon", 0, &balloon.info, connect);
        }
    }
    rest(domain, &mut all);
    all
}

/// What comes after the balloon.
fn rest<'a>(domain: &'a Domain, all: &mut Vec<Request<'a>>) {
    let devices = &domain.devices;
    for (number, rng) in devices.rngs.iter().enumerate() {
        push(all, "rng", number, &rng.info, virtio(Some(rng.model)));
    }
    for (number, watchdog) in devices.watchdogs.iter().enumerate() {
        if watchdog.model == WatchdogModel::I6300esb {
            push(
                all,
                "watchdog",
                number,
                &watchdog.info,
                Connect::Conventional,
            );
        }
    }
    for (number, video) in devices.videos.iter().enumerate() {
        let connect = match video.model {
            Some(VideoModel::None | VideoModel::Ramfb) => continue,
            Some(VideoModel::Virtio | VideoModel::Bochs) => Connect::Express,
            _ => Connect::Conventional,
        };
        let special = if number == 0 {
            Special::Video
        } else {
            Special::None
        };
        all.push(Request {
            name: "video",
            number,
            info: &video.info,
            connect,
            special,
        });
    }
    for (number, memory) in devices.shared_memories.iter().enumerate() {
        push(all, "shmem", number, &memory.info, Connect::Conventional);
    }
    for (number, input) in devices.inputs.iter().enumerate() {
        if input.bus == Some(InputBus::Virtio) {
            push(all, "input", number, &input.info, virtio(input.model));
        }
    }
    for (number, serial) in devices.serials.iter().enumerate() {
        if serial.target == Some(SerialTarget::Pci) {
            push(
                all,
                "serial",
                number,
                &serial.device.info,
                Connect::Conventional,
            );
        }
    }
    if let Some(iommu) = &devices.iommu
        && iommu.model == IommuModel::Virtio
    {
        push(all, "iommu", 0, &iommu.info, Connect::Root);
    }
    if let Some(vsock) = &devices.vsock {
        push(all, "vsock", 0, &vsock.info, virtio(Some(vsock.model)));
    }
    for (number, module) in devices.memory_modules.iter().enumerate() {
        if matches!(
            module.model,
            MemoryModel::VirtioMem | MemoryModel::VirtioPmem
        ) {
            push(all, "memory", number, &module.info, Connect::Express);
        }
    }
    for (number, crypto) in devices.crypto_devices.iter().enumerate() {
        push(all, "crypto", number, &crypto.info, Connect::Conventional);
    }
    for (number, panic) in devices.panics.iter().enumerate() {
        if panic.model == Some(PanicModel::Pvpanic) {
            push(all, "panic", number, &panic.info, Connect::Root);
        }
    }
    for (number, store) in devices.persistent_stores.iter().enumerate() {
        push(all, "pstore", number, &store.info, Connect::Conventional);
    }
}

fn push<'a>(
    all: &mut Vec<Request<'a>>,
    name: &'static str,
    number: usize,
    info: &'a DeviceInfo,
    connect: Connect,
) {
    // A device may be elsewhere on purpose.
    if matches!(info.address, Some(Address::Pci(_)) | None) {
        all.push(Request {
            name,
            number,
            info,
            connect,
            special: Special::None,
        });
    }
}

/// Transitional devices are conventional: old drivers expect them there.
fn virtio(model: Option<VirtioModel>) -> Connect {
    match model {
        Some(VirtioModel::VirtioTransitional) => Connect::Conventional,
        _ => Connect::Express,
    }
}

/// PCI controllers, or all others.
fn controllers<'a>(domain: &'a Domain, is_pci: bool, all: &mut Vec<Request<'a>>) {
    for number in in_order_of_index(&domain.devices.controllers) {
        let Some(controller) = domain.devices.controllers.get(number) else {
            continue;
        };
        let found = match &controller.kind {
            ControllerKind::Pci(pci) if is_pci => pci.model.and_then(bridge),
            ControllerKind::Pci(_) => None,
            _ if is_pci => None,
            _ => other(controller),
        };
        if let Some((connect, special)) = found {
            let info = &controller.info;
            all.push(Request {
                name: "controller",
                number,
                info,
                connect,
                special,
            });
        }
    }
}

fn bridge(model: PciModel) -> Option<(Connect, Special)> {
    match model {
        PciModel::PciRoot | PciModel::PcieRoot => None,
        PciModel::PcieRootPort => Some((Connect::RootPort, Special::None)),
        PciModel::DmiToPciBridge => Some((Connect::Root, Special::DmiBridge)),
        PciModel::PcieToPciBridge | PciModel::PcieSwitchUpstreamPort => {
            Some((Connect::Express, Special::None))
        }
        PciModel::PcieSwitchDownstreamPort => Some((Connect::Downstream, Special::None)),
        PciModel::PciBridge => Some((Connect::Bridge, Special::None)),
        PciModel::PciExpanderBus | PciModel::PcieExpanderBus => {
            Some((Connect::Root, Special::None))
        }
    }
}

fn other(controller: &Controller) -> Option<(Connect, Special)> {
    let index = controller.index.unwrap_or(0);
    let is_first = index == 0;
    match &controller.kind {
        ControllerKind::Pci(_) | ControllerKind::Fdc | ControllerKind::Ccid => None,
        ControllerKind::Usb { model, .. } => usb(*model, index),
        ControllerKind::Scsi { model } => match model {
            Some(ScsiModel::VirtioScsi | ScsiModel::VirtioNonTransitional) => {
                Some((Connect::Express, Special::None))
            }
            _ => Some((Connect::Conventional, Special::None)),
        },
        ControllerKind::Ide { .. } if is_first => Some((Connect::Conventional, Special::Ide)),
        ControllerKind::Sata if is_first => Some((Connect::Conventional, Special::Sata)),
        ControllerKind::Ide { .. } | ControllerKind::Sata => {
            Some((Connect::Conventional, Special::None))
        }
        ControllerKind::VirtioSerial { model, .. } => match model {
            Some(VirtioSerialModel::VirtioTransitional) => {
                Some((Connect::Conventional, Special::None))
            }
            _ => Some((Connect::Express, Special::None)),
        },
    }
}

fn usb(model: Option<UsbModel>, index: u32) -> Option<(Connect, Special)> {
    let special = match model {
        Some(UsbModel::None) => return None,
        Some(UsbModel::NecXhci | UsbModel::QemuXhci) => {
            return Some((Connect::Express, Special::None));
        }
        Some(UsbModel::Ich9Ehci1) => Special::Ich9Usb(index, 7),
        Some(UsbModel::Ich9Uhci1) => Special::Ich9Usb(index, 0),
        Some(UsbModel::Ich9Uhci2) => Special::Ich9Usb(index, 1),
        Some(UsbModel::Ich9Uhci3) => Special::Ich9Usb(index, 2),
        Some(UsbModel::Piix3Uhci | UsbModel::Piix4Uhci) | None if index == 0 => Special::Uhci,
        _ => Special::None,
    };
    Some((Connect::Conventional, special))
}
