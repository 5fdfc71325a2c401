//! A save whose target fails at any step: the guest is put back, no half image has a good name, and the next save
//! succeeds.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "this is a test")]

mod support;

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;
use support::{
    Before, Guest, GuestSpec, PATIENCE, Qemu, Settings, TestDir, wait_for_silence, wait_until,
};
use vmstow::bytes::{PublishError, Sink};
use vmstow::container::Layout;
use vmstow::error::Error;
use vmstow::pipeline::Encoding;
use vmstow::progress::Silent;
use vmstow::save::{Capture, Plan, SaveReport, SaveRequest, Source, Then, save_into};
use vmstow::store::{FileSink, Location};

fn start(dir: &TestDir, qemu: Qemu) -> Guest {
    let spec = GuestSpec {
        qemu,
        ..GuestSpec::default()
    };
    let guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(18); // its memory is full by then
    Settings::make_unusual(&guest);
    guest
}

/// A file that fails at one of its steps: an append, the sync, or the publication.
struct FailingSink {
    file: FileSink,
    steps_left: u32,
    /// Whether a failing publication happened all the same.
    lies: bool,
}

impl FailingSink {
    fn new(target: &Path, steps_left: u32) -> Self {
        FailingSink {
            file: FileSink::create(target, false).unwrap(),
            steps_left,
            lies: false,
        }
    }

    fn step(&mut self) -> io::Result<()> {
        let left = self.steps_left.checked_sub(1);
        self.steps_left = left.ok_or_else(|| io::Error::other("the test says no"))?;
        Ok(())
    }
}

impl Sink for FailingSink {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.step()?;
        self.file.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.step()?;
        self.file.sync()
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        if self.lies {
            self.file.publish()?;
            return Err(PublishError::Unknown(io::Error::other("the test lies")));
        }
        self.step().map_err(PublishError::NotPublished)?;
        self.file.publish()
    }
}

fn request(guest: &Guest, target: &Path, capture: Capture) -> SaveRequest {
    SaveRequest {
        source: Source::Monitor(guest.qmp_path()),
        target: Location::Path(target.to_owned()),
        may_replace: false,
        capture,
        encoding: Encoding {
            layout: Layout::Zstd,
            level: 1,
            chunk_len: 4 << 20, // few chunks, so that there are few steps
            threads: 2,
            twins: None,
        },
        then: Then::Quit,
        live: None,
        labels: [].into(),
        from_postmigrate: false,
        timeout: None,
        digest_disks: false,
        key: None,
        program: PathBuf::from(env!("CARGO_BIN_EXE_vmstow")),
    }
}

fn save_to(
    guest: &Guest,
    target: &Path,
    capture: Capture,
    sink: &mut dyn Sink,
) -> Result<SaveReport, Error> {
    let request = request(guest, target, capture);
    save_into(Plan::check(&request).unwrap(), &request, sink, &Silent)
}

fn all_of(error: &Error) -> String {
    format!("{error}\n{}", error.facts().join("\n"))
}

#[test]
fn a_target_that_fails_at_any_step_leaves_the_guest_running() {
    for (qemu, capture) in WAYS {
        let dir = TestDir::new();
        let mut guest = start(&dir, qemu);
        let target = dir.join("x.stow");
        let mut steps = 0;
        loop {
            let before = Before::of(&dir, &guest);
            let mut sink = FailingSink::new(&target, steps);
            let saved = save_to(&guest, &target, capture, &mut sink);
            drop(sink);
            wait_for_silence(&dir);
            let Err(error) = saved else { break };
            let said = all_of(&error);
            assert!(
                said.starts_with("guest was not saved and runs on as before\n"),
                "{said}"
            );
            assert!(said.ends_with("the test says no"), "step {steps}: {said}");
            assert_eq!(error.kind().exit_code(), 1, "step {steps}: {said}");
            before.assert_is_back(&dir, &guest);
            steps += 1;
        }
        eprintln!("{qemu:?}: it failed at {steps} steps");
        assert!(steps > 20, "{steps}");
        assert!(guest.wait_for_exit().success());
        dir.vmstow()
            .args(["verify", "--deep", "x.stow"])
            .assert()
            .success();
        assert!(dir.names().iter().all(|name| !name.ends_with(".part")));
    }
}

