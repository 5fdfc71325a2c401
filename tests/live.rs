//! Guests that run on while they are saved.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "this is a test")]

mod support;

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use support::{
    Before, Guest, GuestSpec, PATIENCE, Qemu, Serial, Settings, TestDir, wait_for_silence,
    wait_until,
};

/// A guest that writes to `writer_mib` MiB of memory all the time, and sees whether it is of one moment.
fn writer(qemu: Qemu, memory_mib: u32, writer_mib: u32) -> GuestSpec {
    let append = format!("console=ttyS0 quiet panic=-1 content=1 writer={writer_mib}");
    let spec = GuestSpec {
        qemu,
        memory_mib,
        is_disk_read_only: true,
        ..GuestSpec::linux()
    };
    spec.with(&["-append", &append])
}

fn passes(text: &str) -> Vec<u64> {
    let lines = text.split_inclusive('\n');
    let lines = lines.filter_map(|line| line.strip_suffix('\n')?.trim_end().strip_prefix("pass "));
    lines.filter_map(|number| number.parse().ok()).collect()
}

/// Waits until the guest wrote over all of its memory twice more.
#[track_caller]
fn wait_for_passes(serial: &Serial) {
    let first = passes(&serial.text()).last().copied().unwrap_or(0);
    wait_until("two passes over memory", PATIENCE, || {
        let text = serial.text();
        assert!(!text.contains("BAD"), "{text}");
        match passes(&text).last() {
            Some(&last) if last >= first + 2 => Ok(()),
            last => Err(format!("pass {last:?} after {first}")),
        }
    });
}

fn remap_serial(dir: &TestDir, name: &str) -> (String, Serial) {
    let serial = Serial::at(dir.join(name));
    (
        format!("chardev:serial0=file:{}", serial.path().display()),
        serial,
    )
}

#[test]
fn the_image_of_a_guest_that_writes_all_the_time_is_of_one_moment() {
    for qemu in Qemu::ALL {
        for (machine, layout, smp) in [("pc", "zstd", "1"), ("q35", "raw", "2")] {
            let dir = TestDir::new();
            let spec = GuestSpec {
                machine: machine.to_owned(),
                ..writer(qemu, 384, 160)
            };
            let guest = Guest::start(&dir, spec.with(&["-smp", smp]));
            guest
                .serial()
                .wait_for_line("a pass", |line| line.starts_with("pass"));
            wait_for_passes(&guest.serial());
            let saved = dir.json(&[
                "save",
                &guest.source(),
                "x.stow",
                "--live",
                "--layout",
                layout,
            ]);
            let downtime = saved["downtime_ms"].as_f64().unwrap();
            eprintln!("{qemu:?} {machine} {layout}: {saved}");
            assert!(downtime < 50.0, "it stood still for {downtime} ms");
            assert_eq!(saved["guest"], "running");
            assert_eq!(guest.qmp().status(), "running");
            wait_for_passes(&guest.serial());
            dir.vmstow()
                .args(["verify", "--deep", "x.stow"])
                .assert()
                .success();
            let (remap, serial) = remap_serial(&dir, "restored.serial");
            let restored = dir.restore(&["x.stow", "--remap", &remap]);
            assert_eq!(restored.report["state"], "running");
            wait_for_passes(&serial);
            drop(restored);
            let (remap, serial) = remap_serial(&dir, "fed.serial");
            let image = std::fs::read(dir.join("x.stow")).unwrap();
            let mut fed = dir.vmstow();
            let fed = fed.args(["--json", "restore", "-", "--trust", "--remap", &remap]);
            let answer = fed.write_stdin(image).assert().success();
            let answer = serde_json::from_slice(&answer.get_output().stdout).unwrap();
            let fed = support::Restored::of(answer);
            wait_for_passes(&serial);
            drop(fed);
        }
    }
}

