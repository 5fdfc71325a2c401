//! A guest is saved, its QEMU ends, it is restored and goes on as if nothing had happened: it says so itself.

#![allow(missing_docs, clippy::unwrap_used, reason = "this is a test")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use support::{Guest, GuestSpec, Kind, PATIENCE, Qemu, Qmp, Restored, TestDir, wait_until};

// The main story. A heavy guest, once for each pair of QEMUs, machine and layout.

const CONTENT_MIB: u32 = 200;

#[test]
fn linux_i440fx_on_qemu_10() {
    linux_goes_on(Qemu::V10, "pc", [(Qemu::V10, "zstd"), (Qemu::V10, "raw")]);
}

#[test]
fn linux_q35_on_qemu_10() {
    linux_goes_on(Qemu::V10, "q35", [(Qemu::V10, "raw"), (Qemu::V10, "zstd")]);
}

#[test]
fn linux_i440fx_on_qemu_7_2_then_raw_to_10() {
    linux_goes_on(Qemu::V7_2, "pc", [(Qemu::V7_2, "zstd"), (Qemu::V10, "raw")]);
}

#[test]
fn linux_i440fx_on_qemu_7_2_then_zstd_to_10() {
    linux_goes_on(Qemu::V7_2, "pc", [(Qemu::V7_2, "raw"), (Qemu::V10, "zstd")]);
}

#[test]
fn linux_q35_on_qemu_7_2_then_raw_to_10() {
    linux_goes_on(
        Qemu::V7_2,
        "q35",
        [(Qemu::V7_2, "zstd"), (Qemu::V10, "raw")],
    );
}

#[test]
fn linux_q35_on_qemu_7_2_then_zstd_to_10() {
    linux_goes_on(
        Qemu::V7_2,
        "q35",
        [(Qemu::V7_2, "raw"), (Qemu::V10, "zstd")],
    );
}

/// Starts Linux by hand and takes it from image to image: each hop saves it in a layout and restores it in a QEMU.
fn linux_goes_on(qemu: Qemu, machine: &str, hops: [(Qemu, &str); 2]) {
    let dir = TestDir::new();
    let spec = GuestSpec {
        name: "web01".to_owned(),
        qemu,
        machine: machine.to_owned(),
        kind: Kind::Linux {
            content_mib: CONTENT_MIB,
        },
        memory_mib: 512,
        ..GuestSpec::default()
    };
    let mut by_hand = Guest::start(&dir, spec);
    let serial = by_hand.serial();
    serial.wait_for_line("the first checksum", |line| line.starts_with("sum "));
    serial.wait_for_line("the network", |line| line == "net ok");
    let mut source = by_hand.source();
    let mut restored: Option<Restored> = None;
    for (hop, (target, layout)) in hops.into_iter().enumerate() {
        let image = format!("{hop}.stow");
        let saved = dir.json(&["save", &source, &image, "--layout", layout]);
        assert_eq!(
            (&saved["name"], &saved["guest"]),
            (&json!("web01"), &json!("quit"))
        );
        match restored.take() {
            Some(before) => before.qemu.wait_for_exit(),
            None => drop(by_hand.wait_for_exit()),
        }
        let before = serial.mark();
        let program = target.program().display().to_string();
        let now = dir.restore(&[&image, "--qemu", &program]);
        assert_eq!(
            (now.name(), &now.report["state"]),
            ("web01", &json!("running"))
        );
        for (what, line) in [
            ("disk", "disk ok"),
            ("network", "net ok"),
            ("checksum", "sum "),
        ] {
            serial.wait_for_new_line(&before, what, |found| found.starts_with(line));
        }
        serial.assert_goes_on(&before);
        now.name().clone_into(&mut source);
        restored = Some(now);
    }
    let ended = dir.json(&["stop", &source]);
    assert_eq!(ended["state"], "stopped");
}

// What else there is to know of a save. The counter is enough of a guest.

