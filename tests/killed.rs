//! A save whose program, guardian or QEMU is killed, at many moments: afterwards there is either no image and the guest
//! as it was, or the whole image and no guest. Never both, never neither.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "this is a test")]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::json;
use support::{Before, Guest, GuestSpec, Process, Qemu, Settings, TestDir, wait_for_silence};

/// When something is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// So long after the program's start.
    After(Duration),
    /// As soon as the guardian is seen.
    Guardian,
    /// As soon as the unfinished image has its temporary name and that many bytes.
    PartHas(u64),
    /// As soon as the image has its name.
    Published,
}

/// `count` moments over the duration of a save, and those that are told by what is seen.
fn moments(whole: Duration, count: u32) -> Vec<Moment> {
    let spread = (0..count).map(|n| Moment::After(whole * n / count));
    let seen = [
        Moment::Guardian,
        Moment::PartHas(0),
        Moment::PartHas(1),
        Moment::PartHas(10 << 20),
        Moment::Published,
        Moment::Published,
    ];
    spread.chain(seen).collect()
}

/// A guest with unusual settings, and saves of it that are cut off.
struct Scene {
    guest: Guest, // ends before the directory does
    dir: TestDir,
    qemu: Qemu,
    runs: bool,
    outcomes: BTreeMap<String, u32>,
}

impl Scene {
    fn new(qemu: Qemu, runs: bool) -> Self {
        let dir = TestDir::new();
        let guest = start(&dir, qemu, runs);
        Scene {
            dir,
            guest,
            qemu,
            runs,
            outcomes: BTreeMap::new(),
        }
    }

    fn start_over(&mut self) {
        std::fs::remove_file(self.image()).unwrap();
        self.guest = start(&self.dir, self.qemu, self.runs);
    }

    fn image(&self) -> PathBuf {
        self.dir.join("x.stow")
    }

    fn save(&self, options: &[&str]) -> Save {
        let log = self.dir.join("run/save.log");
        let mut command = self.dir.vmstow_command();
        command
            .args(["save", &self.guest.source(), "x.stow"])
            .args(options);
        Save::start(command, log)
    }

    /// How long a save takes that nobody disturbs.
    fn duration_of(&self, options: &[&str]) -> Duration {
        let started = Instant::now();
        let mut save = self.save(&[options, &["--then", "resume"]].concat());
        assert!(save.child.wait().unwrap().success(), "{}", save.said());
        let duration = started.elapsed();
        std::fs::remove_file(self.image()).unwrap();
        duration
    }

    fn wait_for(&self, moment: Moment, save: &mut Save) {
        let end = save.started + Duration::from_secs(30);
        while !self.has_come(moment, save) && Instant::now() < end {
            if save.child.try_wait().unwrap().is_some() {
                return; // it came too late
            }
            std::hint::spin_loop();
        }
    }

    fn has_come(&self, moment: Moment, save: &Save) -> bool {
        match moment {
            Moment::After(delay) => save.started.elapsed() >= delay,
            Moment::Guardian => guardian_of(&self.dir).is_some(),
            Moment::PartHas(bytes) => self.part_len().is_some_and(|len| len >= bytes),
            Moment::Published => self.image().exists(),
        }
    }

    /// Bytes of the unfinished image.
    fn part_len(&self) -> Option<u64> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut parts = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().ends_with(".part"));
        Some(parts.next()?.metadata().ok()?.len())
    }

    fn note(&mut self, outcome: &str) {
        *self.outcomes.entry(outcome.to_owned()).or_default() += 1;
    }

    #[track_caller]
    fn assert_image_is_whole(&self) {
        self.dir
            .vmstow()
            .args(["verify", "x.stow"])
            .assert()
            .success();
    }

    /// The guest was put back: it is as it was, and can be saved.
    #[track_caller]
    fn assert_undone(&self, before: &Before) {
        before.assert_is_back(&self.dir, &self.guest);
        let options = ["--then", "resume", "--from-postmigrate"];
        self.save(&options).assert_succeeds();
        self.assert_image_is_whole();
        before.assert_guest_is_back(&self.guest);
        std::fs::remove_file(self.image()).unwrap();
    }

    /// The image is the guest: it is whole, and QEMU has ended.
    #[track_caller]
    fn assert_taken(&mut self) {
        assert!(self.guest.wait_for_exit().success(), "QEMU quits");
        self.assert_image_is_whole();
        assert_eq!(self.part_len(), None);
        self.start_over();
    }

    /// The guest either was put back or has become the image.
    #[track_caller]
    fn assert_undone_or_taken(&mut self, before: &Before, said: &str) {
        let outcome = match (self.image().exists(), said.contains("put back")) {
            (true, _) => "image",
            (false, true) => "put back",
            (false, false) => "untouched",
        };
        self.note(outcome);
        match self.image().exists() {
            true => self.assert_taken(),
            false => self.assert_undone(before),
        }
    }

    fn tell(&self, what: &str) {
        eprintln!("{what}, {:?}: {:?}", self.qemu, self.outcomes);
    }
}

