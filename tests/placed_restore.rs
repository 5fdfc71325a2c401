//! A guest whose memory was put in its place has bit for bit the memory it had, with every kind of memory behind it; and
//! what is damaged or ends meanwhile gives no guest.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::json;
use support::{Adopted, Guest, GuestSpec, Process, Qemu, Qmp, Restored, TestDir, flip_bit};
use vmstow::container::{Image, PageLocation, PageMap};
use vmstow::digest::{Digest, Hasher};
use vmstow::host::{ProcessId, ProcessMemory};
use vmstow::store::FileSource;
use vmstow::units::{ChunkIndex, PAGE_LEN, PageIndex};

const PAGE: u64 = PAGE_LEN as u64;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Guest memory at a guest address: its length.
type Range = (u64, u64);

/// Where QEMU keeps what is at a guest address.
fn host_address(qmp: &mut Qmp, guest_address: u64) -> u64 {
    let line = json!({ "command-line": format!("gpa2hva {guest_address:#x}") });
    let answer = qmp.command("human-monitor-command", line);
    let (_, address) = answer
        .as_str()
        .unwrap()
        .trim()
        .rsplit_once(" is 0x")
        .unwrap();
    u64::from_str_radix(address, 16).unwrap()
}

/// A digest of all that the guest has in these ranges; it reads only pages that are there.
fn memory(pid: u32, qmp: &mut Qmp, ranges: &[Range]) -> Digest {
    let process = ProcessId::of(i32::try_from(pid).unwrap()).unwrap();
    let pages = ProcessMemory::open(process).unwrap();
    let bytes = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut hasher = Hasher::new();
    for (start, len) in ranges {
        let base = host_address(qmp, *start);
        let mut touched = vec![false; usize::try_from(len / PAGE).unwrap()];
        pages.touched(base, &mut touched).unwrap();
        for (index, _) in (0..).zip(&touched).filter(|(_, is_touched)| **is_touched) {
            let mut page = [0; PAGE_LEN];
            bytes.read_exact_at(&mut page, base + index * PAGE).unwrap();
            if page != [0; PAGE_LEN] {
                hasher.update(&(start + index * PAGE).to_le_bytes());
                hasher.update(&page);
            }
        }
    }
    hasher.finish()
}

/// Puts something into the first and the last pages of the ranges, and here and there between.
fn scribble(pid: u32, qmp: &mut Qmp, ranges: &[Range]) {
    let bytes = File::options()
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .unwrap();
    for (start, len) in ranges {
        let base = host_address(qmp, *start);
        let steps = (0..*len).step_by(usize::try_from(len / 97 / PAGE * PAGE + PAGE).unwrap());
        let edges = [PAGE, 2 * PAGE, 3 * PAGE, len - 3 * PAGE, len - PAGE];
        for at in steps.chain(edges) {
            let text = format!("page at {:#x} ", start + at).repeat(100);
            bytes
                .write_all_at(&text.as_bytes()[..1000], base + at + 77)
                .unwrap();
        }
    }
}

/// A guest that never ran, with known bytes in its memory.
fn scribbled(
    dir: &TestDir,
    qemu: Qemu,
    memory_mib: u32,
    extra: &[&str],
    ranges: &[Range],
) -> Guest {
    let spec = GuestSpec {
        qemu,
        memory_mib,
        machine: "q35".to_owned(),
        ..GuestSpec::default()
    };
    let guest = Guest::start(dir, spec.with(&["-S"]).with(extra));
    scribble(guest.pid(), &mut guest.qmp(), ranges);
    guest
}

/// Saves a paused guest and restores it paused; its memory must be the same, and have come in that `way`.
#[track_caller]
fn comes_back(
    dir: &TestDir,
    mut guest: Guest,
    qemu: Qemu,
    ranges: &[Range],
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

/// The chunk that holds this page of the guest's RAM, and where in the file.
fn chunk_of(dir: &TestDir, page: u64) -> (ChunkIndex, u64) {
    let image = Image::open(FileSource::open(&dir.join("x.stow")).unwrap()).unwrap();
    let page_map: PageMap = image.page_map().unwrap().unwrap();
    let ram = page_map
        .blocks()
        .iter()
        .position(|block| block.idstr == "pc.ram");
    let mut pages = page_map.locate_range(ram.unwrap(), PageIndex(page), 4096);
    let chunk = pages.find_map(|(_, location)| match location {
        PageLocation::Data { chunk, .. } => Some(chunk),
        PageLocation::Zero => None,
    });
    let chunk = chunk.unwrap();
    let entry = image.chunk(chunk).unwrap();
    (
        chunk,
        entry.stored_offset.0 + u64::from(entry.stored_len) / 2,
    )
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
