//! Deltas: the second save of a guest holds what the first does not, and is that save all the same; without its parent it is of
//! no use, and says so.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod sample_images;
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use sample_images::{delta_of, image_of};
use serde_json::Value;
use support::{
    Guest, GuestSpec, OtherHost, PATIENCE, Qemu, Serial, TestDir, flip_bit, scribbled, write_memory,
};
use vmstow::container::{ChunkEntry, ChunkKind, Image, Layout, ParentId};
use vmstow::digest::Digest;
use vmstow::store::FileSource;

fn len(dir: &TestDir, name: &str) -> u64 {
    fs::metadata(dir.join(name)).unwrap().len()
}

fn digest(dir: &TestDir, name: &str) -> Value {
    dir.json(&["inspect", name])["image_digest"].clone()
}

fn chunks(path: &Path) -> Vec<ChunkEntry> {
    let image = Image::open(FileSource::open(path).unwrap()).unwrap();
    image.chunks().map(Result::unwrap).collect()
}

/// What `zstd -dc` makes of the file, which it must find whole.
fn decoded(path: &Path) -> String {
    let output = Command::new("zstd").arg("-dc").arg(path).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// That QEMU refuses what stock tools make of a delta, and ends.
fn qemu_refuses(dir: &TestDir, qemu: Qemu, incoming: &str) {
    let arguments = "-machine pc -accel tcg -m 64 -display none -nodefaults -incoming";
    let mut command = assert_cmd::Command::new(qemu.program());
    let assert = command
        .args(arguments.split(' ').chain([incoming]))
        .current_dir(dir.path())
        .timeout(PATIENCE)
        .assert()
        .code(1);
    let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(said.contains("Not a migration stream"), "{said}");
}

#[test]
fn a_guest_goes_on_through_a_chain_of_deltas() {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, GuestSpec::default());
    guest.serial().wait_for_tick(18);
    dir.json(&["save", &guest.source(), "a.stow"]);
    guest.wait_for_exit();
    let serial = guest.serial();

    // Read from QEMU's memory, and restored eagerly.
    let before = serial.mark();
    let restored = dir.restore(&["a.stow"]);
    serial.assert_goes_on(&before);
    let saved = dir.json(&["save", restored.name(), "b.stow", "--parent", "a.stow"]);
    let whole = len(&dir, "a.stow");
    assert_eq!(saved["file_bytes"], len(&dir, "b.stow"));
    assert!(len(&dir, "b.stow") * 20 <= whole, "{saved} of {whole}");
    restored.qemu.wait_for_exit();
    let report = dir.json(&["verify", "b.stow", "--deep"]);
    assert_eq!(report["is_whole"], true, "{report}");
    assert_eq!(report["parents"].as_array().unwrap().len(), 1);
    assert!(report["stream"]["data_pages"].as_u64().unwrap() > 1000);

    // By QEMU's migration, of a guest that was restored lazily.
    let before = serial.mark();
    let restored = dir.restore(&["b.stow", "--lazy", "--wait"]);
    assert_eq!(restored.report["served"]["phase"], "complete");
    serial.assert_goes_on(&before);
    let name = restored.name().to_owned();
    let by_migration = ["--capture", "migration", "--parent", "b.stow"];
    dir.json(&[&["save", &name, "c.stow"][..], &by_migration].concat());
    restored.qemu.wait_for_exit();
    assert!(len(&dir, "c.stow") * 4 <= whole);
    let report = dir.json(&["verify", "c.stow"]);
    assert_eq!(report["parents"].as_array().unwrap().len(), 2);

    // All that reads images follows the chain.
    let made = dir.json(&["convert", "c.stow", "flat.stow"]);
    assert_eq!(made["image_digest"], digest(&dir, "c.stow"));
    assert!(dir.json(&["inspect", "flat.stow"])["parent"].is_null());
    assert!(len(&dir, "flat.stow") * 2 > whole);
    let same = dir.json(&["diff", "c.stow", "flat.stow"]);
    assert_eq!(same["is_same"], true);
    let page = |image: &str| {
        let words = ["mem", image, "read", "0x200000", "4096", "--raw"];
        dir.vmstow()
            .args(words)
            .assert()
            .success()
            .get_output()
            .stdout
            .clone()
    };
    assert_eq!(
        (page("c.stow"), page("c.stow").len()),
        (page("flat.stow"), 4096)
    );
    dir.vmstow().args(["check", "c.stow"]).assert().success();

    // However many workers there are, the same bytes come out.
    for threads in ["1", "3"] {
        let name = format!("d{threads}.stow");
        let words = ["convert", "flat.stow", &name, "--parent", "a.stow"];
        let made = dir.json(&[&words[..], &["--threads", threads]].concat());
        assert_eq!(made["image_digest"], digest(&dir, "c.stow"));
    }
    let made = ["d1.stow", "d3.stow"].map(|name| fs::read(dir.join(name)).unwrap());
    assert!(made[0] == made[1]);

    let before = serial.mark();
    let restored = dir.restore(&["c.stow"]);
    serial.assert_goes_on_to(&before, before.last_tick() + 16);
    a_damaged_parent_leaves_the_guest_as_it_was(&dir, restored.name());
    drop(restored);

    stock_tools_get_nothing_but_words(&dir);
    one_chunk_is_a_patch_of_stock_zstd(&dir);
}

