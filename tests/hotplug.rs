//! A guest that has other devices now than QEMU was started with cannot be restored from its arguments: the save is
//! refused, by name, and the guest runs on. What QEMU adds by itself is no such device.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use serde_json::json;

use support::{Guest, GuestSpec, PATIENCE, Qemu, Qmp, TestDir, wait_until};

const USB: [&str; 4] = [
    "-device",
    "qemu-xhci,id=xhci",
    "-device",
    "usb-tablet,id=tablet",
];

fn start(dir: &TestDir, qemu: Qemu, machine: &str, extra: &[&str]) -> Guest {
    let spec = GuestSpec {
        qemu,
        machine: machine.to_owned(),
        ..GuestSpec::default()
    };
    Guest::start(dir, spec.with(extra))
}

/// What stands against a save, as `--dry-run` tells; nothing if it may go.
fn why_not(dir: &TestDir, guest: &Guest) -> String {
    let mut command = dir.vmstow();
    command.args(["save", &guest.source(), "x.stow", "--dry-run"]);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.success(), text.is_empty(), "{text}");
    text
}

/// `save` is refused with these words, and the guest runs on.
#[track_caller]
fn assert_refused(dir: &TestDir, guest: &Guest, words: &str) {
    let found = why_not(dir, guest);
    assert!(found.contains(words), "{found}");
    let mut command = dir.vmstow();
    command.args(["save", &guest.source(), "x.stow"]);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(String::from_utf8_lossy(&output.stderr).contains(words));
    assert_eq!(guest.qmp().status(), "running");
}

fn unplug(qmp: &mut Qmp, id: &str) {
    qmp.command("device_del", json!({ "id": id }));
    wait_until("a device to go", PATIENCE, || {
        let left = qmp.command("qom-list", json!({ "path": "/machine/peripheral" }));
        let is_there = left.as_array().unwrap().iter().any(|one| one["name"] == id);
        (!is_there).then_some(()).ok_or(left.to_string())
    });
}

#[test]
fn a_device_that_was_plugged_in_is_named_until_it_is_gone() {
    for qemu in [Qemu::V10, Qemu::V7_2] {
        let dir = TestDir::new();
        let guest = start(&dir, qemu, "q35", &USB);
        guest
            .qmp()
            .command("device_add", json!({ "driver": "usb-kbd", "id": "kbd" }));
        assert_refused(
            &dir,
            &guest,
            "device \"kbd\" was plugged in after QEMU's start",
        );
        unplug(&mut guest.qmp(), "kbd");
        assert_eq!(why_not(&dir, &guest), "");
    }
}

#[test]
fn a_device_that_was_plugged_in_without_an_id_is_counted() {
    for qemu in [Qemu::V10, Qemu::V7_2] {
        let dir = TestDir::new();
        let guest = start(&dir, qemu, "pc", &USB);
        guest
            .qmp()
            .command("device_add", json!({ "driver": "usb-kbd" }));
        let words = "1 device(s) without an id were plugged in after QEMU's start";
        assert_refused(&dir, &guest, words);
    }
}

#[test]
fn a_device_that_was_unplugged_is_named() {
    let dir = TestDir::new();
    let guest = start(&dir, Qemu::V10, "pc", &USB);
    unplug(&mut guest.qmp(), "tablet");
    assert_refused(
        &dir,
        &guest,
        "device \"tablet\" was unplugged after QEMU's start",
    );
}

#[test]
fn a_medium_in_a_drive_that_no_argument_names_is_named() {
    for (machine, drive) in [("q35", "ide2-cd0"), ("pc", "ide1-cd0")] {
        let dir = TestDir::new();
        let guest = start(&dir, Qemu::V10, machine, &[]);
        assert_eq!(why_not(&dir, &guest), "");
        let medium = dir.join("medium.iso");
        std::fs::write(&medium, [0; 4096]).unwrap();
        let change = json!({ "device": drive, "filename": medium, "format": "raw" });
        guest.qmp().command("blockdev-change-medium", change);
        assert_refused(&dir, &guest, &format!("cdrom {drive:?} holds"));
    }
}

#[test]
fn what_qemu_adds_by_itself_is_not_taken_for_a_change() {
    let drives = [
        "-drive",
        "file=second.img,format=raw,if=virtio",
        "-drive",
        "file=third.img,format=raw,if=none,id=third",
        "-device",
        r#"{"driver": "virtio-blk-pci", "drive": "third", "id": "third-device"}"#,
    ];
    let networks = [
        ["-nic", "user,model=virtio-net-pci"].as_slice(),
        &["-net", "nic", "-net", "user"],
        &["-nic", "none"],
    ];
    for qemu in [Qemu::V10, Qemu::V7_2] {
        for (machine, network) in ["q35", "pc", "q35"].into_iter().zip(networks) {
            let dir = TestDir::new();
            for name in ["second.img", "third.img"] {
                std::fs::write(dir.join(name), [0; 4096]).unwrap();
            }
            let more = [
                "-usb",
                "-usbdevice",
                "mouse",
                "-device",
                "virtio-rng-pci",
                "-vga",
                "std",
            ];
            let extra = [&drives, network, &USB, &more].concat();
            let guest = start(&dir, qemu, machine, &extra);
            assert_eq!(why_not(&dir, &guest), "", "{machine} {network:?}");
        }
    }
}
