//! What people read: answers, refusals with their place and what to do, exit codes.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::path::Path;

use serde_json::{Value, json};

use vmstow::container::manifest::Manifest;
use vmstow::container::{ChunkEntry, Image};

use support::{Guest, GuestSpec, Qemu, TestDir, flip_bit};

/// Saves a guest of 16 MiB to `web01.stow`.
fn saved(spec: GuestSpec, arguments: &[&str]) -> TestDir {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: 16,
        ..spec.named("web01")
    };
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    let source = guest.source();
    dir.json(&[&["save", &source, "web01.stow"], arguments].concat());
    guest.wait_for_exit();
    dir
}

/// The chunks that hold pages of `pc.ram`.
fn chunks_with_memory(dir: &TestDir) -> Vec<ChunkEntry> {
    let image = Image::open(std::fs::read(dir.join("web01.stow")).unwrap()).unwrap();
    let pages = image.page_map().unwrap().unwrap();
    let chunks = image.chunks().map(Result::unwrap);
    let has_memory = |chunk: &ChunkEntry| {
        let blocks = pages.pages_in(chunk.index);
        blocks.iter().any(|(block, _)| block.idstr == "pc.ram")
    };
    chunks.filter(has_memory).collect()
}

/// What the program says on stdout.
#[track_caller]
fn answer(dir: &TestDir, arguments: &[&str]) -> String {
    let output = dir.vmstow().args(arguments).unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// What `inspect` shows of a broken stream, and what it says of the break.
#[track_caller]
fn inspect_broken(dir: &TestDir, stream: &str) -> (String, String) {
    let assert = dir.vmstow().args(["inspect", stream]).assert().code(3);
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let output = assert.get_output();
    (text(&output.stdout), text(&output.stderr))
}

/// Puts `*` where `wanted` has it: a run of letters that no test can know.
#[track_caller]
fn assert_reads(found: &str, wanted: &str) {
    let fits = |found: &str, wanted: &str| {
        let mut rest = found;
        let mut parts = wanted.split('*');
        let is_start = parts
            .next()
            .is_none_or(|first| match rest.strip_prefix(first) {
                Some(behind) => {
                    rest = behind;
                    true
                }
                None => false,
            });
        let are_parts = parts.all(|part| match (part, rest.find(part)) {
            ("", _) => {
                rest = "";
                true
            }
            (_, Some(at)) => {
                rest = &rest[at + part.len()..];
                true
            }
            (_, None) => false,
        });
        is_start && are_parts && rest.is_empty()
    };
    let (found_lines, wanted_lines): (Vec<_>, Vec<_>) =
        (found.lines().collect(), wanted.lines().collect());
    let all_fit = found_lines.len() == wanted_lines.len()
        && found_lines
            .iter()
            .zip(&wanted_lines)
            .all(|(found, wanted)| fits(found, wanted));
    assert!(all_fit, "found:\n{found}\nwanted:\n{wanted}");
}

// Answers.

#[test]
fn inspect_says_what_an_image_holds() {
    let dir = saved(GuestSpec::default(), &["--label", "ticket=1234"]);
    assert_reads(
        &answer(&dir, &["inspect", "web01.stow"]),
        "    guest: web01
    saved: 20*Z, running at the time
  machine: pc-i440fx-10.0, 1 vCPU, tcg
   memory: 16 MiB, * MiB of it not zero
     qemu: 10.0.2 (/usr/bin/qemu-system-x86_64)
resources: disk disk0 (virtio-blk-pci): */web01.img
           chardev serial0 (serial0): */web01.serial
  devices: * sections
  capture: from QEMU's memory, without its description of the devices
   labels: ticket=1234
    image: * MiB, layout zstd, format 1, generation 1, * chunks
   digest: *
    trust: it is signed by vmstow@* (SHA256:*)
  restore: eager
           --lazy
           not --map: its layout is zstd
",
    );
}

#[test]
fn inspect_gives_programs_the_same_facts() {
    let dir = saved(GuestSpec::default(), &["--layout", "raw"]);
    let document = dir.json(&["inspect", "web01.stow"]);
    assert_eq!(document["schema"], 1);
    assert_eq!(document["layout"], "raw");
    let sections = document["sections"].as_array().unwrap().iter();
    let types: Vec<&str> = sections
        .map(|section| section["type"].as_str().unwrap())
        .collect();
    assert_eq!(types, ["XML", "MANI", "CHNK", "PMAP", "SIGN"]);
    let manifest: Manifest = serde_json::from_value(document["manifest"].clone()).unwrap();
    assert_eq!(manifest.machine.machine_type, "pc-i440fx-10.0");
    let ram = manifest
        .ram_blocks
        .iter()
        .find(|block| block.idstr == "pc.ram");
    assert_eq!(ram.unwrap().used_length, 16 << 20);
    assert_keys_of_schema(&document["manifest"]);
}

/// Every member of the manifest stands in its schema, and every one that the schema requires is there.
fn assert_keys_of_schema(manifest: &Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("spec/manifest.schema.json");
    let schema: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for key in manifest.as_object().unwrap().keys() {
        assert!(
            schema["properties"].get(key).is_some(),
            "{key} is not in the schema"
        );
    }
    for key in schema["required"].as_array().unwrap() {
        assert!(
            manifest.get(key.as_str().unwrap()).is_some(),
            "{key} is missing"
        );
    }
}

#[test]
fn verify_says_how_far_it_looked() {
    let dir = saved(GuestSpec::default(), &[]);
    let wanted = "\
web01.stow is whole: * chunks, * MiB of stream, all digests match
it is signed by vmstow@* (SHA256:*)
";
    assert_reads(&answer(&dir, &["verify", "web01.stow"]), wanted);
    let quick = answer(&dir, &["verify", "--quick", "web01.stow"]);
    assert!(quick.contains("its chunks were not read"), "{quick}");
    let deep = answer(&dir, &["verify", "--deep", "web01.stow"]);
    assert!(
        deep.contains("the stream is complete: ") && deep.contains("virtio-blk"),
        "{deep}"
    );
    assert_eq!(dir.json(&["verify", "web01.stow"])["problems"], json!([]));
}

#[test]
fn scripts_and_pages_for_shells_and_readers() {
    let dir = TestDir::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = answer(&dir, &["completion", shell]);
        assert!(
            script.contains("vmstow") && script.contains("restore"),
            "{shell}"
        );
    }
    answer(&dir, &["man", "man"]);
    for page in ["vmstow.1", "vmstow-save.1", "vmstow-restore.1"] {
        let text = std::fs::read_to_string(dir.join("man").join(page)).unwrap();
        assert!(text.contains(".TH "), "{page}");
    }
    assert!(!answer(&dir, &["--help"]).contains("guardian"));
    let version = answer(&dir, &["--version"]);
    assert_eq!(version, format!("vmstow {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn doctor_tells_what_this_host_has() {
    let dir = TestDir::new();
    let findings = &dir.json(&["doctor"])["findings"];
    let names: Vec<&Value> = findings
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["name"])
        .collect();
    assert_eq!(
        names,
        [
            "qemu",
            "kvm",
            "userfaultfd",
            "runtime",
            "keys",
            "memory",
            "space"
        ]
    );
    assert!(answer(&dir, &["doctor"]).starts_with("ok        qemu: "));
    let mut blind = dir.vmstow();
    let blind = blind.arg("doctor").env("PATH", dir.path()).assert().code(4);
    let said = String::from_utf8_lossy(&blind.get_output().stdout).into_owned();
    assert!(
        said.starts_with("--        qemu: ") && said.contains("install QEMU"),
        "{said}"
    );
}

// Refusals.

#[test]
fn every_damaged_chunk_is_named_with_its_memory() {
    let dir = saved(GuestSpec::default(), &[]);
    let image = dir.join("web01.stow");
    let chunks = chunks_with_memory(&dir);
    let [first, .., last] = &chunks[..] else {
        panic!("{} chunks with memory", chunks.len());
    };
    for chunk in [first, last] {
        flip_bit(
            &image,
            chunk.stored_offset.0 + u64::from(chunk.stored_len) / 2,
            3,
        );
    }
    let place = |chunk: &ChunkEntry| {
        format!(
            "file offset {}, RAMBlock \"pc.ram\", pages 0x*..0x*",
            chunk.stored_offset
        )
    };
    let verify = dir.vmstow().args(["verify", "web01.stow"]).assert().code(3);
    let (one, two) = (first.index, last.index);
    assert_reads(
        &String::from_utf8_lossy(&verify.get_output().stdout),
        &format!(
            "\
web01.stow is damaged:
  chunk {one} does not match its checksum ({})
  chunk {two} does not match its checksum ({})
",
            place(first),
            place(last)
        ),
    );
    assert_reads(
        &dir.refused(3, &["restore", "web01.stow"]),
        &format!(
            "\
error: web01.stow is damaged: chunk {one} does not match its checksum
   at: {}
  try: copy the image again; `vmstow verify web01.stow` lists every damaged chunk
",
            place(first)
        ),
    );
    assert!(dir.processes().is_empty(), "no guest runs");
    assert_eq!(dir.json(&["list"])["guests"], json!([]));
    let described = dir.json(&["inspect", "web01.stow"]);
    assert_eq!(
        described["manifest"]["guest"]["name"], "web01",
        "what can be read is shown"
    );
}

#[test]
fn an_image_that_was_cut_off_is_not_complete() {
    for (layout, wanted) in [
        (
            "zstd",
            "\
error: web01.stow is not complete: it ends without a footer
   at: file offset 0x*, found bytes *
  try: the save is still running or was cut off; wait for it or save again
",
        ),
        (
            "raw",
            "\
error: web01.stow is not complete, or no image: it holds a migration stream of QEMU and nothing behind it
  try: `vmstow inspect web01.stow` reads a bare stream, `vmstow convert web01.stow NEW.stow --xml FILE` makes an image of it; if this was an image with --layout raw, it was cut off: copy it again
",
        ),
    ] {
        let dir = saved(GuestSpec::default(), &["--layout", layout]);
        let file = std::fs::OpenOptions::new().write(true).open(dir.join("web01.stow")).unwrap();
        file.set_len(2 << 20).unwrap();
        for command in ["restore", "verify"] {
            assert_reads(&dir.refused(3, &[command, "web01.stow"]), wanted);
        }
        assert!(dir.processes().is_empty());
    }
}

#[test]
fn a_machine_type_that_a_qemu_does_not_know() {
    let spec = GuestSpec {
        machine: "pc-q35-10.0".to_owned(),
        ..GuestSpec::default()
    };
    let dir = saved(spec, &[]);
    let program = Qemu::V7_2.program().display().to_string();
    assert_reads(
        &dir.refused(4, &["restore", "web01.stow", "--qemu", &program]),
        "\
error: this host cannot run web01: machine type \"pc-q35-10.0\" is unknown to QEMU 7.2.* (*qemu-system-x86_64-7.2)
  try: give --qemu PATH, naming a QEMU of at least 10.0
",
    );
}

#[test]
fn a_disk_that_changed_is_refused() {
    let dir = saved(GuestSpec::default(), &[]);
    flip_bit(dir.join("web01.img"), 4096, 0);
    let said = dir.refused(4, &["restore", "web01.stow"]);
    assert_reads(
        &said,
        "\
error: this host cannot run web01: disk \"disk0\": */web01.img changed since the guest was saved
  try: give --remap disk:disk0=PATH, or --accept-changed-disks
",
    );
    drop(dir.restore(&["web01.stow", "--accept-changed-disks"]));
}

#[test]
fn a_guest_that_qemu_does_not_migrate_runs_on() {
    let dir = TestDir::new();
    let guest = Guest::start(
        &dir,
        GuestSpec::default().with(&["-device", "nvme,serial=x"]),
    );
    guest.serial().wait_for_tick(3);
    assert_reads(
        &dir.refused(4, &["save", &guest.source(), "x.stow"]),
        "\
error: QEMU refuses to migrate guest, which runs on as before
  why: *non-migratable device*nvme*
  try: detach the device, save, attach it again after the restore
",
    );
    let before = guest.serial().mark();
    guest.serial().assert_goes_on(&before);
    let mut plan = dir.vmstow();
    let plan = plan
        .args(["save", &guest.source(), "x.stow", "--dry-run"])
        .assert()
        .code(4);
    let shown = String::from_utf8_lossy(&plan.get_output().stdout).into_owned();
    assert!(shown.contains("blocked: non-migratable device"), "{shown}");
}

#[test]
fn what_is_no_image_is_called_so() {
    let dir = TestDir::new();
    std::fs::write(dir.join("letter.txt"), "Dear reader,\n".repeat(1000)).unwrap();
    for command in ["inspect", "verify", "restore"] {
        assert_reads(
            &dir.refused(3, &[command, "letter.txt"]),
            "error: letter.txt cannot be used: it is no image of vmstow\n",
        );
    }
    assert_reads(
        &dir.refused(1, &["inspect", "missing.stow"]),
        "error: cannot open missing.stow\n  why: No such file or directory (os error 2)\n",
    );
}

#[test]
fn a_stream_that_breaks_says_where() {
    let dir = saved(GuestSpec::default(), &["--layout", "raw"]);
    let described = dir.json(&["inspect", "web01.stow"]);
    let mut stream = std::fs::read(dir.join("web01.stow")).unwrap();
    stream.truncate(usize::try_from(described["stream_bytes"].as_u64().unwrap()).unwrap());
    std::fs::write(dir.join("guest.mig"), &stream).unwrap();
    let shown = answer(&dir, &["inspect", "guest.mig"]);
    assert!(
        shown.contains("a bare migration stream, no image"),
        "{shown}"
    );
    std::fs::write(dir.join("short.mig"), &stream[..1 << 20]).unwrap();
    let (shown, said) = inspect_broken(&dir, "short.mig");
    assert!(shown.contains("blocks: pc.ram 16 MiB"), "{shown}");
    assert!(shown.contains("machine: pc-i440fx-10.0"), "{shown}");
    assert!(shown.contains("the stream breaks here"), "{shown}");
    assert_reads(
        &said,
        "\
error: short.mig cannot be read to its end: the stream is not complete: it ends inside the RAM pages
   at: stream offset 0x*, in section * \"ram\"
",
    );
    // The first section begins behind magic, version and configuration.
    let name = stream
        .windows(4)
        .position(|window| window == b"\x03ram")
        .unwrap();
    stream[name - 5] = 0x42;
    std::fs::write(dir.join("guest.mig"), &stream).unwrap();
    assert_reads(
        &inspect_broken(&dir, "guest.mig").1,
        "\
error: guest.mig is not a migration stream we can read: unknown section type 0x42
   at: stream offset 0x*
",
    );
}

#[test]
fn guests_that_are_not_there() {
    let dir = TestDir::new();
    assert_reads(
        &dir.refused(4, &["save", "qmp:/nowhere.sock", "x.stow"]),
        "\
error: cannot connect to the monitor /nowhere.sock
  why: No such file or directory (os error 2)
  try: is the guest running, and is that the socket of its -qmp option?
",
    );
    assert_reads(
        &dir.refused(4, &["save", "web01", "x.stow"]),
        "\
error: no guest named web01 runs here
  try: `vmstow list` shows the guests that vmstow runs
",
    );
    let said = dir.refused(2, &["save", "vnc:1", "x.stow"]);
    assert!(
        said.contains("qmp:/path/to/socket, pid:NUMBER or the name of a guest"),
        "{said}"
    );
    assert_eq!(dir.names(), [""; 0]);
}

#[test]
fn a_disk_that_another_guest_uses() {
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, GuestSpec::default().named("web01"));
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "web01.stow"]);
    guest.wait_for_exit();
    let _first = dir.restore(&["web01.stow"]);
    let said = dir.refused(4, &["restore", "web01.stow", "--accept-changed-disks"]);
    assert_reads(
        &said,
        "\
error: QEMU does not let web01-2 run, which was not restored; its image is as it was
  why: QEMU refused cont: GenericError: Failed to get \"write\" lock
  try: another QEMU uses this disk: end it, or give this guest a disk of its own with --remap disk:ID=PATH
",
    );
}