/// What the new save would follow is damaged: nothing is saved, and the guest counts on.
fn a_damaged_parent_leaves_the_guest_as_it_was(dir: &TestDir, guest: &str) {
    let of_parent = chunks(&dir.join("a.stow"));
    let (mut followed, mut repeated) = (Vec::new(), Vec::new());
    for entry in chunks(&dir.join("b.stow")) {
        let (damaged, twin) = match entry.kind {
            ChunkKind::Patched(twin) => (&mut followed, twin),
            ChunkKind::Same(twin) => (&mut repeated, twin),
            _ => continue,
        };
        let twin = of_parent[usize::try_from(twin.0).unwrap()];
        damaged.push(twin.stored_offset.0 + u64::from(twin.stored_len) / 2);
    }
    for mut damaged in [followed, repeated] {
        damaged.sort_unstable();
        damaged.dedup();
        let flip = || {
            for at in &damaged {
                flip_bit(dir.join("a.stow"), *at, 5);
            }
        };
        flip();
        let serial = Serial::at(dir.join("guest.serial"));
        let before = serial.mark();
        let said = dir.refused(4, &["save", guest, "x.stow", "--parent", "c.stow"]);
        let is_named = said.contains("the parent is damaged") && said.contains("checksum");
        assert!(
            is_named && said.contains("was not saved and runs on"),
            "{said}"
        );
        serial.assert_goes_on(&before);
        assert!(!dir.join("x.stow").exists());
        flip();
    }
}

fn stock_tools_get_nothing_but_words(dir: &TestDir) {
    let parent = dir.json(&["inspect", "b.stow"])["parent"].clone();
    let text = decoded(&dir.join("b.stow"));
    assert_eq!(text.lines().count(), 1);
    for word in ["image_uuid", "image_digest"] {
        assert!(text.contains(parent[word].as_str().unwrap()), "{text}");
    }
    let path = dir.join("b.stow").display().to_string();
    qemu_refuses(dir, Qemu::V10, &format!("exec:zstd -dc {path}"));
    qemu_refuses(dir, Qemu::V10, &format!("file:{path}"));
    qemu_refuses(dir, Qemu::V7_2, &format!("exec:zstd -dc {path}"));
    let file = fs::read(dir.join("b.stow")).unwrap();
    let mut command = dir.vmstow();
    let said = command
        .args(["restore", "-", "--trust"])
        .write_stdin(file)
        .assert()
        .code(2);
    let said = String::from_utf8(said.get_output().stderr.clone()).unwrap();
    assert!(
        said.contains("comes through a pipe") && said.contains("try:"),
        "{said}"
    );
}

