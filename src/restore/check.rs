//! What the guest needs and what this host has, as values that can be compared.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, ToSocketAddrs, UdpSocket};
use std::path::Path;

use rustix::fs::Access;

use super::side;
use crate::config::compat::{FileFact, Fingerprint, GuestNeeds, HostFacts, QemuVersion};
use crate::config::{Arguments, Resource, ResourceKind, ResourceTable};
use crate::container::Manifest;
use crate::error::Result;
use crate::host::{self, FileIdentity, QemuFacts};
use crate::image::resource;

/// What the guest needs once its resources are remapped.
pub fn needs(manifest: &Manifest, arguments: &[String]) -> Result<GuestNeeds> {
    let machine = &manifest.machine;
    let arguments = Arguments::parse(arguments)?;
    let mut resources = ResourceTable::from_arguments(&arguments, Some(&machine.machine_type));
    resources
        .resources
        .extend(backing_files(manifest, &resources));
    let programs = &manifest.qemu.side_programs;
    resources.resources.retain(|one| {
        let path = one.backend.path.as_deref();
        !path.is_some_and(|path| side::is_own_socket(programs, path))
    });
    Ok(GuestNeeds {
        machine_type: machine.machine_type.clone(),
        qemu_version: version(&manifest.qemu.version),
        minimum_qemu: None,
        accelerator: machine.accelerator.clone(),
        memory_bytes: machine.memory_bytes,
        fingerprints: fingerprints(manifest, &resources),
        drifted: drifted(manifest, &resources),
        resources,
    })
}

/// The files behind the overlays of those disks that were not remapped.
fn backing_files(manifest: &Manifest, now: &ResourceTable) -> Vec<Resource> {
    let saved: Vec<Resource> = manifest.resources.iter().filter_map(resource).collect();
    let is_kept = |overlay: &str| {
        let disks = saved.iter().filter(|one| one.id == overlay);
        let mut disks = disks.filter_map(|disk| Some((disk, now.find(disk.kind, overlay)?)));
        disks.any(|(then, now)| then.backend.path == now.backend.path)
    };
    let backing = saved
        .iter()
        .filter(|one| one.overlay_id().is_some_and(is_kept));
    backing.cloned().collect()
}

/// The disks with which the guest ran on after the save; one that was remapped is another by intention.
fn drifted(manifest: &Manifest, now: &ResourceTable) -> BTreeSet<String> {
    let saved = manifest.resources.iter().filter_map(resource);
    let saved = saved.filter(|_| manifest.guest.ran_on);
    let is_kept = |then: &Resource| {
        let now = now.find(then.kind, &then.id);
        now.is_some_and(|now| {
            (&now.backend.path, &now.backend.host) == (&then.backend.path, &then.backend.host)
        })
    };
    saved.filter(is_kept).map(|one| one.id).collect()
}

/// The saved fingerprints by path; a resource that was remapped has none, for it is another by intention.
fn fingerprints(manifest: &Manifest, now: &ResourceTable) -> BTreeMap<String, Fingerprint> {
    let mut fingerprints = BTreeMap::new();
    for kept in &manifest.resources {
        let (Some(saved), Some(fingerprint)) = (resource(kept), &kept.fingerprint) else {
            continue;
        };
        // Other arguments may know the same file under another name.
        let same =
            |one: &&Resource| one.kind == saved.kind && one.backend.path == saved.backend.path;
        let now = now
            .find(saved.kind, &saved.id)
            .or_else(|| now.resources.iter().find(same));
        let path = now.and_then(|now| now.backend.path.as_ref());
        if let Some(path) = path.filter(|path| saved.backend.path.as_ref() == Some(path)) {
            fingerprints.insert(
                path.clone(),
                Fingerprint {
                    device: fingerprint.device,
                    inode: fingerprint.inode,
                    size: fingerprint.size,
                    mtime_ns: fingerprint.mtime_ns,
                    ctime_ns: fingerprint.ctime_ns,
                    sha256: fingerprint.sha256.clone(),
                },
            );
        }
    }
    fingerprints
}

