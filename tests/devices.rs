//! The devices' state in an image or a stream, field by field: every byte has its place, and the processors' registers
//! are those that QEMU itself shows.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, Qemu, TestDir, testdata};

/// Streams that describe their devices, and how many there are.
const STREAMS: [&str; 8] = [
    "i440fx-10.0",
    "q35-10.0",
    "q35-10.0-file",
    "uuid-10.0",
    "live-10.0",
    "return-path-10.0",
    "i440fx-7.2",
    "q35-7.2",
];

fn unpack(dir: &TestDir, name: &str) -> String {
    let packed = std::fs::read(testdata(&format!("streams/{name}.mig.zst"))).unwrap();
    let file = format!("{name}.mig");
    std::fs::write(dir.join(&file), zstd::decode_all(&*packed).unwrap()).unwrap();
    file
}

/// The bytes of fields and subsections, headers of the latter included.
fn len_of(members: &Value) -> u64 {
    let fields = members["fields"].as_array().unwrap().iter();
    let fields: u64 = fields.map(|field| field["len"].as_u64().unwrap()).sum();
    let empty = Vec::new();
    let subsections = members["subsections"].as_array().unwrap_or(&empty).iter();
    let subsections =
        subsections.map(|one| 6 + one["name"].as_str().unwrap().len() as u64 + len_of(one));
    fields + subsections.sum::<u64>()
}

#[test]
fn every_byte_of_every_device_has_its_field() {
    let dir = TestDir::new();
    for name in STREAMS {
        let file = unpack(&dir, name);
        let answer = dir.json(&["inspect", &file, "--devices"]);
        let devices = answer["devices"].as_array().unwrap();
        assert!(devices.len() > 20, "{name}");
        for device in devices {
            assert_eq!(
                device["len"].as_u64().unwrap(),
                len_of(device),
                "{name}: {device}"
            );
        }
        let cpu = devices
            .iter()
            .find(|device| device["idstr"] == "cpu")
            .unwrap();
        assert!(cpu["fields"].as_array().unwrap().len() > 40, "{name}");
        // The whole stream in the words of people, too.
        let said = dir
            .vmstow()
            .args(["inspect", &file, "--devices"])
            .output()
            .unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(
            said.contains("  env.eip: 0x") && said.contains("    selector: 0x"),
            "{said}"
        );
    }
}

#[test]
fn one_device_is_shown_by_its_name_or_its_bytes() {
    let dir = TestDir::new();
    let file = unpack(&dir, "q35-10.0");
    let said = dir.refused(2, &["inspect", &file, "--device", "cpu"]);
    assert!(said.contains("2 devices are named \"cpu\""), "{said}");
    let device = dir.json(&["inspect", &file, "--device", "cpu#1"]);
    assert_eq!(device["device"]["instance_id"], 1);
    let raw = dir
        .vmstow()
        .args(["inspect", &file, "--device", "cpu#1", "--raw"])
        .output()
        .unwrap();
    let stream = std::fs::read(dir.join(&file)).unwrap();
    let offset = usize::try_from(device["device"]["offset"].as_u64().unwrap()).unwrap();
    assert_eq!(device["device"]["len"], raw.stdout.len());
    assert!(stream[offset..].starts_with(&raw.stdout));
    let said = dir.refused(2, &["inspect", &file, "--device", "toaster"]);
    assert!(
        said.contains("toaster") && said.contains("slirp#0"),
        "{said}"
    );
}