#[test]
fn chunks_of_a_live_save_do_not_become_tiny() {
    let dir = TestDir::new();
    let guest = Guest::start(&dir, writer(Qemu::V10, 384, 160));
    guest
        .serial()
        .wait_for_line("a pass", |line| line.starts_with("pass"));
    wait_for_passes(&guest.serial());
    let saved = dir.json(&["save", &guest.source(), "x.stow", "--live"]);
    let shown = dir.json(&["inspect", "x.stow"]);
    let chunks = shown["chunks"]
        .as_u64()
        .unwrap_or_else(|| panic!("{shown}"));
    let stream = saved["stream_bytes"].as_u64().unwrap();
    assert!(
        stream / chunks > 300 << 10,
        "{chunks} chunks of {stream} bytes"
    );
}

/// The block nodes at the top of what the guest writes to.
fn written_by(guest: &Guest) -> Vec<String> {
    let devices = guest.qmp().command("query-block", json!({}));
    let inserted = devices.as_array().unwrap().iter().map(|it| &it["inserted"]);
    let writable = inserted.filter(|medium| medium["ro"] == json!(false));
    let files = writable.map(|it| it["image"]["filename"].as_str().unwrap().to_owned());
    files.collect()
}

#[test]
fn disks_stay_as_they_were_and_the_guest_goes_on_in_overlays() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let more = dir.join("more.qcow2");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .args([more.as_os_str(), "1M".as_ref()])
            .status();
        assert!(made.unwrap().success());
        let node = json!({"driver": "qcow2", "node-name": "more",
            "file": {"driver": "file", "filename": more}});
        let spec = GuestSpec {
            qemu,
            ..GuestSpec::linux()
        };
        let spec = spec.with(&[
            "-blockdev",
            &node.to_string(),
            "-device",
            "virtio-blk-pci,drive=more",
        ]);
        let mut guest = Guest::start(&dir, spec);
        let serial = guest.serial();
        serial.wait_for_line("the disk", |line| line == "disk ok");
        let said = dir.refused(4, &["save", &guest.source(), "x.stow", "--live"]);
        assert!(
            said.contains("disk0") && said.contains("--disk-snapshot"),
            "{said}"
        );
        let before = serial.mark();
        let options = ["--live", "--disk-snapshot", "--disk-digest"];
        let saved = dir.json(&[&["save", &guest.source(), "x.stow"], &options[..]].concat());
        eprintln!("{qemu:?}: {saved}");
        let overlays: Vec<String> = serde_json::from_value(saved["overlays"].clone()).unwrap();
        assert_eq!(overlays.len(), 2);
        assert!(overlays[0].starts_with(&format!("{}.live-", guest.disk().display())));
        assert_eq!(written_by(&guest), overlays);
        let frozen = || [guest.disk(), more.clone()].map(|disk| std::fs::read(disk).unwrap());
        let bytes = frozen();
        serial.wait_for_new_line(&before, "the disk", |line| line == "disk ok");
        serial.assert_goes_on(&before);
        let said = dir.refused(4, &["restore", "x.stow"]);
        assert!(said.contains("drifted"), "{said}");
        // The guest runs on, and others go on from the moment of its image.
        let options = ["--throwaway", "--count", "2"];
        let clones = dir.json(&[&["restore", "x.stow"], &options[..]].concat());
        let clones = clones["guests"].as_array().unwrap().iter();
        let clones: Vec<_> = clones.cloned().map(support::Restored::of).collect();
        for clone in &clones {
            let serial = Serial::at(dir.join("run").join(clone.name()).join("serial0.out"));
            serial.wait_for_line("the disk", |line| line == "disk ok");
            let ticks = before.last_tick() + 15;
            serial.wait_for_tick(ticks);
        }
        drop(clones);
        assert!(frozen() == bytes);
        // A second one names its overlays after the disks, and an ordinary save names what is in use.
        std::thread::sleep(Duration::from_millis(1100)); // another name
        let again = dir.json(&[
            "save",
            &guest.source(),
            "y.stow",
            "--live",
            "--disk-snapshot",
        ]);
        let overlays: Vec<String> = serde_json::from_value(again["overlays"].clone()).unwrap();
        assert_eq!(overlays[0].matches(".live-").count(), 1, "{overlays:?}");
        dir.json(&["save", &guest.source(), "z.stow"]);
        guest.wait_for_exit();
        let before = serial.mark();
        let restored = dir.restore(&["z.stow"]);
        serial.wait_for_new_line(&before, "the disk", |line| line == "disk ok");
        serial.assert_goes_on(&before);
        drop(restored);
    }
}

