//! `vmstow diff`: what differs between two images is what the guest changed, page by page and byte by byte, whatever
//! the layouts; what does not differ is not read.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::collections::BTreeSet;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, Qemu, TestDir, flip_bit, write_memory};
use vmstow::container::{Image, PageLocation};
use vmstow::store::FileSource;
use vmstow::units::PageIndex;

const PAGE: u64 = 4096;

/// Pages of a region at whose edges a stopped guest's memory is cut into chunks.
const REGION_PAGES: u64 = vmstow::pipeline::DEFAULT_CHUNK_LEN as u64 / PAGE;

/// The answer for a RAMBlock.
fn block<'a>(diff: &'a Value, idstr: &str) -> &'a Value {
    let blocks = diff["memory"]["blocks"].as_array().unwrap();
    blocks.iter().find(|block| block["idstr"] == idstr).unwrap()
}

/// The pages of all ranges.
fn pages(block: &Value) -> Vec<u64> {
    let ranges = block["ranges"].as_array().unwrap().iter();
    let pages = ranges.flat_map(|range| {
        let first = range["first_page"].as_u64().unwrap();
        first..first + range["page_count"].as_u64().unwrap()
    });
    pages.collect()
}

/// The pages that the counter guest writes to at each tick: `testdata/guests/counter.asm`.
const STAMPS: std::ops::Range<u64> = 0x140..0x150;

/// The pages that it may write to besides: its variables at 0x600 and its stack below 0x7000.
const OTHERS: [u64; 2] = [0, 6];

#[test]
fn what_a_guest_wrote_between_two_saves_is_found() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::default()
        };
        let mut guest = Guest::start(&dir, spec);
        guest.serial().wait_for_tick(3);
        let by_migration = ["--capture", "migration", "--label", "x=y"];
        let save = |name: &str, then: &str| {
            let source = guest.source();
            let words = [&["save", &source, name, "--then", then][..], &by_migration].concat();
            dir.json(&words);
        };
        save("a.stow", "resume");
        let ticks = guest.serial().last_tick();
        guest.serial().wait_for_tick(ticks + 3);
        save("b.stow", "quit");
        guest.wait_for_exit();

        let same = dir.json(&["diff", "a.stow", "a.stow", "--exit-code"]);
        assert_eq!(
            (&same["is_same"], &same["memory"]["chunks_read"]),
            (&json!(true), &json!(0))
        );

        let output = dir
            .vmstow()
            .args(["--json", "diff", "a.stow", "b.stow", "--exit-code"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let diff: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(diff["is_same"], false);
        let ram = block(&diff, "pc.ram");
        let mut found = pages(ram);
        assert_eq!(found.len() as u64, ram["changed_pages"].as_u64().unwrap());
        found.retain(|page| !OTHERS.contains(page));
        assert_eq!(found, Vec::from_iter(STAMPS), "{ram}");
        assert_eq!(
            (&ram["filled_pages"], &ram["emptied_pages"]),
            (&json!(0), &json!(0))
        );
        // The number of the last tick takes one or two bytes of each stamp, its variables and its stack some more.
        let bytes = ram["changed_bytes"].as_u64().unwrap();
        assert!((16..32 + 64).contains(&bytes), "{ram}");
        for other in diff["memory"]["blocks"].as_array().unwrap() {
            assert!(
                other["idstr"] == "pc.ram" || other["changed_pages"] == 0,
                "{other}"
            );
        }
        let configuration = &diff["configuration"];
        assert_eq!(
            (&configuration["xml"], &configuration["facts"]),
            (&json!([]), &json!([]))
        );
        fields_are_those_of_inspect(&dir, &diff["devices"]);

        let said = dir
            .vmstow()
            .args(["diff", "a.stow", "b.stow"])
            .output()
            .unwrap();
        assert!(said.status.success());
        let said = String::from_utf8(said.stdout).unwrap();
        assert!(
            said.contains("0x140..0x150") && said.contains("config: the same"),
            "{said}"
        );
        assert!(
            said.contains("~ timer#0") && said.lines().count() < 80,
            "{said}"
        );
        let said = dir
            .vmstow()
            .args(["diff", "a.stow", "b.stow", "--config"])
            .output()
            .unwrap();
        assert_eq!(
            String::from_utf8(said.stdout).unwrap(),
            "config: the same\n"
        );
    }
}

