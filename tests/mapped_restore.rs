//! A guest whose memory is a private mapping of its image goes on as it was, and its image stays as it is.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, Mark, PATIENCE, Qemu, Restored, TestDir, flip_bit, wait_until};
use vmstow::container::{ChunkEntry, Image};
use vmstow::host::file_digest;
use vmstow::pipeline::MappedImage;
use vmstow::store::{FileSource, StoreError, open_to_change};

/// A guest that was saved to `x.stow` in layout mapped, and what it had said by then.
struct Saved {
    dir: TestDir,
    guest: Guest,
    before: Mark,
}

fn saved(spec: GuestSpec) -> Saved {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(5);
    dir.json(&["save", &guest.source(), "x.stow", "--layout", "mapped"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    Saved { dir, guest, before }
}

fn small(extra: &[&str]) -> GuestSpec {
    let spec = GuestSpec {
        memory_mib: 32,
        ..GuestSpec::default()
    };
    spec.with(extra)
}

impl Saved {
    /// Restores by mapping; the guest must go on.
    #[track_caller]
    fn goes_on(&self, arguments: &[&str]) -> Restored {
        let words = [&["x.stow", "--map"], arguments].concat();
        let restored = self.dir.restore(&words);
        assert_eq!(restored.report["memory"], "mapped");
        assert!(restored.report["running_after_ms"].is_u64());
        self.guest.serial().assert_goes_on(&self.before);
        restored
    }

    /// The names of the RAMBlocks that a process has mapped from the image, private, by where they lie in it.
    fn mapped_by(&self, restored: &Restored) -> Vec<String> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", restored.qemu.pid())).unwrap();
        let image = Image::open(FileSource::open(&self.dir.join("x.stow")).unwrap()).unwrap();
        let blocks = MappedImage::open(&image).unwrap().blocks.into_iter();
        let is_mapped = |offset: u64| {
            let offset = format!(" rw-p {offset:08x} ");
            let mut lines = maps.lines();
            lines.any(|line| line.contains(&offset) && line.ends_with("/x.stow"))
        };
        let blocks = blocks.filter(|block| is_mapped(block.pages));
        blocks.map(|block| block.block.idstr).collect()
    }

    fn chunks(&self) -> Vec<ChunkEntry> {
        let image = Image::open(FileSource::open(&self.dir.join("x.stow")).unwrap()).unwrap();
        image.chunks().map(Result::unwrap).collect()
    }
}

#[test]
fn linux_goes_on_with_its_memory_as_it_was_and_never_writes_to_its_image() {
    for machine in ["pc", "q35"] {
        let reporting = "virtio-balloon-device.free-page-reporting=on";
        let spec = GuestSpec {
            machine: machine.to_owned(),
            ..GuestSpec::linux()
        };
        let saved = saved(spec.with(&["-smp", "2", "-global", reporting]));
        let image = saved.dir.join("x.stow");
        let digest = file_digest(&image).unwrap();
        let restored = saved.goes_on(&[]);
        assert_eq!(saved.mapped_by(&restored), ["pc.ram"]);
        let mut qmp = restored.qmp();
        qmp.command("balloon", json!({ "value": 160 << 20 }));
        wait_until("the balloon to be blown up", PATIENCE, || {
            let actual = qmp.command("query-balloon", json!({}))["actual"].clone();
            (actual == json!(160 << 20))
                .then_some(())
                .ok_or(actual.to_string())
        });
        assert!(matches!(
            open_to_change(&image),
            Err(StoreError::InUse { .. })
        ));
        drop(qmp);
        let now = saved.guest.serial().mark();
        saved.guest.serial().assert_goes_on(&now);
        // Saved again it is a guest with ordinary memory.
        saved.dir.json(&["save", restored.name(), "y.stow"]);
        assert_eq!(file_digest(&image).unwrap(), digest);
        drop(open_to_change(&image).unwrap());
        let now = saved.guest.serial().mark();
        std::fs::remove_file(image).unwrap();
        let again = saved.dir.restore(&["y.stow"]);
        saved.guest.serial().assert_goes_on(&now);
        assert_ne!(again.report["memory"], "mapped");
    }
}

#[test]
fn every_block_is_mapped_whatever_its_name() {
    let numa = "-object memory-backend-ram,id=m0,size=16M -object memory-backend-ram,id=m1,size=16M \
        -numa node,memdev=m0 -numa node,memdev=m1";
    let memfd = "-object memory-backend-memfd,id=m0,size=32M,share=off -numa node,memdev=m0";
    let json = r#"-object {"qom-type":"memory-backend-ram","id":"m0","size":33554432} -machine memory-backend=m0"#;
    let dimm = "-m 32,slots=2,maxmem=1G -object memory-backend-ram,id=d1,size=128M -device pc-dimm,id=dimm1,memdev=d1";
    for (machine, extra, blocks) in [
        ("pc-i440fx-3.1", "", &["pc.ram"][..]),
        ("pc-i440fx-3.1", memfd, &["/objects/m0"]),
        ("pc", numa, &["m0", "m1"]),
        ("pc", memfd, &["m0"]),
        ("q35", json, &["m0"]),
        ("q35", dimm, &["d1", "pc.ram"]),
    ] {
        let words: Vec<&str> = extra.split_whitespace().collect();
        let spec = GuestSpec {
            machine: machine.to_owned(),
            ..small(&words)
        };
        let saved = saved(spec);
        let restored = saved.goes_on(&[]);
        let mut mapped = saved.mapped_by(&restored);
        mapped.sort();
        assert_eq!(mapped, blocks, "{machine} {extra}");
        // The arguments that this guest has now are as good as the first.
        saved.dir.json(&[
            "save",
            restored.name(),
            "x.stow",
            "--layout",
            "mapped",
            "--replace",
        ]);
        let now = saved.guest.serial().mark();
        let restored = saved.dir.restore(&["x.stow", "--map", "--verify", "full"]);
        saved.guest.serial().assert_goes_on(&now);
        assert_eq!(saved.mapped_by(&restored).len(), blocks.len());
    }
}

#[test]
fn a_damaged_page_freezes_a_guest_that_runs_on_it() {
    let saved = saved(GuestSpec::linux());
    let chunk = saved.chunks().into_iter().rev().nth(20).unwrap();
    flip_bit(saved.dir.join("x.stow"), chunk.stored_offset.0 + 99, 2);
    let restored = saved.dir.restore(&["x.stow", "--map"]);
    let guest = wait_until("the guest to be frozen", PATIENCE, || {
        let listed: Value = saved.dir.json(&["list"]);
        let guest = listed["guests"][0].clone();
        (guest["state"] == "damaged")
            .then_some(guest.clone())
            .ok_or(guest.to_string())
    });
    let what = guest["damage"]["what"].as_str().unwrap();
    assert!(what.contains("does not match"), "{what}");
    assert!(
        guest["damage"]["pages"]
            .as_str()
            .unwrap()
            .contains("RAMBlock")
    );
    let assert = saved.dir.vmstow().arg("list").assert().success();
    let said = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(
        said.contains("is frozen") && said.contains("another copy"),
        "{said}"
    );
    let stopped = saved.dir.json(&["stop", restored.name()]);
    assert_eq!(stopped["how"], "frozen");
}

#[test]
fn a_byte_in_a_hole_freezes_the_guest_too() {
    let saved = saved(small(&[]));
    let chunks = saved.chunks();
    let hole = chunks.windows(2).find_map(|two| {
        let end = two[0].stored_offset.0 + u64::from(two[0].stored_len);
        (two[1].stored_offset.0 > end + 8192).then_some(end + 4096)
    });
    flip_bit(saved.dir.join("x.stow"), hole.unwrap(), 0);
    let said = saved
        .dir
        .refused(3, &["restore", "x.stow", "--map", "--verify", "full"]);
    assert!(
        said.contains("not zero") || said.contains("damaged"),
        "{said}"
    );
    let restored = saved.dir.restore(&["x.stow", "--map"]);
    wait_until("the guest to be frozen", PATIENCE, || {
        let listed: Value = saved.dir.json(&["list"]);
        let state = listed["guests"][0]["state"].clone();
        (state == "damaged").then_some(()).ok_or(state.to_string())
    });
    saved.dir.json(&["stop", restored.name()]);
}

#[test]
fn what_is_fed_is_verified_first_and_a_full_look_comes_before_the_guest() {
    let saved = saved(small(&[]));
    let image = saved.dir.join("x.stow");
    // Device state comes last, and is fed.
    let devices = *saved.chunks().last().unwrap();
    flip_bit(&image, devices.stored_offset.0 + 200, 1);
    let said = saved
        .dir
        .refused(3, &["restore", "x.stow", "--map", "--verify", "quick"]);
    assert!(said.contains("does not match its"), "{said}");
    flip_bit(&image, devices.stored_offset.0 + 200, 1);
    let page = saved.chunks()[2];
    flip_bit(&image, page.stored_offset.0 + 99, 1);
    let said = saved
        .dir
        .refused(3, &["restore", "x.stow", "--map", "--verify", "full"]);
    assert!(said.contains("RAMBlock \"pc.ram\""), "{said}");
    assert!(saved.dir.qemus().is_empty());
    flip_bit(&image, page.stored_offset.0 + 99, 1);
    let restored = saved.goes_on(&["--verify", "quick"]);
    assert_eq!(restored.report["verify"], "quick");
}

#[test]
fn what_cannot_be_mapped_is_refused_with_the_reason_before_qemu_starts() {
    let saved = saved(small(&[
        "-object",
        "memory-backend-ram,id=m0,size=32M,share=on",
        "-machine",
        "memory-backend=m0",
    ]));
    let old = Qemu::V7_2.program().display().to_string();
    let said = saved
        .dir
        .refused(4, &["restore", "x.stow", "--map", "--qemu", &old]);
    assert!(
        said.contains("8.2.0 or later") && said.contains("\"m0\" is shared"),
        "{said}"
    );
    assert!(saved.dir.qemus().is_empty());
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, small(&[]));
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let said = dir.refused(2, &["restore", "x.stow", "--map"]);
    assert!(said.contains("layout zstd cannot be mapped"), "{said}");
}
