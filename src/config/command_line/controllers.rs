//! Controllers.

use std::collections::BTreeMap;

use super::json::Json;
use super::line::{Line, id};
use crate::config::domain::Domain;
use crate::config::domain::address::VirtioOptions;
use crate::config::domain::controllers::{
    Controller, ControllerKind, PciController, PciModel, ScsiModel, UsbModel, VirtioSerialModel,
};
use crate::config::domain::disks::VirtioModel;

/// The ids of the PCI buses by the index of the controller that has them.
pub(super) fn buses(domain: &Domain) -> BTreeMap<u32, String> {
    let mut buses = BTreeMap::new();
    for controller in &domain.devices.controllers {
        if let (ControllerKind::Pci(pci), Some(index)) = (&controller.kind, controller.index) {
            let name = match pci.model {
                Some(PciModel::PciRoot) => "pci.0".to_owned(),
                Some(PciModel::PcieRoot) => "pcie.0".to_owned(),
                _ => id(&controller.info).to_owned(),
            };
            buses.insert(index, name);
        }
    }
    buses
}

/// The id of a controller of one kind, whose buses are `ID.0` and so on.
pub(super) fn id_of(
    domain: &Domain,
    index: u32,
    is_kind: impl Fn(&ControllerKind) -> bool,
) -> Option<String> {
    let mut controllers = domain.devices.controllers.iter();
    let found =
        controllers.find(|controller| controller.index == Some(index) && is_kind(&controller.kind));
    found.map(|controller| id(&controller.info).to_owned())
}

/// The id of a virtio-serial controller.
pub(super) fn virtio_serial_id(line: &Line<'_>, index: u32) -> String {
    let named = line.serial_controllers.get(&index).cloned();
    named.unwrap_or_else(|| format!("virtio-serial{index}"))
}

/// The ids of the virtio-serial controllers by their index.
pub(super) fn serial_controllers(domain: &Domain) -> BTreeMap<u32, String> {
    let controllers = domain.devices.controllers.iter();
    let serial = controllers.filter(|one| matches!(one.kind, ControllerKind::VirtioSerial { .. }));
    serial
        .filter_map(|one| Some((one.index?, id(&one.info).to_owned())))
        .collect()
}

/// Adds the controllers.
pub(super) fn controllers(line: &mut Line<'_>, domain: &Domain) {
    pci_controllers(line, domain);
    let mut others: Vec<&Controller> = domain.devices.controllers.iter().collect();
    // A companion needs the controller whose companion it is.
    others.sort_by_key(|controller| {
        matches!(
            controller.kind,
            ControllerKind::Usb {
                master: Some(_),
                ..
            }
        )
    });
    for controller in others {
        match &controller.kind {
            ControllerKind::Pci(_) => {}
            ControllerKind::Usb {
                model,
                ports,
                master,
            } => {
                usb_controller(line, controller, *model, *ports, *master);
            }
            ControllerKind::Scsi { model } => scsi_controller(line, controller, *model),
            ControllerKind::Ide { .. } => ide_controller(line, controller),
            ControllerKind::Sata => sata_controller(line, controller),
            ControllerKind::Fdc => {
                if line.is_q35 {
                    line.companion(Json::device("isa-fdc"), &controller.info);
                }
            }
            ControllerKind::VirtioSerial {
                model,
                ports,
                vectors,
            } => {
                let model = model.map(|model| match model {
                    VirtioSerialModel::Virtio => VirtioModel::Virtio,
                    VirtioSerialModel::VirtioTransitional => VirtioModel::VirtioTransitional,
                    VirtioSerialModel::VirtioNonTransitional => VirtioModel::VirtioNonTransitional,
                });
                let device = virtio_device("virtio-serial", model, controller.virtio)
                    .with_some("max_ports", *ports)
                    .with_some("vectors", *vectors)
                    .with_some("ioeventfd", controller.ioeventfd);
                line.device(device, &controller.info);
            }
            ControllerKind::Ccid => line.usb_device(Json::device("usb-ccid"), &controller.info),
        }
    }
}

/// A virtio device on the PCI bus.
pub(super) fn virtio_device(
    name: &str,
    model: Option<VirtioModel>,
    options: VirtioOptions,
) -> Json {
    let suffix = match model {
        None | Some(VirtioModel::Virtio) => "",
        Some(VirtioModel::VirtioTransitional) => "-transitional",
        Some(VirtioModel::VirtioNonTransitional) => "-non-transitional",
    };
    with_virtio(Json::device(&format!("{name}-pci{suffix}")), options)
}

/// Adds what every virtio device may be told.
pub(super) fn with_virtio(device: Json, options: VirtioOptions) -> Json {
    device
        .with_some("iommu_platform", options.iommu)
        .with_some("ats", options.ats)
        .with_some("packed", options.packed)
        .with_some("page-per-vq", options.page_per_vq)
}

/// Adds the PCI controllers, each behind the one whose bus it is on.
fn pci_controllers(line: &mut Line<'_>, domain: &Domain) {
    let controllers = domain.devices.controllers.iter();
    let mut left: Vec<(&Controller, &PciController)> = controllers
        .filter_map(|controller| Some((controller, controller.as_pci()?)))
        .collect();
    while !left.is_empty() {
        let is_waiting = |(controller, _): &(&Controller, &PciController)| {
            let bus = controller.info.pci().map(|address| address.bus);
            left.iter()
                .any(|(other, _)| bus.is_some() && other.index == bus)
        };
        let (waiting, ready): (Vec<_>, Vec<_>) = left.iter().partition(|it| is_waiting(it));
        if ready.is_empty() {
            for (controller, _) in waiting {
                line.error(
                    &controller.info,
                    "it is on a bus that is behind itself",
                    None,
                );
            }
            return;
        }
        for (controller, pci) in ready {
            pci_controller(line, controller, pci);
        }
        left = waiting;
    }
}