/// Starts the counter, and waits until it counts.
fn counter(dir: &TestDir, name: &str) -> Guest {
    counting(dir, GuestSpec::default().named(name))
}

fn counting(dir: &TestDir, spec: GuestSpec) -> Guest {
    let guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(3);
    guest
}

/// What a save changes in QEMU while it lasts.
fn migration_settings(qmp: &mut Qmp) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|query| qmp.command(query, json!({})))
}

#[test]
fn a_guest_may_run_on_after_its_save() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let guest = counting(
            &dir,
            GuestSpec {
                qemu,
                ..GuestSpec::default()
            },
        );
        let mut qmp = guest.qmp();
        qmp.command(
            "migrate-set-parameters",
            json!({ "max-bandwidth": 7 << 20 }),
        );
        let settings = migration_settings(&mut qmp);
        let before = guest.serial().mark();
        let saved = dir.json(&["save", &guest.source(), "x.stow", "--then", "resume"]);
        assert_eq!(saved["guest"], "running");
        assert_eq!(qmp.status(), "running");
        guest.serial().assert_goes_on(&before);
        assert_eq!(migration_settings(&mut qmp), settings);
        dir.vmstow()
            .args(["verify", "--deep", "x.stow"])
            .assert()
            .success();
        let again = dir.json(&["save", &guest.source(), "y.stow"]);
        assert_eq!(again["guest"], "quit");
    }
}

#[test]
fn a_guest_may_stay_stopped_after_its_save() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let guest = counting(
            &dir,
            GuestSpec {
                qemu,
                ..GuestSpec::default()
            },
        );
        let mut qmp = guest.qmp();
        let settings = migration_settings(&mut qmp);
        let saved = dir.json(&["save", &guest.source(), "x.stow", "--then", "pause"]);
        assert_eq!(saved["guest"], "stopped");
        assert_eq!(qmp.status(), qemu.state_behind_a_save());
        assert_eq!(migration_settings(&mut qmp), settings);
        let before = guest.serial().mark();
        dir.json(&["save", &guest.source(), "y.stow", "--from-postmigrate"]);
        let restored = dir.restore(&["y.stow"]);
        assert_eq!(
            restored.report["state"], "paused",
            "nobody knows that it shall run"
        );
        restored.qmp().command("cont", json!({}));
        guest.serial().assert_goes_on(&before);
    }
}

#[test]
fn a_paused_guest_is_paused_when_it_is_restored() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    guest.qmp().command("stop", json!({}));
    let before = guest.serial().mark();
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let restored = dir.restore(&["x.stow"]);
    assert_eq!(restored.report["state"], "paused");
    assert_eq!(restored.report["running_after_ms"], Value::Null);
    let mut qmp = restored.qmp();
    assert_eq!(qmp.status(), "paused");
    assert_eq!(guest.serial().text(), before.text());
    qmp.command("cont", json!({}));
    guest.serial().assert_goes_on(&before);
}

#[test]
fn a_restore_can_leave_a_running_guest_paused() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let restored = dir.restore(&["x.stow", "--paused"]);
    assert_eq!(restored.report["state"], "paused");
    let mut qmp = restored.qmp();
    assert_eq!(qmp.status(), "paused");
    qmp.command("cont", json!({}));
    guest.serial().assert_goes_on(&before);
}

#[test]
fn a_guest_is_found_by_its_process_and_saved_again_by_its_name() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "web01");
    let pid = format!("pid:{}", guest.pid());
    dir.json(&[
        "save",
        &pid,
        "1.stow",
        "--label",
        "ticket=1234",
        "--label",
        "why=",
    ]);
    guest.wait_for_exit();
    let labels = &dir.json(&["inspect", "1.stow"])["manifest"]["labels"];
    assert_eq!(labels, &json!({ "ticket": "1234", "why": "" }));
    for round in 1..4 {
        let (image, next) = (format!("{round}.stow"), format!("{}.stow", round + 1));
        let before = guest.serial().mark();
        let restored = dir.restore(&[&image]);
        assert_eq!(restored.name(), "web01");
        guest.serial().assert_goes_on(&before);
        dir.json(&["save", "web01", &next]);
        restored.qemu.wait_for_exit();
    }
    let argv = |image: &str| dir.json(&["inspect", image])["manifest"]["qemu"]["argv"].clone();
    assert_eq!(argv("2.stow"), argv("4.stow"), "saving again adds nothing");
}

