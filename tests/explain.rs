//! QEMU's own words when a guest does not load, explained: each is said by a real QEMU here, in front of which something
//! was made wrong on purpose.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::net::TcpListener;
use std::process::Command;

use serde_json::Value;
use support::{PATIENCE, Qemu, TestDir, testdata};

/// The guest of `testdata/streams/q35-10.0.mig.zst`; its firmware's bytes come from the stream.
const GUEST: &str = "-accel tcg -machine pc-q35-10.0 -m 2 -smp 2 -bios halt.bin -netdev user,id=n0 \
    -device virtio-net-pci,netdev=n0,romfile= -device virtio-rng-pci";

/// What is changed in the arguments, and the code of the explanation.
const WRONG: &[(&str, &str, &str)] = &[
    ("pc-q35-10.0", "pc-q35-9.2", "machine.other"),
    ("pc-q35-10.0", "pc-q35-99.9", "machine.unknown"),
    ("-m 2", "-m 4", "ramblock.length"),
    ("halt.bin", "long.bin", "ramblock.firmware-length"),
    ("-smp 2", "-smp 1", "cpu.count"),
    (
        "-netdev user,id=n0",
        "-netdev hubport,id=n0,hubid=0",
        "net.slirp",
    ),
    ("-device virtio-rng-pci", "", "section.missing"),
    ("virtio-rng-pci", "virtio-rng-pci,addr=9", "section.missing"),
    ("pc-q35-10.0", "pc-q35-10.0,hpet=off", "machine.property"),
    ("pc-q35-10.0", "pc-q35-10.0,vmport=off", "machine.property"),
    ("netdev=n0,", "netdev=n0,vectors=0,", "device.config"),
    ("virtio-rng-pci", "nonsense-pci", "device.unknown"),
    (
        "virtio-rng-pci",
        "virtio-rng-pci,nonsense=1",
        "device.property",
    ),
    (
        "virtio-rng-pci",
        "virtio-rng-pci,bus=nonsense",
        "device.bus",
    ),
    ("-smp 2", "-smp 2 -cpu nonsense", "cpu.model"),
    ("tcg", "nonsense", "accelerator.missing"),
    (
        "-smp 2",
        "-smp 2 -drive file=missing.img,format=raw",
        "disk.missing",
    ),
    ("halt.bin", "missing.bin", "firmware.missing"),
    ("romfile=", "romfile=missing.rom", "firmware.missing"),
];

/// A directory with the stream, and firmware of the right and of another length.
fn prepared() -> TestDir {
    let dir = TestDir::new();
    let packed = std::fs::read(testdata("streams/q35-10.0.mig.zst")).unwrap();
    std::fs::write(dir.join("guest.mig"), zstd::decode_all(&*packed).unwrap()).unwrap();
    std::fs::write(dir.join("halt.bin"), vec![0xf4; 64 << 10]).unwrap();
    std::fs::write(dir.join("long.bin"), vec![0xf4; 128 << 10]).unwrap();
    dir
}

/// What a QEMU says that is to load the stream and ends.
fn last_words(dir: &TestDir, qemu: Qemu, arguments: &str, incoming: &str) -> String {
    let mut command = Command::new(qemu.program());
    command
        .args(["-nodefaults", "-vga", "none", "-display", "none", "-S"])
        .args(arguments.split_whitespace())
        .args(["-incoming", incoming])
        .current_dir(dir.path())
        .env("VMSTOW_RUNTIME_DIR", dir.join("run"));
    let mut command = assert_cmd::Command::from_std(command);
    let output = command.timeout(PATIENCE).output().unwrap();
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| code != 0),
        "{arguments}: {output:?}"
    );
    String::from_utf8(output.stderr).unwrap()
}

#[track_caller]
fn is_explained(dir: &TestDir, words: &str, code: &str) {
    let mut explain = dir.vmstow();
    explain.args(["--json", "explain", "-"]).write_stdin(words);
    let output = explain.output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = answer["explanations"].as_array().unwrap();
    assert!(
        found.len() == 1 && found[0]["code"] == code,
        "{code} was expected for {words:?}: {answer}"
    );
    assert!(output.status.success());
}

#[test]
fn what_qemu_says_of_a_wrong_guest_is_explained() {
    let dir = prepared();
    for (right, wrong, code) in WRONG {
        let arguments = GUEST.replacen(right, wrong, 1);
        let words = last_words(&dir, Qemu::V10, &arguments, "exec:cat guest.mig");
        is_explained(&dir, &words, code);
    }
    let words = last_words(&dir, Qemu::V7_2, GUEST, "exec:cat guest.mig");
    is_explained(&dir, &words, "machine.unknown");
}

#[test]
fn what_qemu_says_of_a_wrong_stream_or_host_is_explained() {
    let dir = prepared();
    std::fs::write(dir.join("text"), "this is no stream of QEMU ".repeat(9)).unwrap();
    let words = last_words(&dir, Qemu::V10, GUEST, "exec:cat text");
    is_explained(&dir, &words, "stream.none");
    let mut stream = std::fs::read(dir.join("guest.mig")).unwrap();
    let footer = stream
        .windows(5)
        .rposition(|bytes| bytes[0] == 0x7e)
        .unwrap();
    stream[footer] = 0x55;
    std::fs::write(dir.join("bad.mig"), stream).unwrap();
    let words = last_words(&dir, Qemu::V10, GUEST, "exec:cat bad.mig");
    is_explained(&dir, &words, "stream.damaged");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let user = format!("user,id=n0,hostfwd=tcp:127.0.0.1:{port}-:22");
    let arguments = GUEST.replace("user,id=n0", &user);
    let words = last_words(&dir, Qemu::V10, &arguments, "exec:cat guest.mig");
    is_explained(&dir, &words, "port.taken");
}

#[test]
fn a_message_can_be_given_as_it_is_and_an_unknown_one_is_told() {
    let dir = TestDir::new();
    let mut explain = dir.vmstow();
    explain.args(["explain", "UUID received is 1 and local is 2"]);
    let said = String::from_utf8(explain.output().unwrap().stdout).unwrap();
    assert!(
        said.contains("[stream.uuid]") && said.contains("-uuid 1"),
        "{said}"
    );
    let said = dir
        .vmstow()
        .args(["explain", "all is well"])
        .assert()
        .code(1);
    let said = String::from_utf8(said.get_output().stdout.clone()).unwrap();
    assert_eq!(said, "nothing in this text is known\n");
}