#[test]
fn only_a_running_guest_is_saved_live() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            is_disk_read_only: true,
            ..GuestSpec::default()
        };
        let guest = Guest::start(&dir, spec);
        guest.serial().wait_for_tick(3);
        let save = |options: &[&str]| {
            let words = ["save", &guest.source(), "x.stow", "--live"];
            words
                .iter()
                .chain(options)
                .map(|it| (*it).to_owned())
                .collect::<Vec<_>>()
        };
        let refused = |code, options: &[&str]| {
            let words = save(options);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            dir.refused(code, &words)
        };
        for then in ["quit", "pause"] {
            let said = refused(2, &["--then", then]);
            assert!(said.contains("--live lets the guest run on"), "{said}");
        }
        guest.qmp().command("stop", json!({}));
        let before = Before::of(&dir, &guest);
        let said = refused(4, &[]);
        assert!(said.contains("it is paused"), "{said}");
        before.assert_is_back(&dir, &guest);
    }
}

#[test]
fn memory_that_cannot_be_watched_is_refused_with_the_words_of_qemu() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            is_disk_read_only: true,
            ..GuestSpec::default()
        };
        let memory = dir.join("memory");
        let object = format!(
            "memory-backend-file,id=m,size=64M,share=on,mem-path={}",
            memory.display()
        );
        let guest = Guest::start(
            &dir,
            spec.with(&["-object", &object, "-machine", "memory-backend=m"]),
        );
        guest.serial().wait_for_tick(3);
        Settings::make_unusual(&guest);
        let before = Before::of(&dir, &guest);
        let said = dir.refused(4, &["save", &guest.source(), "x.stow", "--live"]);
        assert!(
            said.contains("runs on as before") && said.contains("Background-snapshot"),
            "{said}"
        );
        before.assert_is_back(&dir, &guest);
    }
}

/// When a save is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    After(Duration),
    PartHas(u64),
    Published,
}