#[test]
fn an_image_goes_through_pipes() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    let out = std::fs::File::create(dir.join("x.stow")).unwrap();
    let mut save = dir.vmstow_command();
    let save = save.args(["save", &guest.source(), "-"]).stdout(out);
    assert!(save.status().unwrap().success());
    guest.wait_for_exit();
    let before = guest.serial().mark();
    dir.vmstow()
        .args(["verify", "--deep", "x.stow"])
        .assert()
        .success();
    let mut restore = dir.vmstow();
    let restore = restore.args(["--json", "restore", "-", "--trust"]);
    let output = restore.pipe_stdin(dir.join("x.stow")).unwrap().unwrap();
    let restored = Restored::of(serde_json::from_slice(&output.stdout).unwrap());
    guest.serial().assert_goes_on(&before);
    drop(restored);
}

#[test]
fn a_dry_run_touches_nothing() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    let mut qmp = guest.qmp();
    let settings = migration_settings(&mut qmp);
    let names = dir.names();
    let state = |name: &str| std::fs::read_dir(dir.join(name)).unwrap().count();
    let plan = dir.json(&["save", &guest.source(), "x.stow", "--dry-run"]);
    assert_eq!(plan["run_state"], "running");
    assert_eq!(plan["blockers"], json!([]));
    assert_eq!(qmp.status(), "running");
    assert_eq!(migration_settings(&mut qmp), settings);
    assert_eq!(qmp.command("query-migrate", json!({})), json!({}));
    assert_eq!((dir.names(), state("state")), (names, 0));

    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let (names, said) = (dir.names(), guest.serial().text());
    let ours = state("run");
    let plan = dir.json(&["restore", "x.stow", "--dry-run"]);
    assert_eq!(plan["name"], "guest");
    let command = dir.json(&["restore", "x.stow", "--print-command"]);
    assert_eq!(command["argv"], plan["argv"]);
    assert_eq!((dir.names(), state("run")), (names, ours));
    assert_eq!(guest.serial().text(), said);
    assert!(dir.processes().is_empty());
}

#[test]
fn an_image_is_private_and_never_replaced_unasked() {
    let dir = TestDir::new();
    let guest = counter(&dir, "guest");
    dir.json(&["save", &guest.source(), "x.stow", "--then", "resume"]);
    let mode = || {
        std::fs::metadata(dir.join("x.stow"))
            .unwrap()
            .permissions()
            .mode()
    };
    assert_eq!(mode() & 0o777, 0o600);
    let first = std::fs::read(dir.join("x.stow")).unwrap();
    let said = dir.refused(2, &["save", &guest.source(), "x.stow"]);
    assert!(said.contains("--replace"), "{said}");
    assert_eq!(guest.qmp().status(), "running");
    assert!(std::fs::read(dir.join("x.stow")).unwrap() == first);
    dir.json(&["save", &guest.source(), "x.stow", "--replace"]);
    assert!(std::fs::read(dir.join("x.stow")).unwrap() != first);
    assert_eq!(mode() & 0o777, 0o600);
}

// What else there is to know of a restore.

