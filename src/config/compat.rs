//! What a saved guest needs, held against what a host has: every reason why it cannot run there, not just the first.
//!
//! Somebody else gathers the facts about the host; this compares values. Every finding has a stable code:
//!
//! | code | says |
//! |---|---|
//! | `qemu.missing` `qemu.too-old` `qemu.older` | no QEMU; older than needed; older than at the save (a warning) |
//! | `machine.unknown` `accel.missing` | QEMU lacks the machine type; the accelerator |
//! | `file.missing` `file.permission` `file.changed` | a file the arguments name |
//! | `disk.changed` `disk.unproven` | a disk is not, or may not be (a warning), what it was at the save |
//! | `disk.drifted` | the guest ran on with the disk after the save |
//! | `socket.busy` `port.busy` `interface.missing` | a socket or port in use; a tap or bridge that is not there |
//! | `map.memory` `map.qemu` | memory cannot be mapped from the image: what the guest has, a QEMU that is too old |
//! | `memory.short` | less memory is free than the guest has (a warning) |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::overlay;
use super::resources::{Resource, ResourceKind, ResourceTable};

/// A QEMU version: major, minor, micro.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion(pub u32, pub u32, pub u32);

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// What a saved guest needs of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNeeds {
    /// The resolved machine type.
    pub machine_type: String,
    /// The QEMU that saved it.
    pub qemu_version: QemuVersion,
    /// The oldest QEMU that can restore it in the way asked for.
    #[serde(default)]
    pub minimum_qemu: Option<QemuVersion>,
    /// `kvm`, `tcg`, ….
    pub accelerator: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// Its host resources, after remaps.
    pub resources: ResourceTable,
    /// What its files were at the save, by path as in `resources`; a file that was remapped has none.
    #[serde(default)]
    pub fingerprints: BTreeMap<String, Fingerprint>,
    /// The ids of disks with which the guest ran on after the save, and which it would write to again: the image shows
    /// their past.
    #[serde(default)]
    pub drifted: BTreeSet<String>,
}

/// What a host has; gathered for one guest's needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The QEMU that would be started.
    pub qemu_path: String,
    /// Its version; `None` if it could not be run.
    pub qemu_version: Option<QemuVersion>,
    /// Every machine type it knows.
    pub machine_types: BTreeSet<String>,
    /// Every accelerator that works here.
    pub accelerators: BTreeSet<String>,
    /// The files asked for, by path as the resources name them.
    pub files: BTreeMap<String, FileFact>,
    /// Paths of sockets that somebody answers on.
    pub busy_sockets: BTreeSet<String>,
    /// Addresses in use, spelled as [`super::resources::Backend::listens`].
    pub busy_ports: BTreeSet<String>,
    /// Network interfaces; `None` if they were not looked at.
    pub interfaces: Option<BTreeSet<String>>,
    /// Memory that can be had without swapping; `None` if unknown.
    pub available_memory_bytes: Option<u64>,
}

/// What is known of a file on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileFact {
    /// There is none.
    Missing,
    /// It is there.
    Present {
        /// Whether QEMU will be allowed to read it.
        can_read: bool,
        /// Whether QEMU will be allowed to write it.
        can_write: bool,
        /// What it is now; `None` for sockets and pipes.
        fingerprint: Option<Fingerprint>,
    },
}

/// What identifies the state of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
    /// Bytes; of a block device its length.
    pub size: u64,
    /// Last change of content, in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Last change of content or inode, in nanoseconds since 1970.
    pub ctime_ns: i64,
    /// SHA-256 of all of it in hexadecimal, if it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// Whether a file is what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sameness {
    /// It is.
    Unchanged,
    /// It is not: its size or its digest is another.
    Changed,
    /// It is the same file, but was written to since; what it holds may be the same nonetheless.
    Written,
    /// Nothing proves either: it was copied, or only its inode was changed.
    Unproven,
}

impl Fingerprint {
    /// Compares a file at the save with now.
    ///
    /// Another size: changed. Else a digest of all of it, taken both times, decides. Without one the same device, inode,
    /// mtime and ctime say that nobody touched it, and the same device and inode with another mtime that somebody did.
    pub fn compare(&self, now: &Fingerprint) -> Sameness {
        let place = |f: &Fingerprint| (f.device, f.inode, f.size, f.mtime_ns, f.ctime_ns);
        if self.size != now.size {
            return Sameness::Changed;
        }
        match (&self.sha256, &now.sha256) {
            (Some(then), Some(now)) if then == now => Sameness::Unchanged,
            (Some(_), Some(_)) => Sameness::Changed,
            _ if place(self) == place(now) => Sameness::Unchanged,
            _ if self.is_same_file(now) && self.mtime_ns != now.mtime_ns => Sameness::Written,
            _ => Sameness::Unproven,
        }
    }

    fn is_same_file(&self, other: &Fingerprint) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// The guest can be restored, and somebody should know.
    Warning,
    /// The guest cannot be restored.
    Refusal,
}

