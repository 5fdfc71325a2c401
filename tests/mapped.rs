//! Images of layout `mapped`: every page at a place of its own.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};

use serde_json::json;
use support::{Guest, GuestSpec, PATIENCE, Qemu, TestDir, flip_bit, wait_until};
use vmstow::container::{Image, PageLocation};
use vmstow::pipeline::MappedImage;
use vmstow::store::FileSource;
use vmstow::stream::mapped_ram::MappedBlock;
use vmstow::units::PageIndex;

/// A running guest that has counted a little.
fn counting(dir: &TestDir, spec: GuestSpec) -> Guest {
    let guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(5);
    guest
}

fn small(qemu: Qemu, machine: &str) -> GuestSpec {
    GuestSpec {
        qemu,
        machine: machine.to_owned(),
        memory_mib: 16,
        ..GuestSpec::default()
    }
}

/// Saves the guest to `x.stow` in layout mapped, and waits until its QEMU has ended.
fn save(dir: &TestDir, guest: &mut Guest, arguments: &[&str]) {
    let source = guest.source();
    let words = ["save", &source, "x.stow", "--layout", "mapped"];
    dir.json(&[&words, arguments].concat());
    guest.wait_for_exit();
}

fn opened(dir: &TestDir, name: &str) -> Image<FileSource> {
    Image::open(FileSource::open(&dir.join(name)).unwrap()).unwrap()
}

fn blocks(dir: &TestDir, name: &str) -> Vec<MappedBlock> {
    MappedImage::open(&opened(dir, name)).unwrap().blocks
}

/// The bytes of a block's pages in a file of the layout, holes as zeros.
fn pages_of(file: &File, block: &MappedBlock) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(block.block.used_length).unwrap()];
    file.read_exact_at(&mut bytes, block.pages).unwrap();
    bytes
}

/// Starts a stock QEMU that loads the image by itself; the guest must go on.
fn restore_by_hand(dir: &TestDir, spec: GuestSpec, guest: &Guest) {
    std::fs::copy(guest.disk(), dir.join("second.img")).unwrap();
    let before = guest.serial().mark();
    let second = Guest::start(dir, spec.named("second").with(&["-incoming", "defer"]));
    let mut qmp = second.qmp();
    let on = json!([{ "capability": "mapped-ram", "state": true }]);
    qmp.command("migrate-set-capabilities", json!({ "capabilities": on }));
    let uri = format!("file:{}", dir.join("x.stow").display());
    qmp.command("migrate-incoming", json!({ "uri": uri }));
    wait_until("the incoming migration", PATIENCE, || {
        let status = qmp.status();
        (status == "paused").then_some(()).ok_or(status)
    });
    qmp.command("cont", json!({}));
    second
        .serial()
        .assert_goes_on_to(&before, before.last_tick() + 15);
}

#[test]
fn a_stock_qemu_loads_an_image() {
    for (spec, capture) in [
        (small(Qemu::V10, "pc"), "auto"),
        (small(Qemu::V10, "q35"), "migration"),
        (GuestSpec::linux(), "auto"),
        (GuestSpec::linux(), "migration"),
    ] {
        let dir = TestDir::new();
        let mut guest = counting(&dir, spec.clone());
        save(&dir, &mut guest, &["--capture", capture]);
        restore_by_hand(&dir, spec, &guest);
    }
}

#[test]
fn an_image_is_sparse_and_whole_and_brings_the_guest_back_with_both_qemus() {
    for (qemu, capture) in [
        (Qemu::V10, "auto"),
        (Qemu::V10, "migration"),
        (Qemu::V7_2, "auto"),
    ] {
        let dir = TestDir::new();
        let mut guest = counting(
            &dir,
            GuestSpec {
                qemu,
                ..GuestSpec::linux()
            },
        );
        save(&dir, &mut guest, &["--capture", capture]);
        let verified = dir.json(&["verify", "--deep", "x.stow"]);
        assert_eq!(verified["is_whole"], json!(true));
        let described = dir.json(&["inspect", "x.stow"]);
        assert_eq!(described["layout"], "mapped");
        let stream = &described["manifest"]["stream"];
        let data = stream["data_pages"].as_u64().unwrap() * 4096;
        assert_eq!(
            stream["vmdescription"],
            json!(capture == "migration" || qemu == Qemu::V7_2)
        );
        let metadata = dir.join("x.stow").metadata().unwrap();
        assert!(
            metadata.blocks() * 512 < data + (2 << 20),
            "{} {data}",
            metadata.blocks() * 512
        );
        assert!(metadata.len() > 256 << 20);
        let before = guest.serial().mark();
        let program = qemu.program().display().to_string();
        let restored = dir.restore(&["x.stow", "--qemu", &program]);
        guest.serial().assert_goes_on(&before);
        assert_eq!(restored.report["state"], "running");
    }
}