#[test]
fn a_guest_gets_another_disk_and_another_name() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let moved = dir.join("moved.img").display().to_string();
    std::fs::rename(guest.disk(), &moved).unwrap();
    let said = dir.refused(4, &["restore", "x.stow"]);
    assert!(said.contains("guest.img"), "{said}");
    let remap = format!("disk:disk0={moved}");
    let restored = dir.restore(&["x.stow", "--remap", &remap, "--name", "other"]);
    assert_eq!(restored.name(), "other");
    guest.serial().assert_goes_on(&before);
    assert_eq!(
        restored.qmp().command("query-name", json!({})),
        json!({ "name": "other" })
    );
    let blocks = restored.qmp().command("query-block", json!({}));
    let file = blocks
        .as_array()
        .unwrap()
        .iter()
        .find(|block| block["device"] == "disk0");
    assert_eq!(file.unwrap()["inserted"]["file"], json!(moved));
}

#[test]
fn a_relative_path_starts_where_the_user_stands() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    std::fs::create_dir(dir.join("elsewhere")).unwrap();
    std::fs::rename(guest.disk(), dir.join("elsewhere/moved.img")).unwrap();
    let mut restore = dir.vmstow();
    let restore = restore.current_dir(dir.join("elsewhere"));
    let restore = restore.args([
        "--json",
        "restore",
        "../x.stow",
        "--remap",
        "disk:disk0=moved.img",
    ]);
    let restored = Restored::of(serde_json::from_slice(&restore.unwrap().stdout).unwrap());
    guest.serial().assert_goes_on(&before);
    drop(restored);
}

#[test]
fn a_digest_proves_that_a_copied_disk_is_the_same() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    let options = ["--disk-digest", "--then", "pause"];
    dir.json(&[&["save", &guest.source(), "y.stow"], &options[..]].concat());
    dir.json(&["save", &guest.source(), "x.stow", "--from-postmigrate"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let bytes = std::fs::read(guest.disk()).unwrap();
    std::fs::write(dir.join("copy.img"), &bytes).unwrap();
    std::fs::rename(dir.join("copy.img"), guest.disk()).unwrap();
    let warnings =
        |words: &[&str]| dir.json(&[&["restore", "--dry-run"], words].concat())["warnings"].clone();
    let accepted = warnings(&["x.stow", "--accept-changed-disks"]);
    assert_eq!(accepted[0]["code"], "disk.replaced");
    assert_eq!(warnings(&["y.stow"]), json!([]));
    let restored = dir.restore(&["y.stow"]);
    guest.serial().assert_goes_on(&before);
    drop(restored);
    std::fs::write(
        guest.disk(),
        [&bytes[..4096], &[1], &bytes[4097..]].concat(),
    )
    .unwrap();
    let said = dir.refused(4, &["restore", "y.stow"]);
    assert!(said.contains("guest.img changed since"), "{said}");
}

#[test]
fn one_image_gives_two_guests_if_they_do_not_share_what_they_write() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        is_disk_read_only: true,
        ..GuestSpec::default()
    };
    let mut guest = counting(&dir, spec.named("web01"));
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let serial = support::Serial::at(dir.join("second.serial"));
    let remap = format!("chardev:serial0=file:{}", serial.path().display());
    let first = dir.restore(&["x.stow"]);
    let second = dir.restore(&["x.stow", "--remap", &remap]);
    assert_eq!((first.name(), second.name()), ("web01", "web01-2"));
    guest.serial().assert_goes_on(&before);
    serial.assert_goes_on(&before);
    let listed = &dir.json(&["list"])["guests"];
    let names: Vec<&Value> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|guest| &guest["name"])
        .collect();
    assert_eq!(names, ["web01", "web01-2"]);
    assert_eq!(listed[0]["state"], "running");
}

#[test]
fn two_guests_never_write_to_one_disk() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let first = dir.restore(&["x.stow"]);
    let said = dir.refused(4, &["restore", "x.stow", "--accept-changed-disks"]);
    assert!(said.contains("Failed to get \"write\" lock"), "{said}");
    assert_eq!(dir.qemus().len(), 1, "only the first one is left");
    assert_eq!(first.qmp().status(), "running");
    let guests = &dir.json(&["list"])["guests"];
    assert_eq!(guests.as_array().unwrap().len(), 1, "{guests}");
}