/// One thing that a host lacks or that is not as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A stable code; see the module's table.
    pub code: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What is so, in one sentence without an end stop.
    pub fact: String,
    /// The flag that would help; `None` if none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    fn refusal(code: &'static str, fact: String, fix: impl Into<Option<String>>) -> Self {
        Finding {
            code,
            level: Level::Refusal,
            fact,
            fix: fix.into(),
        }
    }

    /// A doubt.
    pub fn warning(code: &'static str, fact: String, fix: impl Into<Option<String>>) -> Self {
        Finding {
            level: Level::Warning,
            ..Finding::refusal(code, fact, fix)
        }
    }
}

/// Every reason why the guest cannot run on the host, and every doubt; empty if there is neither.
pub fn check(guest: &GuestNeeds, host: &HostFacts) -> Vec<Finding> {
    let mut findings = check_qemu(guest, host);
    findings.extend(check_memory(guest, host));
    for resource in &guest.resources.resources {
        findings.extend(check_drift(resource, guest));
        findings.extend(check_file(resource, guest, host));
        findings.extend(check_socket(resource, host));
        findings.extend(check_ports(resource, host));
        findings.extend(check_interface(resource, host));
    }
    findings
}

fn check_qemu(guest: &GuestNeeds, host: &HostFacts) -> Vec<Finding> {
    let Some(version) = host.qemu_version else {
        let fact = format!("{} is not a QEMU that can be run", host.qemu_path);
        let fix = "--qemu PATH".to_owned();
        return vec![Finding::refusal("qemu.missing", fact, fix)];
    };
    let mut findings = Vec::new();
    let known = host.machine_types.contains(&guest.machine_type);
    match guest.minimum_qemu {
        Some(minimum) if version < minimum => findings.push(Finding::refusal(
            "qemu.too-old",
            format!(
                "this restore needs QEMU {minimum}, {} is {version}",
                host.qemu_path
            ),
            "--qemu PATH".to_owned(),
        )),
        // Between versions the machine type is what counts, but QEMU promises less on the way back.
        _ if known && (version.0, version.1) < (guest.qemu_version.0, guest.qemu_version.1) => {
            let saved = guest.qemu_version;
            let fact = format!(
                "the guest was saved by QEMU {saved}, {} is {version}",
                host.qemu_path
            );
            findings.push(Finding::warning(
                "qemu.older",
                fact,
                "--qemu PATH".to_owned(),
            ));
        }
        _ => {}
    }
    if !known {
        findings.push(Finding::refusal(
            "machine.unknown",
            format!(
                "machine type {:?} is unknown to QEMU {version} ({})",
                guest.machine_type, host.qemu_path
            ),
            format!(
                "--qemu PATH, naming a QEMU of at least {}",
                first_version(guest)
            ),
        ));
    }
    if !host.accelerators.contains(&guest.accelerator) {
        findings.push(Finding::refusal(
            "accel.missing",
            format!(
                "accelerator {:?} does not work on this host",
                guest.accelerator
            ),
            None,
        ));
    }
    findings
}

/// The first QEMU that knows the guest's machine type, as far as its name tells: `10.0` of `pc-q35-10.0`.
fn first_version(guest: &GuestNeeds) -> String {
    let suffix = guest.machine_type.rsplit('-').next().unwrap_or_default();
    if suffix.starts_with(|first: char| first.is_ascii_digit()) {
        suffix.to_owned()
    } else {
        guest.qemu_version.to_string()
    }
}

fn check_memory(guest: &GuestNeeds, host: &HostFacts) -> Option<Finding> {
    let available = host
        .available_memory_bytes
        .filter(|free| *free < guest.memory_bytes)?;
    let fact = format!(
        "the guest has {} of memory, {} is available",
        crate::units::human_bytes(guest.memory_bytes),
        crate::units::human_bytes(available)
    );
    Some(Finding::warning("memory.short", fact, None))
}

/// Only what QEMU opens; what it makes itself (sockets, output files) need not be there.
fn must_exist(resource: &Resource) -> bool {
    match resource.kind {
        ResourceKind::Chardev => match resource.backend.kind.as_str() {
            "socket" => !resource.backend.is_server,
            "pipe" | "serial" | "parallel" => true,
            _ => false,
        },
        ResourceKind::Nic => !resource.backend.is_server,
        ResourceKind::Display => false,
        _ => true,
    }
}

fn check_file(resource: &Resource, guest: &GuestNeeds, host: &HostFacts) -> Option<Finding> {
    let path = resource.backend.path.as_ref()?;
    let fix = remap_fix(resource, "PATH");
    let name = format!("{} {:?}", resource.kind.word(), resource.id);
    match host.files.get(path)? {
        FileFact::Missing if must_exist(resource) => {
            let fact = format!("{name} needs {path}, which is missing");
            Some(Finding::refusal("file.missing", fact, fix))
        }
        FileFact::Missing => None,
        FileFact::Present {
            can_read,
            can_write,
            fingerprint,
        } => {
            let needed = match (
                can_read,
                resource.read_only || *can_write || !is_written(resource),
            ) {
                (false, _) => Some("read"),
                (true, false) => Some("written"),
                (true, true) => None,
            };
            if let Some(needed) = needed {
                let fact = format!("{name} needs {path}, which may not be {needed}");
                return Some(Finding::refusal("file.permission", fact, fix));
            }
            let (then, now) = (guest.fingerprints.get(path)?, fingerprint.as_ref()?);
            check_sameness(resource, path, then.compare(now))
        }
    }
}

