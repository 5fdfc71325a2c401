//! `vmstow check` finds every wrong restore before QEMU loads a byte, each by its code, and refuses none of the right ones.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use vmstow::config::compat::{Code, Level, codes::CODES};

use support::{Guest, GuestSpec, Qemu, Restored, Serial, TestDir, flip_bit, testdata};

/// Runs a check; gives its answer, which has to fit its exit code.
#[track_caller]
fn check(dir: &TestDir, arguments: &[&str]) -> Value {
    let words = [&["--json", "check"], arguments].concat();
    let output = dir.vmstow().args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let verdict: Value = serde_json::from_slice(&output.stdout).expect(&said);
    let code = if verdict["can_run"] == true { 0 } else { 4 };
    assert_eq!(output.status.code(), Some(code), "{verdict:#}");
    assert!(dir.qemus().is_empty(), "nothing is left running");
    verdict
}

/// The codes of the reasons, or of the doubts.
fn codes(verdict: &Value, level: &str) -> Vec<String> {
    let findings = verdict["findings"].as_array().unwrap().iter();
    let findings = findings.filter(|finding| finding["level"] == level);
    findings
        .map(|finding| finding["code"].as_str().unwrap().to_owned())
        .collect()
}

/// A check that has to find this reason; gives the finding.
#[track_caller]
fn finds(dir: &TestDir, code: &str, arguments: &[&str]) -> Value {
    let verdict = check(dir, arguments);
    let findings = verdict["findings"].as_array().unwrap();
    let found = findings.iter().find(|finding| finding["code"] == code);
    let found = found.unwrap_or_else(|| panic!("{arguments:?}: no {code} in {verdict:#}"));
    assert_eq!(found["level"], "refusal", "{found}");
    found.clone()
}

/// A check that must find no reason, and has asked QEMU.
#[track_caller]
fn is_right(dir: &TestDir, arguments: &[&str]) -> Value {
    let verdict = check(dir, arguments);
    assert_eq!(codes(&verdict, "refusal"), [""; 0], "{verdict:#}");
    assert_eq!(verdict["is_compared"], true, "{verdict:#}");
    verdict
}

/// A guest from XML, with `change` made to what it was saved with.
fn xml(dir: &TestDir, change: (&str, &str)) -> String {
    let whole = format!(
        "<domain type='qemu'><name>web</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
        <os><type arch='x86_64' machine='pc-i440fx-10.0'>hvm</type></os><features><acpi/></features>
        <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>Nehalem</model></cpu>
        <devices><emulator>{}</emulator>
        <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>
            <target dev='vda' bus='virtio'/>
            <address type='pci' domain='0' bus='0' slot='7' function='0'/></disk>
        <interface type='user'><mac address='52:54:00:00:00:07'/><model type='e1000'/>
            <address type='pci' domain='0' bus='0' slot='8' function='0'/></interface>
        <serial type='file'><source path='{}' append='on'/></serial>
        <memballoon model='none'/></devices></domain>",
        Qemu::V10.program().display(),
        dir.join("web.img").display(),
        dir.join("web.serial").display()
    );
    let (from, to) = change;
    assert!(whole.contains(from), "{from}");
    whole.replacen(from, to, 1)
}

