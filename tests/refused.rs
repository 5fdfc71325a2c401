//! What cannot be saved or restored is refused by name, before anything is touched or started.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "this is a test")]

mod support;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::net::TcpListener;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use vmstow::host::ProcessId;

use support::{
    Adopted, Before, Guest, GuestSpec, PATIENCE, Process, Qemu, Qmp, Settings, TestDir, flip_bit,
    wait_for_silence, wait_until,
};

fn start(dir: &TestDir, qemu: Qemu, extra: &[&str]) -> Guest {
    let spec = GuestSpec {
        qemu,
        ..GuestSpec::default()
    };
    let guest = Guest::start(dir, spec.with(extra));
    guest.serial().wait_for_tick(2);
    guest
}

/// Runs `vmstow`, which must refuse with that exit code, leave every file as it is and start nothing.
#[track_caller]
fn refused(dir: &TestDir, code: i32, arguments: &[&str]) -> String {
    let (names, qemus) = (dir.names(), pids(dir));
    let said = dir.refused(code, arguments);
    eprintln!("$ vmstow {}\n{said}", arguments.join(" "));
    assert!(said.starts_with("error: "), "{said}");
    wait_for_silence(dir);
    assert_eq!(dir.names(), names);
    assert_eq!(pids(dir), qemus, "a QEMU was started");
    said
}

fn pids(dir: &TestDir) -> Vec<u32> {
    let mut pids: Vec<u32> = dir.qemus().iter().map(Process::pid).collect();
    pids.sort_unstable();
    pids
}

#[track_caller]
fn assert_says(said: &str, wanted: &[&str]) {
    for wanted in wanted {
        assert!(said.contains(wanted), "{wanted:?} is missing in: {said}");
    }
}

#[test]
fn a_guest_being_migrated_is_left_to_who_migrates_it() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let guest = start(&dir, qemu, &[]);
        guest.serial().wait_for_tick(18); // its memory is full by then, which keeps the migration going
        let mut qmp = guest.qmp();
        qmp.command("migrate-set-parameters", json!({ "max-bandwidth": 10_000 }));
        let before = Settings::of(&mut qmp);
        qmp.command("migrate", json!({ "uri": "exec:cat >/dev/null" }));
        let status = |qmp: &mut Qmp| qmp.command("query-migrate", json!({}))["status"].clone();
        wait_until("a migration", PATIENCE, || {
            let found = status(&mut qmp);
            (found == "active").then_some(()).ok_or(found.to_string())
        });
        for words in [&["x.stow"][..], &["x.stow", "--dry-run"]] {
            let said = refused(&dir, 4, &[&["save", &guest.source()], words].concat());
            let sentence =
                "error: guest is being migrated already (status active); it was not touched";
            assert_says(&said, &[sentence, "migrate_cancel"]);
        }
        assert_eq!(
            (status(&mut qmp), qmp.status()),
            (json!("active"), "running".into())
        );
        assert_eq!(Settings::of(&mut qmp), before);
        guest.serial().wait_for_tick(guest.serial().last_tick() + 3);
        qmp.command("migrate_cancel", json!({}));
        wait_until("its end", PATIENCE, || {
            let found = status(&mut qmp);
            (found == "cancelled")
                .then_some(())
                .ok_or(found.to_string())
        });
        dir.vmstow()
            .args(["save", &guest.source(), "x.stow"])
            .assert()
            .success();
    }
}

#[test]
fn a_monitor_that_another_client_holds_is_busy() {
    let dir = TestDir::new();
    let guest = start(&dir, Qemu::V10, &[]);
    let before = Before::of(&dir, &guest);
    let _held = Qmp::connect(guest.qmp_path());
    let said = refused(&dir, 4, &["save", &guest.source(), "x.stow"]);
    assert_says(&said, &["another client holds it", "one more monitor"]);
    before.assert_is_back(&dir, &guest);
}

/// Two saves that begin `stagger` apart, by these monitors.
fn save_twice(
    dir: &TestDir,
    monitors: [&Path; 2],
    stagger: Duration,
) -> [(Option<i32>, String); 2] {
    let mut count = 0;
    let children = monitors.map(|monitor| {
        count += 1;
        let source = format!("qmp:{}", monitor.display());
        let mut command = dir.vmstow_command();
        command.args(["save", &source, &format!("{count}.stow")]);
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(stagger);
        child
    });
    children.map(|child| {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), said)
    })
}

