//! What stands against a restore is told before QEMU is started, with the flag that helps, and nothing is left behind.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::OpenOptions;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;

use support::{Guest, GuestSpec, TestDir};

/// A counter guest, saved to `x.stow` and ended.
fn saved(dir: &TestDir, extra: &[&str]) -> Guest {
    let mut guest = Guest::start(dir, GuestSpec::default().with(extra));
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    guest
}

fn nothing_is_left(dir: &TestDir) {
    assert!(dir.processes().is_empty());
    assert_eq!(dir.join("run").read_dir().unwrap().count(), 0);
}

#[test]
fn a_disk_that_was_written_to_is_refused_unless_the_user_accepts_it() {
    let dir = TestDir::new();
    let guest = saved(&dir, &[]);
    let disk = OpenOptions::new().write(true).open(guest.disk()).unwrap();
    disk.write_all_at(b"x", 4000).unwrap();
    let said = dir.refused(4, &["restore", "x.stow"]);
    assert!(said.contains("guest.img changed since"), "{said}");
    assert!(said.contains("--accept-changed-disks"), "{said}");
    nothing_is_left(&dir);
    drop(dir.restore(&["x.stow", "--accept-changed-disks"]));
}

#[test]
fn a_digest_tells_a_changed_disk_from_one_that_was_only_copied() {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "x.stow", "--disk-digest"]);
    guest.wait_for_exit();
    std::fs::copy(guest.disk(), dir.join("copy")).unwrap();
    std::fs::rename(dir.join("copy"), guest.disk()).unwrap();
    dir.json(&["restore", "x.stow", "--dry-run"]);
    let disk = OpenOptions::new().write(true).open(guest.disk()).unwrap();
    disk.write_all_at(b"x", 4000).unwrap();
    let said = dir.refused(4, &["restore", "x.stow"]);
    assert!(said.contains("guest.img changed since"), "{said}");
}

#[test]
fn a_port_in_use_is_told_before_qemu_is_started() {
    let dir = TestDir::new();
    let port = {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let network = format!("user,id=net0,hostfwd=tcp:127.0.0.1:{port}-:22");
    let _guest = saved(&dir, &["-netdev", &network, "-device", "e1000,netdev=net0"]);
    let _taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let said = dir.refused(4, &["restore", "x.stow"]);
    assert!(said.contains(&format!("{port} is in use")), "{said}");
    assert!(said.contains("--remap net:net0=user"), "{said}");
    nothing_is_left(&dir);
    drop(dir.restore(&["x.stow", "--remap", "net:net0=user"]));
}

#[test]
fn every_answer_names_its_schema() {
    let dir = TestDir::new();
    let guest = saved(&dir, &[]);
    drop(guest);
    for arguments in [
        vec!["inspect", "x.stow"],
        vec!["verify", "--quick", "x.stow"],
        vec!["restore", "--dry-run", "x.stow"],
        vec!["repair", "x.stow"],
        vec!["list"],
        vec!["doctor"],
    ] {
        assert_eq!(dir.json(&arguments)["schema"], 1, "{arguments:?}");
    }
}

#[test]
fn a_name_that_no_guest_may_have_is_refused() {
    let dir = TestDir::new();
    let _guest = saved(&dir, &[]);
    for name in ["", "../x", "a,b"] {
        let said = dir.refused(2, &["restore", "x.stow", "--name", name]);
        assert!(said.contains("is not a guest name"), "{said}");
    }
    nothing_is_left(&dir);
}
