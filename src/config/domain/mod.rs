//! The domain as typed, owned values, read from domain XML.
//!
//! [`Domain::read`] takes a [`Document`] and gives a [`Reading`]. Values mirror the XML: what is not there is `None`, and
//! [`expand`](crate::config::expand) fills in what libvirt and QEMU would. What is not modelled is found and listed with
//! its path and line: an error if the guest would differ without it, a warning if only the host's side would. Errors are
//! gathered and told all at once.
//!
//! | file | what it reads |
//! |---|---|
//! | [`os`] [`memory`] [`cpu`] [`features`] | the machine |
//! | [`devices`] | the list of devices |
//! | [`disks`] [`disk_source`] | disks and where their bytes are |
//! | [`controllers`] [`interfaces`] [`chardevs`] [`displays`] [`sound`] [`usb_devices`] [`shares`] [`hostdevs`] [`stores`] [`platform`] | the other devices |
//! | [`address`] | what all devices have |
//! | [`commandline`] | what is handed to QEMU past the model |
//! | `view` `quantity` [`word`] | how elements, sizes and words are read |
//!
//! Source: libvirt's documentation of the domain format.

pub mod address;
pub mod chardevs;
pub mod commandline;
pub mod controllers;
pub mod cpu;
pub mod devices;
pub mod disk_source;
pub mod disks;
pub mod displays;
pub mod features;
pub mod hostdevs;
pub mod interfaces;
pub mod memory;
pub mod os;
pub mod platform;
pub mod shares;
pub mod sound;
pub mod stores;
pub mod usb_devices;
pub mod word;

mod boot;
pub(super) mod quantity;
mod view;

use std::cell::RefCell;

use super::ConfigError;
use super::error::Unmodelled;
use super::xml::Document;
pub(in crate::config) use view::Problems;
use view::View;
use word::words;

pub use address::{Address, DeviceInfo, PciAddress};
pub use commandline::{ExtraArguments, PropertyOverride};
pub use cpu::{Cpu, IoThreads, Vcpus};
pub use devices::Devices;
pub use features::{Clock, Features, Lifecycle, PowerManagement};
pub use memory::Memory;
pub use os::{Os, SysInfo};
pub use word::Word;

words! {
    /// Who runs the guest's instructions.
    DomainType {
        Kvm = "kvm",
        /// QEMU itself, TCG.
        Qemu = "qemu",
    }
}

/// As many devices a domain may have: more than any machine has are a slip or an attack.
pub const MOST_DEVICES: usize = 2048;

/// A guest's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// The line of its element.
    pub line: u32,
    /// Who runs its instructions.
    pub kind: DomainType,
    /// Its name.
    pub name: String,
    /// Its UUID; `None` if it has none, for none is invented.
    pub uuid: Option<uuid::Uuid>,
    /// `<genid>`: the generation that the guest sees; one is to be made if it is `Some(None)`.
    pub generation: Option<Option<uuid::Uuid>>,
    /// Memory.
    pub memory: Memory,
    /// Virtual CPUs.
    pub vcpus: Vcpus,
    /// Threads for I/O.
    pub iothreads: IoThreads,
    /// How it boots.
    pub os: Os,
    /// `<sysinfo>`.
    pub sysinfo: Vec<SysInfo>,
    /// What its machine can do.
    pub features: Features,
    /// Its CPU; QEMU's default without it.
    pub cpu: Option<Cpu>,
    /// Its clock.
    pub clock: Clock,
    /// What becomes of it when it ends.
    pub lifecycle: Lifecycle,
    /// Whether it can sleep.
    pub power: PowerManagement,
    /// Its devices.
    pub devices: Devices,
    /// `<qemu:commandline>`; whether it is used is for the caller to decide.
    pub extra: ExtraArguments,
    /// `<qemu:override>`; whether it is used is for the caller to decide.
    pub overrides: Vec<PropertyOverride>,
}

/// What reading a domain gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The domain.
    pub domain: Domain,
    /// What is left out without the guest being another one.
    pub warnings: Vec<Unmodelled>,
}