#[test]
fn qemus_own_file_holds_the_same_pages() {
    let dir = TestDir::new();
    let guest = counting(&dir, GuestSpec::linux());
    let mut qmp = guest.qmp();
    qmp.command("stop", json!({}));
    dir.json(&[
        "save",
        &guest.source(),
        "x.stow",
        "--layout",
        "mapped",
        "--then",
        "pause",
        "--capture",
        "auto",
    ]);
    // Only a guest that runs for a moment can be migrated again, so it is the image's guest that QEMU saves.
    drop(qmp);
    drop(guest);
    let restored = dir.restore(&["x.stow", "--paused"]);
    let mut qmp = restored.qmp();
    let on = json!([{ "capability": "mapped-ram", "state": true }]);
    qmp.command("migrate-set-capabilities", json!({ "capabilities": on }));
    qmp.migrate(&format!("file:{}", dir.join("qemu.mig").display()));
    let (ours, theirs) = (
        File::open(dir.join("x.stow")).unwrap(),
        File::open(dir.join("qemu.mig")).unwrap(),
    );
    let their_blocks = blocks_of_qemu(&dir);
    let our_blocks = blocks(&dir, "x.stow");
    assert_eq!(our_blocks.len(), their_blocks.len());
    for block in &our_blocks {
        let theirs_of_it = their_blocks
            .iter()
            .find(|one| one.block == block.block)
            .unwrap();
        assert!(
            pages_of(&ours, block) == pages_of(&theirs, theirs_of_it),
            "{block:?}"
        );
    }
}

/// Where QEMU itself put the blocks, by our parser.
fn blocks_of_qemu(dir: &TestDir) -> Vec<MappedBlock> {
    use vmstow::stream::{Event, Parser};
    let file = File::open(dir.join("qemu.mig")).unwrap();
    let mut parser = Parser::mapped_ram();
    let mut found: Vec<MappedBlock> = Vec::new();
    loop {
        let mut bytes = [0; 4400];
        let read = file.read_at(&mut bytes, parser.position().0).unwrap();
        match parser.next(&bytes[..read]).unwrap().unwrap().event {
            Event::MappedBlock {
                block,
                bitmap,
                pages,
            } => found.push(MappedBlock {
                block: parser.blocks()[block].clone(),
                entry: 0,
                bitmap,
                pages,
            }),
            Event::DeviceState => return found,
            _ => {}
        }
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let dir = TestDir::new();
    let mut guest = counting(&dir, small(Qemu::V10, "pc"));
    save(&dir, &mut guest, &[]);
    let image = opened(&dir, "x.stow");
    let ram = blocks(&dir, "x.stow").swap_remove(0);
    let page_map = image.page_map().unwrap().unwrap();
    let is_zero = |page: &u64| page_map.locate(0, PageIndex(*page)) == Some(PageLocation::Zero);
    let (a_zero, a_page) = (
        (0..ram.page_count()).find(is_zero).unwrap(),
        (0..ram.page_count()).find(|page| !is_zero(page)).unwrap(),
    );
    let hole = image.chunks().map(Result::unwrap).find_map(|chunk| {
        let end = chunk.stored_offset.0 + u64::from(chunk.stored_len);
        (end < ram.pages).then_some(end)
    });
    let places = [
        (ram.page_offset(a_page) + 77, "does not match"),
        (ram.bitmap + 3, "does not match"),
        (ram.page_offset(a_zero) + 5, ""),
        (hole.unwrap() + 9, "not zero"),
        (ram.pages_end() + 2, "does not match"),
    ];
    for (offset, says) in places {
        flip_bit(dir.join("x.stow"), offset, 3);
        let assert = dir.vmstow().args(["verify", "x.stow"]).assert().code(3);
        let text = String::from_utf8(assert.get_output().stdout.clone()).unwrap();
        assert!(text.contains(says), "{offset:#x}: {text}");
        flip_bit(dir.join("x.stow"), offset, 3);
    }
    dir.vmstow().args(["verify", "x.stow"]).assert().success();
}

#[test]
fn a_pipe_is_refused_before_the_guest_is_touched() {
    let dir = TestDir::new();
    let guest = counting(&dir, small(Qemu::V10, "pc"));
    let said = dir.refused(2, &["save", &guest.source(), "-", "--layout", "mapped"]);
    assert!(said.contains("only be written to a file"), "{said}");
    assert_eq!(guest.qmp().status(), "running");
}

#[test]
fn a_torn_edit_is_cut_off() {
    let dir = TestDir::new();
    let mut guest = counting(&dir, small(Qemu::V10, "pc"));
    save(&dir, &mut guest, &[]);
    let whole = dir.join("x.stow").metadata().unwrap().len();
    let file = File::options()
        .append(true)
        .open(dir.join("x.stow"))
        .unwrap();
    std::io::Write::write_all(&mut &file, &[0x5b, 0x2a, 0x4d, 0x18, 9, 9, 9]).unwrap();
    let user = FileSource::open(&dir.join("x.stow")).unwrap();
    user.lock_shared(&dir.join("x.stow")).unwrap();
    let said = dir.refused(4, &["repair", "x.stow"]);
    assert!(said.contains("a guest runs on it"), "{said}");
    drop(user);
    dir.vmstow().args(["repair", "x.stow"]).assert().success();
    assert_eq!(dir.join("x.stow").metadata().unwrap().len(), whole);
    dir.vmstow().args(["verify", "x.stow"]).assert().success();
}