/// Each QEMU with each way of taking its guest's state; 7.2 only migrates.
const WAYS: [(Qemu, Capture); 3] = [
    (Qemu::V10, Capture::Auto),
    (Qemu::V10, Capture::Migration),
    (Qemu::V7_2, Capture::Auto),
];

/// A file; while it is synced somebody else lets the guest run.
struct MeddledSink<'g> {
    file: FileSink,
    guest: &'g Guest,
}

impl Sink for MeddledSink<'_> {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.append(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.guest.qmp().command("cont", json!({}));
        self.file.sync()
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        self.file.publish()
    }
}

#[test]
fn a_guest_that_somebody_let_run_before_its_image_had_a_name_is_not_saved() {
    for (qemu, capture) in WAYS {
        let dir = TestDir::new();
        let guest = start(&dir, qemu);
        let before = Before::of(&dir, &guest);
        let target = dir.join("x.stow");
        let file = FileSink::create(&target, false).unwrap();
        let mut sink = MeddledSink {
            file,
            guest: &guest,
        };
        let error = save_to(&guest, &target, capture, &mut sink).unwrap_err();
        drop(sink);
        let said = all_of(&error);
        assert!(said.contains("somebody else started the guest"), "{said}");
        wait_for_silence(&dir);
        before.assert_is_back(&dir, &guest);
    }
}

#[test]
fn an_image_that_may_have_its_name_leaves_the_guest_stopped() {
    for (qemu, capture) in WAYS {
        let dir = TestDir::new();
        let guest = start(&dir, qemu);
        let target = dir.join("x.stow");
        let settings = Settings::of(&mut guest.qmp());
        let mut sink = FailingSink::new(&target, u32::MAX);
        sink.lies = true;
        let error = save_to(&guest, &target, capture, &mut sink).unwrap_err();
        assert_eq!(
            error.to_string(),
            "it is not known whether the image of guest is whole under its name; guest stays stopped"
        );
        drop(sink);
        wait_for_silence(&dir);
        dir.vmstow().args(["verify", "x.stow"]).assert().success();
        let tick = guest.serial().last_tick();
        let state = match capture {
            Capture::Auto => qemu.state_behind_a_save(),
            Capture::Migration => "postmigrate",
        };
        assert_eq!(guest.qmp().status(), state);
        assert_eq!(Settings::of(&mut guest.qmp()), settings);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(guest.serial().last_tick(), tick);
        // It can be saved once more, or go on.
        let words = [
            "save",
            &guest.source(),
            "y.stow",
            "--from-postmigrate",
            "--then",
            "pause",
        ];
        dir.vmstow().args(words).assert().success();
        dir.vmstow().args(["verify", "y.stow"]).assert().success();
        guest.qmp().command("cont", json!({}));
        guest.serial().wait_for_tick(tick + 3);
    }
}