/// What is stored of a chunk that follows one of the parent is what `zstd --patch-from` reads.
fn one_chunk_is_a_patch_of_stock_zstd(dir: &TestDir) {
    let image = Image::open(FileSource::open(&dir.join("b.stow")).unwrap()).unwrap();
    let parent = Image::open(FileSource::open(&dir.join("a.stow")).unwrap()).unwrap();
    let mut found = image.chunks().map(Result::unwrap);
    let (entry, twin) = found
        .find_map(|entry| match entry.kind {
            ChunkKind::Patched(twin) => Some((entry, twin)),
            _ => None,
        })
        .unwrap();
    let twin = parent.chunk(twin).unwrap();
    let twin = sample_images::decode(&parent, &twin).unwrap();
    let mut stored = Vec::new();
    image.read_stored(&entry, &mut stored).unwrap();
    fs::write(dir.join("twin"), twin).unwrap();
    fs::write(dir.join("patch.zst"), stored).unwrap();
    let output = Command::new("zstd")
        .args(["-d", "--patch-from=twin", "patch.zst", "-o", "chunk"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let raw = fs::read(dir.join("chunk")).unwrap();
    assert_eq!(Digest::of(&raw), entry.raw_digest);
}

/// A guest saved three times, each image the parent of the next.
fn three(dir: &TestDir) {
    const MIB: u64 = 1 << 20;
    let mut guest = scribbled(dir, Qemu::V10, 64, &[], &[(16 * MIB, 32 * MIB)]);
    let save = |name: &str, parent: &[&str], then: &str| {
        let at = MIB * (20 + name.len() as u64);
        write_memory(guest.pid(), &mut guest.qmp(), at, name.as_bytes());
        let source = guest.source();
        dir.json(&[&["save", &source, name, "--then", then][..], parent].concat());
    };
    save("a.stow", &[], "pause");
    save("bb.stow", &["--parent", "a.stow"], "pause");
    save("ccc.stow", &["--parent", "bb.stow"], "quit");
    guest.wait_for_exit();
}

#[test]
fn what_a_delta_lacks_is_named() {
    let dir = TestDir::new();
    three(&dir);
    let a = dir.json(&["inspect", "a.stow"]);
    let a_uuid = a["image_uuid"].as_str().unwrap();

    // Another name is found by what the file is.
    fs::rename(dir.join("a.stow"), dir.join("monday.stow")).unwrap();
    assert_eq!(dir.json(&["verify", "ccc.stow"])["is_whole"], true);

    // Elsewhere it is not, unless the user says where.
    fs::create_dir(dir.join("kept")).unwrap();
    fs::rename(dir.join("monday.stow"), dir.join("kept/monday.stow")).unwrap();
    let report = dir
        .vmstow()
        .args(["--json", "verify", "ccc.stow"])
        .assert()
        .code(3);
    let report: Value = serde_json::from_slice(&report.get_output().stdout).unwrap();
    assert_eq!(report["problems"].as_array().unwrap().len(), 1, "{report}");
    for words in [
        &["restore", "ccc.stow"][..],
        &["restore", "ccc.stow", "--lazy"],
        &["convert", "ccc.stow", "x.stow"],
        &["mem", "ccc.stow", "read", "0x0", "16"],
        &["diff", "ccc.stow", "bb.stow"],
        &["check", "ccc.stow"],
        &["save", "qmp:/nowhere", "x.stow", "--parent", "bb.stow"],
    ] {
        let said = dir.refused(3, words);
        let is_named = said.contains("bb.stow is a delta, and its parent is not there");
        assert!(is_named && said.contains(a_uuid), "{words:?}: {said}");
        assert!(
            said.contains("last called \"a.stow\"") && said.contains("try:"),
            "{said}"
        );
    }
    let description = dir.json(&["inspect", "bb.stow"]);
    assert_eq!(description["manifest"]["guest"]["name"], "guest");
    let parent = &description["parent"];
    assert_eq!(
        (&parent["name"], &parent["found"]),
        (&"a.stow".into(), &serde_json::json!([]))
    );
    assert!(parent["problem"].as_str().unwrap().contains(a_uuid));
    dir.vmstow()
        .env("VMSTOW_PARENTS", dir.join("kept"))
        .args(["verify", "ccc.stow"])
        .assert()
        .success();

    // Another image under its name is not taken for it.
    fs::copy(dir.join("ccc.stow"), dir.join("a.stow")).unwrap();
    let said = dir.refused(3, &["restore", "bb.stow"]);
    assert!(said.contains("a.stow is another one"), "{said}");

    // It can be edited and repaired without.
    dir.vmstow()
        .args(["config", "bb.stow", "set", "day=tuesday"])
        .assert()
        .success();
    let torn = fs::read(dir.join("bb.stow")).unwrap();
    fs::write(dir.join("torn.stow"), &torn[..torn.len() - 100]).unwrap();
    dir.vmstow()
        .args(["repair", "torn.stow"])
        .assert()
        .success();
    fs::rename(dir.join("kept/monday.stow"), dir.join("a.stow")).unwrap();
    for name in ["bb.stow", "torn.stow", "ccc.stow"] {
        assert_eq!(dir.json(&["verify", name])["is_whole"], true, "{name}");
    }
    copies(&dir);
    another_host_has_its_own(&dir);
    damage_is_found(&dir);
}

/// A delta of another host finds its parent there.
fn another_host_has_its_own(dir: &TestDir) {
    let other = OtherHost::new(dir, "other");
    let answer = |words: &[&str]| -> Value {
        let mut command = dir.vmstow();
        command.envs(other.environment());
        let output = command.arg("--json").args(words).unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let copied = answer(&["copy", "bb.stow", &other.location("bb.stow")]);
    assert_eq!(copied["lacks_parent"], true);
    let lacking = answer(&["inspect", &other.location("bb.stow")]);
    assert!(lacking["parent"]["problem"].is_string());
    answer(&["copy", "a.stow", &other.location("a.stow")]);
    let verified = answer(&["verify", &other.location("bb.stow")]);
    assert_eq!(verified["is_whole"], true);
    assert_eq!(
        verified["parents"],
        serde_json::json!([other.location("a.stow")])
    );
    let back = answer(&["copy", &other.location("bb.stow"), "back.stow"]);
    assert!(back["lacks_parent"].is_null());

    // A full image becomes a delta on its way there, and on its way here.
    answer(&["convert", "bb.stow", "flat.stow"]);
    let as_delta = ["--parent", "a.stow", "--as-delta"];
    let (pushed, full) = (other.location("pushed.stow"), other.location("full.stow"));
    answer(&[&["copy", "flat.stow", &pushed], &as_delta[..]].concat());
    answer(&["copy", "flat.stow", &full]);
    answer(&[&["copy", &full, "pulled.stow"], &as_delta[..]].concat());
    for delta in [pushed.as_str(), "pulled.stow"] {
        let verified = answer(&["verify", delta]);
        assert_eq!(verified["is_whole"], true);
        assert_eq!(verified["parents"].as_array().unwrap().len(), 1);
    }
    let pushed = fs::metadata(other.path("pushed.stow")).unwrap().len();
    assert!(pushed.max(len(dir, "pulled.stow")) * 4 < len(dir, "flat.stow"));
    for name in ["flat.stow", "pulled.stow"] {
        fs::remove_file(dir.join(name)).unwrap();
    }
}

/// A copy without its parent is checked as far as that goes, and beside its parent wholly.
fn copies(dir: &TestDir) {
    let words = |target: &'static str| ["copy", "bb.stow", target];
    let copied = dir.vmstow().args(words("kept/bb.stow")).assert().success();
    let said = String::from_utf8(copied.get_output().stderr.clone()).unwrap();
    assert!(said.contains("only the checksums"), "{said}");
    let same =
        |name: &str| fs::read(dir.join(name)).unwrap() == fs::read(dir.join("bb.stow")).unwrap();
    assert!(same("kept/bb.stow"));
    dir.refused(3, &["restore", "kept/bb.stow"]);
    let report = dir.json(&words("copy.stow"));
    assert!(
        report["lacks_parent"].is_null() && same("copy.stow"),
        "{report}"
    );
}

/// One flipped bit, in the delta or in what it needs of its parent, is found, and said where.
fn damage_is_found(dir: &TestDir) {
    let of_delta = chunks(&dir.join("bb.stow"));
    let (patched, twin) = of_delta
        .iter()
        .find_map(|entry| match entry.kind {
            ChunkKind::Patched(twin) => Some((*entry, twin)),
            _ => None,
        })
        .unwrap();
    let same = of_delta.iter().find_map(|entry| match entry.kind {
        ChunkKind::Same(twin) => Some(twin),
        _ => None,
    });
    let of_parent = chunks(&dir.join("a.stow"));
    let in_parent = |twin: vmstow::units::ChunkIndex| {
        let entry = of_parent[usize::try_from(twin.0).unwrap()];
        entry.stored_offset.0 + u64::from(entry.stored_len) / 2
    };
    for (name, at, words) in [
        (
            "bb.stow",
            patched.stored_offset.0 + 9,
            "does not match its checksum",
        ),
        ("bb.stow", patched.stored_offset.0 - 8, "the section around"),
        (
            "bb.stow",
            dir.json(&["inspect", "bb.stow"])["sections"][0]["len"]
                .as_u64()
                .unwrap()
                + 30,
            "does not name its parent",
        ),
        ("a.stow", in_parent(twin), "of the parent"),
        ("a.stow", in_parent(same.unwrap()), "of the parent"),
    ] {
        flip_bit(dir.join(name), at, 3);
        let found = dir.vmstow().args(["verify", "bb.stow"]).assert().code(3);
        let found = String::from_utf8(found.get_output().stdout.clone()).unwrap();
        assert!(found.contains(words), "{name} {at:#x}: {found}");
        if words != "does not name its parent" {
            let said = dir.refused(3, &["convert", "bb.stow", "x.stow"]);
            assert!(said.contains("damaged"), "{said}");
        }
        flip_bit(dir.join(name), at, 3);
    }
    assert_eq!(dir.json(&["verify", "bb.stow"])["is_whole"], true);
}

#[test]
fn deltas_that_cannot_be_are_refused() {
    let dir = TestDir::new();
    let image = |number: u8| image_of(Layout::Zstd, &[vec![number; 300]]).0;
    let id_of = |file: &[u8], uuid: u8| ParentId {
        image_uuid: uuid::Uuid::from_bytes([uuid; 16]),
        image_digest: Image::open(file).unwrap().image_digest(),
    };
    // Each the parent of the other: a digest does not tell what stands behind it.
    let (one, other) = (id_of(&image(1), 1), id_of(&image(2), 2));
    fs::write(dir.join("1.stow"), delta_of(1, other, &[vec![1; 300]])).unwrap();
    fs::write(dir.join("2.stow"), delta_of(2, one, &[vec![2; 300]])).unwrap();
    let said = dir.refused(3, &["convert", "1.stow", "x.stow"]);
    assert!(
        said.contains("more than 16 deltas") && said.contains("try:"),
        "{said}"
    );
    dir.vmstow().args(["inspect", "1.stow"]).assert().success();

    // Sixteen follow each other, and no more.
    let root = image(0x11);
    fs::write(dir.join("root.stow"), &root).unwrap();
    let mut parent = id_of(&root, 0x11);
    for number in 0x20..=0x30 {
        let file = delta_of(number, parent, &[vec![number; 300]]);
        parent = id_of(&file, number);
        fs::write(dir.join(&format!("{number:x}.stow")), file).unwrap();
    }
    dir.vmstow().args(["verify", "2f.stow"]).assert().success();
    let said = dir.refused(3, &["convert", "30.stow", "x.stow"]);
    assert!(said.contains("more than 16 deltas"), "{said}");
    let said = dir.refused(
        3,
        &["convert", "root.stow", "x.stow", "--parent", "2f.stow"],
    );
    assert!(said.contains("more than 16 deltas"), "{said}");

    // What makes no sense is refused before a guest is looked for.
    let save = ["save", "qmp:/nowhere"];
    let refused = |words: &[&str]| dir.refused(2, &[&save[..], words].concat());
    let said = refused(&["x.stow", "--layout", "raw", "--parent", "root.stow"]);
    assert!(
        said.contains("a delta is of layout zstd, not raw"),
        "{said}"
    );
    let said = refused(&["20.stow", "--replace", "--parent", "21.stow"]);
    assert!(said.contains("would be replaced"), "{said}");
    let said = refused(&["s3://bucket/x.stow", "--parent", "root.stow"]);
    assert!(said.contains("full images only"), "{said}");
    fs::create_dir(dir.join("other")).unwrap();
    fs::write(dir.join("other/root.stow"), image(0x40)).unwrap();
    let as_delta = ["--parent", "root.stow", "--as-delta", "--replace"];
    let said = dir.refused(
        2,
        &[&["copy", "other/root.stow", "."], &as_delta[..]].concat(),
    );
    assert!(said.contains("would be replaced"), "{said}");
    let said = dir.refused(2, &["convert", "20.stow", "x.stow", "--parent", "20.stow"]);
    assert!(said.contains("the same save"), "{said}");
}
