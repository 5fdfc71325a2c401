//! Controllers.

use super::address::{DeviceInfo, VirtioOptions};
use super::view::View;
use super::word::words;

words! {
    /// What a controller is for.
    ControllerType {
        Pci = "pci",
        Usb = "usb",
        Scsi = "scsi",
        Ide = "ide",
        Sata = "sata",
        Fdc = "fdc",
        VirtioSerial = "virtio-serial",
        Ccid = "ccid",
    }
}

words! {
    /// A PCI controller.
    PciModel {
        PciRoot = "pci-root",
        PcieRoot = "pcie-root",
        PciBridge = "pci-bridge",
        DmiToPciBridge = "dmi-to-pci-bridge",
        PcieToPciBridge = "pcie-to-pci-bridge",
        PcieRootPort = "pcie-root-port",
        PcieSwitchUpstreamPort = "pcie-switch-upstream-port",
        PcieSwitchDownstreamPort = "pcie-switch-downstream-port",
        PciExpanderBus = "pci-expander-bus",
        PcieExpanderBus = "pcie-expander-bus",
    }
}

words! {
    /// A USB controller.
    UsbModel {
        Piix3Uhci = "piix3-uhci",
        Piix4Uhci = "piix4-uhci",
        Ehci = "ehci",
        Ich9Ehci1 = "ich9-ehci1",
        Ich9Uhci1 = "ich9-uhci1",
        Ich9Uhci2 = "ich9-uhci2",
        Ich9Uhci3 = "ich9-uhci3",
        Vt82c686bUhci = "vt82c686b-uhci",
        PciOhci = "pci-ohci",
        NecXhci = "nec-xhci",
        QemuXhci = "qemu-xhci",
        /// The guest has no USB.
        None = "none",
    }
}

words! {
    /// A SCSI controller.
    ScsiModel {
        Auto = "auto",
        LsiLogic = "lsilogic",
        LsiSas1068 = "lsisas1068",
        LsiSas1078 = "lsisas1078",
        VirtioScsi = "virtio-scsi",
        VirtioTransitional = "virtio-transitional",
        VirtioNonTransitional = "virtio-non-transitional",
        Buslogic = "buslogic",
        Vmpvscsi = "vmpvscsi",
        Am53c974 = "am53c974",
        Dc390 = "dc390",
    }
}

words! {
    /// An IDE controller.
    IdeModel {
        Piix3 = "piix3",
        Piix4 = "piix4",
        Ich6 = "ich6",
    }
}

words! {
    /// A virtio-serial controller.
    VirtioSerialModel {
        Virtio = "virtio",
        VirtioTransitional = "virtio-transitional",
        VirtioNonTransitional = "virtio-non-transitional",
    }
}

/// `<controller>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// Alias and address.
    pub info: DeviceInfo,
    /// `index=`; always there once the domain is expanded.
    pub index: Option<u32>,
    /// What it is.
    pub kind: ControllerKind,
    /// `<driver queues>`.
    pub queues: Option<u32>,
    /// `<driver cmd_per_lun>`.
    pub cmd_per_lun: Option<u32>,
    /// `<driver max_sectors>`.
    pub max_sectors: Option<u32>,
    /// `<driver ioeventfd>`.
    pub ioeventfd: Option<bool>,
    /// `<driver iothread>`.
    pub iothread: Option<u32>,
    /// What every virtio device may have.
    pub virtio: VirtioOptions,
}

/// What a controller is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControllerKind {
    /// PCI.
    Pci(PciController),
    /// USB.
    Usb {
        /// `model=`; always there once the domain is expanded.
        model: Option<UsbModel>,
        /// `ports=` of xhci.
        ports: Option<u32>,
        /// `<master startport>`: a companion, and its first port of the other's.
        master: Option<u32>,
    },
    /// SCSI.
    Scsi {
        /// `model=`; always there once the domain is expanded.
        model: Option<ScsiModel>,
    },
    /// IDE.
    Ide {
        /// `model=`.
        model: Option<IdeModel>,
    },
    /// SATA.
    Sata,
    /// Floppies.
    Fdc,
    /// Ports of virtio-serial.
    VirtioSerial {
        /// `model=`.
        model: Option<VirtioSerialModel>,
        /// `ports=`.
        ports: Option<u32>,
        /// `vectors=`.
        vectors: Option<u32>,
    },
    /// Smartcards.
    Ccid,
}

/// What only a PCI controller has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PciController {
    /// `model=`; always there once the domain is expanded.
    pub model: Option<PciModel>,
    /// `<model name>`: QEMU's device, where several fit.
    pub device: Option<String>,
    /// `<target chassisNr>`; always there for bridges once the domain is expanded.
    pub chassis_nr: Option<u32>,
    /// `<target chassis>`; always there for root and downstream ports once the domain is expanded.
    pub chassis: Option<u32>,
    /// `<target port>`; always there for root and downstream ports once the domain is expanded.
    pub port: Option<u32>,
    /// `<target busNr>` of an expander.
    pub bus_nr: Option<u32>,
    /// `<target><node>` of an expander.
    pub node: Option<u32>,
    /// `<target hotplug>`.
    pub hotplug: Option<bool>,
    /// `<target memReserve>` in bytes.
    pub mem_reserve: Option<u64>,
    /// `<pcihole64>` in bytes.
    pub hole64: Option<u64>,
}