pub fn version(text: &str) -> QemuVersion {
    let mut numbers = text.split('.').map(|number| number.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    QemuVersion(next(), next(), next())
}

/// What this host has of what the guest needs.
pub fn host_facts(qemu: &QemuFacts, needs: &GuestNeeds, cwd: &Path) -> HostFacts {
    let machine_types = qemu.machines.iter().map(|machine| machine.name.clone());
    let accelerators = qemu
        .accelerators
        .iter()
        .filter(|name| *name != "kvm" || host::is_kvm_accessible());
    let mut facts = HostFacts {
        qemu_path: qemu.path.display().to_string(),
        qemu_version: Some(QemuVersion(
            qemu.version.major,
            qemu.version.minor,
            qemu.version.micro,
        )),
        machine_types: machine_types.collect(),
        accelerators: accelerators.cloned().collect(),
        interfaces: Some(interfaces(needs)),
        available_memory_bytes: host::available_memory(),
        ..HostFacts::default()
    };
    for resource in &needs.resources.resources {
        let backend = &resource.backend;
        let is_socket = backend.kind == "socket" || resource.kind == ResourceKind::Display;
        if let Some(path) = &backend.path {
            let saved = needs.fingerprints.get(path);
            let digest = saved.is_some_and(|saved| saved.sha256.is_some());
            if is_socket && backend.is_server && is_listened_on(&cwd.join(path)) {
                facts.busy_sockets.insert(path.clone());
            }
            facts
                .files
                .insert(path.clone(), file_fact(&cwd.join(path), digest));
        }
        facts.busy_ports.extend(
            backend
                .listens
                .iter()
                .filter(|address| is_busy(address))
                .cloned(),
        );
    }
    facts
}

fn file_fact(path: &Path, with_digest: bool) -> FileFact {
    let Ok(identity) = FileIdentity::of(path) else {
        return FileFact::Missing;
    };
    let may = |access| rustix::fs::access(path, access).is_ok();
    FileFact::Present {
        can_read: may(Access::READ_OK),
        can_write: may(Access::WRITE_OK),
        fingerprint: Some(Fingerprint {
            device: identity.dev,
            inode: identity.inode,
            size: identity.len,
            mtime_ns: identity.mtime_ns,
            ctime_ns: identity.ctime_ns,
            sha256: if with_digest {
                host::file_digest(path)
                    .ok()
                    .map(|digest| digest.to_string())
            } else {
                None
            },
        }),
    }
}

/// Whether some process listens on a unix socket; a socket nobody listens on is in nobody's way.
fn is_listened_on(path: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(path).is_ok()
}

/// Whether an address like `tcp:127.0.0.1:5901` or `udp::5901` cannot be listened on.
fn is_busy(address: &str) -> bool {
    let (protocol, address) = address.split_once(':').unwrap_or(("tcp", address));
    let address = address
        .strip_prefix(':')
        .map_or(address.to_owned(), |port| format!("0.0.0.0:{port}"));
    let Ok(mut addresses) = address.to_socket_addrs() else {
        return false; // QEMU itself will say what is wrong with it
    };
    match protocol {
        "udp" => addresses.any(|address| UdpSocket::bind(address).is_err()),
        _ => addresses.any(|address| TcpListener::bind(address).is_err()),
    }
}

/// The network interfaces that the guest needs and that are there.
fn interfaces(needs: &GuestNeeds) -> BTreeSet<String> {
    let all = needs.resources.resources.iter();
    let named = all.filter_map(|one| one.backend.interface.as_ref());
    named
        .filter(|name| host::has_interface(name))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_somebody_listens_on_is_busy_for_its_own_protocol() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_busy(&format!("tcp:127.0.0.1:{port}")));
        assert!(is_busy(&format!("tcp::{port}")));
        drop(listener);
        assert!(!is_busy(&format!("tcp:127.0.0.1:{port}")));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        assert!(is_busy(&format!("udp:127.0.0.1:{port}")));
    }
}
