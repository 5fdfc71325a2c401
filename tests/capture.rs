//! A guest's state read from its QEMU's memory is the state that QEMU would have migrated, bit for bit.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use support::{Guest, GuestSpec, Kind, Qemu, TestDir, wait_for_silence};
use vmstow::container::Image;
use vmstow::digest::Digest;
use vmstow::pipeline;
use vmstow::progress::Silent;
use vmstow::store::FileSource;
use vmstow::stream::{Event, Parser, StreamSummary};
use vmstow::units::PAGE_LEN;

/// A stream taken apart.
struct State {
    /// By idstr and page: the digest of the page's bytes.
    pages: BTreeMap<(String, u64), Digest>,
    /// The device sections and the EOF byte, without the vmdescription.
    devices: Vec<u8>,
    summary: StreamSummary,
}

fn state_of(path: &Path) -> State {
    let image = Image::open(FileSource::open(path).unwrap()).unwrap();
    let mut stream = Vec::new();
    let mut take = |raw: &[u8]| {
        stream.extend_from_slice(raw);
        Ok(())
    };
    pipeline::decode(&image, 2, &Silent, &mut take).unwrap();
    let mut parser = Parser::new();
    let (mut pages, mut devices_at, mut at) = (BTreeMap::new(), None, 0);
    while let Some(element) = parser.next(&stream[at..]).unwrap() {
        match element.event {
            Event::Framing | Event::MappedBlock { .. } => {}
            Event::Page {
                block,
                page,
                is_zero,
                body,
            } => {
                let bytes = match is_zero {
                    true => &[0; PAGE_LEN][..],
                    false => &stream[at + body..][..PAGE_LEN],
                };
                let idstr = parser.blocks()[block].idstr.clone();
                pages.insert((idstr, page.0), Digest::of(bytes));
            }
            Event::DeviceState => devices_at = devices_at.or(Some(at)),
        }
        at += element.len;
    }
    let summary = parser.finish().unwrap();
    let end = match &summary.vmdescription {
        Some(json) => usize::try_from(json.offset.0).unwrap() - 5,
        None => stream.len() - 5, // an empty one
    };
    State {
        pages,
        devices: stream[devices_at.unwrap()..end].to_vec(),
        summary,
    }
}

fn capture_of(dir: &TestDir, image: &str) -> Value {
    dir.json(&["inspect", image])["manifest"]["stream"]["capture"].clone()
}

/// Saves a guest that does not run, which goes on not running.
fn save(dir: &TestDir, guest: &Guest, image: &str, arguments: &[&str]) -> Value {
    let mut words = vec!["save".to_owned(), guest.source(), image.to_owned()];
    words.extend(["--then", "pause"].map(str::to_owned));
    words.extend(arguments.iter().map(|&word| word.to_owned()));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    dir.json(&words)
}