#[test]
fn of_two_saves_at_once_one_takes_the_guest() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        for stagger in [0, 10, 40] {
            let mut guest = start(&dir, qemu, &[]);
            let path = guest.qmp_path();
            let ends = save_twice(&dir, [&path, &path], Duration::from_millis(stagger));
            eprintln!("{ends:?}");
            let mut codes = [ends[0].0, ends[1].0];
            codes.sort();
            assert_eq!(codes, [Some(0), Some(4)], "{ends:?}");
            assert!(guest.wait_for_exit().success());
            assert_one_image(&dir);
        }
    }
}

/// One image, which is whole; it is removed.
#[track_caller]
fn assert_one_image(dir: &TestDir) {
    wait_for_silence(dir);
    let names = dir.names();
    let images: Vec<_> = names.iter().filter(|name| name.contains(".stow")).collect();
    let [image] = images[..] else {
        panic!("{images:?}")
    };
    dir.vmstow().args(["verify", image]).assert().success();
    std::fs::remove_file(dir.join(image)).unwrap();
}

#[test]
fn of_two_saves_by_two_monitors_one_takes_the_guest() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        for stagger in [0, 3, 6, 10, 15, 20, 25, 30, 40, 50, 60] {
            let mut guest = start(&dir, qemu, &[]);
            let other = dir.join("guest.check.qmp");
            let monitors = [&guest.qmp_path(), other.as_path()];
            let ends = save_twice(&dir, monitors, Duration::from_millis(stagger));
            eprintln!("{stagger} ms: {ends:?}");
            let mut codes = [ends[0].0, ends[1].0];
            codes.sort();
            assert_eq!(codes, [Some(0), Some(4)], "{ends:?}");
            assert!(guest.wait_for_exit().success());
            assert_one_image(&dir);
        }
    }
}

#[test]
fn a_guest_that_is_being_saved_is_left_alone() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let guest = start(&dir, qemu, &[]);
        let pid = i32::try_from(guest.pid()).unwrap();
        let lock = ProcessId::of(pid).unwrap().lock().unwrap();
        let said = refused(&dir, 4, &["save", &guest.source(), "x.stow"]);
        let sentence = "error: guest is being saved already; it was not touched";
        assert_says(&said, &[sentence, "wait until that save has ended"]);
        let tick = guest.serial().last_tick();
        guest.serial().wait_for_tick(tick + 2);
        drop(lock);
        dir.vmstow()
            .args(["save", &guest.source(), "x.stow"])
            .assert()
            .success();
    }
}

#[test]
fn a_guest_that_waits_for_its_stream_is_not_saved() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::default()
        };
        let guest = Guest::start(&dir, spec.with(&["-incoming", "defer"]));
        guest.qmp();
        let said = refused(&dir, 4, &["save", &guest.source(), "x.stow"]);
        assert_says(&said, &["error: guest cannot be saved: it is inmigrate"]);
        assert_eq!(guest.qmp().status(), "inmigrate");
    }
}

#[test]
fn a_guest_that_was_migrated_is_saved_only_when_told_to() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let mut guest = start(&dir, qemu, &[]);
        dir.vmstow()
            .args(["save", &guest.source(), "x.stow", "--then", "pause"])
            .args(["--capture", "migration"])
            .assert()
            .success();
        let said = refused(&dir, 4, &["save", &guest.source(), "y.stow"]);
        let sentence = "error: guest cannot be saved: it is postmigrate";
        assert_says(&said, &[sentence, "--from-postmigrate"]);
        assert_eq!(guest.qmp().status(), "postmigrate");
        dir.vmstow()
            .args(["save", &guest.source(), "y.stow", "--from-postmigrate"])
            .assert()
            .success();
        assert!(guest.wait_for_exit().success());
        dir.vmstow().args(["verify", "y.stow"]).assert().success();
    }
}

