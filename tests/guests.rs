//! The guests themselves, without the program under test: they run, they notice damage, and QEMU alone can migrate
//! them. Whatever a story finds is then ours.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use serde_json::json;
use support::{Guest, GuestSpec, Qemu, Serial, SerialPort, TestDir, wait_until};

const MACHINES: [&str; 2] = ["pc", "q35"];

fn counter(qemu: Qemu, machine: &str) -> GuestSpec {
    GuestSpec {
        qemu,
        machine: machine.to_owned(),
        ..GuestSpec::default()
    }
}

fn linux(qemu: Qemu, machine: &str) -> GuestSpec {
    GuestSpec {
        qemu,
        machine: machine.to_owned(),
        ..GuestSpec::linux()
    }
}

#[test]
fn the_counter_image_is_what_its_source_makes() {
    let dir = TestDir::new();
    let guests = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/guests");
    let status = Command::new(format!("{guests}/build.sh"))
        .arg(dir.join("counter.img"))
        .status()
        .unwrap();
    assert!(
        status.success(),
        "install the Debian package nasm, or run tests/setup.sh"
    );
    let made = std::fs::read(dir.join("counter.img")).unwrap();
    let kept = std::fs::read(format!("{guests}/counter.img")).unwrap();
    assert!(made == kept, "run testdata/guests/build.sh");
}

#[test]
fn the_counter_runs_on_both_machines_of_both_qemus() {
    for qemu in Qemu::ALL {
        for machine in MACHINES {
            let dir = TestDir::new();
            let guest = Guest::start(&dir, counter(qemu, machine));
            guest.serial().wait_for_tick(18); // by then it has looked at all of its memory
            let text = guest.serial().text();
            assert!(text.starts_with("vmstow counter guest: 64 MiB\ntick 1 memory ok\n"));
        }
    }
}

#[test]
fn the_counter_boots_from_a_floppy_too() {
    let dir = TestDir::new();
    let image = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/guests/counter.img");
    let floppy = format!("file={image},format=raw,if=floppy,readonly=on");
    std::fs::write(dir.join("guest.img"), vec![0; 1 << 20]).unwrap(); // a disk that does not boot
    let guest = Guest::start(&dir, GuestSpec::default().with(&["-drive", &floppy]));
    guest.serial().wait_for_tick(3);
}

#[test]
fn the_counter_notices_four_changed_bytes() {
    let dir = TestDir::new();
    let gdb = format!("unix:{},server=on,wait=off", dir.join("gdb").display());
    let guest = Guest::start(&dir, GuestSpec::default().with(&["-gdb", &gdb]));
    guest.serial().wait_for_tick(2);
    write_memory(&dir, "1000004");
    let line = guest
        .serial()
        .wait_for_line("a complaint", |line| line.contains("BAD"));
    assert!(line.ends_with(" memory BAD at 0x1000004"), "{line}");
}

/// Writes four bytes at a guest address through QEMU's gdb stub, which stops the guest until we detach.
fn write_memory(dir: &TestDir, address: &str) {
    let mut gdb = UnixStream::connect(dir.join("gdb")).unwrap();
    for packet in [&format!("M{address},4:76737477"), "D"] {
        let sum = packet.bytes().fold(0u8, u8::wrapping_add);
        write!(gdb, "${packet}#{sum:02x}").unwrap();
        let mut answer = String::new();
        while !answer.ends_with("$OK#9a") {
            let mut byte = [0];
            gdb.read_exact(&mut byte).unwrap();
            answer.push(char::from(byte[0]));
        }
        write!(gdb, "+").unwrap();
    }
}

/// Looks at `text` as if a guest had written it.
fn look_at(text: &str) {
    let dir = TestDir::new();
    let serial = Serial::at(dir.join("serial"));
    std::fs::write(serial.path(), text).unwrap();
    serial.wait_for_tick(2);
}

#[test]
fn an_unbroken_count_is_accepted() {
    look_at("vmstow counter guest: 64 MiB\ntick 1 memory ok\ntick 2 memory ok\ntick 9");
    look_at("tick 7\r\nsum ab\r\nnet ok\r\ntick 8\r\nsum ab\r\n");
}

