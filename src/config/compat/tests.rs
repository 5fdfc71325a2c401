use super::*;
use crate::config::Arguments;

fn fingerprint() -> Fingerprint {
    Fingerprint {
        device: 1,
        inode: 2,
        size: 3,
        mtime_ns: 4,
        ctime_ns: 5,
        sha256: None,
    }
}

fn guest(words: &[&str]) -> GuestNeeds {
    let mut all = vec!["qemu"];
    all.extend(words);
    GuestNeeds {
        machine_type: "pc-q35-10.0".into(),
        qemu_version: QemuVersion(10, 0, 2),
        minimum_qemu: None,
        accelerator: "kvm".into(),
        memory_bytes: 1 << 30,
        resources: ResourceTable::from_arguments(&Arguments::parse(&all).unwrap(), None),
        fingerprints: BTreeMap::new(),
        drifted: BTreeSet::new(),
    }
}

fn host() -> HostFacts {
    HostFacts {
        qemu_path: "/usr/bin/qemu".into(),
        qemu_version: Some(QemuVersion(10, 0, 2)),
        machine_types: ["pc-q35-10.0".to_owned()].into(),
        accelerators: ["kvm".to_owned(), "tcg".to_owned()].into(),
        ..HostFacts::default()
    }
}

fn present(can_read: bool, can_write: bool, now: Option<Fingerprint>) -> FileFact {
    FileFact::Present {
        can_read,
        can_write,
        fingerprint: now,
    }
}

fn codes(guest: &GuestNeeds, host: &HostFacts) -> Vec<&'static str> {
    check(guest, host)
        .into_iter()
        .map(|finding| finding.code)
        .collect()
}

#[test]
fn a_host_that_has_all_is_without_findings() {
    assert_eq!(check(&guest(&["-hda", "/a"]), &host()), []);
}

#[test]
fn every_reason_is_given_at_once() {
    let mut host = host();
    host.machine_types.clear();
    host.accelerators.clear();
    host.available_memory_bytes = Some(1);
    host.files.insert("/a".into(), FileFact::Missing);
    host.busy_ports.insert("tcp::2222".into());
    host.busy_sockets.insert("/s".into());
    host.interfaces = Some(BTreeSet::new());
    let guest = guest(&[
        "-hda",
        "/a",
        "-serial",
        "unix:/s,server",
        "-nic",
        "user,hostfwd=tcp::2222-:22",
        "-nic",
        "bridge,br=br7",
    ]);
    let expected = [
        "machine.unknown",
        "accel.missing",
        "memory.short",
        "file.missing",
        "port.busy",
        "interface.missing",
        "socket.busy",
    ];
    assert_eq!(codes(&guest, &host), expected);
}

#[test]
fn a_qemu_that_cannot_be_run_is_the_only_thing_said_about_it() {
    let mut host = host();
    host.qemu_version = None;
    assert_eq!(codes(&guest(&[]), &host), ["qemu.missing"]);
}

#[test]
fn an_older_qemu_is_a_doubt_and_a_too_old_one_a_reason() {
    let mut host = host();
    host.qemu_version = Some(QemuVersion(7, 2, 22));
    let mut guest = guest(&[]);
    let findings = check(&guest, &host);
    assert_eq!(
        (findings[0].code, findings[0].level),
        ("qemu.older", Level::Warning)
    );
    guest.minimum_qemu = Some(QemuVersion(8, 2, 0));
    let findings = check(&guest, &host);
    assert_eq!(
        (findings[0].code, findings[0].level),
        ("qemu.too-old", Level::Refusal)
    );
    assert_eq!(findings[0].fix.as_deref(), Some("--qemu PATH"));
}

#[test]
fn a_writable_disk_has_to_be_writable_and_a_cdrom_readable() {
    let guest = guest(&["-hda", "/a", "-cdrom", "/b"]);
    let mut host = host();
    host.files.insert("/a".into(), present(true, false, None));
    host.files.insert("/b".into(), present(true, false, None));
    let findings = check(&guest, &host);
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].code, "file.permission");
    assert_eq!(
        findings[0].fix.as_deref(),
        Some("--remap disk:ide0-hd0=PATH")
    );
    host.files.insert("/b".into(), present(false, false, None));
    assert_eq!(codes(&guest, &host), ["file.permission", "file.permission"]);
}

#[test]
fn files_that_qemu_makes_need_not_be_there() {
    let guest = guest(&["-serial", "file:/log", "-serial", "unix:/s,server"]);
    let mut host = host();
    host.files.insert("/log".into(), FileFact::Missing);
    host.files.insert("/s".into(), FileFact::Missing);
    assert_eq!(check(&guest, &host), []);
}

