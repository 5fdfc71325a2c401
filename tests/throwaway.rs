//! Guests that write to throwaway overlays, and disks that went on without their image.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, Qemu, Restored, TestDir, wait_until};

fn counter(dir: &TestDir, spec: GuestSpec) -> Guest {
    let guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(3);
    guest
}

/// What is left of overlays.
fn overlays(dir: &TestDir) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir.join("overlays")) else {
        return Vec::new();
    };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// The files that a guest may write to, as its QEMU says.
fn written_by(restored: &Restored) -> Vec<String> {
    let devices = restored.qmp().command("query-block", json!({}));
    let inserted = devices.as_array().unwrap().iter();
    let inserted = inserted.map(|device| &device["inserted"]);
    let writable = inserted.filter(|medium| medium["ro"] == json!(false));
    let files = writable.map(|medium| medium["image"]["filename"].as_str().unwrap().to_owned());
    files.collect()
}

#[test]
fn a_throwaway_guest_never_writes_to_its_disks() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::linux()
        };
        let mut guest = Guest::start(&dir, spec);
        let serial = guest.serial();
        serial.wait_for_line("the disk", |line| line == "disk ok");
        dir.json(&["save", &guest.source(), "x.stow"]);
        guest.wait_for_exit();
        let before = serial.mark();
        let bytes = std::fs::read(guest.disk()).unwrap();
        let restored = dir.restore(&["x.stow", "--throwaway"]);
        serial.wait_for_new_line(&before, "the disk", |line| line == "disk ok");
        serial.assert_goes_on(&before);
        assert!(
            written_by(&restored)[0].starts_with(dir.join("overlays").to_str().unwrap()),
            "{:?}",
            written_by(&restored)
        );
        let said = dir.refused(4, &["save", restored.name(), "y.stow", "--then", "resume"]);
        assert!(said.contains("--throwaway"), "{said}");
        dir.json(&["stop", restored.name()]);
        assert_eq!(overlays(&dir), [""; 0].map(PathBuf::from));
        assert!(std::fs::read(guest.disk()).unwrap() == bytes);
        let again = dir.restore(&["x.stow", "--throwaway"]);
        drop(again);
        assert_eq!(overlays(&dir).len(), 1, "QEMU was killed");
        dir.json(&["list"]);
        assert_eq!(overlays(&dir), [""; 0].map(PathBuf::from));
    }
}

fn make_disk(path: &Path, format: &str) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", format])
        .args([path.as_os_str(), "1M".as_ref()])
        .status();
    assert!(made.unwrap().success());
}

#[test]
fn disks_of_every_form_get_an_overlay() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let disk = |name: &str, format: &str| {
            let path = dir.join(name);
            make_disk(&path, format);
            path.display().to_string()
        };
        let names = ["flat", "json", "nodes", "bare", "short", "floppy", "a,b"];
        let flat = format!(
            "qcow2,node-name=flat,file.driver=file,file.filename={}",
            disk("flat", "qcow2")
        );
        let nested = json!({"driver": "raw", "node-name": "json",
            "file": {"driver": "file", "filename": disk("json", "raw")}});
        let file =
            json!({"driver": "file", "node-name": "file", "filename": disk("nodes", "qcow2")});
        let format = json!({"driver": "qcow2", "node-name": "nodes", "file": "file"});
        let bare = format!("file,node-name=bare,filename={}", disk("bare", "raw"));
        let drive = format!("file={},if=virtio", disk("a,b", "qcow2").replace(',', ",,"));
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::default()
        };
        let spec = spec.with(&["-blockdev", &flat, "-device", "virtio-blk-pci,drive=flat"]);
        let spec = spec.with(&["-blockdev", &nested.to_string(), "-device"]);
        let spec = spec.with(&[
            "virtio-blk-pci,drive=json,id=j",
            "-blockdev",
            &file.to_string(),
        ]);
        let spec = spec.with(&["-blockdev", &format.to_string(), "-device"]);
        let spec = spec.with(&["virtio-blk-pci,drive=nodes", "-blockdev", &bare, "-device"]);
        let spec = spec.with(&["virtio-blk-pci,drive=bare", "-drive", &drive]);
        // The BIOS boots from this one.
        let short = dir.join("short");
        std::fs::copy(support::testdata("guests/counter.img"), &short).unwrap();
        let spec = spec.with(&[
            "-hdc",
            short.to_str().unwrap(),
            "-fda",
            &disk("floppy", "raw"),
        ]);
        let mut guest = counter(&dir, spec);
        dir.json(&["save", &guest.source(), "x.stow"]);
        guest.wait_for_exit();
        let before = guest.serial().mark();
        let bytes = || names.map(|name| std::fs::read(dir.join(name)).unwrap());
        let saved = bytes();
        let restored = dir.restore(&["x.stow", "--throwaway"]);
        guest.serial().assert_goes_on(&before);
        let written = written_by(&restored);
        assert_eq!(written.len(), names.len() + 1, "{written:?}");
        let root = dir.join("overlays").display().to_string();
        assert!(
            written.iter().all(|file| file.starts_with(&root)),
            "{written:?}"
        );
        dir.json(&["stop", restored.name()]);
        assert!(bytes() == saved);
    }
}

