//! `vmstow mem` and ELF cores: what they say of a saved guest's memory is what QEMU says of the guest itself, stopped at the
//! same moment; gdb, readelf and Volatility judge the core.

#![allow(clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::io::Read;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::{Guest, GuestSpec, Qmp, TestDir, flip_bit, wait_until, write_memory};

/// Where Linux has its text if it is not moved about.
const KERNEL_TEXT: u64 = 0xffff_ffff_8100_0000;
/// What its virtual addresses there are more than the physical ones.
const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;

const GIB: u64 = 1 << 30;

/// Runs a program that judges us; gives what it printed.
#[track_caller]
fn judge(program: impl AsRef<Path>, package: &str, arguments: &[&str]) -> String {
    let program = program.as_ref();
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| {
        panic!(
            "{}: {error}: install {package}, or run tests/setup.sh",
            program.display()
        )
    });
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program:?}: {said}{failed}");
    said
}

fn monitor(qmp: &mut Qmp, line: &str) -> String {
    let answer = qmp.command("human-monitor-command", json!({ "command-line": line }));
    answer.as_str().unwrap().to_owned()
}

/// `RIP=ffffffff81000000` in what QEMU says of registers.
fn register(words: &str, name: &str) -> u64 {
    let at = words.find(&format!("{name}=")).unwrap();
    let digits = words[at + name.len() + 1..].split_whitespace().next();
    u64::from_str_radix(digits.unwrap(), 16).unwrap()
}

/// Stops the guest where its first processor is in the kernel.
fn stop_in_kernel(qmp: &mut Qmp) -> u64 {
    wait_until("the guest to be in its kernel", support::PATIENCE, || {
        qmp.command("stop", json!({}));
        let rip = register(&monitor(qmp, "info registers"), "RIP");
        if rip >= KERNEL_TEXT {
            return Ok(rip);
        }
        qmp.command("cont", json!({}));
        Err(format!("RIP {rip:#x}"))
    })
}

/// The bytes that `vmstow mem IMAGE read …` gives.
fn read(dir: &TestDir, image: &str, arguments: &[&str]) -> Vec<u8> {
    let words = [&["mem", image, "read", "--raw"], arguments].concat();
    let output = dir.vmstow().args(words).assert().success();
    output.get_output().stdout.clone()
}

/// The bytes that QEMU's `command` (`memsave`, `pmemsave`) gives.
fn saved(dir: &TestDir, qmp: &mut Qmp, command: &str, address: u64, len: u64) -> Vec<u8> {
    let path = dir.join("qemu.bytes");
    let arguments = json!({ "val": address, "size": len, "filename": path });
    qmp.command(command, arguments);
    std::fs::read(path).unwrap()
}

/// Guest-physical ranges with what lies behind them, as `vmstow mem IMAGE map` has them: first address, length, block.
fn mapped(dir: &TestDir, image: &str) -> Vec<(u64, u64, String)> {
    let answer = dir.json(&["mem", image, "map"]);
    let stretches = answer["memory"].as_array().unwrap().iter();
    let number = |value: &Value| value.as_u64().unwrap();
    let with_address = stretches.filter(|it| !it["address"].is_null());
    let found = with_address.map(|it| {
        let block = it["block"].as_str().unwrap().to_owned();
        (number(&it["address"]), number(&it["len"]), block)
    });
    found.collect()
}

/// The same as `info mtree -f` has it, of the blocks that are placed by rules.
fn flat_view(qmp: &mut Qmp) -> Vec<(u64, u64, String)> {
    let words = monitor(qmp, "info mtree -f");
    let view = words
        .split("FlatView")
        .find(|view| view.contains("AS \"memory\""));
    let mut found: Vec<(u64, u64, String)> = Vec::new();
    for line in view.expect("there is a view of memory").lines() {
        // `  0000000000000000-000000000009ffff (prio 0, ram): pc.ram`, `… pc.ram @00000000000c0000 KVM`
        let Some((range, rest)) = line.trim().split_once(" (prio ") else {
            continue;
        };
        let (kind, name) = rest.split_once("): ").unwrap();
        let (name, offset) = match name.split_once(" @") {
            Some((name, offset)) => (name, &offset[..16]),
            None => (name.split_once(' ').map_or(name, |(name, _)| name), "0"),
        };
        let is_memory = kind.contains("ram") || kind.contains("rom");
        if !is_memory || !name.starts_with("pc.") {
            continue;
        }
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let (start, len) = (hex(first), hex(last) - hex(first) + 1);
        match found.last_mut() {
            // Parts with other rights are one to us.
            Some((before, before_len, block))
                if *before + *before_len == start && *block == name && hex(offset) != 0 =>
            {
                *before_len += len;
            }
            _ => found.push((start, len, name.to_owned())),
        }
    }
    found
}

