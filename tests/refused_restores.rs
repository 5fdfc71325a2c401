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

fn qemu_img(dir: &TestDir, arguments: &str) {
    let mut command = std::process::Command::new("qemu-img");
    command
        .args(arguments.split_whitespace())
        .current_dir(dir.path());
    let output = command
        .output()
        .expect("qemu-img (Debian package qemu-utils)");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn every_file_behind_an_overlay_is_recognised() {
    let dir = TestDir::new();
    qemu_img(&dir, "create -f raw base.img 4M");
    qemu_img(&dir, "create -f qcow2 -b base.img -F raw middle.qcow2");
    qemu_img(&dir, "create -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2");
    let top = dir.join("top.qcow2").display().to_string();
    saved(&dir, &["-drive", &format!("file={top},if=virtio")]);
    dir.json(&["restore", "x.stow", "--dry-run"]);
    let base = dir.join("base.img");
    let file = OpenOptions::new().write(true).open(&base).unwrap();
    file.write_all_at(b"x", 4000).unwrap();
    let said = dir.refused(4, &["restore", "x.stow"]);
    assert!(said.contains("base.img changed since"), "{said}");
    std::fs::remove_file(&base).unwrap();
    let said = dir.refused(4, &["restore", "x.stow"]);
    assert!(
        said.contains("base.img") && said.contains("missing"),
        "{said}"
    );
    nothing_is_left(&dir);
}

#[test]
fn a_disk_that_daemonize_lost_is_told_before_the_guest_is_touched() {
    let dir = TestDir::new();
    qemu_img(&dir, "create -f raw lost.img 1M");
    let socket = dir.join("lost.sock").display().to_string();
    let pid_file = dir.join("lost.pid");
    let mut command = std::process::Command::new(support::Qemu::V10.program());
    command.current_dir(dir.path()).args([
        "-daemonize",
        "-display",
        "none",
        "-accel",
        "tcg",
        "-drive",
        "file=lost.img,format=raw,if=virtio",
        "-qmp",
        &format!("unix:{socket},server=on,wait=off"),
        "-pidfile",
        &pid_file.display().to_string(),
    ]);
    assert!(command.status().unwrap().success());
    let pid = std::fs::read_to_string(&pid_file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let qemu = support::Adopted(support::Process::open(pid).unwrap());
    let said = dir.refused(4, &["save", &format!("qmp:{socket}"), "y.stow"]);
    assert!(said.contains("there is no lost.img in /"), "{said}");
    drop(qemu);
}

#[test]
fn a_name_that_is_taken_is_not_given_to_another_guest() {
    let dir = TestDir::new();
    saved(&dir, &[]);
    let restored = dir.restore(&["x.stow", "--paused", "--name", "mine"]);
    let said = dir.refused(2, &["restore", "x.stow", "--name", "mine"]);
    assert!(
        said.contains("a guest named mine runs here already"),
        "{said}"
    );
    drop(restored);
}
