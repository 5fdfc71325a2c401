//! Images of one layout made into another.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, Qemu, TestDir, flip_bit};
use vmstow::container::Image;

fn saved(spec: GuestSpec, arguments: &[&str]) -> (TestDir, Guest) {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(5);
    let source = guest.source();
    dir.json(&[&["save", &source, "x.stow", "--label", "a=b"], arguments].concat());
    guest.wait_for_exit();
    (dir, guest)
}

fn small(qemu: Qemu) -> GuestSpec {
    GuestSpec {
        qemu,
        memory_mib: 16,
        ..GuestSpec::default()
    }
}

fn convert(dir: &TestDir, from: &str, to: &str, layout: &str) -> Value {
    let report = dir.json(&["convert", from, to, "--layout", layout]);
    assert_eq!(report["layout"], layout);
    let verified = dir.json(&["verify", "--deep", to]);
    assert_eq!(verified["is_whole"], json!(true));
    assert_eq!(verified["trust"]["state"], "trusted");
    report
}

/// The manifest without what a conversion may change.
fn manifest(dir: &TestDir, image: &str) -> Value {
    let mut manifest = dir.json(&["inspect", image])["manifest"].clone();
    manifest.as_object_mut().unwrap().remove("stream");
    manifest["capabilities"] = json!([]);
    manifest
}

#[test]
fn zstd_to_raw_and_back_keeps_the_digest_and_all_else() {
    for capture in ["auto", "migration"] {
        let (dir, guest) = saved(small(Qemu::V10), &["--capture", capture]);
        let raw = convert(&dir, "x.stow", "raw.stow", "raw");
        let back = convert(&dir, "raw.stow", "back.stow", "zstd");
        for report in [&raw, &back] {
            assert_eq!(report["image_digest"], raw["from_digest"]);
        }
        assert_eq!(manifest(&dir, "back.stow"), manifest(&dir, "x.stow"));
        let bytes = |name: &str| std::fs::read(dir.join(name)).unwrap();
        let [first, last] = ["x.stow", "back.stow"].map(|name| Image::open(bytes(name)).unwrap());
        assert_eq!(first.xml().unwrap(), last.xml().unwrap());
        let payload = |image: &Image<Vec<u8>>| {
            let start = usize::try_from(image.footer().payload_offset.0).unwrap();
            let len = usize::try_from(image.footer().payload_len).unwrap();
            image.reader()[start..start + len].to_vec()
        };
        assert!(payload(&first) == payload(&last));
        let before = guest.serial().mark();
        let _restored = dir.restore(&["back.stow"]);
        guest.serial().assert_goes_on(&before);
    }
}

#[test]
fn mapped_and_back_gives_the_guest_back_with_both_qemus() {
    for qemu in Qemu::ALL {
        let program = qemu.program().display().to_string();
        let (dir, guest) = saved(small(qemu), &["--capture", "migration"]);
        let mapped = convert(&dir, "x.stow", "m.stow", "mapped");
        assert_ne!(mapped["image_digest"], mapped["from_digest"]);
        let stream = &dir.json(&["inspect", "m.stow"])["manifest"]["stream"];
        assert_eq!(stream["made_from"], mapped["from_digest"]);
        assert_eq!(stream["vmdescription"], json!(true));
        convert(&dir, "m.stow", "z.stow", "zstd");
        assert_eq!(manifest(&dir, "z.stow"), manifest(&dir, "x.stow"));
        let stream = &dir.json(&["inspect", "z.stow"])["manifest"]["stream"];
        assert_eq!(stream["vmdescription"], json!(true));
        // Once more mapped, the pages lie where they lay.
        let again = convert(&dir, "z.stow", "again.stow", "mapped");
        assert_eq!(again["image_digest"], mapped["image_digest"]);
        let before = guest.serial().mark();
        let _restored = dir.restore(&["z.stow", "--qemu", &program]);
        guest.serial().assert_goes_on(&before);
    }
}

#[test]
fn what_7_2_saved_runs_as_a_mapping_on_10() {
    let (dir, guest) = saved(small(Qemu::V7_2), &[]);
    convert(&dir, "x.stow", "m.stow", "mapped");
    let before = guest.serial().mark();
    let program = Qemu::V10.program().display().to_string();
    let restored = dir.restore(&["m.stow", "--map", "--qemu", &program]);
    assert_eq!(restored.report["memory"], "mapped");
    guest.serial().assert_goes_on(&before);
}

#[test]
fn a_damaged_image_is_not_converted() {
    let (dir, _guest) = saved(small(Qemu::V10), &["--layout", "raw"]);
    flip_bit(dir.join("x.stow"), 5000, 3);
    for layout in ["zstd", "mapped"] {
        let said = dir.refused(3, &["convert", "x.stow", "y.stow", "--layout", layout]);
        assert!(said.contains("does not match its"), "{said}");
        assert!(!dir.join("y.stow").exists());
    }
}

#[test]
fn a_strangers_image_is_not_signed_for_him() {
    let (dir, _guest) = saved(small(Qemu::V10), &["--no-sign"]);
    let assert = dir
        .vmstow()
        .args(["convert", "x.stow", "y.stow", "--layout", "mapped"])
        .assert()
        .success();
    let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(said.contains("is not signed"), "{said}");
    let described = dir.json(&["inspect", "y.stow"]);
    assert_eq!(described["trust"]["state"], "unsigned");
    let said = dir.refused(2, &["convert", "x.stow", "y.stow"]);
    assert!(said.contains("y.stow exists"), "{said}");
    let said = dir.refused(2, &["convert", "x.stow", "-", "--layout", "mapped"]);
    assert!(said.contains("only be written to a file"), "{said}");
}