/// Starts a guest, stops it, and holds what is read from its memory against what QEMU migrates.
fn reads_what_qemu_migrates(spec: GuestSpec) {
    let dir = TestDir::new();
    // Else the clock's registers, which go on while the guest is stopped, tell one save from the next.
    let guest = Guest::start(&dir, spec.with(&["-rtc", "clock=vm"]));
    guest.serial().wait_for_tick(3);
    if guest.serial().text().contains("Linux") {
        guest
            .serial()
            .wait_for_line("a checksum", |line| line.starts_with("sum "));
    }
    let tick = guest.serial().last_tick();
    guest.qmp().command("stop", json!({}));

    let read = save(&dir, &guest, "read.stow", &[]);
    assert_eq!(guest.qmp().status(), "paused");
    let threads = ["--threads", "5", "--layout", "raw"];
    let again = save(&dir, &guest, "again.stow", &threads);
    let migrated = save(&dir, &guest, "migrated.stow", &["--capture", "migration"]);
    assert_eq!(capture_of(&dir, "read.stow"), "memory");
    assert_eq!(capture_of(&dir, "migrated.stow"), "migration");
    assert_eq!(read["image_digest"], again["image_digest"]);
    assert_ne!(read["image_digest"], migrated["image_digest"]);
    dir.vmstow()
        .args(["verify", "--deep", "read.stow"])
        .assert()
        .success();

    let (read, migrated) = (
        state_of(&dir.join("read.stow")),
        state_of(&dir.join("migrated.stow")),
    );
    assert_eq!(read.summary.machine_type, migrated.summary.machine_type);
    assert_eq!(read.summary.blocks, migrated.summary.blocks);
    assert_eq!(read.summary.run_state, migrated.summary.run_state);
    assert_eq!(read.summary.data_pages, migrated.summary.data_pages);
    assert_eq!(read.summary.zero_pages, migrated.summary.zero_pages);
    assert!(read.pages == migrated.pages, "guest memory differs");
    assert!(read.devices == migrated.devices, "device state differs");

    guest.qmp().command("cont", json!({}));
    guest.serial().wait_for_tick(tick + 3);
}

#[test]
fn a_guest_of_one_block_on_either_machine() {
    for machine in ["pc", "q35"] {
        reads_what_qemu_migrates(GuestSpec {
            machine: machine.to_owned(),
            memory_mib: 300,
            ..GuestSpec::default()
        });
    }
}

#[test]
fn linux_with_programs_and_a_network() {
    reads_what_qemu_migrates(GuestSpec::linux());
}

#[test]
fn nodes_with_memory_of_different_kinds() {
    let spec = GuestSpec {
        machine: "q35".to_owned(),
        memory_mib: 192,
        ..GuestSpec::default()
    };
    let mut extra = Vec::new();
    for (index, backend) in [
        "memory-backend-ram,id=m0,size=64M",
        "memory-backend-memfd,id=m1,size=64M,share=on",
        "memory-backend-file,id=m2,size=64M,mem-path=m2.ram,share=off",
    ]
    .into_iter()
    .enumerate()
    {
        extra.extend(["-object".to_owned(), backend.to_owned()]);
        extra.extend([
            "-numa".to_owned(),
            format!("node,nodeid={index},memdev=m{index}"),
        ]);
    }
    let extra: Vec<&str> = extra.iter().map(String::as_str).collect();
    reads_what_qemu_migrates(spec.with(&extra));
}

#[test]
fn memory_beyond_the_hole_below_four_gibibytes() {
    reads_what_qemu_migrates(GuestSpec {
        machine: "q35".to_owned(),
        memory_mib: 4608,
        ..GuestSpec::default()
    });
}

#[test]
fn a_qemu_that_does_not_tell_where_its_memory_is_migrates() {
    let dir = TestDir::new();
    let mut guest = Guest::start(
        &dir,
        GuestSpec {
            qemu: Qemu::V7_2,
            kind: Kind::Counter,
            ..GuestSpec::default()
        },
    );
    guest.serial().wait_for_tick(2);
    dir.json(&["save", &guest.source(), "x.stow"]);
    assert!(guest.wait_for_exit().success());
    assert_eq!(capture_of(&dir, "x.stow"), "migration");
    wait_for_silence(&dir);
}

#[test]
fn a_guest_that_runs_on_after_each_of_many_saves_misses_nothing() {
    let dir = TestDir::new();
    let guest = Guest::start(&dir, GuestSpec::default());
    let mut tick = 2;
    for round in 0..5 {
        guest.serial().wait_for_tick(tick);
        let before = guest.serial().mark();
        let image = format!("{round}.stow");
        dir.json(&["save", &guest.source(), &image, "--then", "resume"]);
        tick = guest.serial().last_tick() + 2;
        guest.serial().wait_for_tick(tick);
        guest.serial().assert_goes_on(&before);
        assert_eq!(capture_of(&dir, &image), "memory");
    }
}