/// A small file system, for as long as the test runs.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: PathBuf, options: &str) -> Self {
        std::fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&path);
        assert!(
            mount.status().unwrap().success(),
            "this test has to be run by root"
        );
        SmallDisk(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Runs `vmstow save SOURCE ARGUMENTS…`, which must fail with that exit code; gives what it said.
#[track_caller]
fn refused(dir: &TestDir, guest: &Guest, arguments: &[&str], code: i32) -> String {
    let mut command = dir.vmstow();
    let assert = command
        .arg("save")
        .arg(guest.source())
        .args(arguments)
        .assert();
    let output = assert.get_output();
    let said = String::from_utf8(output.stderr.clone()).unwrap();
    eprintln!("$ vmstow save … {}\n{said}", arguments.join(" "));
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(output.stdout.is_empty());
    wait_for_silence(dir);
    said
}

#[test]
fn a_target_that_cannot_be_written_is_named_and_the_guest_runs_on() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let mut guest = start(&dir, qemu);
        let full = SmallDisk::mount(dir.join("full"), "size=4m");
        let locked = SmallDisk::mount(dir.join("locked"), "size=4m,ro");
        std::fs::write(dir.join("old.stow"), "somebody else's").unwrap();
        let before = Before::of(&dir, &guest);

        let said = refused(&dir, &guest, &["full/x.stow"], 1);
        let sentence = "error: guest was not saved and runs on as before\n";
        assert!(said.starts_with(sentence), "{said}");
        assert!(said.contains("No space left on device"), "{said}");
        assert_eq!(std::fs::read_dir(&full.0).unwrap().count(), 0);
        before.assert_is_back(&dir, &guest);

        let said = refused(&dir, &guest, &["locked/x.stow"], 1);
        assert!(
            said.starts_with("error: cannot create locked/x.stow\n"),
            "{said}"
        );
        assert!(said.contains("Read-only file system"), "{said}");
        before.assert_is_back(&dir, &guest);

        let said = refused(&dir, &guest, &["nowhere/x.stow"], 1);
        assert!(
            said.starts_with("error: cannot create nowhere/x.stow\n"),
            "{said}"
        );
        assert!(said.contains("No such file or directory"), "{said}");
        before.assert_is_back(&dir, &guest);

        let said = refused(&dir, &guest, &["old.stow"], 2);
        assert!(said.starts_with("error: old.stow exists\n"), "{said}");
        assert!(said.contains("--replace"), "{said}");
        before.assert_is_back(&dir, &guest);
        assert_eq!(
            std::fs::read(dir.join("old.stow")).unwrap(),
            b"somebody else's"
        );

        drop((full, locked));
        let words = ["save", &guest.source(), "old.stow", "--replace"];
        dir.vmstow().args(words).assert().success();
        assert!(guest.wait_for_exit().success());
        dir.vmstow().args(["verify", "old.stow"]).assert().success();
    }
}

#[test]
fn a_target_directory_that_goes_in_the_middle_leaves_the_guest_running() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let guest = start(&dir, qemu);
        let before = Before::of(&dir, &guest);
        std::fs::create_dir(dir.join("inner")).unwrap();
        let inner = dir.join("inner");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let is_there = || std::fs::read_dir(&inner).ok()?.next();
                let _ = wait_until("the unfinished image", PATIENCE, || {
                    is_there().ok_or(String::new())
                });
                std::thread::sleep(Duration::from_millis(100));
                std::fs::remove_dir_all(&inner).unwrap();
            });
            let words = ["inner/x.stow", "--level", "19", "--threads", "1"];
            // A machine with much to do has told by then how far it is.
            let said = refused(&dir, &guest, &words, 1);
            let sentence = "error: guest was not saved and runs on as before\n  why: the image could not be given its name\n";
            assert!(said.contains(sentence), "{said}");
        });
        before.assert_is_back(&dir, &guest);
    }
}

#[test]
fn a_pipe_whose_reader_goes_leaves_the_guest_running() {
    for qemu in Qemu::ALL {
        let dir = TestDir::new();
        let mut guest = start(&dir, qemu);
        for bytes in [0, 1, 5_000_000] {
            let before = Before::of(&dir, &guest);
            let mut command = dir.vmstow_command();
            command.args(["save", &guest.source(), "-"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let mut reader = child.stdout.take().unwrap();
            reader.read_exact(&mut vec![0; bytes]).unwrap();
            drop(reader);
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            eprintln!("{said}");
            assert_eq!(output.status.code(), Some(1), "{said}");
            let sentence = "error: guest was not saved and runs on as before\n";
            assert!(said.starts_with(sentence), "{said}");
            assert!(said.contains("Broken pipe"), "{said}");
            wait_for_silence(&dir);
            before.assert_is_back(&dir, &guest);
        }
        let output = dir
            .vmstow()
            .args(["save", &guest.source(), "-"])
            .assert()
            .success();
        assert!(guest.wait_for_exit().success());
        std::fs::write(dir.join("x.stow"), &output.get_output().stdout).unwrap();
        dir.vmstow().args(["verify", "x.stow"]).assert().success();
    }
}
