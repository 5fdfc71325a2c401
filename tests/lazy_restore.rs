//! A guest that runs before its memory is there: it has bit for bit the memory it had, it goes on when who gives it its
//! memory is killed, and it is frozen when its image turns out damaged.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{
    Guest, GuestSpec, Kind, Mark, MemoryRange, PATIENCE, Process, Qemu, Restored, TestDir,
    chunk_of, flip_bit, memory, scribbled, wait_until,
};

const MIB: u64 = 1 << 20;

/// What a guest's directory says of how it gets its memory; null if it says nothing.
fn serving(dir: &TestDir, name: &str) -> Value {
    let text = std::fs::read(dir.join(&format!("run/{name}/serving.json"))).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// The process that gives a guest its memory.
fn server(dir: &TestDir) -> Process {
    wait_until("a server", PATIENCE, || {
        let mut found = dir.processes().into_iter();
        found
            .find(|process| process.argv().iter().any(|word| word == "__serve"))
            .ok_or("none yet".to_owned())
    })
}

/// Waits until no process knows the directory any more.
#[track_caller]
fn all_have_ended(dir: &TestDir) {
    wait_until("all processes to end", PATIENCE, || {
        let left = dir.processes();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
}

/// Saves a guest, which ends with it.
fn saved(dir: &TestDir, mut guest: Guest, layout: &str) {
    dir.json(&["save", &guest.source(), "x.stow", "--layout", layout]);
    guest.wait_for_exit();
}

/// A counter that has filled its memory, saved.
fn saved_counter(dir: &TestDir, qemu: Qemu, memory_mib: u32) -> support::Serial {
    let spec = GuestSpec {
        qemu,
        memory_mib,
        ..GuestSpec::default()
    };
    let guest = Guest::start(dir, spec);
    let serial = guest.serial();
    serial.wait_for_tick(18);
    saved(dir, guest, "zstd");
    serial
}

/// Linux with two processors, a disk and a network is restored lazily and goes on.
fn linux_goes_on(qemu: Qemu, machine: &str, layout: &str, more: &[&str]) {
    let dir = TestDir::new();
    let spec = GuestSpec {
        name: "web01".to_owned(),
        qemu,
        machine: machine.to_owned(),
        memory_mib: 384,
        kind: Kind::Linux { content_mib: 100 },
        ..GuestSpec::default()
    };
    let guest = Guest::start(&dir, spec.with(&["-smp", "2"]));
    let serial = guest.serial();
    serial.wait_for_line("the first checksum", |line| line.starts_with("sum "));
    saved(&dir, guest, layout);
    let before = serial.mark();
    let program = qemu.program().display().to_string();
    let arguments = ["x.stow", "--lazy", "--wait", "--qemu", &program];
    let restored = dir.restore(&[&arguments[..], more].concat());
    assert_eq!(restored.report["memory"], "lazy");
    assert_eq!(restored.report["served"]["phase"], "complete");
    let is_direct = restored.report["served"]["is_direct"].as_bool().unwrap();
    assert_eq!(is_direct, !more.contains(&"--through-qemu"));
    for (what, line) in [
        ("disk", "disk ok"),
        ("network", "net ok"),
        ("checksum", "sum "),
    ] {
        serial.wait_for_new_line(&before, what, |found| found.starts_with(line));
    }
    serial.assert_goes_on(&before);
    // It can be saved and restored again in any way.
    dir.json(&["save", "web01", "again.stow"]);
    restored.qemu.wait_for_exit();
    let before = serial.mark();
    let _again = dir.restore(&["again.stow", "--qemu", &program]);
    serial.assert_goes_on(&before);
}

#[test]
fn linux_i440fx_on_qemu_10() {
    linux_goes_on(Qemu::V10, "pc", "zstd", &[]);
}

#[test]
fn linux_q35_on_qemu_10_through_qemu() {
    linux_goes_on(Qemu::V10, "q35", "raw", &["--through-qemu"]);
}

#[test]
fn linux_i440fx_on_qemu_7_2_through_qemu() {
    linux_goes_on(Qemu::V7_2, "pc", "zstd", &["--through-qemu"]);
}

#[test]
fn linux_q35_on_qemu_7_2() {
    linux_goes_on(Qemu::V7_2, "q35", "zstd", &[]);
}

/// A guest that does not run is restored and gets its memory, which must be the same.
#[track_caller]
fn comes_back(qemu: Qemu, memory_mib: u32, extra: &[&str], ranges: &[MemoryRange], more: &[&str]) {
    let dir = TestDir::new();
    let mut guest = scribbled(&dir, qemu, memory_mib, extra, ranges);
    let before = memory(guest.pid(), &mut guest.qmp(), ranges);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let program = qemu.program().display().to_string();
    let arguments = ["x.stow", "--lazy", "--wait", "--qemu", &program];
    let restored = dir.restore(&[&arguments[..], more].concat());
    assert_ne!(restored.report["state"], "running");
    let after = memory(restored.qemu.pid(), &mut restored.qmp(), ranges);
    assert_eq!(after, before);
}

#[test]
fn memory_above_the_pci_hole_comes_back() {
    let ranges = [(0, 2 << 30), (4 << 30, 3 << 30)];
    comes_back(Qemu::V10, 5120, &[], &ranges, &[]);
    comes_back(Qemu::V7_2, 5120, &[], &ranges, &["--through-qemu"]);
}

#[test]
fn several_backends_shared_ones_too_come_back() {
    let nodes = [
        "-object",
        "memory-backend-ram,id=m0,size=64M",
        "-object",
        "memory-backend-memfd,id=m1,size=32M,share=on",
        "-numa",
        "node,memdev=m0",
        "-numa",
        "node,memdev=m1",
    ];
    let ranges = [(0, 64 * MIB), (64 * MIB, 32 * MIB)];
    for qemu in Qemu::ALL {
        for more in [&[][..], &["--through-qemu"]] {
            comes_back(qemu, 96, &nodes, &ranges, more);
        }
    }
}

#[test]
fn memory_that_the_guest_writes_meanwhile_is_its_own() {
    const CONTENT_MIB: u32 = 512;
    let spec = GuestSpec {
        memory_mib: 1024,
        kind: Kind::Linux {
            content_mib: CONTENT_MIB,
        },
        ..GuestSpec::default()
    };
    let dir = TestDir::new();
    let mut guest = Guest::start(&dir, spec.clone().named("whole"));
    let whole = guest.serial();
    whole.wait_for_line("the checksum", |line| line.starts_with("sum "));
    guest.kill();
    // Saved just before it writes all of it.
    let guest = Guest::start(&dir, spec.named("writer"));
    let serial = guest.serial();
    serial.wait_for_line("its beginning", |line| line.contains("MiB of content"));
    saved(&dir, guest, "zstd");
    let restored = dir.restore(&["x.stow", "--lazy", "--fill-rate", "4"]);
    serial.wait_for_line("the checksum", |line| line.starts_with("sum "));
    assert_eq!(serial.sums().first(), whole.sums().first());
    assert_eq!(restored.report["state"], "running");
}

/// A restore that is under way.
struct UnderWay {
    command: Child,
}

impl UnderWay {
    fn begin(dir: &TestDir) -> Self {
        let mut command = dir.vmstow_command();
        command.args(["--json", "restore", "x.stow", "--lazy", "--fill-rate", "20"]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        UnderWay {
            command: command.spawn().unwrap(),
        }
    }
}

/// Kills the server when `is_due`; whatever comes of it, `--resume` brings the guest back.
#[track_caller]
fn killed_when(dir: &TestDir, serial: &support::Serial, before: &Mark, delay: Delay) {
    // The guest starts from the same image each time.
    std::fs::write(serial.path(), before.text()).unwrap();
    let kills_command = matches!(delay, Delay::BothAfterMillis(_));
    let mut under_way = UnderWay::begin(dir);
    let victim = server(dir);
    match delay {
        Delay::Millis(millis) | Delay::BothAfterMillis(millis) => {
            std::thread::sleep(Duration::from_millis(millis))
        }
        Delay::Chunks(count) => wait_until("some memory", PATIENCE, || {
            let given = serving(dir, "guest")["given_chunks"].as_u64().unwrap_or(0);
            (given >= count).then_some(()).ok_or(given.to_string())
        }),
    }
    if kills_command {
        under_way.command.kill().unwrap();
    }
    victim.kill();
    let output = under_way.command.wait_with_output().unwrap();
    if !kills_command {
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{delay:?}: {said}");
    }
    let mut again = dir.vmstow();
    again.args(["--json", "restore", "--resume", "guest", "--wait"]);
    let output = again.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{delay:?}: {said}");
    serial.assert_goes_on(before);
    assert_eq!(serving(dir, "guest")["phase"], "complete", "{delay:?}");
    dir.json(&["stop", "guest"]);
    all_have_ended(dir);
}

#[derive(Debug, Clone, Copy)]
enum Delay {
    /// So long after it was there.
    Millis(u64),
    /// As soon as so many chunks were given.
    Chunks(u64),
    /// As `Millis`, and the command that restores is killed with it.
    BothAfterMillis(u64),
}

#[test]
fn a_guest_whose_server_is_killed_goes_on() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let serial = saved_counter(&dir, qemu, 64);
        let before = serial.mark();
        let moments = [0, 2, 5, 10, 20, 50].map(Delay::Millis).into_iter();
        let moments = moments.chain([5, 20, 40, 60].map(Delay::Chunks));
        for delay in moments.chain([0, 1, 2, 3, 5, 8, 30].map(Delay::BothAfterMillis)) {
            killed_when(&dir, &serial, &before, delay);
        }
    }
}

#[test]
fn a_guest_goes_on_even_if_its_keeper_was_killed_too() {
    let dir = TestDir::new();
    let serial = saved_counter(&dir, Qemu::V10, 64);
    let before = serial.mark();
    let _restored = dir.restore(&["x.stow", "--lazy", "--paused", "--fill-rate", "1"]);
    let keepers = dir.processes().into_iter();
    let keeper = keepers.filter(|process| process.argv().iter().any(|word| word == "__keeper"));
    keeper.for_each(|keeper| keeper.kill());
    server(&dir).kill();
    let listed = dir.vmstow().arg("list").output().unwrap();
    let said = String::from_utf8_lossy(&listed.stderr).into_owned();
    assert!(said.contains("vmstow restore --resume guest"), "{said}");
    dir.json(&["restore", "--resume", "guest", "--wait"]);
    let mut qmp = support::Qmp::connect(dir.join("run/guest/qmp.sock"));
    qmp.command("cont", json!({}));
    serial.assert_goes_on(&before);
}

/// A monitor connection that is not waited for: the guest's page at that address is read through it.
fn ask_for_page(socket: &std::path::Path, guest_address: u64) -> BufReader<UnixStream> {
    let stream = UnixStream::connect(socket).unwrap();
    let mut monitor = BufReader::new(stream);
    let mut line = String::new();
    monitor.read_line(&mut line).unwrap();
    let say = |words: Value| writeln!(monitor.get_ref(), "{words}").unwrap();
    say(json!({ "execute": "qmp_capabilities" }));
    let line = format!("xp /1bx {guest_address:#x}");
    let arguments = json!({ "command-line": line });
    say(json!({ "execute": "human-monitor-command", "arguments": arguments, "id": "page" }));
    monitor
}

/// Whether the page that was asked for has come within a second.
fn page_has_come(monitor: &mut BufReader<UnixStream>) -> bool {
    let second = Some(Duration::from_secs(1));
    monitor.get_ref().set_read_timeout(second).unwrap();
    let mut line = String::new();
    while monitor.read_line(&mut line).is_ok_and(|len| len > 0) {
        if line.contains("\"page\"") {
            return true;
        }
        line.clear();
    }
    false
}

#[test]
fn a_guest_goes_on_whose_main_loop_waits_for_a_page() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let serial = saved_counter(&dir, qemu, 64);
        let before = serial.mark();
        let program = qemu.program().display().to_string();
        let arguments = ["x.stow", "--lazy", "--fill-rate", "1", "--qemu", &program];
        let restored = dir.restore(&arguments);
        assert_eq!(restored.report["state"], "running");
        server(&dir).kill();
        let mut monitor = ask_for_page(&dir.join("run/guest/qmp.sock"), 0x3c0_0000);
        assert!(!page_has_come(&mut monitor), "nobody can have given it");
        // A monitor connection that is made now is not greeted: only the keeper's is answered.
        let mut late = UnixStream::connect(dir.join("run/guest/keeper.qmp")).unwrap();
        late.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        assert!(late.read(&mut [0]).is_err());
        drop(late);
        dir.json(&["restore", "--resume", "guest", "--wait"]);
        assert!(page_has_come(&mut monitor));
        serial.assert_goes_on(&before);
    }
}