fn start(dir: &TestDir, qemu: Qemu, runs: bool) -> Guest {
    let spec = GuestSpec {
        qemu,
        ..GuestSpec::default()
    };
    let guest = Guest::start(dir, spec);
    guest.serial().wait_for_tick(18); // its memory is full by then
    Settings::make_unusual(&guest);
    if !runs {
        guest.qmp().command("stop", json!({}));
    }
    guest
}

fn guardian_of(dir: &TestDir) -> Option<Process> {
    let is_guardian = |process: &Process| process.argv().iter().any(|word| word == "__guardian");
    dir.processes().into_iter().find(is_guardian)
}

/// A save under way.
struct Save {
    child: Child,
    started: Instant,
    log: PathBuf,
}

impl Save {
    /// In a process group of its own, as a shell would.
    fn start(mut command: Command, log: PathBuf) -> Self {
        let output = File::create(&log).unwrap();
        command.process_group(0);
        command.stdout(output.try_clone().unwrap()).stderr(output);
        let started = Instant::now();
        let child = command.spawn().unwrap();
        Save {
            child,
            started,
            log,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What it and its guardian said.
    fn said(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn end(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    #[track_caller]
    fn assert_succeeds(mut self) {
        let status = self.end();
        assert!(status.success(), "{status}: {}", self.said());
    }
}

const SLOW: [&str; 4] = ["--level", "19", "--threads", "1"];

#[test]
fn a_killed_save_is_undone_or_finished() {
    for qemu in Qemu::ALL {
        let mut scene = Scene::new(qemu, true);
        let whole = scene.duration_of(&[]);
        for moment in moments(whole, 20) {
            let before = Before::of(&scene.dir, &scene.guest);
            let mut save = scene.save(&[]);
            scene.wait_for(moment, &mut save);
            let _ = save.child.kill();
            save.end();
            wait_for_silence(&scene.dir);
            eprintln!("{moment:?}: {}", save.said());
            scene.assert_undone_or_taken(&before, &save.said());
        }
        scene.tell("killed in a fast save");
    }
}

#[test]
fn a_killed_slow_save_is_undone_or_finished() {
    for qemu in Qemu::ALL {
        let mut scene = Scene::new(qemu, true);
        let whole = scene.duration_of(&SLOW);
        for moment in moments(whole, 8) {
            let before = Before::of(&scene.dir, &scene.guest);
            let mut save = scene.save(&SLOW);
            scene.wait_for(moment, &mut save);
            let _ = save.child.kill();
            save.end();
            wait_for_silence(&scene.dir);
            scene.assert_undone_or_taken(&before, &save.said());
        }
        scene.tell("killed in a slow save");
    }
}

#[test]
fn a_killed_save_of_a_paused_guest_leaves_it_paused_or_takes_it() {
    for qemu in Qemu::ALL {
        let mut scene = Scene::new(qemu, false);
        let whole = scene.duration_of(&["--from-postmigrate"]);
        for moment in moments(whole, 8) {
            let before = Before::of(&scene.dir, &scene.guest);
            let mut save = scene.save(&["--from-postmigrate"]);
            scene.wait_for(moment, &mut save);
            let _ = save.child.kill();
            save.end();
            wait_for_silence(&scene.dir);
            scene.assert_undone_or_taken(&before, &save.said());
        }
        scene.tell("killed in a save of a paused guest");
    }
}

#[test]
fn a_killed_save_that_lets_the_guest_run_on_does_so() {
    for qemu in Qemu::ALL {
        let mut scene = Scene::new(qemu, true);
        let whole = scene.duration_of(&[]);
        for moment in moments(whole, 10) {
            let before = Before::of(&scene.dir, &scene.guest);
            let mut save = scene.save(&["--then", "resume"]);
            scene.wait_for(moment, &mut save);
            let _ = save.child.kill();
            save.end();
            wait_for_silence(&scene.dir);
            if scene.image().exists() {
                scene.note("image");
                scene.assert_image_is_whole();
                std::fs::remove_file(scene.image()).unwrap();
            } else {
                scene.note("no image");
            }
            before.assert_is_back(&scene.dir, &scene.guest);
        }
        scene.tell("killed with --then resume");
    }
}

#[test]
fn a_killed_save_that_leaves_the_guest_paused_does_so() {
    for qemu in Qemu::ALL {
        let mut scene = Scene::new(qemu, true);
        let whole = scene.duration_of(&[]);
        for moment in moments(whole, 10) {
            let before = Before::of(&scene.dir, &scene.guest);
            let mut save = scene.save(&["--then", "pause"]);
            scene.wait_for(moment, &mut save);
            let _ = save.child.kill();
            save.end();
            wait_for_silence(&scene.dir);
            if scene.image().exists() {
                scene.note("image");
                scene.assert_image_is_whole();
                std::fs::remove_file(scene.image()).unwrap();
                let state = scene.guest.qmp().status();
                assert_eq!(state, qemu.state_behind_a_save());
                before.assert_rests(&scene.guest);
                scene.guest.qmp().command("cont", json!({}));
            } else {
                scene.note("no image");
            }
            before.assert_is_back(&scene.dir, &scene.guest);
        }
        scene.tell("killed with --then pause");
    }
}

/// As Ctrl-C in a terminal does, which tells the whole process group.
fn interrupt_group(save: &Save) {
    let _ = kill_process_group(save.pid(), Signal::INT);
}

fn terminate(save: &Save) {
    let _ = kill_process(save.pid(), Signal::TERM);
}

#[test]
fn an_interrupted_save_is_undone_and_says_so() {
    for (qemu, interrupt) in [
        (Qemu::V10, interrupt_group as fn(&Save)),
        (Qemu::V7_2, terminate),
    ] {
        let mut scene = Scene::new(qemu, true);
        let fast = moments(scene.duration_of(&[]), 8);
        let slow = scene.duration_of(&SLOW);
        let slow = [1, 2, 3].map(|n| (Moment::After(slow * n / 4), &SLOW[..]));
        let all = fast.into_iter().map(|moment| (moment, &[][..]));
        for (moment, options) in all.chain(slow) {
            let before = Before::of(&scene.dir, &scene.guest);
            let mut save = scene.save(options);
            scene.wait_for(moment, &mut save);
            interrupt(&save);
            let status = save.end();
            let said = save.said();
            wait_for_silence(&scene.dir);
            eprintln!("{moment:?}: {status}: {said}");
            if scene.image().exists() {
                assert_eq!(status.code(), Some(0), "{moment:?}: {said}");
                scene.note("image");
                scene.assert_taken();
                continue;
            }
            if status.signal().is_some() {
                // It had not even begun to listen.
                scene.note("dead at once");
                assert_eq!(said, "");
            } else {
                scene.note("put back");
                assert_eq!(status.code(), Some(130), "{moment:?}: {said}");
                let sentence =
                    "error: guest was not saved and runs on as before\n  why: interrupted";
                assert!(said.contains(sentence), "{moment:?}: {said}");
            }
            scene.assert_undone(&before);
        }
        scene.tell("interrupted");
    }
}

#[test]
fn a_save_that_loses_its_guardian_does_not_publish() {
    for qemu in Qemu::ALL {
        let mut scene = Scene::new(qemu, true);
        for delay in [0, 20, 300] {
            let before = Before::of(&scene.dir, &scene.guest);
            let mut save = scene.save(&SLOW);
            scene.wait_for(Moment::Guardian, &mut save);
            std::thread::sleep(Duration::from_millis(delay));
            guardian_of(&scene.dir).unwrap().kill();
            let status = save.end();
            wait_for_silence(&scene.dir);
            eprintln!("{}", save.said());
            assert_eq!(status.code(), Some(1), "{}", save.said());
            assert!(save.said().contains("guardian"), "{}", save.said());
            scene.note("put back");
            scene.assert_undone(&before);
        }
        scene.tell("without a guardian");
    }
}

#[test]
fn a_qemu_killed_in_its_save_is_said_to_be_gone() {
    for qemu in Qemu::ALL {
        let mut scene = Scene::new(qemu, true);
        let fast = moments(scene.duration_of(&[]), 6);
        let slow = scene.duration_of(&SLOW);
        let slow = [1, 2, 3].map(|n| (Moment::After(slow * n / 4), &SLOW[..]));
        let all = fast.into_iter().map(|moment| (moment, &[][..]));
        for (moment, options) in all.chain(slow) {
            let mut save = scene.save(options);
            scene.wait_for(moment, &mut save);
            scene.guest.kill();
            let status = save.end();
            let said = save.said();
            wait_for_silence(&scene.dir);
            eprintln!("{moment:?}: {status}: {said}");
            if scene.image().exists() {
                // It was all there already.
                scene.note("image");
                assert_eq!(status.code(), Some(0), "{moment:?}: {said}");
                scene.assert_image_is_whole();
                std::fs::remove_file(scene.image()).unwrap();
            } else {
                scene.note("gone");
                assert_eq!(status.code(), Some(4), "{moment:?}: {said}");
                assert_eq!(scene.part_len(), None);
            }
            scene.guest = start(&scene.dir, qemu, true);
        }
        scene.tell("QEMU killed");
    }
}
