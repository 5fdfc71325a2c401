//! The host resources a guest uses: files, sockets, ports, networks.
//!
//! Made from the arguments ([`ResourceTable::from_arguments`]) and corrected by what QMP says about the block graph
//! ([`ResourceTable::apply_block_facts`]): after a snapshot, a mirror or a change of medium the arguments name the wrong
//! file. The table goes into the manifest as JSON.
//!
//! A resource without an id gets the one QEMU gives it (`ide0-hd0`, `virtio0`, `floppy0`, `pflash0`) or, where QEMU has
//! none, its option and number (`serial0`, `nic0`, `bios`).

mod block;
mod other;

use serde::{Deserialize, Serialize};

use super::Arguments;

pub use block::{BlockDevice, BlockFacts, BlockNode};
pub(super) use other::is_monitor_only;

/// A prefix of ids that restore arguments give to character devices that had none; not part of a resource's id.
pub(super) const OWN_PREFIX: &str = "vmstow-";
/// As [`OWN_PREFIX`], for log files that stand in for a terminal.
pub(super) const OWN_LOG_PREFIX: &str = "vmstow-log-";

/// A prefix of the ids of user networks that only load the state of one that was remapped; they are no resources.
pub(super) const OWN_SLIRP_PREFIX: &str = "vmstow-slirp-";

/// What sort of resource it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResourceKind {
    /// A disk image or a block device.
    Disk,
    /// A file behind a disk's overlay.
    Backing,
    /// The medium of a CD-ROM drive.
    Cdrom,
    /// The medium of a floppy drive.
    Floppy,
    /// The host side of a network interface.
    Nic,
    /// The host side of a serial port or another character device.
    Chardev,
    /// A directory shared with the guest.
    Share,
    /// A BIOS, a UEFI flash or an option ROM.
    Firmware,
    /// A kernel, its initrd, a device tree.
    Kernel,
    /// A TPM.
    Tpm,
    /// A remote display.
    Display,
}

/// One host resource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resource {
    /// What sort it is.
    pub kind: ResourceKind,
    /// Its name, unique within its kind.
    pub id: String,
    /// Other names by which a remap may call it: the device's id, the node's name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// What the guest sees: a device's driver, an interface (`ide`), a port (`serial0`). `None` if nothing is attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frontend: Option<String>,
    /// What stands behind it on the host.
    pub backend: Backend,
    /// Whether QEMU only reads it.
    #[serde(default)]
    pub read_only: bool,
    /// The argument it comes from, counted from 0 behind the program; `None` if only QMP knew of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argument: Option<usize>,
}

/// The host's side of a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// QEMU's word for it: `file`, `user`, `tap`, `socket`, `pty`; `empty` for a drive without medium.
    #[serde(rename = "type")]
    pub kind: String,
    /// A path on the host, as written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// The path in the arguments, where QMP said that another one is in use now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub argument_path: Option<String>,
    /// The image format: `qcow2`, `raw`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// The image that this one builds on, as QMP names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_file: Option<String>,
    /// A bridge, a tap or a macvtap interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// A host to connect to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// A port to connect to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// Whether QEMU makes the socket and waits for others.
    #[serde(default)]
    pub is_server: bool,
    /// Ports that QEMU takes on the host: `tcp:127.0.0.1:2222`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub listens: Vec<String>,
}

/// Every host resource of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ResourceTable {
    /// In the order of the arguments within each kind.
    pub resources: Vec<Resource>,
}

impl ResourceTable {
    /// The resources that the arguments name. Monitors are not among them: they are never restored.
    ///
    /// `machine_type` is the resolved one, if it is known; drives on q35 are numbered otherwise than on i440fx.
    pub fn from_arguments(arguments: &Arguments, machine_type: Option<&str>) -> Self {
        let mut resources = block::drives(arguments, machine_type);
        resources.extend(block::nodes(arguments));
        resources.extend(other::networks(arguments));
        resources.extend(other::chardevs(arguments));
        resources.extend(other::shares(arguments));
        resources.extend(other::firmware_and_kernel(arguments));
        resources.extend(other::tpms(arguments));
        resources.extend(other::displays(arguments));
        ResourceTable { resources }
    }

    /// Puts the files that QEMU has open now in place of those that the arguments name.
    pub fn apply_block_facts(&mut self, facts: &BlockFacts) {
        block::apply(&mut self.resources, facts);
    }

    /// The resources of one kind.
    pub fn of(&self, kind: ResourceKind) -> impl Iterator<Item = &Resource> {
        self.resources.iter().filter(move |r| r.kind == kind)
    }

    /// A resource by its id or, if no id fits, by one of its aliases.
    pub fn find(&self, kind: ResourceKind, id: &str) -> Option<&Resource> {
        let by_id = self.of(kind).find(|resource| resource.id == id);
        by_id.or_else(|| self.of(kind).find(|r| r.aliases.iter().any(|a| a == id)))
    }
}

impl ResourceKind {
    /// The word for it in the manifest and in a remap.
    pub fn word(self) -> &'static str {
        match self {
            ResourceKind::Disk => "disk",
            ResourceKind::Backing => "backing",
            ResourceKind::Cdrom => "cdrom",
            ResourceKind::Floppy => "floppy",
            ResourceKind::Nic => "nic",
            ResourceKind::Chardev => "chardev",
            ResourceKind::Share => "share",
            ResourceKind::Firmware => "firmware",
            ResourceKind::Kernel => "kernel",
            ResourceKind::Tpm => "tpm",
            ResourceKind::Display => "display",
        }
    }
}

impl Resource {
    /// A file behind the overlay of `disk`, the `number`th from the top: no argument names it, the overlay does.
    pub fn backing(disk: &Resource, number: usize, path: String) -> Self {
        Resource {
            kind: ResourceKind::Backing,
            id: format!("{}/{number}", disk.id),
            aliases: Vec::new(),
            frontend: None,
            backend: Backend::file(path),
            read_only: true,
            argument: None,
        }
    }

    /// The id of the disk that a backing file belongs to.
    pub fn overlay_id(&self) -> Option<&str> {
        let is_backing = self.kind == ResourceKind::Backing;
        is_backing.then(|| self.id.rsplit_once('/').map(|(disk, _)| disk))?
    }

    fn new(kind: ResourceKind, id: impl Into<String>, argument: usize, backend: Backend) -> Self {
        Resource {
            kind,
            id: id.into(),
            aliases: Vec::new(),
            frontend: None,
            backend,
            read_only: false,
            argument: Some(argument),
        }
    }
}

impl Backend {
    fn of_type(kind: impl Into<String>) -> Self {
        Backend {
            kind: kind.into(),
            ..Backend::default()
        }
    }

    fn file(path: impl Into<String>) -> Self {
        Backend {
            path: Some(path.into()),
            ..Backend::of_type("file")
        }
    }
}

#[cfg(test)]
mod tests;