/// The first bytes of the core that QEMU itself would write of the guest: headers and notes, for it is not let go on.
fn own_core_head(dir: &TestDir, qmp: &mut Qmp) -> Vec<u8> {
    let pipe = dir.join("core.fifo");
    judge("mkfifo", "coreutils", &[pipe.to_str().unwrap()]);
    let path = pipe.clone();
    let reader = std::thread::spawn(move || {
        let mut head = vec![0; 0x1_0000];
        let mut file = std::fs::File::open(path).unwrap();
        file.read_exact(&mut head).unwrap();
        head
    });
    let protocol = format!("file:{}", pipe.display());
    let arguments = json!({ "paging": false, "protocol": protocol });
    let ended = qmp.try_command("dump-guest-memory", arguments);
    assert!(ended.is_err(), "QEMU went on without a reader");
    std::fs::remove_file(pipe).unwrap();
    reader.join().unwrap()
}

/// Type, file offset, physical address and length in the file of an ELF core's parts.
fn parts(core: &[u8]) -> Vec<(u32, u64, u64, u64)> {
    let number = |at: usize, len: usize| {
        let bytes = core[at..at + len].iter().rev();
        bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    assert_eq!(core[..5], *b"\x7fELF\x02");
    let (first, count) = (number(0x20, 8), number(0x38, 2));
    let places = (0..count).map(|index| usize::try_from(first + index * 56).unwrap());
    let part = |at| {
        let kind = u32::try_from(number(at, 4)).unwrap();
        (
            kind,
            number(at + 8, 8),
            number(at + 24, 8),
            number(at + 32, 8),
        )
    };
    places.map(part).collect()
}

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The ranges of RAM among them: all but video memory and the firmware at the end of 4 GiB.
fn loads(core: &[u8]) -> Vec<(u64, u64)> {
    let is_load = |part: &(u32, u64, u64, u64)| part.0 == PT_LOAD;
    let is_ram =
        |(_, _, address, _): &(u32, u64, u64, u64)| *address < 3 * GIB || *address >= 4 * GIB;
    let parts = parts(core).into_iter().filter(is_load).filter(is_ram);
    parts.map(|(_, _, address, len)| (address, len)).collect()
}

fn notes(core: &[u8]) -> &[u8] {
    let note = parts(core).into_iter().find(|part| part.0 == PT_NOTE);
    let (_, offset, _, len) = note.unwrap();
    let [offset, len] = [offset, len].map(|value| usize::try_from(value).unwrap());
    &core[offset..offset + len]
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// Adjacent ranges as one.
fn joined(ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = Vec::new();
    for (start, len) in ranges {
        match found.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ => found.push((start, len)),
        }
    }
    found
}

#[test]
fn a_saved_linux_guest_is_read_as_it_was() {
    let dir = TestDir::new();
    let append = "console=ttyS0 quiet panic=-1 nokaslr content=8";
    let spec = GuestSpec {
        memory_mib: 160,
        ..GuestSpec::linux()
    };
    let spec = spec.with(&["-append", append, "-smp", "2"]);
    let mut guest = Guest::start(&dir, spec);
    let serial = guest.serial();
    serial.wait_for_line("the disk", |line| line == "disk ok");
    let mut qmp = guest.qmp();
    let rip = stop_in_kernel(&mut qmp);

    // Marks across the ends of a page, of a chunk and of what a search looks at in one piece.
    let mark = b"vmstow looks across boundaries \x00\xff\n";
    let marked = [0x0200_1000, 0x0248_0000, 0x0300_0000].map(|boundary| boundary - 7);
    for address in marked {
        write_memory(guest.pid(), &mut qmp, address, mark);
    }
    let flat = flat_view(&mut qmp);
    let own_core = own_core_head(&dir, &mut qmp);
    let physical: Vec<(u64, u64, Vec<u8>)> = [(0x100_0000 - 13, 0x20_0011), (0xf_0000, 0x1_0000)]
        .into_iter()
        .map(|(at, len)| (at, len, saved(&dir, &mut qmp, "pmemsave", at, len)))
        .collect();
    let text = saved(&dir, &mut qmp, "memsave", rip & !0xf, 64);

    let source = guest.source();
    dir.json(&["save", &source, "x.stow", "--then", "pause"]);
    dir.json(&[
        "save",
        &source,
        "described.stow",
        "--capture",
        "migration",
        "--then",
        "pause",
    ]);
    dir.json(&["convert", "x.stow", "raw.stow", "--layout", "raw"]);
    dir.json(&["convert", "x.stow", "mapped.stow", "--layout", "mapped"]);

    let banners = dir.json(&["mem", "x.stow", "search", "-F", "Linux version 6.1"]);
    let banners = banners["matches"].as_array().unwrap().clone();
    let banner = banners.iter().find_map(|found| {
        let address = found["address"].as_u64()? + KERNEL_BASE;
        // The guest's log has it too, but that is no place of the kernel's own.
        let arguments = json!({ "val": address, "size": 128, "filename": dir.join("banner") });
        let is_there = qmp.try_command("memsave", arguments).is_ok();
        is_there.then_some(address)
    });
    let banner = banner.expect("the kernel's banner is mapped");
    let shown = std::fs::read(dir.join("banner")).unwrap();
    assert!(shown.starts_with(b"Linux version 6.1"), "{shown:?}");
    drop(qmp);
    guest.kill();

    for image in ["x.stow", "described.stow", "raw.stow", "mapped.stow"] {
        for (address, len, bytes) in &physical {
            let found = read(&dir, image, &[&hex(*address), &len.to_string()]);
            assert!(found == *bytes, "{image}: {len} bytes at {address:#x}");
        }
        let found = read(&dir, image, &["--virtual", &hex(rip & !0xf), "64"]);
        assert_eq!(found, text, "{image}");
        let found = read(
            &dir,
            image,
            &["--virtual", "--cpu", "1", &hex(banner), "128"],
        );
        assert_eq!(found, shown, "{image}");
        assert_eq!(mapped(&dir, image), flat, "{image}");

        let answer = dir.json(&[
            "mem",
            image,
            "search",
            "-F",
            "vmstow looks across boundaries",
        ]);
        let found = answer["matches"].as_array().unwrap().iter();
        let found: Vec<u64> = found.map(|it| it["address"].as_u64().unwrap()).collect();
        assert_eq!(found, marked, "{image}");
        let expression = r"vmstow \w+ across boundaries \x00\xff\n";
        let said = dir.json(&[
            "mem", image, "search", expression, "--block", "pc.ram", "--count",
        ]);
        assert_eq!(said["searched"]["matches"], 3, "{image}: {said}");
    }
    the_rest_of_mem_works(&dir, banner, &shown);
    a_core_is_what_its_judges_expect(&dir, rip, &own_core, &banners);
}

fn the_rest_of_mem_works(dir: &TestDir, banner: u64, shown: &[u8]) {
    // By offset in a block, to a file, as people read it.
    let offset = hex(banner - KERNEL_BASE);
    let block = ["--block", "pc.ram"];
    let words = ["mem", "x.stow", "read", "-o", "banner.out", &offset, "128"];
    let output = dir.vmstow().args([&words[..], &block].concat()).output();
    assert!(output.unwrap().status.success());
    assert_eq!(std::fs::read(dir.join("banner.out")).unwrap(), shown);
    let output = dir
        .vmstow()
        .args(["mem", "x.stow", "read", &offset, "0x10"])
        .output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(said.contains("|Linux version 6.|"), "{said}");

    let hexadecimal = "4c 69 6e 75 78 20 ?? 65 72 73 69 6f 6e 20 36";
    for words in [vec!["--hex", hexadecimal], vec!["-i", "LINUX VERSION 6"]] {
        let words = [&["mem", "x.stow", "search", "--json"], &*words].concat();
        let output = dir.vmstow().args(words).output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let mut found = answer["matches"].as_array().unwrap().iter();
        assert!(
            found.any(|it| it["address"] == banner - KERNEL_BASE),
            "{answer}"
        );
    }
    let answer = dir.json(&[
        "mem",
        "x.stow",
        "strings",
        "-n",
        "40",
        "--encoding",
        "ascii",
    ]);
    let mut texts = answer["strings"].as_array().unwrap().iter();
    assert!(texts.any(|it| {
        it["address"] == banner - KERNEL_BASE
            && it["text"]
                .as_str()
                .unwrap()
                .starts_with("Linux version 6.1")
    }));

    let answer = dir.json(&["mem", "x.stow", "stats"]);
    let number = |value: &Value| value.as_u64().unwrap();
    let ram = answer["blocks"].as_array().unwrap().iter();
    let ram = ram
        .clone()
        .find(|block| block["block"] == "pc.ram")
        .unwrap();
    assert_eq!(number(&ram["pages"]), 160 << 8);
    let random = number(&ram["entropy"][7]);
    assert!(
        random >= 4 << 8,
        "half of 8 MiB of content does not compress: {ram}"
    );
    assert!(
        number(&ram["zero"]) > 0 && number(&ram["duplicate"]) > 0,
        "{ram}"
    );
    let stretches = dir.json(&["mem", "x.stow", "map"]);
    let stretches = stretches["memory"].as_array().unwrap().iter();
    let of_ram = stretches.filter(|it| it["block"] == "pc.ram");
    let zero: u64 = of_ram.map(|it| number(&it["zero_pages"])).sum();
    assert_eq!(zero, number(&ram["zero"]));

    let said = dir.refused(2, &["mem", "x.stow", "read", "0xa0000"]);
    assert!(
        said.contains("no memory at guest-physical address 0xa0000"),
        "{said}"
    );
    let said = dir.refused(2, &["mem", "x.stow", "read", "--virtual", "0x10"]);
    assert!(
        said.contains("leads nowhere") && said.contains("not present"),
        "{said}"
    );
    let said = dir.refused(
        2,
        &["mem", "x.stow", "read", "--virtual", "--cpu", "7", "0x10"],
    );
    assert!(
        said.contains("no processor 7") && said.contains("0, 1"),
        "{said}"
    );
    let said = dir.refused(2, &["mem", "x.stow", "read", "--block", "pc.rum", "0"]);
    assert!(said.contains("pc.rum") && said.contains("pc.ram"), "{said}");
    let said = dir.refused(2, &["mem", "x.stow", "search", "a("]);
    assert!(said.contains("cannot be understood"), "{said}");
}

fn a_core_is_what_its_judges_expect(dir: &TestDir, rip: u64, own: &[u8], banners: &[Value]) {
    dir.json(&["convert", "x.stow", "x.core", "--to", "core"]);
    let path = dir.join("x.core");
    let path = path.to_str().unwrap();
    let core = std::fs::read(path).unwrap();
    let ours = notes(&core);
    let theirs = notes(own);
    assert!(
        ours.len() >= theirs.len() && ours[..theirs.len()] == *theirs,
        "notes differ"
    );
    let told = [&b"VMCOREINFO\0\0OSRELEASE=6.1"[..]].concat();
    let mut windows = ours[theirs.len()..].windows(told.len());
    assert!(
        windows.any(|window| window == told),
        "the guest's own note is there"
    );
    assert_eq!(joined(loads(&core)), joined(loads(own)));
    for (kind, offset, address, len) in parts(&core) {
        let Some(found) = banners.iter().find_map(|it| it["address"].as_u64()) else {
            continue;
        };
        if kind == PT_LOAD && (address..address + len).contains(&found) {
            let at = usize::try_from(offset + found - address).unwrap();
            assert!(core[at..].starts_with(b"Linux version 6.1"));
        }
    }
    // The image that has QEMU's description of its devices gives the same.
    dir.json(&[
        "convert",
        "described.stow",
        "described.core",
        "--to",
        "core",
    ]);
    let described = std::fs::read(dir.join("described.core")).unwrap();
    assert!(notes(&described) == ours, "notes differ");

    let commands = [
        "-batch",
        "-nx",
        "-ex",
        "info threads",
        "-ex",
        "print/x $rip",
        "-c",
        path,
    ];
    let said = judge("gdb", "the Debian package gdb", &commands);
    assert!(
        rip >= KERNEL_TEXT && said.contains(&format!("$1 = {rip:#x}")),
        "{said}"
    );
    assert!(
        said.contains("  2    LWP 2") || said.contains("  2    "),
        "{said}"
    );

    let volatility =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-assets/volatility/bin/vol");
    let cache = dir.join("volatility");
    std::fs::create_dir(&cache).unwrap();
    let words = [
        "-q",
        "--offline",
        "--cache-path",
        cache.to_str().unwrap(),
        "-f",
        path,
        "banners.Banners",
    ];
    let said = judge(volatility, "Volatility 3", &words);
    let banner = said.lines().find(|line| line.contains("Linux version 6.1"));
    let address = banner.expect(&said).split_whitespace().next().unwrap();
    let found = banners
        .iter()
        .any(|it| hex(it["address"].as_u64().unwrap()) == address);
    assert!(found, "{said}");
}

/// Guests with their memory here and there: machine, MiB, more arguments.
const LAYOUTS: [(&str, u32, &[&str]); 8] = [
    ("pc", 256, &[]),
    ("pc", 3277, &[]),
    ("pc", 4608, &[]),
    ("q35", 256, &[]),
    ("q35", 3277, &[]),
    ("q35", 4608, &[]),
    ("q35", 3277, &["-machine", "max-ram-below-4g=1G"]),
    // Two nodes, the larger of which comes first in the stream, and memory plugged into a slot.
    (
        "pc",
        512,
        &[
            "-m",
            "512,slots=2,maxmem=2G",
            "-object",
            "memory-backend-ram,id=pc.small,size=128M",
            "-object",
            "memory-backend-ram,id=pc.large,size=384M",
            "-numa",
            "node,nodeid=1,memdev=pc.large",
            "-numa",
            "node,nodeid=0,memdev=pc.small",
            "-object",
            "memory-backend-ram,id=pc.plugged,size=64M",
            "-device",
            "pc-dimm,id=dimm0,memdev=pc.plugged",
        ],
    ),
];

#[test]
fn addresses_are_those_that_qemu_gives_and_a_core_has_its_hole_there() {
    for (machine, memory_mib, extra) in LAYOUTS {
        let dir = TestDir::new();
        let spec = GuestSpec {
            machine: machine.to_owned(),
            memory_mib,
            ..GuestSpec::default()
        };
        let mut guest = Guest::start(&dir, spec.with(&["-S"]).with(extra));
        let mut qmp = guest.qmp();
        let flat = flat_view(&mut qmp);
        let own = (memory_mib == 4608).then(|| own_core_head(&dir, &mut qmp));
        drop(qmp);
        dir.json(&["save", &guest.source(), "x.stow"]);
        guest.wait_for_exit();
        let found = mapped(&dir, "x.stow");
        assert_eq!(found, flat, "{machine}, {memory_mib} MiB, {extra:?}");
        if let Some(own) = own {
            a_core_has_its_hole(&dir, machine, &own);
        }
    }
}

/// Of a guest with 4.5 GiB.
fn a_core_has_its_hole(dir: &TestDir, machine: &str, own: &[u8]) {
    dir.json(&["convert", "x.stow", "x.core", "--to", "core"]);
    let path = dir.join("x.core");
    let mut head = vec![0; 0x1_0000];
    let mut core = std::fs::File::open(&path).unwrap();
    core.read_exact(&mut head).unwrap();
    assert_eq!(joined(loads(&head)), joined(loads(own)), "{machine}");
    let words = ["-lW", path.to_str().unwrap()];
    let said = judge("readelf", "the Debian package binutils", &words);
    let above = if machine == "pc" { 3 * GIB } else { 2 * GIB };
    let address = format!("{:#018x}", 4 * GIB);
    let len = format!("{:#08x}", (4608 << 20) - above);
    let load = format!("{address} {address} {len}");
    assert!(said.contains(&load), "{load}: {said}");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&core.metadata().unwrap());
    assert!(blocks * 512 < 16 << 20, "zero pages are holes: {blocks}");
}

#[test]
fn what_is_damaged_is_never_shown() {
    let dir = TestDir::new();
    let mut guest = support::scribbled(
        &dir,
        support::Qemu::V10,
        64,
        &[],
        &[(0, 0xa_0000), (1 << 20, 63 << 20)],
    );
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let (chunk, at) = support::chunk_of(&dir, 5000);
    flip_bit(dir.join("x.stow"), at, 3);
    let damaged = format!("chunk {chunk}");
    for words in [
        &["search", "page at"][..],
        &["strings"],
        &["stats"],
        &["read", "0x100000", "60M"],
    ] {
        let words = [&["mem", "x.stow"], words].concat();
        let output = dir.vmstow().args(&words).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{words:?}: {said}");
        assert!(
            said.contains("x.stow is damaged") && said.contains(&damaged),
            "{said}"
        );
    }
    let said = dir.refused(3, &["convert", "x.stow", "x.core", "--to", "core"]);
    assert!(said.contains("x.stow is damaged"), "{said}");
    assert!(!dir.join("x.core").exists());
    assert!(read(&dir, "x.stow", &["0x1000", "16"]).len() == 16);
}