/// A live save whose program is killed at many moments: the guest runs on with its settings, and there is no image, or
/// a whole one.
fn killed_at_many_moments(qemu: Qemu, options: &[&str]) {
    let dir = TestDir::new();
    let spec = GuestSpec {
        is_disk_read_only: !options.contains(&"--disk-snapshot"),
        ..writer(qemu, 192, 48)
    };
    let guest = Guest::start(&dir, spec);
    guest
        .serial()
        .wait_for_line("a pass", |line| line.starts_with("pass"));
    Settings::make_unusual(&guest);
    let image = dir.join("x.stow");
    let log = dir.join("run/save.log");
    let start = || {
        let output = File::create(&log).unwrap();
        let mut command = dir.vmstow_command();
        command.args([
            "save",
            &guest.source(),
            "x.stow",
            "--live",
            "--threads",
            "1",
        ]);
        command.args(options).process_group(0);
        command.stdout(output.try_clone().unwrap()).stderr(output);
        command.spawn().unwrap()
    };
    let remove_overlays = || dir.names().iter().any(|name| name.contains(".live-"));
    let started = Instant::now();
    let mut save = start();
    let status = save.wait().unwrap();
    assert!(
        status.success(),
        "{}",
        std::fs::read_to_string(&log).unwrap()
    );
    let whole = started.elapsed();
    std::fs::remove_file(&image).unwrap();
    let spread = (0..10).map(|n| Moment::After(whole * n / 10));
    let seen = [
        Moment::PartHas(1),
        Moment::PartHas(1 << 20),
        Moment::Published,
    ];
    let (mut undone, mut published) = (0, 0);
    for moment in spread.chain(seen) {
        if remove_overlays() {
            std::thread::sleep(Duration::from_millis(1100)); // overlays have the second in their names
        }
        let count = guest.serial().last_tick();
        let settings = Settings::of(&mut guest.qmp());
        let started = Instant::now();
        let mut save = start();
        let part_len = || {
            let entries = std::fs::read_dir(dir.path()).unwrap().flatten();
            let mut parts =
                entries.filter(|it| it.file_name().to_string_lossy().ends_with(".part"));
            parts.next().and_then(|it| Some(it.metadata().ok()?.len()))
        };
        while save.try_wait().unwrap().is_none() {
            let has_come = match moment {
                Moment::After(delay) => started.elapsed() >= delay,
                Moment::PartHas(len) => part_len().is_some_and(|it| it >= len),
                Moment::Published => image.exists(),
            };
            if has_come {
                break;
            }
            std::hint::spin_loop();
        }
        let _ = kill_process_group(Pid::from_child(&save), Signal::KILL);
        save.wait().unwrap();
        wait_for_silence(&dir);
        let said = std::fs::read_to_string(&log).unwrap();
        if image.exists() {
            published += 1;
            dir.vmstow().args(["verify", "x.stow"]).assert().success();
            std::fs::remove_file(&image).unwrap();
        } else {
            undone += 1;
        }
        let names = dir.names();
        assert!(
            !names.iter().any(|name| name.ends_with(".part")),
            "{names:?}"
        );
        let mut qmp = guest.qmp();
        assert_eq!(qmp.status(), "running", "{moment:?}: {said}");
        assert_eq!(Settings::of(&mut qmp), settings, "{moment:?}: {said}");
        drop(qmp);
        // Until it wrote to all of its memory once more.
        let now = guest.serial().last_tick().max(count);
        guest.serial().wait_for_tick(now + 8);
    }
    eprintln!("{qemu:?} {options:?}: {undone} undone, {published} published");
    assert!(undone > 3);
    dir.json(&[&["save", &guest.source(), "x.stow", "--live"], options].concat());
    let throwaway: &[&str] = match options.contains(&"--disk-snapshot") {
        true => &["--throwaway"],
        false => &[],
    };
    let (remap, serial) = remap_serial(&dir, "restored.serial");
    let words = ["restore", "x.stow", "--remap", &remap];
    let restored = support::Restored::of(dir.json(&[&words[..], throwaway].concat()));
    wait_for_passes(&serial);
    drop(restored);
}

#[test]
fn a_killed_live_save_leaves_a_running_guest() {
    for qemu in Qemu::ALL {
        killed_at_many_moments(qemu, &[]);
    }
}

#[test]
fn a_killed_live_save_with_disks_leaves_a_running_guest() {
    for qemu in Qemu::ALL {
        killed_at_many_moments(qemu, &["--disk-snapshot"]);
    }
}

#[test]
fn a_live_save_that_fails_leaves_a_running_guest() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let spec = GuestSpec {
            qemu,
            is_disk_read_only: true,
            ..GuestSpec::default()
        };
        let guest = Guest::start(&dir, spec);
        guest.serial().wait_for_tick(18);
        Settings::make_unusual(&guest);
        let before = Before::of(&dir, &guest);
        let source = guest.source();
        let full = ["save", &source, "/dev/full", "--live", "--replace"];
        let _ = dir.vmstow().args(full).assert().failure();
        before.assert_is_back(&dir, &guest);
        let output = File::options().write(true).open("/dev/full").unwrap();
        let mut command = dir.vmstow_command();
        command
            .args(["save", &source, "-", "--live"])
            .stdout(output);
        let output = command.output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && said.contains("runs on as before"),
            "{said}"
        );
        before.assert_is_back(&dir, &guest);
        let saved: Value = dir.json(&["save", &source, "x.stow", "--live"]);
        assert_eq!(saved["guest"], "running");
        let kept: PathBuf = dir.join("x.stow");
        assert!(kept.exists());
    }
}