#[test]
fn restored_guests_are_listed_and_stopped() {
    let dir = TestDir::new();
    assert_eq!(dir.json(&["list"])["guests"], json!([]));
    let mut guest = counter(&dir, "guest");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let restored = dir.restore(&["x.stow"]);
    let report = &restored.report;
    assert!(report["running_after_ms"].as_u64().unwrap() < 60_000);
    assert!(report["stream_bytes"].as_u64().unwrap() > 1 << 20);
    let listed = &dir.json(&["list"])["guests"];
    for field in ["name", "pid", "qmp"] {
        assert_eq!(listed[0][field], report[field], "{field}");
    }
    dir.vmstow()
        .args(["stop", "guest"])
        .assert()
        .success()
        .stdout("guest has ended\n");
    restored.qemu.wait_for_exit();
    assert_eq!(dir.json(&["list"])["guests"], json!([]));
    let said = dir.refused(4, &["stop", "guest"]);
    assert!(
        said.starts_with("error: no guest named guest runs here\n"),
        "{said}"
    );
    assert_eq!(std::fs::read_dir(dir.join("run")).unwrap().count(), 0);
}

#[test]
fn a_guest_in_the_foreground_ends_with_ctrl_c() {
    let dir = TestDir::new();
    let mut guest = counter(&dir, "guest");
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let before = guest.serial().mark();
    let mut restore = dir.vmstow_command();
    let restore = restore.args(["restore", "x.stow", "--foreground"]);
    let mut restore = restore.stdout(Stdio::null()).spawn().unwrap();
    guest.serial().assert_goes_on(&before);
    let qemu = dir.adopt_qemu("guest", &[]);
    kill_process(Pid::from_child(&restore), Signal::INT).unwrap();
    let status = wait_until("vmstow to end", PATIENCE, || {
        restore.try_wait().unwrap().ok_or("it runs".to_owned())
    });
    assert_eq!(status.code(), Some(130));
    assert!(qemu.has_ended());
    assert_eq!(dir.json(&["list"])["guests"], json!([]));
}

#[test]
fn the_number_of_threads_changes_no_byte_of_what_is_saved() {
    let dir = TestDir::new();
    let spec = GuestSpec {
        memory_mib: 16,
        is_disk_read_only: true,
        ..GuestSpec::default()
    };
    let mut guest = counting(&dir, spec.with(&["-rtc", "clock=vm"]));
    dir.json(&["save", &guest.source(), "x.stow"]);
    guest.wait_for_exit();
    let save = |threads: &str, image: &str| {
        let restored = dir.restore(&["x.stow", "--paused"]);
        let saved = dir.json(&["save", "guest", image, "--threads", threads, "--replace"]);
        restored.qemu.wait_for_exit();
        let chunks = payload(&dir, image);
        let stream = zstd::decode_all(chunks.as_slice()).unwrap();
        (stream, (saved["image_digest"].clone(), chunks))
    };
    // On a busy machine QEMU cuts its stream otherwise, since it goes by time: two equal ones are needed.
    for _ in 0..20 {
        let (one, four) = (save("1", "1.stow"), save("4", "4.stow"));
        if one.0 == four.0 {
            assert!(one.1 == four.1);
            return;
        }
    }
    panic!("QEMU never wrote the same stream twice");
}

/// The chunks of an image as they are stored.
fn payload(dir: &TestDir, image: &str) -> Vec<u8> {
    let sections = dir.json(&["inspect", image])["sections"].clone();
    let section = |name: &str, field: &str| {
        let found = sections
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["type"] == name);
        usize::try_from(found.unwrap()[field].as_u64().unwrap()).unwrap()
    };
    let bytes = std::fs::read(dir.join(image)).unwrap();
    bytes[section("HEAD", "len")..section("XML", "offset")].to_owned()
}
