//! Several guests from one image: all of them, each by itself, or none.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::PathBuf;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, Qemu, Restored, Serial, TestDir, fill};

/// Makes clones of an image; ended when dropped.
fn clones(dir: &TestDir, options: &[&str]) -> Vec<Restored> {
    let answer = dir.json(&[&["restore", "x.stow"], options].concat());
    let guests = answer["guests"].as_array().unwrap().iter();
    guests.cloned().map(Restored::of).collect()
}

fn serial_of(dir: &TestDir, name: &str) -> Serial {
    Serial::at(dir.join("run").join(name).join("serial0.out"))
}

fn is_empty(path: PathBuf) -> bool {
    std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none())
}

#[test]
fn clones_of_a_linux_guest_all_go_on_and_share_nothing_they_write() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::linux()
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let forward = format!("user,id=net1,hostfwd=tcp:127.0.0.1:{port}-:22");
        let spec = spec.with(&["-netdev", &forward, "-device", "e1000,netdev=net1"]);
        let mut guest = Guest::start(&dir, spec.named("web"));
        guest
            .serial()
            .wait_for_line("the disk", |line| line == "disk ok");
        dir.json(&["save", &guest.source(), "x.stow"]);
        guest.wait_for_exit();
        let before = guest.serial().mark();
        let disk = std::fs::read(guest.disk()).unwrap();
        let cloned = clones(&dir, &["--throwaway", "--count", "3"]);
        let names: Vec<&str> = cloned.iter().map(Restored::name).collect();
        assert_eq!(names, ["web-1", "web-2", "web-3"]);
        for name in &names {
            let serial = serial_of(&dir, name);
            serial.assert_goes_on_to(&before, before.last_tick() + 12);
            for line in ["disk ok", "net ok"] {
                serial.wait_for_line(line, |found| found == line);
            }
        }
        let sockets: BTreeSet<String> = cloned
            .iter()
            .map(|one| one.report["qmp"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(sockets.len(), 3);
        assert_eq!(guest.serial().text(), before.text());
        let listed = dir.json(&["list"]);
        let listed: Vec<&Value> = listed["guests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|guest| &guest["name"])
            .collect();
        assert_eq!(listed, names);
        for name in &names {
            dir.json(&["stop", name]);
        }
        assert!(is_empty(dir.join("run")) && is_empty(dir.join("overlays")));
        assert!(std::fs::read(guest.disk()).unwrap() == disk);
        assert!(dir.processes().is_empty());
    }
}

#[test]
fn numbers_that_are_taken_are_passed_over() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        is_disk_read_only: true,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let first = clones(&dir, &["--count", "1", "--name", "db", "--paused"]);
    assert_eq!(first[0].report["state"], "paused");
    let more = clones(&dir, &["--count", "2", "--name", "db"]);
    let names: BTreeSet<&str> = more.iter().map(Restored::name).collect();
    assert_eq!(names, BTreeSet::from(["db-2", "db-3"]));
    let plain = dir
        .vmstow()
        .args(["restore", "x.stow", "--count", "2"])
        .assert();
    let said = String::from_utf8(plain.success().get_output().stdout.clone()).unwrap();
    let lines: Vec<&str> = said.lines().collect();
    assert!(
        lines.len() == 2 && lines[0].starts_with("restored guest-"),
        "{said}"
    );
    for name in ["guest-1", "guest-2"] {
        dir.json(&["stop", name]);
    }
}

#[test]
fn clones_that_would_share_a_disk_are_refused() {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let said = dir.refused(2, &["restore", "x.stow", "--count", "2"]);
    assert!(
        said.contains("\"disk0\"") && said.contains("--throwaway"),
        "{said}"
    );
    let said = dir.refused(2, &["restore", "-", "--count", "2"]);
    assert!(said.contains("pipe"), "{said}");
    assert_eq!(dir.json(&["list"])["guests"], json!([]));
}

#[test]
fn one_clone_that_fails_ends_them_all() {
    let dir = TestDir::new();
    let spec =
        GuestSpec::default().with(&["-netdev", "user,id=net0", "-device", "e1000,netdev=net0"]);
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    // The first one gets the port, and no other can.
    let remap = format!("net:net0=user,hostfwd=tcp:127.0.0.1:{port}-:22");
    let options = ["--throwaway", "--count", "3", "--remap", &remap];
    let said = dir.refused(4, &[&["restore", "x.stow"], &options[..]].concat());
    assert!(
        said.contains("of 3 of guest was not restored; no clone is left")
            && said.contains("forward"),
        "{said}"
    );
    assert!(dir.processes().is_empty());
    assert!(is_empty(dir.join("run")) && is_empty(dir.join("overlays")));
    assert_eq!(dir.json(&["list"])["guests"], json!([]));
}

/// Bytes of memory that a process has to itself, and its share of what it has with others.
fn proportional_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn clones_that_map_their_image_share_its_pages() {
    const COUNT: u64 = 8;
    const MEMORY_MIB: u32 = 1024;
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: MEMORY_MIB,
        ..GuestSpec::linux()
    };
    let reporting = "virtio-balloon-device.free-page-reporting=on";
    let mut guest = Guest::start(&dir, spec.with(&["-global", reporting]));
    let serial = guest.serial();
    serial.wait_for_line("the first checksum", |line| line.starts_with("sum "));
    let memory_len = u64::from(MEMORY_MIB) << 20;
    fill(guest.pid(), &mut guest.qmp(), memory_len);
    dir.json(&["save", &guest.source(), "x.stow", "--layout", "mapped"]);
    guest.wait_for_exit();
    let digest = vmstow::host::file_digest(&dir.join("x.stow")).unwrap();
    let count = COUNT.to_string();
    let eager = clones(&dir, &["--throwaway", "--count", "1"]);
    let before = serial.mark();
    serial_of(&dir, "guest-1").assert_goes_on(&before);
    let eager_bytes = proportional_bytes(eager[0].qemu.pid());
    dir.json(&["stop", "guest-1"]);
    let options = [
        "--throwaway",
        "--count",
        &count,
        "--map",
        "--verify",
        "full",
    ];
    let mapped = clones(&dir, &options);
    assert_eq!(mapped.len() as u64, COUNT);
    for clone in &mapped {
        assert_eq!(clone.report["memory"], "mapped");
        serial_of(&dir, clone.name()).assert_goes_on(&before);
    }
    let of_each = mapped
        .iter()
        .map(|clone| proportional_bytes(clone.qemu.pid()));
    let bytes: u64 = of_each.sum();
    assert!(
        bytes * 100 <= COUNT * eager_bytes * 15,
        "{COUNT} clones take {bytes} bytes, one restored eagerly {eager_bytes}"
    );
    let in_use = vmstow::store::open_to_change(&dir.join("x.stow"));
    assert!(matches!(
        in_use,
        Err(vmstow::store::StoreError::InUse { .. })
    ));
    for clone in &mapped {
        dir.json(&["stop", clone.name()]);
    }
    let after = vmstow::host::file_digest(&dir.join("x.stow")).unwrap();
    assert_eq!(after, digest);
}

#[test]
fn clones_get_their_memory_behind() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        is_disk_read_only: true,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    let serial = guest.serial();
    serial.wait_for_tick(18);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let before = serial.mark();
    let lazy = clones(&dir, &["--count", "3", "--lazy"]);
    for clone in &lazy {
        assert_eq!(clone.report["memory"], "lazy");
        let served = dir.json(&["restore", "--resume", clone.name(), "--wait"]);
        assert_eq!(served["served"]["phase"], "complete");
        serial_of(&dir, clone.name()).assert_goes_on(&before);
    }
}