#[test]
fn what_another_configuration_would_change_is_found() {
    let dir = TestDir::new();
    std::fs::copy(testdata("guests/counter.img"), dir.join("web.img")).unwrap();
    std::fs::write(dir.join("web.xml"), xml(&dir, ("", ""))).unwrap();
    let started = Restored::of(dir.json(&["run", "web.xml"]));
    Serial::at(dir.join("web.serial")).wait_for_tick(2);
    dir.json(&["save", "web", "x.stow"]);
    started.qemu.wait_for_exit();
    assert_eq!(is_right(&dir, &["x.stow"])["findings"], json!([]));
    is_right(&dir, &["x.stow", "--xml", "web.xml"]);
    let interface = "<interface type='user'>";
    let rng = format!(
        "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>{interface}"
    );
    let sse = "Nehalem</model><feature policy='disable' name='sse4.2'/>";
    for (code, from, to, says) in [
        ("cpu.flag.missing", "Nehalem</model>", sse, "sse4.2"),
        ("cpu.model", "Nehalem<", "Westmere<", "Westmere"),
        (
            "cpu.count",
            "<vcpu>1<",
            "<vcpu>2<",
            "with 1 processor(s), and would have 2",
        ),
        (
            "cpu.max",
            "<vcpu>1<",
            "<vcpu current='1'>3<",
            "it would be 3",
        ),
        ("device.surplus", interface, rng.as_str(), "virtio-rng"),
        ("device.missing", interface, "<!--", "e1000"),
        (
            "device.moved",
            "slot='8'",
            "slot='9'",
            "0000:00:08.0, and would be at 0000:00:09.0",
        ),
        (
            "ramblock.length",
            "'MiB'>64",
            "'MiB'>96",
            "64 MiB in the image, and would have 96 MiB",
        ),
        (
            "machine.other",
            "pc-i440fx-10.0",
            "pc-i440fx-9.2",
            "pc-i440fx-9.2",
        ),
        ("device.missing", "pc-i440fx-10.0", "q35", "I440FX"),
    ] {
        let mut other = xml(&dir, (from, to));
        if to == "<!--" {
            other = other.replacen("</interface>", "-->", 1);
        }
        std::fs::write(dir.join("other.xml"), other).unwrap();
        let found = finds(&dir, code, &["x.stow", "--xml", "other.xml"]);
        assert!(found["fact"].as_str().unwrap().contains(says), "{found}");
    }
    let older = Qemu::V7_2.program().display().to_string();
    let found = finds(&dir, "machine.unknown", &["x.stow", "--qemu", &older]);
    assert!(
        found["fix"].as_str().unwrap().contains("at least 10.0"),
        "{found}"
    );
    finds(&dir, "qemu.missing", &["x.stow", "--qemu", "/nonexistent"]);
    let said = dir
        .vmstow()
        .args(["check", "x.stow", "--qemu", "/nonexistent"])
        .assert()
        .code(4);
    let said = String::from_utf8(said.get_output().stdout.clone()).unwrap();
    assert!(
        said.starts_with("web cannot run here, with /nonexistent; 1 reason"),
        "{said}"
    );
}

/// A q35 guest of QEMU 10 with the devices of 7.2, a CD-ROM and a network, saved to `x.stow` and, with a part in its state
/// that 7.2 does not know, to `newer.stow`.
fn saved_twice(dir: &TestDir) -> Guest {
    std::fs::write(dir.join("cd.iso"), vec![0; 1 << 20]).unwrap();
    let spec = GuestSpec {
        machine: "pc-q35-7.2".to_owned(),
        ..GuestSpec::default()
    };
    let mut guest = Guest::start(
        dir,
        spec.with(&[
            "-cdrom",
            "cd.iso",
            "-netdev",
            "user,id=net0",
            "-device",
            "virtio-net-pci,netdev=net0",
        ]),
    );
    guest.serial().wait_for_tick(2);
    dir.json(&["save", &guest.source(), "x.stow", "--then", "pause"]);
    // The interrupt controller is told that its inputs are levels, which no QEMU before 8.0 can be.
    let line = json!({ "command-line": "o/b 0x20 0x19" });
    guest.qmp().command("human-monitor-command", line);
    dir.json(&["save", &guest.source(), "newer.stow", "--from-postmigrate"]);
    guest.wait_for_exit();
    guest
}