#[test]
fn a_disk_that_a_guest_still_writes_to_is_refused_before_anything_starts() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, GuestSpec::default());
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let _first = dir.restore(&["x.stow"]);
    let said = dir.refused(
        4,
        &["restore", "x.stow", "--throwaway", "--accept-changed-disks"],
    );
    assert!(
        said.contains("a guest that still runs writes to it") && said.contains("lock"),
        "{said}"
    );
    assert_eq!(dir.qemus().len(), 1);
    assert_eq!(overlays(&dir), [""; 0].map(PathBuf::from));
    let guests = &dir.json(&["list"])["guests"];
    assert_eq!(guests.as_array().unwrap().len(), 1);
}

#[test]
fn without_qemu_img_nothing_is_started() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, GuestSpec::default());
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let mut command = dir.vmstow();
    command.env("PATH", dir.join("config"));
    let refused = command.args(["restore", "x.stow", "--throwaway"]).assert();
    let said = String::from_utf8(refused.code(4).get_output().stderr.clone()).unwrap();
    assert!(
        said.contains("qemu-img") && said.contains("qemu-utils"),
        "{said}"
    );
}

#[test]
fn an_image_whose_guest_ran_on_never_goes_onto_the_disk_itself() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, GuestSpec::default());
    dir.json(&["save", &guest.source(), "x.stow", "--then", "resume"]);
    let before = guest.serial().mark();
    guest.kill();
    for options in [&[][..], &["--accept-changed-disks"]] {
        let words = [&["restore", "x.stow"], options].concat();
        let said = dir.refused(4, &words);
        assert!(
            said.contains("drifted") && said.contains("--throwaway"),
            "{said}"
        );
    }
    let serial = |name: &str| format!("chardev:serial0=file:{}", dir.join(name).display());
    std::fs::copy(guest.disk(), dir.join("copy.img")).unwrap();
    let copy = dir.restore(&[
        "x.stow",
        "--remap",
        "disk:disk0=copy.img",
        "--remap",
        &serial("copy.serial"),
    ]);
    assert_eq!(
        written_by(&copy),
        [dir.join("copy.img").display().to_string()]
    );
    let over = dir.restore(&["x.stow", "--throwaway", "--remap", &serial("over.serial")]);
    wait_until("both to tick", support::PATIENCE, || {
        let last = |name: &str| support::Serial::at(dir.join(name)).last_tick();
        let ticks = [last("copy.serial"), last("over.serial")];
        let are_on = ticks.iter().all(|tick| *tick > before.last_tick());
        are_on.then_some(()).ok_or(format!("{ticks:?}"))
    });
    drop((copy, over));
}

#[test]
fn a_read_only_disk_does_not_drift() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        is_disk_read_only: true,
        ..GuestSpec::default()
    };
    let mut guest = counter(&dir, spec);
    dir.json(&["save", &guest.source(), "x.stow", "--then", "resume"]);
    guest.kill();
    let planned: Value = dir.json(&["restore", "x.stow", "--dry-run"]);
    assert_eq!(planned["warnings"], json!([]));
}