/// What changed is what `inspect` shows of each image, and time went on.
fn fields_are_those_of_inspect(dir: &TestDir, devices: &Value) {
    assert_eq!(
        (&devices["only_in_old"], &devices["only_in_new"]),
        (&json!([]), &json!([]))
    );
    let inspected = ["a.stow", "b.stow"].map(|name| dir.json(&["inspect", name, "--devices"]));
    let all = inspected[0]["devices"].as_array().unwrap().len();
    assert_eq!(devices["compared"], all);
    let changed = devices["changed"].as_array().unwrap();
    assert!(!changed.is_empty() && changed.len() < all, "{devices}");
    assert!(
        changed.iter().any(|device| device["device"] == "timer#0"),
        "{devices}"
    );
    let mut seen = 0;
    for device in changed {
        assert_eq!(device["is_described"], true, "{device}");
        let (idstr, instance) = device["device"].as_str().unwrap().rsplit_once('#').unwrap();
        let values = inspected.each_ref().map(|answer| {
            let devices = answer["devices"].as_array().unwrap().iter();
            let mut devices = devices.filter(|one| one["idstr"] == idstr);
            devices
                .find(|one| one["instance_id"].as_u64() == instance.parse().ok())
                .unwrap()
        });
        for change in device["fields"].as_array().unwrap() {
            assert_ne!(change["old"], change["new"]);
            let sides = [(values[0], &change["old"]), (values[1], &change["new"])];
            for (device, value) in sides {
                let fields = device["fields"].as_array().unwrap();
                if let Some(field) = fields.iter().find(|field| field["name"] == change["path"]) {
                    assert_eq!(&field["value"], value, "{change}");
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 2, "{devices}");
}

/// What is written into a stopped guest: the address and the bytes, which are not what was there.
fn writes() -> Vec<(u64, Vec<u8>)> {
    let whole = vec![0x5a; 300 * 4096];
    vec![
        // One byte; a whole page of zeros, which three in four regions of 256 KiB are; half of two pages.
        (0x40_0005, vec![0xe7]),
        (0x44_3000, vec![0x11; 4096]),
        (0x45_0800, vec![0x22; 4096]),
        // Pages that are not zero any more but for one byte; many pages across chunks; the last page.
        (0x48_0fff, vec![1, 1]),
        (0x100_0000, whole),
        ((64 << 20) - PAGE, vec![0x77; 16]),
    ]
}

#[test]
fn every_byte_that_was_written_is_counted_in_every_layout() {
    let dir = TestDir::new();
    // A clock that stands still while the guest does.
    let spec = GuestSpec::default().with(&["-rtc", "clock=vm"]);
    let guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(2);
    let mut qmp = guest.qmp();
    qmp.command("stop", json!({}));
    let save = |name: &str, more: &[&str]| {
        let source = guest.source();
        let words = [&["save", &source, name, "--then", "pause"][..], more].concat();
        dir.json(&words);
    };
    save("old.stow", &[]);
    let before = memory_of(&dir, "old.stow");
    for (address, bytes) in writes() {
        write_memory(guest.pid(), &mut qmp, address, &bytes);
    }
    // A page with bytes that is zero now.
    let emptied = 0x80_0000;
    write_memory(guest.pid(), &mut qmp, emptied, &[0; 4096]);
    save("zstd.stow", &[]);
    save("raw.stow", &["--layout", "raw"]);
    save("mapped.stow", &["--layout", "mapped"]);
    save("migrated.stow", &["--capture", "migration"]);
    for layout in ["raw", "mapped"] {
        let name = format!("old-{layout}.stow");
        dir.json(&["convert", "old.stow", &name, "--layout", layout]);
    }

    let mut expected = before.clone();
    for (address, bytes) in writes().into_iter().chain([(emptied, vec![0; 4096])]) {
        let at = usize::try_from(address).unwrap();
        expected[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    let both = || before.chunks(4096).zip(expected.chunks(4096));
    let changed = |(_, (old, new)): &(u64, (&[u8], &[u8]))| old != new;
    let changed: Vec<u64> = (0..)
        .zip(both())
        .filter(changed)
        .map(|(page, _)| page)
        .collect();
    let count = |test: &dyn Fn(&[u8], &[u8]) -> bool| {
        let pages = both().filter(|(old, new)| old != new && test(old, new));
        json!(pages.count())
    };
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let bytes = before
        .iter()
        .zip(&expected)
        .filter(|(old, new)| old != new)
        .count();
    assert!(changed.len() > 300 && bytes > 300 * 4000, "{bytes}");
    for old in ["old.stow", "old-raw.stow", "old-mapped.stow"] {
        for new in ["zstd.stow", "raw.stow", "mapped.stow", "migrated.stow"] {
            let diff = dir.json(&["diff", old, new, "--memory"]);
            let ram = block(&diff, "pc.ram");
            assert_eq!(pages(ram), changed, "{old} {new}");
            assert_eq!(ram["changed_pages"], changed.len());
            assert_eq!(ram["changed_bytes"], bytes);
            assert_eq!(ram["filled_pages"], count(&|old, _| is_zero(old)));
            assert_eq!(ram["emptied_pages"], count(&|_, new| is_zero(new)));
            assert!(diff.get("devices").is_none() && diff.get("configuration").is_none());
        }
    }
    // Both were cut at the same regions, so all that is read are those with a page that differs, of each image.
    let regions = changed.iter().map(|page| page / REGION_PAGES);
    let regions = BTreeSet::from_iter(regions).len();
    let diff = dir.json(&["diff", "old.stow", "zstd.stow", "--memory"]);
    let read = diff["memory"]["chunks_read"].as_u64().unwrap();
    assert!(
        read <= 2 * regions as u64,
        "{read} chunks, {regions} regions"
    );
    // The state as QEMU wrote it and as it was taken from its memory: the devices' bytes are the same but for the time
    // that the latter took.
    for pair in [["zstd.stow", "mapped.stow"], ["raw.stow", "migrated.stow"]] {
        let diff = dir.json(&["diff", pair[0], pair[1], "--memory", "--threads", "1"]);
        assert_eq!(diff["is_same"], true, "{diff}");
    }
    let diff = dir.json(&["diff", "zstd.stow", "mapped.stow", "--config"]);
    assert_eq!(diff["is_same"], true, "{diff}");
    let diff = dir.json(&["diff", "zstd.stow", "raw.stow"]);
    assert_eq!(
        (&diff["is_same"], &diff["memory"]["chunks_read"]),
        (&json!(true), &json!(0))
    );
    a_damaged_chunk_is_told_by_the_name_of_its_image(&dir, changed[0]);
}

/// The guest's RAM as the image holds it.
fn memory_of(dir: &TestDir, name: &str) -> Vec<u8> {
    let image = Image::open(FileSource::open(&dir.join(name)).unwrap()).unwrap();
    let map = image.page_map().unwrap().unwrap();
    let number = map
        .blocks()
        .iter()
        .position(|block| block.idstr == "pc.ram");
    let number = number.unwrap();
    let mut memory = Vec::new();
    for (_, location) in map.locate_range(number, PageIndex(0), u64::MAX) {
        match location {
            PageLocation::Zero => memory.extend([0; 4096]),
            PageLocation::Data { chunk, body } => {
                let entry = image.chunk(chunk).unwrap();
                let mut stored = Vec::new();
                image.read_stored(&entry, &mut stored).unwrap();
                let raw = zstd::decode_all(&*stored).unwrap();
                memory.extend(&raw[body as usize..][..4096]);
            }
        }
    }
    memory
}

fn a_damaged_chunk_is_told_by_the_name_of_its_image(dir: &TestDir, page: u64) {
    let image = Image::open(FileSource::open(&dir.join("raw.stow")).unwrap()).unwrap();
    let map = image.page_map().unwrap().unwrap();
    let ram = map
        .blocks()
        .iter()
        .position(|block| block.idstr == "pc.ram");
    let location = map.locate(ram.unwrap(), PageIndex(page));
    let Some(PageLocation::Data { chunk, body }) = location else {
        panic!("{location:?}");
    };
    let at = image.chunk(chunk).unwrap().stored_offset.0 + u64::from(body) + 100;
    flip_bit(dir.join("raw.stow"), at, 3);
    let said = dir.refused(3, &["diff", "old.stow", "raw.stow", "--memory"]);
    assert!(said.contains("raw.stow is damaged"), "{said}");
}

#[test]
fn guests_of_other_sizes_and_devices_are_compared_as_far_as_they_go() {
    let dir = TestDir::new();
    let spec = |name: &str, memory_mib: u32| GuestSpec {
        name: name.to_owned(),
        memory_mib,
        ..GuestSpec::default()
    };
    for (name, memory_mib, more) in [
        ("small", 64, &["-S", "-cpu", "qemu64"][..]),
        (
            "large",
            96,
            &[
                "-S",
                "-smp",
                "2",
                "-cpu",
                "max",
                "-device",
                "virtio-rng-pci",
            ],
        ),
    ] {
        let mut guest = Guest::start(&dir, spec(name, memory_mib).with(more));
        dir.json(&["save", &guest.source(), &format!("{name}.stow")]);
        guest.wait_for_exit();
    }
    let diff = dir.json(&["diff", "small.stow", "large.stow"]);
    let ram = block(&diff, "pc.ram");
    assert_eq!(
        (&ram["old_pages"], &ram["new_pages"]),
        (&json!(64 << 8), &json!(96 << 8))
    );
    let news = diff["devices"]["only_in_new"].as_array().unwrap();
    let is_there = |name: &str| news.iter().any(|device| device == name);
    assert!(
        is_there("cpu#1") && is_there("0000:00:05.0/virtio-rng#0"),
        "{news:?}"
    );
    let facts = diff["configuration"]["facts"].as_array().unwrap();
    let fact = |name: &str| facts.iter().find(|fact| fact["name"] == name).unwrap();
    assert_eq!(fact("machine.vcpus")["new"], "2");
    assert_eq!(fact("guest.name")["old"], "small");
    assert_eq!(fact("machine.memory_bytes")["new"], (96 << 20).to_string());
    assert!(
        facts
            .iter()
            .any(|fact| fact["name"] == "qemu.argv" && fact["new"] == "-smp 2")
    );
    let xml = diff["configuration"]["xml"].as_array().unwrap();
    assert!(
        xml.iter().any(|change| change["path"] == "domain/vcpu"),
        "{xml:?}"
    );
    let said = dir
        .vmstow()
        .args(["diff", "large.stow", "small.stow"])
        .output()
        .unwrap();
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(said.contains("~ pc.ram: 8192 pages less"), "{said}");
    assert!(
        said.contains("- cpu#1") && said.contains("not described"),
        "{said}"
    );
    assert!(said.contains("~ machine.vcpus: \"2\" → \"1\""), "{said}");
}