/// QEMU 10 with a network ROM smaller than the one it came with.
fn with_small_rom(dir: &TestDir) -> String {
    let roms = dir.join("roms");
    std::fs::create_dir(&roms).unwrap();
    std::fs::write(roms.join("efi-virtio.rom"), vec![0; 1 << 16]).unwrap();
    let script = dir.join("qemu-small-rom");
    let qemu = Qemu::V10.program();
    let text = format!(
        "#!/bin/sh\nexec {} -L {} \"$@\"\n",
        qemu.display(),
        roms.display()
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    script.display().to_string()
}

fn set_modified(path: &Path, time: SystemTime) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn what_a_host_lacks_and_what_changed_there_is_found() {
    let dir = TestDir::new();
    let guest = saved_twice(&dir);
    assert_eq!(is_right(&dir, &["x.stow"])["findings"], json!([]));
    // An older QEMU is a doubt, a part of the state that it does not know a reason.
    let older = Qemu::V7_2.program().display().to_string();
    let verdict = is_right(&dir, &["x.stow", "--qemu", &older]);
    assert_eq!(codes(&verdict, "warning"), ["qemu.older"]);
    let found = finds(&dir, "section.unknown", &["newer.stow", "--qemu", &older]);
    assert!(
        found["fact"].as_str().unwrap().contains("i8259/ltim"),
        "{found}"
    );
    is_right(&dir, &["newer.stow"]);
    let small = with_small_rom(&dir);
    let found = finds(&dir, "rom.length", &["x.stow", "--qemu", &small]);
    assert_eq!(found["fix"], "--romsize virtio-net-pci=0x40000");
    let romsize = "virtio-net-pci=0x40000";
    is_right(&dir, &["x.stow", "--qemu", &small, "--romsize", romsize]);
    finds(&dir, "boot.failed", &["x.stow", "--qemu", &small, "--boot"]);
    let verdict = is_right(&dir, &["x.stow", "--boot"]);
    assert!(
        verdict["boot"]["loaded_after_ms"].as_u64().is_some(),
        "{verdict:#}"
    );
    finds(
        &dir,
        "interface.missing",
        &["x.stow", "--remap", "net:net0=bridge=vmstow-none"],
    );
    std::fs::rename(dir.join("cd.iso"), dir.join("moved.iso")).unwrap();
    let found = finds(&dir, "file.missing", &["x.stow"]);
    assert_eq!(found["fix"], "--remap cdrom:ide2-cd0=PATH");
    is_right(&dir, &["x.stow", "--remap", "cdrom:*=eject"]);
    std::fs::rename(dir.join("moved.iso"), dir.join("cd.iso")).unwrap();
    disks(&dir, &guest);
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    let output = dir.as_nobody(&["--json", "check", "x.stow", "--lazy"]);
    let verdict: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = codes(&verdict, "refusal").contains(&"lazy.userfaultfd".to_owned());
    assert_eq!(found, setting.trim() != "1", "{verdict:#}");
}

fn disks(dir: &TestDir, guest: &Guest) {
    let disk = guest.disk();
    let saved = std::fs::metadata(&disk).unwrap().modified().unwrap();
    set_modified(&disk, saved + Duration::from_secs(60));
    let found = finds(dir, "disk.written", &["x.stow"]);
    assert_eq!(
        found["fix"],
        "--remap disk:disk0=PATH, or --accept-changed-disks"
    );
    set_modified(&disk, saved - Duration::from_secs(60));
    finds(dir, "disk.rolled-back", &["x.stow"]);
    std::fs::copy(&disk, dir.join("copy.img")).unwrap();
    std::fs::rename(dir.join("copy.img"), &disk).unwrap();
    set_modified(&disk, saved + Duration::from_secs(60));
    finds(dir, "disk.replaced", &["x.stow"]);
    let said = dir.refused(4, &["restore", "x.stow"]);
    assert!(
        said.contains("is another file than when the guest was saved"),
        "{said}"
    );
    let said = dir.refused(2, &["restore", "x.stow", "--force", "machine.unknown"]);
    assert!(
        said.contains("machine.unknown cannot be overridden"),
        "{said}"
    );
    let said = dir.refused(2, &["restore", "x.stow", "--force", "disk.eaten"]);
    assert!(said.contains("no reason has the code disk.eaten"), "{said}");
    let restored = dir.restore(&["x.stow", "--force", "disk.replaced", "--paused"]);
    let log = std::fs::read_to_string(restored.report["log"].as_str().unwrap()).unwrap();
    assert!(
        log.contains("restored with --force disk.replaced, although disk \"disk0\""),
        "{log}"
    );
    drop(restored);
    let file = File::options().write(true).open(&disk).unwrap();
    file.set_len(1 << 20).unwrap();
    finds(dir, "disk.changed", &["x.stow"]);
}

#[test]
fn a_guest_of_an_older_qemu_is_right_on_it_and_on_a_newer_one_and_damage_is_no_finding() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        qemu: Qemu::V7_2,
        ..GuestSpec::default().with(&["-smp", "1,maxcpus=2"])
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(2);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    is_right(&dir, &["x.stow"]);
    let newer = Qemu::V10.program().display().to_string();
    is_right(&dir, &["x.stow", "--qemu", &newer]);
    let before = guest.serial().mark();
    // Another QEMU than the one of the save is asked before it loads the guest.
    let restored = dir.restore(&["x.stow", "--qemu", &newer]);
    guest.serial().assert_goes_on(&before);
    drop(restored);
    let image = dir.join("x.stow");
    let len = std::fs::metadata(&image).unwrap().len();
    flip_bit(&image, len - 600, 0);
    let output = dir.vmstow().args(["check", "x.stow"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{output:?}");
}

#[test]
fn the_specification_lists_every_code() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/spec/findings.md");
    let text = std::fs::read_to_string(path).unwrap();
    let rows: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let expected: Vec<String> = CODES.iter().map(row).collect();
    assert_eq!(rows, expected);
}

fn row(code: &Code) -> String {
    let level = match code.level {
        Level::Refusal => "reason",
        Level::Warning => "doubt",
    };
    let force = if code.can_be_forced { "yes" } else { "" };
    format!("| `{}` | {level} | {force} | {} |", code.code, code.says)
}