#[test]
fn a_device_that_cannot_migrate_is_named_in_the_words_of_qemu() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let mut words = Vec::new();
        for id in ["one", "two"] {
            words.extend([
                "-drive".to_owned(),
                format!("if=none,id={id},driver=null-co,read-zeroes=on"),
            ]);
            words.extend(["-device".to_owned(), format!("nvme,drive={id},serial={id}")]);
        }
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let guest = start(&dir, qemu, &words);
        Settings::make_unusual(&guest);
        let before = Before::of(&dir, &guest);
        let said = refused(&dir, 4, &["save", &guest.source(), "x.stow"]);
        let sentence = "error: QEMU refuses to migrate guest, which runs on as before";
        assert_says(&said, &[sentence, "/nvme", "detach the device"]);
        let dry = dir
            .vmstow()
            .args(["save", &guest.source(), "x.stow", "--dry-run"])
            .assert()
            .code(4);
        let plan = String::from_utf8(dry.get_output().stdout.clone()).unwrap();
        eprintln!("{plan}");
        let blockers: Vec<_> = plan
            .lines()
            .filter(|line| line.contains("blocked: "))
            .collect();
        assert_eq!(blockers.len(), 2, "{plan}");
        assert!(blockers.iter().all(|line| line.contains("/nvme")), "{plan}");
        before.assert_is_back(&dir, &guest);
    }
}

/// A QEMU without the sockets that every guest here has.
fn bare_qemu(dir: &TestDir, cwd: &Path, arguments: &[&str]) -> Adopted {
    let mut command = Command::new(Qemu::V10.program());
    command.args([
        "-name", "bare", "-machine", "pc", "-accel", "tcg", "-m", "32", "-display", "none",
    ]);
    command
        .args(arguments)
        .current_dir(cwd)
        .env("KNOWS", dir.path());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let process = wait_until("its arguments", PATIENCE, || {
        Process::open(child.id()).ok_or(String::new())
    });
    std::thread::spawn(move || child.wait());
    Adopted(process)
}

#[test]
fn a_qemu_without_a_monitor_of_ours_is_told_how_to_get_one() {
    let dir = TestDir::new();
    let none = bare_qemu(&dir, dir.path(), &[]);
    std::thread::sleep(Duration::from_millis(300));
    let source = format!("pid:{}", none.pid());
    let said = refused(&dir, 4, &["save", &source, "x.stow"]);
    assert_says(&said, &["has no QMP monitor", "-qmp unix:"]);

    let tcp = bare_qemu(
        &dir,
        dir.path(),
        &["-qmp", "tcp:127.0.0.1:0,server=on,wait=off"],
    );
    std::thread::sleep(Duration::from_millis(300));
    let source = format!("pid:{}", tcp.pid());
    let said = refused(&dir, 4, &["save", &source, "x.stow"]);
    assert_says(&said, &["tcp:127.0.0.1:0", "-qmp unix:"]);

    let said = refused(&dir, 4, &["save", "qmp:nowhere.sock", "x.stow"]);
    assert_says(
        &said,
        &["cannot connect to the monitor nowhere.sock", "-qmp option"],
    );
    let said = refused(&dir, 4, &["save", "pid:4194304", "x.stow"]);
    assert_says(&said, &["there is no process 4194304"]);
}

#[test]
fn what_only_this_qemu_has_is_refused_by_name() {
    let dir = TestDir::new();
    let guest = start(&dir, Qemu::V10, &["-snapshot"]);
    let before = Before::of(&dir, &guest);
    let said = refused(&dir, 4, &["save", &guest.source(), "x.stow"]);
    assert_says(
        &said,
        &[
            "error: guest, which runs on as before, could not be restored",
            "-snapshot",
        ],
    );
    before.assert_is_back(&dir, &guest);
}

#[test]
fn a_save_that_takes_too_long_is_undone() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let guest = start(&dir, qemu, &["-device", "virtio-rng-pci"]);
        Settings::make_unusual(&guest);
        let before = Before::of(&dir, &guest);
        let said = refused(
            &dir,
            1,
            &["save", &guest.source(), "x.stow", "--timeout", "0"],
        );
        let sentence = "error: guest was not saved and runs on as before\n  why: the save took longer than 0 s";
        assert_says(&said, &[sentence, "give a longer --timeout"]);
        before.assert_is_back(&dir, &guest);
        dir.vmstow()
            .args(["save", &guest.source(), "x.stow", "--timeout", "60"])
            .assert()
            .success();
    }
}