#[test]
fn a_guest_that_its_user_let_run_is_never_ended() {
    let dir = TestDir::new();
    let serial = saved_counter(&dir, Qemu::V10, 64);
    let before = serial.mark();
    let restored = dir.restore(&["x.stow", "--lazy", "--paused", "--fill-rate", "1"]);
    restored.qmp().command("cont", json!({}));
    server(&dir).kill();
    std::fs::rename(dir.join("x.stow"), dir.join("away.stow")).unwrap();
    let said = dir.refused(1, &["restore", "--resume", "guest"]);
    assert!(
        said.contains("cannot open") && said.contains("x.stow"),
        "{said}"
    );
    assert!(!restored.qemu.has_ended());
    std::fs::rename(dir.join("away.stow"), dir.join("x.stow")).unwrap();
    dir.json(&["restore", "--resume", "guest", "--wait"]);
    serial.assert_goes_on(&before);
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_panics() {
    let dir = TestDir::new();
    saved_counter(&dir, Qemu::V10, 64);
    dir.refused(2, &["restore", "x.stow", "--wait"]);
    dir.refused(2, &["restore", "x.stow", "--lazy", "--map"]);
    dir.refused(2, &["restore", "x.stow", "--resume", "guest"]);
    dir.refused(2, &["restore", "--resume", "guest", "--paused"]);
    let mut command = dir.vmstow();
    command.args(["restore", "x.stow", "--lazy", "--qemu"]);
    command
        .arg(OsStr::from_bytes(b"/no/such/\xff"))
        .assert()
        .code(4);
    let eager = dir.restore(&["x.stow"]);
    let said = dir.refused(2, &["restore", "--resume", eager.name()]);
    assert!(
        said.contains("only a guest that was restored with --lazy"),
        "{said}"
    );
}

#[test]
fn a_guest_whose_image_turns_out_damaged_is_frozen() {
    for more in [&[][..], &["--through-qemu"]] {
        let dir = TestDir::new();
        saved_counter(&dir, Qemu::V10, 64);
        // Nobody asks for that page: the guest is paused.
        let (chunk, at) = chunk_of(&dir, 0x3c00);
        flip_bit(dir.join("x.stow"), at, 3);
        let arguments = ["x.stow", "--lazy", "--paused", "--fill-rate", "60"];
        let restored = dir.restore(&[&arguments[..], more].concat());
        wait_until("the guest to be frozen", PATIENCE, || {
            let state = Process::open(restored.qemu.pid()).and_then(|qemu| qemu.state());
            (state == Some('T'))
                .then_some(())
                .ok_or(format!("{state:?}"))
        });
        let listed = dir.json(&["list"]);
        assert_eq!(listed["guests"][0]["state"], "damaged");
        let damage = listed["guests"][0]["damage"].to_string();
        assert!(damage.contains(&format!("chunk {} ", chunk.0)), "{damage}");
        assert!(damage.contains("pc.ram"), "{damage}");
        let said = dir.refused(3, &["restore", "--resume", "guest"]);
        assert!(
            said.contains("was frozen since its image is damaged"),
            "{said}"
        );
        dir.json(&["stop", "guest"]);
        restored.qemu.wait_for_exit();
        all_have_ended(&dir);
    }
}

#[test]
fn damaged_device_state_gives_no_guest() {
    let dir = TestDir::new();
    saved_counter(&dir, Qemu::V10, 64);
    let image = vmstow::store::FileSource::open(&dir.join("x.stow")).unwrap();
    let image = vmstow::container::Image::open(image).unwrap();
    let last = image.chunks().last().unwrap().unwrap();
    flip_bit(dir.join("x.stow"), last.stored_offset.0 + 20, 1);
    let said = dir.refused(3, &["restore", "x.stow", "--lazy"]);
    let damaged = format!("x.stow is damaged: chunk {} ", last.index.0);
    assert!(said.contains(&damaged), "{said}");
    assert_eq!(dir.join("run").read_dir().unwrap().count(), 0);
}

#[test]
fn what_a_guest_asked_for_first_is_kept_and_given_first() {
    let dir = TestDir::new();
    let serial = saved_counter(&dir, Qemu::V10, 64);
    let before = serial.mark();
    let digest = dir.json(&["inspect", "x.stow"])["image_digest"].clone();
    drop(dir.restore(&["x.stow", "--lazy", "--record", "--wait"]));
    dir.json(&["stop", "guest"]);
    let described = dir.json(&["inspect", "x.stow"]);
    assert_eq!(described["generation"], 2);
    assert_eq!(described["image_digest"], digest);
    assert_eq!(described["trust"]["state"], "trusted");
    let sections = described["sections"].as_array().unwrap();
    let mut sections = sections.iter();
    let recorded = sections.find(|section| section["type"] == "WSET").unwrap();
    assert!(recorded["len"].as_u64().unwrap() > 48, "no chunk in it");
    assert_eq!(dir.json(&["verify", "x.stow"])["is_whole"], true);
    std::fs::write(serial.path(), before.text()).unwrap();
    let restored = dir.restore(&["x.stow", "--lazy", "--wait"]);
    assert_eq!(restored.report["served"]["phase"], "complete");
    serial.assert_goes_on(&before);
}

#[test]
fn a_guest_that_cannot_wait_for_its_memory_is_refused_beforehand() {
    let dir = TestDir::new();
    let object = format!(
        "memory-backend-file,id=m0,size=64M,mem-path={}",
        dir.join("ram").display()
    );
    let spec = GuestSpec::default().with(&["-object", &object, "-machine", "memory-backend=m0"]);
    let mut guest = Guest::start(&dir, spec);
    guest.serial().wait_for_tick(3);
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let said = dir.refused(4, &["restore", "x.stow", "--lazy"]);
    assert!(said.contains("keeps guest memory in a file"), "{said}");
    assert!(said.contains("restore without --lazy"), "{said}");
    assert!(dir.qemus().is_empty());
}

#[test]
fn who_may_not_use_userfaultfd_is_told_before_qemu_is_started() {
    let dir = TestDir::new();
    let serial = saved_counter(&dir, Qemu::V10, 64);
    let before = serial.mark();
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap();
    let output = dir.as_nobody(&["restore", "x.stow", "--lazy", "--wait"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if setting.trim() == "1" {
        assert!(output.status.success(), "{said}");
    } else {
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains("this user may not use userfaultfd"), "{said}");
        assert!(dir.qemus().is_empty());
        let output = dir.as_nobody(&["restore", "x.stow"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
    }
    serial.assert_goes_on(&before);
    assert!(dir.as_nobody(&["stop", "guest"]).status.success());
}

#[test]
fn a_guest_that_lacks_memory_is_not_saved() {
    let dir = TestDir::new();
    let serial = saved_counter(&dir, Qemu::V10, 64);
    let before = serial.mark();
    let restored: Restored = dir.restore(&["x.stow", "--lazy", "--fill-rate", "1"]);
    let said = dir.refused(4, &["save", restored.name(), "y.stow"]);
    assert!(said.contains("still gets its memory"), "{said}");
    serial.assert_goes_on(&before);
}

#[test]
fn an_image_in_use_is_not_changed_and_a_restore_can_be_interrupted() {
    let dir = TestDir::new();
    saved_counter(&dir, Qemu::V10, 64);
    let restored = dir.restore(&["x.stow", "--lazy", "--fill-rate", "1"]);
    let mut command = dir.vmstow_command();
    let waiting = command.args(["restore", "--resume", "guest", "--wait"]);
    let waiting = waiting.stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    Process::open(waiting.id()).unwrap().signal(Signal::INT);
    assert!(!waiting.wait_with_output().unwrap().status.success());
    assert!(!restored.qemu.has_ended());
    let image = vmstow::store::FileAppender::open(&dir.join("x.stow"));
    assert!(matches!(
        image,
        Err(vmstow::store::StoreError::InUse { .. })
    ));
}
