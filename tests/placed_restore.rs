//! A guest whose memory was put in its place has bit for bit the memory it had, with every kind of memory behind it; and
//! what is damaged or ends meanwhile gives no guest.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::process::Stdio;

use rustix::process::Signal;
use serde_json::json;
use support::{
    Adopted, Guest, GuestSpec, MemoryRange, Process, Qemu, Restored, TestDir, chunk_of, flip_bit,
    memory, scribbled,
};
use vmstow::digest::Hasher;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Saves a paused guest and restores it paused; its memory must be the same, and have come in that `way`.
#[track_caller]
fn comes_back(
    dir: &TestDir,
    mut guest: Guest,
    qemu: Qemu,
    ranges: &[MemoryRange],
    way: &str,
) -> Restored {
    let before = memory(guest.pid(), &mut guest.qmp(), ranges);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let program = qemu.program().display().to_string();
    let restored = dir.restore(&["x.stow", "--paused", "--qemu", &program]);
    assert_eq!(restored.report["memory"], way);
    let mut qmp = restored.qmp();
    let after = memory(restored.qemu.pid(), &mut qmp, ranges);
    assert_eq!(after, before);
    assert_ne!(after, Hasher::new().finish(), "there was nothing in it");
    restored
}

#[test]
fn a_guest_that_ran_has_its_memory_and_goes_on() {
    for qemu in Qemu::ALL {
        for machine in ["pc", "q35"] {
            let dir = TestDir::new();
            let spec = GuestSpec {
                qemu,
                machine: machine.to_owned(),
                ..GuestSpec::default()
            };
            let guest = Guest::start(&dir, spec);
            let serial = guest.serial();
            serial.wait_for_tick(18); // by then it has filled its memory
            guest.qmp().command("stop", json!({}));
            let before = serial.mark();
            let restored = comes_back(&dir, guest, qemu, &[(0, 64 * MIB)], "placed");
            restored.qmp().command("cont", json!({}));
            serial.assert_goes_on_to(&before, before.last_tick() + 18);
        }
    }
}

#[test]
fn memory_above_the_pci_hole_comes_back() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let ranges = [(0, 2 * GIB), (4 * GIB, 3 * GIB)];
        let guest = scribbled(&dir, qemu, 5120, &[], &ranges);
        comes_back(&dir, guest, qemu, &ranges, "placed");
    }
}

#[test]
fn two_memory_backends_come_back() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let nodes = [
            "-object",
            "memory-backend-ram,id=m0,size=64M",
            "-object",
            "memory-backend-ram,id=m1,size=32M",
            "-numa",
            "node,memdev=m0",
            "-numa",
            "node,memdev=m1",
        ];
        let ranges = [(0, 64 * MIB), (64 * MIB, 32 * MIB)];
        let guest = scribbled(&dir, qemu, 96, &nodes, &ranges);
        comes_back(&dir, guest, qemu, &ranges, "placed");
    }
}

#[test]
fn memory_that_qemu_touched_beforehand_comes_back() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let object = "memory-backend-ram,id=m0,size=64M,prealloc=on";
        let extra = ["-object", object, "-machine", "memory-backend=m0"];
        let ranges = [(0, 64 * MIB)];
        let guest = scribbled(&dir, qemu, 64, &extra, &ranges);
        comes_back(&dir, guest, qemu, &ranges, "placed");
    }
}

#[test]
fn shared_memory_is_fed() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let object = "memory-backend-memfd,id=m0,size=64M,share=on";
        let mut extra = vec!["-object", object, "-machine", "memory-backend=m0"];
        extra.extend(["-vga", "none"]); // its memory is private
        let ranges = [(0, 64 * MIB)];
        let guest = scribbled(&dir, qemu, 64, &extra, &ranges);
        comes_back(&dir, guest, qemu, &ranges, "fed");
    }
}

#[test]
fn an_image_from_a_pipe_is_fed_and_the_same() {
    let dir = TestDir::new();
    let ranges = [(0, 64 * MIB)];
    let mut guest = scribbled(&dir, Qemu::V10, 64, &[], &ranges);
    let before = memory(guest.pid(), &mut guest.qmp(), &ranges);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let mut command = dir.vmstow();
    command.args(["--json", "restore", "-", "--trust", "--paused"]);
    let output = command.pipe_stdin(dir.join("x.stow")).unwrap().unwrap();
    let restored = Restored::of(serde_json::from_slice(&output.stdout).unwrap());
    assert_eq!(restored.report["memory"], "fed");
    let after = memory(restored.qemu.pid(), &mut restored.qmp(), &ranges);
    assert_eq!(after, before);
}

#[test]
fn a_damaged_page_gives_no_guest() {
    for layout in ["zstd", "raw"] {
        let dir = TestDir::new();
        let mut guest = Guest::start(&dir, GuestSpec::default());
        guest.serial().wait_for_tick(18);
        dir.json(&["save", &guest.source(), "x.stow", "--layout", layout]);
        guest.wait_for_exit();
        for page in [0x400, 0x2000, 0x3f00] {
            let (chunk, at) = chunk_of(&dir, page);
            flip_bit(dir.join("x.stow"), at, 5);
            let said = dir.refused(3, &["restore", "x.stow"]);
            assert!(
                said.contains(&format!("chunk {} does not", chunk.0)),
                "{said}"
            );
            assert!(said.contains("RAMBlock \"pc.ram\", pages 0x"), "{said}");
            assert!(dir.processes().is_empty());
            assert_eq!(dir.join("run").read_dir().unwrap().count(), 0);
            flip_bit(dir.join("x.stow"), at, 5);
        }
        drop(dir.restore(&["x.stow"]));
    }
}

/// The QEMU of a restore that is under way, with part of the guest's memory in it.
fn half_restored(dir: &TestDir) -> Adopted {
    let qemu = dir.adopt_qemu("-incoming", &[]);
    support::wait_until("some memory", support::PATIENCE, || {
        let pid = i32::try_from(qemu.pid()).unwrap();
        let resident = vmstow::host::resident_bytes(pid).unwrap_or(u64::MAX);
        (resident > 120 * MIB)
            .then_some(())
            .ok_or(format!("{resident}"))
    });
    qemu
}

#[test]
fn who_is_killed_meanwhile_gives_no_guest() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: 1024,
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(60);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let restore = || {
        let mut command = dir.vmstow_command();
        command.args(["restore", "x.stow", "--threads", "1"]);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let killed = restore();
    half_restored(&dir).kill();
    let output = killed.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("QEMU could not load guest"), "{said}");
    assert_eq!(dir.join("run").read_dir().unwrap().count(), 0);

    let interrupted = restore();
    let qemu = half_restored(&dir);
    Process::open(interrupted.id()).unwrap().signal(Signal::INT);
    let output = interrupted.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    qemu.wait_for_exit();
    assert_eq!(dir.join("run").read_dir().unwrap().count(), 0);
}