/// A saved guest; its QEMU has ended.
fn saved(dir: &TestDir, extra: &[&str]) -> PathBuf {
    let mut guest = start(dir, Qemu::V10, extra);
    guest.serial().wait_for_tick(18); // its memory is full by then
    dir.vmstow()
        .args(["save", &guest.source(), "x.stow"])
        .assert()
        .success();
    assert!(guest.wait_for_exit().success());
    dir.join("x.stow")
}

/// No directory of a guest is there.
#[track_caller]
fn assert_no_guest(dir: &TestDir) {
    let list = dir.json(&["list"]);
    assert!(!list.to_string().contains("\"pid\""), "{list}");
    assert!(dir.qemus().is_empty());
}

#[test]
fn every_reason_against_a_restore_is_told_at_once() {
    let dir = TestDir::new();
    let socket = dir.join("busy.sock");
    let chardev = format!(
        "socket,id=busy,path={},server=on,wait=off",
        socket.display()
    );
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let number = port.local_addr().unwrap().port();
    drop(port);
    let screen = format!("127.0.0.1:{}", number - 5900);
    saved(&dir, &["-chardev", &chardev, "-vnc", &screen]);

    let _ = std::fs::remove_file(&socket);
    let _listener = UnixListener::bind(&socket).unwrap();
    let _port = TcpListener::bind(("127.0.0.1", number)).unwrap();
    std::fs::rename(dir.join("guest.img"), dir.join("away.img")).unwrap();
    let said = refused(&dir, 4, &["restore", "x.stow"]);
    let wanted = [
        "error: this host cannot run guest\n",
        "busy.sock",
        &number.to_string(),
        "guest.img",
        "try: give ",
    ];
    assert_says(&said, &wanted);
    assert_no_guest(&dir);
}

#[test]
fn a_disk_that_changed_is_refused_unless_told_otherwise() {
    let dir = TestDir::new();
    saved(&dir, &[]);
    let disk = OpenOptions::new()
        .write(true)
        .open(dir.join("guest.img"))
        .unwrap();
    disk.write_all_at(b"changed", 200_000).unwrap();
    drop(disk);
    let said = refused(&dir, 4, &["restore", "x.stow"]);
    assert_says(&said, &["guest.img", "--accept-changed-disks"]);
    assert_no_guest(&dir);
    let words = ["restore", "x.stow", "--accept-changed-disks", "--dry-run"];
    dir.vmstow().args(words).assert().success();
}

#[test]
fn a_working_directory_that_is_missing_is_named() {
    let dir = TestDir::new();
    let inner = dir.join("inner");
    std::fs::create_dir(&inner).unwrap();
    let qemu = bare_qemu(&dir, &inner, &["-qmp", "unix:bare.qmp,server=on,wait=off"]);
    wait_until("its monitor", PATIENCE, || {
        inner
            .join("bare.qmp")
            .exists()
            .then_some(())
            .ok_or(String::new())
    });
    dir.vmstow()
        .args(["save", &format!("pid:{}", qemu.pid()), "x.stow"])
        .assert()
        .success();
    qemu.wait_for_exit();
    std::fs::remove_dir_all(&inner).unwrap();
    let said = refused(&dir, 4, &["restore", "x.stow"]);
    assert_says(&said, &[&inner.display().to_string(), "make the directory"]);
    assert_no_guest(&dir);
}