#[test]
fn a_disk_is_the_same_or_what_became_of_it_is_told() {
    const SECOND: i64 = 1_000_000_000;
    let saved = Fingerprint {
        mtime_ns: 100 * SECOND + 7,
        ..fingerprint()
    };
    let mut guest = guest(&["-hda", "/a"]);
    guest.fingerprints.insert("/a".into(), saved.clone());
    let code_for = |change: &dyn Fn(&mut Fingerprint)| {
        let (mut host, mut now) = (host(), saved.clone());
        change(&mut now);
        let now = present(true, true, Some(now));
        host.files.insert("/a".into(), now);
        let codes = codes(&guest, &host);
        assert!(codes.len() < 2, "{codes:?}");
        codes.first().copied().unwrap_or_default()
    };
    let (earlier, later) = (50 * SECOND + 7, 200 * SECOND + 7);
    assert_eq!(code_for(&|_| {}), "");
    assert_eq!(code_for(&|now| now.size = 9), "disk.changed");
    assert_eq!(code_for(&|now| now.mtime_ns = later), "disk.written");
    assert_eq!(code_for(&|now| now.mtime_ns = earlier), "disk.rolled-back");
    assert_eq!(code_for(&|now| now.ctime_ns = 9), "disk.unproven");
    let other = |now: &mut Fingerprint, mtime_ns| {
        now.inode = 9;
        now.mtime_ns = mtime_ns;
    };
    assert_eq!(code_for(&|now| now.inode = 9), "disk.unproven");
    assert_eq!(code_for(&|now| other(now, later)), "disk.replaced");
    assert_eq!(code_for(&|now| other(now, earlier)), "disk.rolled-back");
    // A tool that keeps whole seconds made the copy.
    assert_eq!(code_for(&|now| other(now, 100 * SECOND)), "disk.unproven");
    let elsewhere = |now: &mut Fingerprint, mtime_ns| {
        now.device = 9;
        now.mtime_ns = mtime_ns;
    };
    assert_eq!(code_for(&|now| elsewhere(now, later)), "disk.unproven");
    assert_eq!(code_for(&|now| elsewhere(now, earlier)), "disk.rolled-back");
}

#[test]
fn a_log_that_grew_is_in_nobodys_way() {
    let mut guest = guest(&["-serial", "file:/log"]);
    guest.fingerprints.insert("/log".into(), fingerprint());
    let mut host = host();
    let grown = Fingerprint {
        size: 9,
        ..fingerprint()
    };
    host.files
        .insert("/log".into(), present(true, true, Some(grown)));
    assert!(codes(&guest, &host).is_empty());
}

#[test]
fn a_full_digest_decides_whatever_the_times_say() {
    let with = |digest: &str, inode| Fingerprint {
        sha256: Some(digest.into()),
        inode,
        ..fingerprint()
    };
    assert_eq!(with("a", 1).compare(&with("a", 2)), Sameness::Unchanged);
    assert_eq!(with("a", 1).compare(&with("b", 2)), Sameness::Changed);
    assert_eq!(
        with("a", 1).compare(&Fingerprint {
            inode: 7,
            ..fingerprint()
        }),
        Sameness::Unproven
    );
}

#[test]
fn a_kernel_of_the_same_size_is_not_doubted_and_one_of_another_size_refused() {
    let mut guest = guest(&["-kernel", "/k"]);
    guest.fingerprints.insert("/k".into(), fingerprint());
    let mut host = host();
    host.files.insert(
        "/k".into(),
        present(
            true,
            false,
            Some(Fingerprint {
                inode: 9,
                ..fingerprint()
            }),
        ),
    );
    assert!(codes(&guest, &host).is_empty());
    host.files.insert(
        "/k".into(),
        present(
            true,
            false,
            Some(Fingerprint {
                size: 9,
                ..fingerprint()
            }),
        ),
    );
    assert_eq!(codes(&guest, &host), ["file.changed"]);
}

#[test]
fn a_disk_with_which_the_guest_ran_on_is_refused_unless_it_is_only_read() {
    let mut guest = guest(&["-hda", "/a", "-drive", "file=/b,id=b,readonly=on"]);
    let ids = guest.resources.resources.iter().map(|one| one.id.clone());
    guest.drifted = ids.collect();
    let findings = check(&guest, &host());
    assert_eq!(findings.len(), 1, "{findings:?}");
    assert_eq!(
        (findings[0].code, findings[0].level),
        ("disk.drifted", Level::Refusal)
    );
    assert!(findings[0].fix.as_ref().unwrap().starts_with("--throwaway"));
}