fn pci_controller(line: &mut Line<'_>, controller: &Controller, pci: &PciController) {
    let default = match pci.model {
        Some(PciModel::PciRoot | PciModel::PcieRoot) | None => return,
        Some(PciModel::PcieRootPort) => "pcie-root-port",
        Some(PciModel::PciBridge) => "pci-bridge",
        Some(PciModel::DmiToPciBridge) => "i82801b11-bridge",
        Some(PciModel::PcieToPciBridge) => "pcie-pci-bridge",
        Some(PciModel::PcieSwitchUpstreamPort) => "x3130-upstream",
        Some(PciModel::PcieSwitchDownstreamPort) => "xio3130-downstream",
        Some(PciModel::PciExpanderBus) => "pxb",
        Some(PciModel::PcieExpanderBus) => "pxb-pcie",
    };
    let device = Json::device(pci.device.as_deref().unwrap_or(default))
        .with_some("chassis_nr", pci.chassis_nr)
        .with_some("chassis", pci.chassis)
        .with_some("port", pci.port)
        .with_some("bus_nr", pci.bus_nr)
        .with_some("numa_node", pci.node)
        .with_some("mem-reserve", pci.mem_reserve);
    let device = match pci.model {
        Some(PciModel::PciBridge) => device.with_some("shpc", pci.hotplug),
        _ => device.with_some("hotplug", pci.hotplug),
    };
    line.device(device, &controller.info);
}

fn usb_controller(
    line: &mut Line<'_>,
    controller: &Controller,
    model: Option<UsbModel>,
    ports: Option<u32>,
    master: Option<u32>,
) {
    let driver = match model {
        Some(UsbModel::None) => return,
        Some(UsbModel::Piix3Uhci) | None => "piix3-usb-uhci",
        Some(UsbModel::Piix4Uhci) => "piix4-usb-uhci",
        Some(UsbModel::Ehci) => "usb-ehci",
        Some(UsbModel::Ich9Ehci1) => "ich9-usb-ehci1",
        Some(UsbModel::Ich9Uhci1) => "ich9-usb-uhci1",
        Some(UsbModel::Ich9Uhci2) => "ich9-usb-uhci2",
        Some(UsbModel::Ich9Uhci3) => "ich9-usb-uhci3",
        Some(UsbModel::Vt82c686bUhci) => "vt82c686b-usb-uhci",
        Some(UsbModel::PciOhci) => "pci-ohci",
        Some(UsbModel::NecXhci) => "nec-usb-xhci",
        Some(UsbModel::QemuXhci) => "qemu-xhci",
    };
    let device = Json::device(driver)
        .with_some("p2", ports)
        .with_some("p3", ports);
    let Some(first_port) = master else {
        return line.device(device, &controller.info);
    };
    // A companion's ports are the other controller's: it has no bus, and no id.
    let device = device
        .with(
            "masterbus",
            format!("{}.0", usb_id(controller.index.unwrap_or(0))),
        )
        .with("firstport", first_port);
    line.companion(device, &controller.info);
}

/// A USB controller's id.
pub(super) fn usb_id(index: u32) -> String {
    match index {
        0 => "usb".to_owned(),
        index => format!("usb{index}"),
    }
}

fn scsi_controller(line: &mut Line<'_>, controller: &Controller, model: Option<ScsiModel>) {
    let virtio = |model| {
        virtio_device("virtio-scsi", Some(model), controller.virtio)
            .with_some("num_queues", controller.queues)
            .with_some("cmd_per_lun", controller.cmd_per_lun)
            .with_some("max_sectors", controller.max_sectors)
            .with_some("ioeventfd", controller.ioeventfd)
            .with_some(
                "iothread",
                controller
                    .iothread
                    .map(|thread| format!("iothread{thread}")),
            )
    };
    let device = match model {
        Some(ScsiModel::VirtioScsi) => virtio(VirtioModel::Virtio),
        Some(ScsiModel::VirtioTransitional) => virtio(VirtioModel::VirtioTransitional),
        Some(ScsiModel::VirtioNonTransitional) => virtio(VirtioModel::VirtioNonTransitional),
        Some(ScsiModel::LsiLogic) | None => Json::device("lsi"),
        Some(ScsiModel::LsiSas1068) => Json::device("mptsas1068"),
        Some(ScsiModel::LsiSas1078) => Json::device("megasas"),
        Some(ScsiModel::Vmpvscsi) => Json::device("pvscsi"),
        Some(ScsiModel::Am53c974) => Json::device("am53c974"),
        Some(ScsiModel::Dc390) => Json::device("dc390"),
        Some(ScsiModel::Auto | ScsiModel::Buslogic) => {
            return line.error(
                &controller.info,
                "QEMU has no such SCSI controller",
                Some("use model='virtio-scsi'"),
            );
        }
    };
    line.device(device, &controller.info);
}

/// The first IDE controller is part of an i440fx machine, and there is no other.
fn ide_controller(line: &mut Line<'_>, controller: &Controller) {
    if line.is_q35 || controller.index.unwrap_or(0) > 0 {
        line.error(
            &controller.info,
            "this machine has no such IDE controller",
            Some("use SATA disks"),
        );
    }
}

/// The first SATA controller is part of a q35 machine.
fn sata_controller(line: &mut Line<'_>, controller: &Controller) {
    if !line.is_q35 || controller.index.unwrap_or(0) > 0 {
        line.device(Json::device("ahci"), &controller.info);
    }
}