#[test]
fn a_damaged_image_is_refused_and_left_as_it_is() {
    let dir = TestDir::new();
    let image = saved(&dir, &[]);
    let whole = std::fs::read(&image).unwrap();
    let len = whole.len() as u64;
    // Sections, in the order they are in: XML, MANI, PMAP, SIGN, CHNK and DIR lie between the chunks and the footer.
    let spread = (1..60).map(|n| len - 512 - n * n * 8);
    let places = [0, 5, 60, 3000, len / 4, len / 2];
    let places = places
        .into_iter()
        .chain(spread)
        .chain([len - 511, len - 500, len - 300, len - 1]);
    for place in places {
        flip_bit(&image, place, 3);
        let damaged = std::fs::read(&image).unwrap();
        let said = refused(&dir, 3, &["restore", "x.stow", "--trust"]);
        assert_says(&said, &["x.stow"]);
        assert_eq!(
            std::fs::read(&image).unwrap(),
            damaged,
            "the image was changed"
        );
        assert_no_guest(&dir);
        flip_bit(&image, place, 3);
    }
    for len in [0, 1, 100, len / 2, len - 512, len - 1] {
        let len = usize::try_from(len).unwrap();
        std::fs::write(&image, &whole[..len]).unwrap();
        let said = refused(&dir, 3, &["restore", "x.stow", "--trust"]);
        assert_says(&said, &["x.stow"]);
        assert_no_guest(&dir);
    }
    std::fs::write(&image, &whole).unwrap();
    dir.vmstow()
        .args(["restore", "x.stow", "--dry-run"])
        .assert()
        .success();
}

#[test]
fn a_qemu_too_old_for_the_machine_is_not_started() {
    let dir = TestDir::new();
    saved(&dir, &[]);
    let old = Qemu::V7_2.program().display().to_string();
    let said = refused(&dir, 4, &["restore", "x.stow", "--qemu", &old]);
    assert_says(
        &said,
        &["error: this host cannot run guest: ", "pc-i440fx-10.0"],
    );
    assert_no_guest(&dir);
}

#[test]
fn a_qemu_that_refuses_the_stream_is_quoted() {
    let dir = TestDir::new();
    let image = saved(&dir, &[]);
    let before = std::fs::read(&image).unwrap();
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *-incoming*) set -- \"$@\" -m 32;; esac\nexec {} \"$@\"\n",
        Qemu::V10.program().display()
    );
    std::fs::write(dir.join("qemu"), script).unwrap();
    std::fs::set_permissions(dir.join("qemu"), PermissionsExt::from_mode(0o755)).unwrap();
    let wrapper = dir.join("qemu").display().to_string();
    let said = refused(&dir, 4, &["restore", "x.stow", "--qemu", &wrapper]);
    let sentence =
        "error: QEMU could not load guest, which was not restored; its image is as it was";
    assert_says(
        &said,
        &[
            sentence,
            "ize mismatch: pc.ram",
            "that is, the guest's memory pc.ram has",
        ],
    );
    assert_eq!(std::fs::read(&image).unwrap(), before);
    assert_no_guest(&dir);
}

/// A restore that was killed leaves either no QEMU, or one that `list` shows and `stop` ends.
#[test]
fn a_killed_restore_leaves_nothing_that_list_does_not_show() {
    let mut outcomes = BTreeMap::<String, u32>::new();
    let dir = TestDir::new();
    saved(&dir, &[]);
    let started = Instant::now();
    drop(dir.restore(&["x.stow", "--paused"]));
    let whole = started.elapsed();
    for n in 0..16 {
        let mut command = dir.vmstow_command();
        command.args(["restore", "x.stow", "--paused"]);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole * n / 16);
        child.kill().unwrap();
        child.wait().unwrap();
        // A QEMU whose stream was cut ends by itself.
        std::thread::sleep(Duration::from_millis(700));
        // One that was just being started shows itself later.
        let shown = wait_until("list shows what runs", PATIENCE, || {
            let shown = dir.json(&["list"]);
            match shown["guests"].as_array().map(Vec::len) == Some(dir.qemus().len()) {
                true => Ok(shown),
                false => Err(shown.to_string()),
            }
        });
        let outcome = match &dir.qemus()[..] {
            [] => "no QEMU".to_owned(),
            [qemu] => {
                let guest = &shown["guests"][0];
                assert_eq!(guest["pid"], qemu.pid(), "{shown}");
                let status = Qmp::connect(guest["qmp"].as_str().unwrap()).status();
                let name = guest["name"].as_str().unwrap();
                dir.vmstow().args(["stop", name]).assert().success();
                status
            }
            qemus => panic!("{qemus:?}"),
        };
        *outcomes.entry(outcome).or_default() += 1;
        assert_no_guest(&dir);
    }
    eprintln!("restores killed: {outcomes:?}");
    dir.restore(&["x.stow", "--paused"]);
}