#[test]
#[should_panic(expected = "is followed by \"tick 4 memory ok\"")]
fn a_lost_tick_is_noticed() {
    look_at("tick 2 memory ok\ntick 4 memory ok\n");
}

#[test]
#[should_panic(expected = "the guest's memory changed")]
fn a_changed_checksum_is_noticed() {
    look_at("tick 2\nsum ab\nsum ac\n");
}

#[test]
#[should_panic(expected = "the guest says \"tick 2 memory BAD at 0x200000\"")]
fn a_guest_that_complains_is_heard() {
    look_at("tick 2 memory BAD at 0x200000\n");
}

#[test]
#[should_panic(expected = "left running (and killed now)")]
fn a_process_that_outlives_its_test_is_noticed() {
    let dir = TestDir::new();
    let mut sleep = Command::new("sleep");
    let child = sleep.arg("60").env("KNOWS", dir.path()).spawn();
    std::thread::spawn(move || child.unwrap().wait());
    wait_until("the process to be seen", support::PATIENCE, || {
        let seen = dir.processes(); // its environment is empty for a moment after exec
        (!seen.is_empty()).then_some(()).ok_or(String::new())
    });
}

#[test]
fn linux_runs_on_both_machines_of_both_qemus() {
    for (qemu, machine) in [(Qemu::V10, "q35"), (Qemu::V7_2, "pc")] {
        let dir = TestDir::new();
        let guest = Guest::start(&dir, linux(qemu, machine));
        let serial = guest.serial();
        serial.wait_for_line("the content", |line| {
            line == "vmstow linux guest: 32 MiB of content"
        });
        serial.wait_for_line("the network", |line| line == "net ok");
        serial.wait_for_line("the disk", |line| line == "disk ok");
        serial.wait_for_tick(12);
        let disk = std::fs::read(guest.disk()).unwrap();
        assert!(disk[2048 * 512..].starts_with(b"tick 10\n"));
        let sum = "9492548f57a2dc4476faa089c382aa4429f695485b06131dc8ca7a8122014470";
        assert_eq!(serial.sums().first().map(String::as_str), Some(sum));
    }
}

#[test]
fn linux_says_its_checksum_when_asked() {
    let dir = TestDir::new();
    let guest = Guest::start(
        &dir,
        GuestSpec {
            serial: SerialPort::Socket,
            ..GuestSpec::linux()
        },
    );
    guest.serial().wait_for_tick(4);
    let said = guest.serial().sums().len();
    guest.send("sum");
    wait_until("one more sum", support::PATIENCE, || {
        let found = guest.serial().sums().len();
        (found > said).then_some(()).ok_or(format!("{found}"))
    });
}

#[test]
fn qemu_alone_migrates_the_counter_to_a_file_and_back() {
    for qemu in Qemu::ALL {
        for machine in MACHINES {
            migrate_and_go_on(counter(qemu, machine));
        }
    }
}

#[test]
fn qemu_alone_migrates_linux_to_a_file_and_back() {
    for (qemu, machine) in [(Qemu::V10, "pc"), (Qemu::V7_2, "q35")] {
        migrate_and_go_on(linux(qemu, machine));
    }
}

/// Stops a guest, migrates it to a file, and lets it go on in a second QEMU.
fn migrate_and_go_on(spec: GuestSpec) {
    let dir = TestDir::new();
    let file = dir.join("stream").display().to_string();
    let mut source = Guest::start(&dir, spec.clone());
    source.serial().wait_for_tick(6);
    let mut qmp = source.qmp();
    qmp.command("stop", json!({}));
    qmp.migrate(&format!("exec:cat >{file}"));
    qmp.command("quit", json!({}));
    source.wait_for_exit();
    let before = source.serial().mark();

    std::fs::copy(source.disk(), dir.join("second.img")).unwrap();
    let incoming = format!("exec:cat {file}");
    let second = Guest::start(&dir, spec.named("second").with(&["-incoming", &incoming]));
    let mut qmp = second.qmp();
    wait_until("the incoming migration", support::PATIENCE, || {
        let status = qmp.status();
        (status == "paused").then_some(()).ok_or(status)
    });
    qmp.command("cont", json!({}));
    let serial: Serial = second.serial();
    serial.assert_goes_on_to(&before, before.last_tick() + 18);
}