impl ControllerKind {
    /// Its word in XML.
    pub fn kind(&self) -> ControllerType {
        match self {
            ControllerKind::Pci(_) => ControllerType::Pci,
            ControllerKind::Usb { .. } => ControllerType::Usb,
            ControllerKind::Scsi { .. } => ControllerType::Scsi,
            ControllerKind::Ide { .. } => ControllerType::Ide,
            ControllerKind::Sata => ControllerType::Sata,
            ControllerKind::Fdc => ControllerType::Fdc,
            ControllerKind::VirtioSerial { .. } => ControllerType::VirtioSerial,
            ControllerKind::Ccid => ControllerType::Ccid,
        }
    }
}

impl Controller {
    /// What only a PCI controller has.
    pub fn as_pci(&self) -> Option<&PciController> {
        match &self.kind {
            ControllerKind::Pci(pci) => Some(pci),
            _ => None,
        }
    }

    /// The model of a PCI controller.
    pub fn pci_model(&self) -> Option<PciModel> {
        self.as_pci().and_then(|pci| pci.model)
    }

    /// The model of a USB controller.
    pub fn usb_model(&self) -> Option<UsbModel> {
        match self.kind {
            ControllerKind::Usb { model, .. } => model,
            _ => None,
        }
    }

    /// The model of a SCSI controller.
    pub fn scsi_model(&self) -> Option<ScsiModel> {
        match self.kind {
            ControllerKind::Scsi { model } => model,
            _ => None,
        }
    }
}

/// The places of controllers in their list, in the order in which libvirt would have them: those of a type by index, a
/// USB controller before its companions.
pub fn in_order(controllers: &[Controller]) -> Vec<usize> {
    let is_companion = |one: &Controller| {
        matches!(
            one.kind,
            ControllerKind::Usb {
                master: Some(_),
                ..
            }
        )
    };
    let mut ordered: Vec<usize> = Vec::with_capacity(controllers.len());
    for (number, controller) in controllers.iter().enumerate() {
        let mut place = ordered.len();
        for (at, other) in ordered.iter().enumerate().rev() {
            let same_type = |other: &&Controller| other.kind.kind() == controller.kind.kind();
            let Some(other) = controllers.get(*other).filter(same_type) else {
                continue;
            };
            let is_before = other.index < controller.index
                || other.index == controller.index
                    && (is_companion(controller) || !is_companion(other));
            if is_before {
                place = at + 1;
                break;
            }
            place = at;
        }
        ordered.insert(place, number);
    }
    ordered
}

pub(super) fn read_controller(view: &View<'_>) -> Option<Controller> {
    let kind = match view.required_word("type") {
        Some(ControllerType::Pci) => ControllerKind::Pci(read_pci(view)),
        Some(ControllerType::Usb) => ControllerKind::Usb {
            model: view.word("model"),
            ports: view.number("ports"),
            master: view.one_some("master", |master| master.number("startport")),
        },
        Some(ControllerType::Scsi) => ControllerKind::Scsi {
            model: view.word("model"),
        },
        Some(ControllerType::Ide) => ControllerKind::Ide {
            model: view.word("model"),
        },
        Some(ControllerType::Sata) => ControllerKind::Sata,
        Some(ControllerType::Fdc) => ControllerKind::Fdc,
        Some(ControllerType::VirtioSerial) => ControllerKind::VirtioSerial {
            model: view.word("model"),
            ports: view.number("ports"),
            vectors: view.number("vectors"),
        },
        Some(ControllerType::Ccid) => ControllerKind::Ccid,
        None => {
            view.skip();
            return None;
        }
    };
    let mut controller = Controller {
        info: view.device_info(),
        index: view.number("index"),
        kind,
        queues: None,
        cmd_per_lun: None,
        max_sectors: None,
        ioeventfd: None,
        iothread: None,
        virtio: VirtioOptions::default(),
    };
    let driver = view.one("driver", |driver| {
        driver.refuse_elements(
            &["iothreads"],
            "several I/O threads for one controller are not modelled",
            None,
        );
        (
            [
                driver.number("queues"),
                driver.number("cmd_per_lun"),
                driver.number("max_sectors"),
            ],
            driver.switch("ioeventfd"),
            driver.number("iothread"),
            driver.virtio_options(),
        )
    });
    if let Some(([queues, cmd_per_lun, max_sectors], ioeventfd, iothread, virtio)) = driver {
        controller = Controller {
            queues,
            cmd_per_lun,
            max_sectors,
            ioeventfd,
            iothread,
            virtio,
            ..controller
        };
    }
    Some(controller)
}

fn read_pci(view: &View<'_>) -> PciController {
    let mut pci = PciController {
        model: view.word("model"),
        device: view.one_some("model", |model| model.attribute("name")),
        hole64: view.one_some("pcihole64", View::size),
        ..PciController::default()
    };
    let target = view.one("target", |target| PciController {
        chassis_nr: target.number("chassisNr"),
        chassis: target.number("chassis"),
        port: target.number("port"),
        bus_nr: target.number("busNr"),
        node: target.one_some("node", View::text_number),
        hotplug: target.switch("hotplug"),
        mem_reserve: target
            .number::<u64>("memReserve")
            .and_then(|kib| kib.checked_mul(1024)),
        ..PciController::default()
    });
    if let Some(target) = target {
        pci = PciController {
            model: pci.model,
            device: pci.device,
            hole64: pci.hole64,
            ..target
        };
    }
    pci
}
