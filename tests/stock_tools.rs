//! An image is no lock-in: QEMU and tools that know nothing of vmstow read it.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::json;

use support::{Guest, GuestSpec, Mark, PATIENCE, Qemu, TestDir, wait_until};

/// A guest that was saved, as it was started, and what it had said by then.
struct Saved {
    dir: TestDir,
    spec: GuestSpec,
    before: Mark,
}

/// Saves a guest to `x.stow` and ends it.
fn save(spec: GuestSpec, layout: &str) -> Saved {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, spec.clone());
    guest.serial().wait_for_tick(5);
    dir.json(&["save", &guest.source(), "x.stow", "--layout", layout]);
    guest.wait_for_exit();
    std::fs::copy(guest.disk(), dir.join("second.img")).unwrap();
    let before = guest.serial().mark();
    Saved { dir, spec, before }
}

impl Saved {
    /// Starts QEMU as the guest was started, with `-incoming`, and tells it to go on; no vmstow is near.
    fn restore_by_hand(&self, incoming: &str) {
        let spec = self.spec.clone().named("second");
        let guest = Guest::start(&self.dir, spec.with(&["-incoming", incoming]));
        let mut qmp = guest.qmp();
        wait_until("the incoming migration", PATIENCE, || {
            let status = qmp.status();
            (status == "paused").then_some(()).ok_or(status)
        });
        qmp.command("cont", json!({}));
        let until = self.before.last_tick() + 15;
        guest.serial().assert_goes_on_to(&self.before, until);
    }

    fn image(&self) -> String {
        self.dir.join("x.stow").display().to_string()
    }
}

fn counter(qemu: Qemu, machine: &str) -> GuestSpec {
    GuestSpec {
        qemu,
        machine: machine.to_owned(),
        memory_mib: 16,
        ..GuestSpec::default()
    }
}

fn linux(qemu: Qemu) -> GuestSpec {
    GuestSpec {
        qemu,
        ..GuestSpec::linux()
    }
}

#[test]
fn zstd_and_qemu_restore_an_image() {
    let specs = [
        counter(Qemu::V10, "q35"),
        counter(Qemu::V7_2, "pc"),
        linux(Qemu::V10),
    ];
    for spec in specs {
        let saved = save(spec, "zstd");
        saved.restore_by_hand(&format!("exec:zstd -dc {}", saved.image()));
    }
}

#[test]
fn qemu_alone_restores_a_raw_image() {
    let specs = [counter(Qemu::V10, "pc"), linux(Qemu::V10)];
    for spec in specs {
        let saved = save(spec, "raw");
        saved.restore_by_hand(&format!("file:{}", saved.image()));
        saved.restore_by_hand(&format!("exec:cat {}", saved.image()));
    }
}

#[test]
fn qemu_7_2_and_cat_restore_a_raw_image() {
    let saved = save(counter(Qemu::V7_2, "q35"), "raw");
    saved.restore_by_hand(&format!("exec:cat {}", saved.image()));
}

/// What a program writes to stdout.
#[track_caller]
fn output(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} ({error}): run tests/setup.sh"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {said}");
    output.stdout
}

#[test]
fn every_zstd_reader_gives_the_same_stream() {
    let saved = save(counter(Qemu::V10, "pc"), "zstd");
    let image = saved.image();
    let stream = output("zstd", &["-dc", &image]);
    assert!(stream.starts_with(b"QEVM"));
    output("zstd", &["-tq", &image]);
    assert!(output("bsdcat", &[&image]) == stream, "bsdcat");
    assert!(
        output("7zz", &["x", "-so", "-tzstd", &image]) == stream,
        "7zz"
    );
    let described = saved.dir.json(&["inspect", "x.stow"]);
    assert_eq!(described["stream_bytes"], json!(stream.len()));
    std::fs::write(saved.dir.join("guest.mig"), stream).unwrap();
    let bare = saved.dir.json(&["inspect", "guest.mig"]);
    assert_eq!(
        bare["machine_type"],
        described["manifest"]["machine"]["type"]
    );
}

#[test]
fn the_configuration_can_be_read_without_any_tool_of_ours() {
    let saved = save(counter(Qemu::V10, "q35"), "zstd");
    let xml = saved
        .dir
        .vmstow()
        .args(["inspect", "--xml", "x.stow"])
        .unwrap()
        .stdout;
    assert!(xml.starts_with(b"<domain"));
    let image = std::fs::read(saved.image()).unwrap();
    assert!(image.windows(xml.len()).any(|window| window == xml));
}

#[test]
fn an_independent_reader_agrees_about_real_images() {
    for (layout, machine) in [("zstd", "pc"), ("raw", "q35")] {
        let saved = save(counter(Qemu::V10, machine), layout);
        let image = saved.image();
        let reader = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/independent_reader.py");
        let judgement = output("python3", &[reader, "verify", &image]);
        assert_eq!(
            String::from_utf8(judgement).unwrap(),
            format!("{image}: good\n")
        );
        let stream = output("python3", &[reader, "extract", &image]);
        assert!(stream == qemus_stream(Path::new(&image), layout));
    }
}

/// The payload of an image, without what we know of it.
fn qemus_stream(image: &Path, layout: &str) -> Vec<u8> {
    let image_path = image.display().to_string();
    if layout == "zstd" {
        return output("zstd", &["-dc", &image_path]);
    }
    let mut bytes = std::fs::read(image).unwrap();
    let described = bytes.windows(16).position(|window| {
        window.starts_with(&[0x5b, 0x2a, 0x4d, 0x18]) && window.ends_with(b"VMSTOW\x1a\x0a")
    });
    bytes.truncate(described.expect("sections follow the stream"));
    bytes
}