/// What the guest remembers of a disk is older than the disk: it would destroy what was written since.
fn check_drift(resource: &Resource, guest: &GuestNeeds) -> Option<Finding> {
    if !overlay::is_writable_disk(resource) || !guest.drifted.contains(&resource.id) {
        return None;
    }
    let name = format!("{} {:?}", resource.kind.word(), resource.id);
    let fact = format!(
        "{name} drifted: the guest ran on with it after the save, so its image fits only an overlay over it or a copy taken at the save"
    );
    let fix = match remap_fix(resource, "COPY") {
        Some(remap) => format!("--throwaway, or {remap}"),
        None => "--throwaway".to_owned(),
    };
    Some(Finding::refusal("disk.drifted", fact, fix))
}

fn is_written(resource: &Resource) -> bool {
    matches!(
        resource.kind,
        ResourceKind::Disk | ResourceKind::Floppy | ResourceKind::Chardev
    )
}

fn check_sameness(resource: &Resource, path: &str, sameness: Sameness) -> Option<Finding> {
    let name = format!("{} {:?}", resource.kind.word(), resource.id);
    let is_medium = match resource.kind {
        ResourceKind::Disk | ResourceKind::Backing | ResourceKind::Cdrom | ResourceKind::Floppy => {
            true
        }
        ResourceKind::Firmware | ResourceKind::Kernel => false,
        // Logs grow, and the guest has no memory of the others.
        _ => return None,
    };
    let fix = remap_fix(resource, "PATH");
    match sameness {
        Sameness::Unchanged => None,
        // A kernel or a firmware of the same size loads; its bytes are in the image.
        Sameness::Written | Sameness::Unproven if !is_medium => None,
        Sameness::Changed | Sameness::Written => {
            let code = if is_medium {
                "disk.changed"
            } else {
                "file.changed"
            };
            let fact = format!("{name}: {path} changed since the guest was saved");
            let fix = match (is_medium, fix) {
                (true, Some(remap)) => Some(format!("{remap}, or --accept-changed-disks")),
                (_, fix) => fix,
            };
            Some(Finding::refusal(code, fact, fix))
        }
        Sameness::Unproven => {
            let fact = format!(
                "{name}: nothing proves that {path} is what it was when the guest was saved"
            );
            Some(Finding::warning(
                "disk.unproven",
                fact,
                "--disk-digest at the save".to_owned(),
            ))
        }
    }
}

fn check_socket(resource: &Resource, host: &HostFacts) -> Option<Finding> {
    let path = resource
        .backend
        .path
        .as_ref()
        .filter(|_| resource.backend.is_server)?;
    host.busy_sockets.contains(path).then(|| {
        let fact = format!(
            "{} {:?}: somebody answers on {path}",
            resource.kind.word(),
            resource.id
        );
        Finding::refusal("socket.busy", fact, remap_fix(resource, "unix:PATH"))
    })
}

fn check_ports(resource: &Resource, host: &HostFacts) -> Vec<Finding> {
    let busy = resource
        .backend
        .listens
        .iter()
        .filter(|port| host.busy_ports.contains(*port));
    let findings = busy.map(|port| {
        let fact = format!(
            "{} {:?}: {port} is in use",
            resource.kind.word(),
            resource.id
        );
        Finding::refusal("port.busy", fact, remap_fix(resource, "unix:PATH"))
    });
    findings.collect()
}

fn check_interface(resource: &Resource, host: &HostFacts) -> Option<Finding> {
    let name = resource.backend.interface.as_ref()?;
    let interfaces = host.interfaces.as_ref()?;
    // QEMU makes a tap that does not exist, if it is allowed to; a bridge has to be there.
    if resource.backend.kind != "bridge" || interfaces.contains(name) {
        return None;
    }
    let fact = format!(
        "nic {:?} needs the bridge {name:?}, which is missing",
        resource.id
    );
    Some(Finding::refusal(
        "interface.missing",
        fact,
        "--remap net:".to_owned() + &resource.id + "=bridge=NAME",
    ))
}

/// The remap that gives the resource another backend; `None` where there is none.
pub(super) fn remap_fix(resource: &Resource, path: &str) -> Option<String> {
    let (kind, target) = match resource.kind {
        // Its overlay names it: only another overlay names another one.
        ResourceKind::Backing => return None,
        ResourceKind::Display if path == "PATH" => ("display", "unix:PATH"),
        ResourceKind::Nic => ("net", "user"),
        ResourceKind::Chardev if path == "PATH" => ("chardev", "file:PATH"),
        kind => (kind.word(), path),
    };
    Some(format!("--remap {kind}:{}={target}", resource.id))
}

#[cfg(test)]
mod tests;
