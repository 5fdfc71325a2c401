//! What a saved guest needs, held against what a host has: every reason why it cannot run there, not just the first.
//!
//! Somebody else gathers the facts about the host; this compares values. Every finding has a stable code, of
//! which [`codes`] is the table.
//!
//! | file | what it compares |
//! |---|---|
//! | [`codes`] | every code, whether a user may override it, and what it says |
//! | [`files`] | files: whether they are there, may be used, and are what they were |
//! | [`state`] | the state that the guest was saved with, with that which a QEMU would have: devices, memory, processors |
//! | [`cpu`] | the features of a processor |
//! | [`argument_changes`] | kept arguments with others, where no QEMU is asked |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use super::resources::{Resource, ResourceKind, ResourceTable};

pub mod argument_changes;
pub mod codes;
pub mod cpu;
pub mod files;
pub mod state;

pub use codes::Code;
pub use files::{CHANGED_DISK, FileFact, Fingerprint, Sameness};

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
    /// The flag that would help, or what to do; `None` if nothing does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    /// A reason.
    pub fn refusal(code: &'static str, fact: String, fix: impl Into<Option<String>>) -> Self {
        debug_assert!(codes::find(code).is_some(), "{code} is not in the table");
        Finding {
            code,
            level: Level::Refusal,
            fact,
            fix: fix.into(),
        }
    }

    /// What to do, as an order: `give --qemu PATH`.
    pub fn advice(&self) -> Option<String> {
        let fix = self.fix.as_ref()?;
        Some(match fix.starts_with("--") {
            true => format!("give {fix}"),
            false => fix.clone(),
        })
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
        findings.extend(files::check_drift(resource, guest));
        findings.extend(files::check_file(resource, guest, host));
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