#[test]
fn a_stream_that_does_not_describe_its_devices_is_shown_as_far_as_it_goes() {
    let dir = TestDir::new();
    let file = unpack(&dir, "suppress-vmdesc-10.0");
    let output = dir
        .vmstow()
        .args(["inspect", &file, "--devices"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("does not describe its devices"), "{said}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(!said.contains("  ") && said.lines().count() > 20, "{said}");
    // Footers tell how long each is, so its bytes are there to be had.
    assert!(
        said.lines()
            .all(|line| line.contains(" bytes at stream offset 0x")),
        "{said}"
    );
    let raw = dir
        .vmstow()
        .args(["inspect", &file, "--device", "globalstate", "--raw"])
        .output()
        .unwrap()
        .stdout;
    assert_eq!((raw.len(), &raw[..10]), (104, &b"\0\0\0\x07paused"[..]));
}

/// A device's fields and subsections, without their places in the stream.
fn members(device: &Value) -> Value {
    json!([
        device["idstr"],
        device["instance_id"],
        device["len"],
        device["fields"],
        device["subsections"]
    ])
}

#[test]
fn qemu_describes_what_was_taken_from_its_memory() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        machine: "q35".to_owned(),
        ..GuestSpec::linux()
    };
    // A clock that stands still while the guest does.
    let more = "-rtc clock=vm -smp 2 -device qemu-xhci -device usb-tablet -device e1000e";
    let more: Vec<&str> = more.split(' ').collect();
    let mut guest = Guest::start(&dir, spec.with(&more));
    guest
        .serial()
        .wait_for_line("the disk", |line| line == "disk ok");
    guest.qmp().command("stop", json!({}));
    dir.json(&["save", &guest.source(), "memory.stow", "--then", "pause"]);
    dir.json(&[
        "save",
        &guest.source(),
        "migrated.stow",
        "--capture",
        "migration",
    ]);
    guest.wait_for_exit();

    let plain = dir.json(&["inspect", "memory.stow", "--devices"]);
    let plain = plain["devices"].as_array().unwrap();
    assert!(
        plain.iter().all(|device| device["is_described"] == false),
        "{plain:?}"
    );
    let described = dir.json(&["inspect", "memory.stow", "--devices", "--ask-qemu"]);
    let described = described["devices"].as_array().unwrap();
    let expected = dir.json(&["inspect", "migrated.stow", "--devices"]);
    let expected = expected["devices"].as_array().unwrap();
    assert_eq!(described.len(), expected.len());
    for device in expected {
        let is_twin = |one: &&Value| {
            one["idstr"] == device["idstr"] && one["instance_id"] == device["instance_id"]
        };
        let twin = described.iter().find(is_twin).unwrap();
        assert_eq!(members(twin), members(device));
    }
    let registers = ["memory.stow", "migrated.stow"].map(|image| {
        let answer = dir.json(&["inspect", image, "--registers", "--ask-qemu"]);
        answer["cpus"].clone()
    });
    assert_eq!(registers[0], registers[1]);
    assert_eq!(registers[0].as_array().unwrap().len(), 2);
    let diff = dir.json(&[
        "diff",
        "memory.stow",
        "migrated.stow",
        "--devices",
        "--ask-qemu",
    ]);
    assert_eq!(diff["is_same"], true, "{diff}");
    // To ask QEMU is to run what the image says: not for an image of somebody else.
    let output = dir
        .vmstow()
        .env("XDG_STATE_HOME", dir.join("state-of-another"))
        .args(["inspect", "memory.stow", "--devices", "--ask-qemu"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{said}");
    assert!(said.contains("--trust"), "{said}");
    // Nothing is left of the guests that were asked.
    assert_eq!(dir.json(&["list"])["guests"], json!([]));
    assert_eq!(std::fs::read_dir(dir.join("overlays")).unwrap().count(), 0);
}

/// `rip` and its like as QEMU's human monitor prints them: `RIP=000000000000fff0`.
fn register(words: &str, name: &str) -> u64 {
    let at = words.find(&format!("{name}=")).unwrap();
    let digits = words[at + name.len() + 1..]
        .split_whitespace()
        .next()
        .unwrap();
    u64::from_str_radix(digits, 16).unwrap()
}

#[test]
fn registers_are_those_that_qemu_shows() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::linux()
        };
        let mut guest = Guest::start(&dir, spec);
        guest
            .serial()
            .wait_for_line("the disk", |line| line == "disk ok");
        let mut qmp = guest.qmp();
        qmp.command("stop", json!({}));
        let line = json!({ "command-line": "info registers" });
        let words = qmp.command("human-monitor-command", line);
        let words = words.as_str().unwrap().to_owned();
        drop(qmp);
        dir.json(&["save", &guest.source(), "x.stow", "--capture", "migration"]);
        guest.wait_for_exit();
        let answer = dir.json(&["inspect", "x.stow", "--registers"]);
        let found = answer["cpus"][0]["registers"].as_array().unwrap();
        for name in ["rax", "rsp", "rip", "cr0", "cr3", "cr4", "efer"] {
            let value = found.iter().find(|pair| pair[0] == name).unwrap()[1].as_u64();
            let shown = register(&words, &name.to_uppercase());
            assert_eq!(value, Some(shown), "{name}: {words}");
        }
        let said = dir
            .vmstow()
            .args(["inspect", "x.stow", "--registers"])
            .output()
            .unwrap();
        let rip = format!("rip {:016x}", register(&words, "RIP"));
        assert!(String::from_utf8(said.stdout).unwrap().contains(&rip));
    }
}
