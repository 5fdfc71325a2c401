//! Files that the guest uses: whether they are there, may be used, and are what they were at the save.

use serde::{Deserialize, Serialize};

use super::{Finding, GuestNeeds, HostFacts, remap_fix};
use crate::config::overlay;
use crate::config::resources::{Resource, ResourceKind};

/// The codes of a disk that is not what it was, all of which `--accept-changed-disks` accepts.
pub const CHANGED_DISK: [&str; 4] = [
    "disk.changed",
    "disk.written",
    "disk.replaced",
    "disk.rolled-back",
];

/// By how much a copied file may be older than the file: some tools keep whole seconds only.
const ROUNDING_NS: i64 = 2_000_000_000;

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
    /// Another file of the same size, written later, lies in its place, in the same file system.
    Replaced,
    /// Its content was changed last before the save: an earlier state of it was put back.
    RolledBack,
    /// Nothing proves either: it was copied from elsewhere, or only its inode was changed.
    Unproven,
}

impl Fingerprint {
    /// Compares a file at the save with now.
    ///
    /// Another size: changed. Else a digest of all of it, taken both times, decides. Without one the same device, inode,
    /// mtime and ctime say that nobody touched it; an earlier mtime that it was rolled back; and a later one in the same
    /// file system that it was written to or replaced. In another file system it may be a copy, made any time.
    pub fn compare(&self, now: &Fingerprint) -> Sameness {
        let place = |f: &Fingerprint| (f.device, f.inode, f.size, f.mtime_ns, f.ctime_ns);
        if self.size != now.size {
            return Sameness::Changed;
        }
        match (&self.sha256, &now.sha256) {
            (Some(then), Some(now)) if then == now => return Sameness::Unchanged,
            (Some(_), Some(_)) => return Sameness::Changed,
            _ if place(self) == place(now) => return Sameness::Unchanged,
            _ => {}
        }
        let is_same_file = (self.device, self.inode) == (now.device, now.inode);
        let later = now.mtime_ns.saturating_sub(self.mtime_ns);
        let is_rounded = now.mtime_ns % 1_000_000_000 == 0 && later > -ROUNDING_NS;
        match later {
            0 => Sameness::Unproven,
            ..0 if is_rounded && !is_same_file => Sameness::Unproven,
            ..0 => Sameness::RolledBack,
            _ if is_same_file => Sameness::Written,
            _ if self.device == now.device => Sameness::Replaced,
            _ => Sameness::Unproven,
        }
    }
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

pub(super) fn check_file(
    resource: &Resource,
    guest: &GuestNeeds,
    host: &HostFacts,
) -> Option<Finding> {
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
pub(super) fn check_drift(resource: &Resource, guest: &GuestNeeds) -> Option<Finding> {
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
    let (code, what) = match sameness {
        Sameness::Unchanged => return None,
        Sameness::Changed if !is_medium => {
            let fact = format!("{name}: {path} changed since the guest was saved");
            return Some(Finding::refusal("file.changed", fact, fix));
        }
        // A kernel or a firmware of the same size loads; its bytes are in the image.
        _ if !is_medium => return None,
        Sameness::Unproven => {
            let fact = format!(
                "{name}: nothing proves that {path} is what it was when the guest was saved"
            );
            let fix = "--disk-digest at the save".to_owned();
            return Some(Finding::warning("disk.unproven", fact, fix));
        }
        Sameness::Changed => ("disk.changed", "changed since the guest was saved"),
        Sameness::Written => ("disk.written", "changed since the guest was saved"),
        Sameness::Replaced => (
            "disk.replaced",
            "is another file than when the guest was saved",
        ),
        Sameness::RolledBack => (
            "disk.rolled-back",
            "is older than when the guest was saved: an earlier state of it was put back",
        ),
    };
    let fix = fix.map(|remap| format!("{remap}, or --accept-changed-disks"));
    Some(Finding::refusal(
        code,
        format!("{name}: {path} {what}"),
        fix,
    ))
}