impl Domain {
    /// Reads a domain.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] with everything that cannot be honoured.
    pub fn read(document: &Document) -> Result<Reading, ConfigError> {
        let problems = RefCell::new(Problems::default());
        let domain = read_domain(document, &problems);
        let Problems { errors, warnings } = problems.into_inner();
        match domain {
            Some(domain) if errors.is_empty() => Ok(Reading { domain, warnings }),
            _ => Err(ConfigError::Unsupported { elements: errors }),
        }
    }

    /// Whether its machine type is of the q35 family.
    pub fn is_q35(&self) -> bool {
        let machine = self.os.machine.as_deref().unwrap_or_default();
        machine == "q35" || machine.starts_with("pc-q35-")
    }

    /// Whether its machine type is of the i440fx family.
    pub fn is_i440fx(&self) -> bool {
        let machine = self.os.machine.as_deref().unwrap_or_default();
        machine == "pc"
            || machine.starts_with("pc-i440fx-")
            || machine.starts_with("pc-0.")
            || machine.starts_with("pc-1.")
    }
}

fn read_domain(document: &Document, problems: &RefCell<Problems>) -> Option<Domain> {
    let view = View::root(&document.root, problems);
    if view.name() != "domain" {
        view.error(
            format!("<{}> stands where one <domain> should", view.name()),
            None,
        );
        return None;
    }
    let devices = document.root.find("devices");
    let count = devices.map_or(0, |devices| devices.elements().count());
    if count > MOST_DEVICES {
        view.error(
            format!("it has {count} devices, more than {MOST_DEVICES}"),
            None,
        );
        return None;
    }
    view.ignore(&["id"]);
    view.ignore_elements(&[
        "metadata",
        "title",
        "description",
        "seclabel",
        "resource",
        "keywrap",
    ]);
    view.leave_out_elements(
        &["cputune", "memtune", "blkiotune"],
        "the host's limits for the guest are not set",
    );
    view.leave_out_elements(
        &["numatune"],
        "where on the host the guest's memory lies is left to the host",
    );
    view.refuse_elements(
        &["launchSecurity"],
        "a guest whose memory is encrypted cannot be saved, and is not modelled",
        None,
    );
    view.refuse_elements(
        &["bootloader", "bootloader_args", "idmap"],
        "only QEMU guests can be run",
        None,
    );
    view.leave_out_elements(
        &["perf", "throttlegroups", "defaultiothread"],
        "it is not set",
    );
    view.leave_out_elements(
        &["qemu:deprecation", "qemu:capabilities"],
        "it is libvirt's own",
    );
    let kind = view.required_word("type");
    let uuid = |text: Option<String>, name: &str| {
        let text = text?;
        let uuid = text.parse();
        if uuid.is_err() {
            view.error(format!("{name} {text:?} is not a UUID"), None);
        }
        uuid.ok()
    };
    let name = view.child_text("name");
    if name.is_none() {
        view.error("it has no <name>", None);
    }
    let os = view.one("os", os::read_os);
    if os.is_none() {
        view.error(
            "it has no <os>",
            Some("add <os><type machine='q35'>hvm</type></os>"),
        );
    }
    let mut domain = Domain {
        line: view.line(),
        kind: kind.unwrap_or(DomainType::Qemu),
        name: name.unwrap_or_default(),
        uuid: uuid(view.child_text("uuid"), "uuid"),
        generation: view
            .one("genid", View::text)
            .map(|text| uuid(text, "genid")),
        memory: memory::read_memory(&view),
        vcpus: cpu::read_vcpus(&view),
        iothreads: cpu::read_iothreads(&view),
        os: os.unwrap_or_default(),
        sysinfo: view.each_some("sysinfo", os::read_sysinfo),
        features: view
            .one("features", features::read_features)
            .unwrap_or_default(),
        cpu: view.one("cpu", cpu::read_cpu),
        clock: view.one("clock", features::read_clock).unwrap_or_default(),
        lifecycle: features::read_lifecycle(&view),
        power: view
            .one("pm", features::read_power_management)
            .unwrap_or_default(),
        devices: view
            .one("devices", devices::read_devices)
            .unwrap_or_default(),
        extra: view
            .one("qemu:commandline", commandline::read_extra_arguments)
            .unwrap_or_default(),
        overrides: view
            .one("qemu:override", commandline::read_overrides)
            .unwrap_or_default(),
    };
    boot::compute(&mut domain, &view);
    view.finish();
    Some(domain)
}

#[cfg(test)]
mod tests;
