//! Real QEMUs launched, listed and stopped; and a guardian whose saver is gone.

#![expect(clippy::unwrap_used, reason = "a test fails by its panic")]

mod support;

use std::ffi::OsString;
use std::fs;
use std::io::{PipeReader, Read, pipe};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vmstow::host::{HostError, ProcessFacts, RuntimeDir, listener_of, qmp_sockets};
use vmstow::qmp::{MigrationStatus, QmpClient, RunState, SavedSettings};
use vmstow::supervise::{
    Damage, Ended, Guardian, GuardianInstruction, Launch, NodeIdentity, RunningGuest,
    SuperviseError, Then, damage_of, freeze, launch, list, put_back, stop,
};

use support::{PATIENCE, Qemu};

/// Both QEMUs, as the first words of a command.
fn qemus() -> Vec<Vec<OsString>> {
    let programs = Qemu::ALL.map(Qemu::program);
    programs.map(|program| vec![program.into()]).into()
}

struct Host {
    dir: tempfile::TempDir,
    runtime: RuntimeDir,
}

impl Host {
    fn new() -> Host {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::at(&dir.path().join("run")).unwrap();
        Host { dir, runtime }
    }

    fn launch(&self, qemu: &[OsString], arguments: &str) -> RunningGuest {
        let dir = self.runtime.create_guest("web").unwrap();
        let mut argv = qemu.to_vec();
        let usual = "-nodefaults -display none -accel tcg";
        let words = usual.split_whitespace().chain(arguments.split_whitespace());
        argv.extend(words.map(OsString::from));
        let monitor = format!("unix:{},server=on,wait=off", dir.qmp_socket().display());
        argv.extend(["-qmp".into(), monitor.into()]);
        let request = Launch {
            argv,
            cwd: "/".into(),
            dir,
            image: None,
            inherit: Vec::new(),
            side: Vec::new(),
            environment: Vec::new(),
            xml: None,
        };
        launch(request).expect("QEMU (Debian package qemu-system-x86)")
    }
}

fn raw(pid: i32) -> Pid {
    Pid::from_raw(pid).unwrap()
}

#[test]
fn a_guest_is_launched_listed_and_stopped() {
    for qemu in qemus() {
        let host = Host::new();
        let mut guest = host.launch(&qemu, "-machine pc -m 16 -S");
        let mut qmp = guest.wait_qmp(PATIENCE).unwrap();
        assert_eq!(qmp.query_status().unwrap(), RunState::Prelaunch);
        drop(qmp);
        let described = guest.keep();
        let session = rustix::process::getsid(Some(raw(described.process.pid)));
        assert_eq!(session.unwrap(), raw(described.process.pid));
        let found = list(&host.runtime).unwrap();
        assert_eq!(found.running, [described]);
        let ended = stop(&host.runtime, "web", None).unwrap();
        assert_eq!(ended, Ended::Quit);
        assert!(list(&host.runtime).unwrap().running.is_empty());
        assert!(matches!(
            stop(&host.runtime, "web", None),
            Err(SuperviseError::Host(HostError::NoSuchGuest { .. }))
        ));
    }
}

#[test]
fn a_frozen_guest_is_marked_and_stopped_at_once() {
    let host = Host::new();
    let mut guest = host.launch(&qemus()[0], "-machine none");
    guest.wait_qmp(PATIENCE).unwrap();
    let dir = guest.dir().clone();
    assert_eq!(damage_of(&dir).unwrap(), None);
    let process = guest.keep().process;
    let damage = Damage {
        what: "chunk 52 does not match its hash".into(),
        at: Some("file offset 0x2a400000".into()),
        pages: None,
        found_at: jiff::Timestamp::now(),
    };
    freeze(&dir, process, &damage).unwrap();
    assert_eq!(damage_of(&dir).unwrap(), Some(damage));
    support::wait_until("QEMU to be stopped", PATIENCE, || {
        let state = fs::read_to_string(format!("/proc/{}/stat", process.pid)).unwrap();
        state.contains(") T ").then_some(()).ok_or(state)
    });
    assert_eq!(list(&host.runtime).unwrap().running.len(), 1);
    let since = Instant::now();
    assert_eq!(stop(&host.runtime, "web", None).unwrap(), Ended::Frozen);
    assert!(since.elapsed() < Duration::from_secs(2));
    assert!(!process.is_alive());
}

#[test]
fn a_qemu_that_refuses_to_start_is_quoted() {
    let host = Host::new();
    let mut guest = host.launch(&qemus()[0], "-machine no-such-machine");
    let error = guest.wait_qmp(PATIENCE).unwrap_err();
    let SuperviseError::EarlyExit { status, log } = &error else {
        panic!("{error}")
    };
    assert_eq!(status, "exit status: 1");
    assert!(log.contains("no-such-machine"), "{log}");
    guest.kill().unwrap();
    assert!(host.runtime.guests().unwrap().is_empty());
}

#[test]
fn a_program_that_is_not_there_leaves_no_directory() {
    let host = Host::new();
    let request = Launch {
        argv: vec!["/nonexistent/qemu".into()],
        cwd: "/".into(),
        dir: host.runtime.create_guest("web").unwrap(),
        image: None,
        inherit: Vec::new(),
        side: Vec::new(),
        environment: Vec::new(),
        xml: None,
    };
    assert!(matches!(launch(request), Err(SuperviseError::Spawn { .. })));
    assert!(host.runtime.guests().unwrap().is_empty());
}

#[test]
fn a_guest_dropped_on_the_way_is_killed() {
    let host = Host::new();
    let mut guest = host.launch(&qemus()[0], "-machine none");
    guest.wait_qmp(PATIENCE).unwrap();
    let id = guest.description().process;
    drop(guest);
    assert!(!id.is_alive());
    assert!(host.runtime.guests().unwrap().is_empty());
}

#[test]
fn what_is_left_of_a_killed_guest_is_cleaned() {
    let host = Host::new();
    let guest = host.launch(&qemus()[0], "-machine none");
    let id = guest.keep().process;
    let handle = id.open().unwrap();
    handle.signal(Signal::KILL).unwrap();
    assert!(handle.wait_gone(PATIENCE).unwrap());
    let found = list(&host.runtime).unwrap();
    assert_eq!(
        (found.running.len(), found.cleaned),
        (0, vec!["web".into()])
    );
    assert!(host.runtime.guests().unwrap().is_empty());
}

#[test]
fn a_guest_deaf_to_its_power_button_is_told_to_quit() {
    let host = Host::new();
    let mut guest = host.launch(&qemus()[0], "-machine pc -m 16 -S");
    guest.wait_qmp(PATIENCE).unwrap();
    guest.keep();
    let ended = stop(&host.runtime, "web", Some(Duration::from_millis(200))).unwrap();
    assert_eq!(ended, Ended::Quit);
}

#[test]
fn a_guest_whose_monitor_is_held_by_another_is_terminated() {
    let host = Host::new();
    let mut guest = host.launch(&qemus()[0], "-machine none");
    let _held = guest.wait_qmp(PATIENCE).unwrap();
    guest.keep();
    assert_eq!(stop(&host.runtime, "web", None).unwrap(), Ended::Terminated);
}

#[test]
fn a_descriptor_is_inherited_under_its_number() {
    use std::os::fd::AsRawFd;
    let host = Host::new();
    let dir = host.runtime.create_guest("web").unwrap();
    let (mut reader, writer) = pipe().unwrap();
    let script = format!("echo hello >&{}", writer.as_raw_fd());
    let request = Launch {
        argv: vec!["/bin/bash".into(), "-c".into(), script.into()],
        cwd: "/".into(),
        dir,
        image: None,
        inherit: vec![writer.into()],
        side: Vec::new(),
        environment: Vec::new(),
        xml: None,
    };
    let _guest = launch(request).unwrap();
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello\n");
}

#[test]
fn a_running_qemu_tells_where_its_monitor_is() {
    for qemu in qemus() {
        let host = Host::new();
        let mut guest = host.launch(&qemu, "-machine none");
        guest.wait_qmp(PATIENCE).unwrap();
        let facts = ProcessFacts::read(guest.pid()).unwrap();
        let sockets = qmp_sockets(&facts).unwrap();
        assert_eq!(sockets, [guest.dir().qmp_socket()]);
        assert_eq!(listener_of(&sockets[0]).unwrap(), guest.pid());
    }
}

/// A save that has stopped its guest: everything the saver would hold.
struct Save {
    host: Host,
    guest: RunningGuest,
    qmp: QmpClient,
    before: SavedSettings,
    temporary: PathBuf,
    target: PathBuf,
}

impl Save {
    /// With a guest that runs, or not, and has settings of its own.
    fn begin(qemu: &[OsString], was_running: bool) -> Save {
        let host = Host::new();
        let mut guest = host.launch(qemu, "-machine pc -m 16");
        let mut qmp = guest.wait_qmp(PATIENCE).unwrap();
        if !was_running {
            qmp.stop().unwrap();
        }
        let on = ("xbzrle".to_owned(), true);
        qmp.set_capabilities(&[on].into()).unwrap();
        qmp.set_parameters(json!({ "max-bandwidth": 5_000_000 }))
            .unwrap();
        let before = SavedSettings::record(&mut qmp).unwrap();
        let [temporary, target] = ["t", "x.stow"].map(|name| host.dir.path().join(name));
        fs::write(&temporary, "image").unwrap();
        Save {
            host,
            guest,
            qmp,
            before,
            temporary,
            target,
        }
    }

    fn guardian(&self, was_running: bool, then: Then) -> Guardian {
        let metadata = fs::symlink_metadata(&self.temporary).unwrap();
        let process = self.guest.description().process;
        let instruction = GuardianInstruction {
            qmp: self.guest.dir().qmp_socket(),
            qemu_pid: Some(process.pid),
            qemu_start_time: Some(process.start_time),
            was_running,
            settings: self.before.clone(),
            then,
            temporary: Some(self.temporary.clone()),
            target: Some(self.target.clone()),
            temporary_identity: Some(NodeIdentity::of(&metadata)),
            overlays: Vec::new(),
            runs_on: false,
            stream: None,
        };
        Guardian::start(Path::new(env!("CARGO_BIN_EXE_vmstow")), &instruction).unwrap()
    }

    fn stop_guest(&mut self) {
        self.before.set_for_save(&mut self.qmp).unwrap();
        self.qmp.stop().unwrap();
    }

    /// Begins a migration into a pipe and waits until it has begun to fill.
    fn migrate(&mut self) -> PipeReader {
        let (reader, writer) = pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&reader, 4096).unwrap();
        self.qmp.getfd("stream", writer.as_fd()).unwrap();
        self.qmp.migrate("fd:stream").unwrap();
        self.wait_for(|status| *status == MigrationStatus::Active);
        reader
    }

    fn wait_for(&mut self, is_there: impl Fn(&MigrationStatus) -> bool) {
        let started = Instant::now();
        while !is_there(&self.qmp.query_migrate().unwrap().status) {
            assert!(started.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn complete_migration(&mut self) {
        let mut reader = self.migrate();
        reader.read_to_end(&mut Vec::new()).unwrap();
        self.wait_for(|status| *status == MigrationStatus::Completed);
    }

    /// As if the saver were killed: its connection and its pipe close. Tells how the guest is then.
    fn die(self, guardian: Guardian) -> Aftermath {
        let Save {
            host,
            mut guest,
            qmp,
            before,
            temporary,
            target,
        } = self;
        drop(qmp);
        let is_settled = guardian.abandon().unwrap().success();
        let state = guest.check_runs().ok().map(|()| {
            let mut qmp = guest.wait_qmp(PATIENCE).unwrap();
            assert_eq!(SavedSettings::record(&mut qmp).unwrap(), before);
            qmp.query_status().unwrap()
        });
        Aftermath {
            state,
            is_settled,
            has_temporary: temporary.exists(),
            has_target: target.exists(),
            _guest: guest,
            _host: host,
        }
    }
}

struct Aftermath {
    /// `None` if QEMU ended.
    state: Option<RunState>,
    is_settled: bool,
    has_temporary: bool,
    has_target: bool,
    _guest: RunningGuest,
    _host: Host,
}

#[test]
fn a_guest_runs_again_with_its_settings_after_its_saver_died() {
    for qemu in qemus() {
        let mut save = Save::begin(&qemu, true);
        let guardian = save.guardian(true, Then::Quit);
        save.stop_guest();
        let after = save.die(guardian);
        assert_eq!(after.state, Some(RunState::Running));
        assert!(after.is_settled && !after.has_temporary);
    }
}

#[test]
fn a_guest_runs_again_after_its_saver_died_in_the_middle_of_the_stream() {
    for qemu in qemus() {
        let mut save = Save::begin(&qemu, true);
        let guardian = save.guardian(true, Then::Quit);
        save.stop_guest();
        drop(save.migrate());
        let after = save.die(guardian);
        assert_eq!(after.state, Some(RunState::Running));
        assert!(after.is_settled && !after.has_temporary);
    }
}

#[test]
fn a_guest_runs_again_after_its_saver_died_behind_the_whole_stream() {
    for qemu in qemus() {
        let mut save = Save::begin(&qemu, true);
        let guardian = save.guardian(true, Then::Quit);
        save.stop_guest();
        save.complete_migration();
        let after = save.die(guardian);
        assert_eq!(after.state, Some(RunState::Running));
        assert!(after.is_settled && !after.has_temporary);
    }
}

#[test]
fn a_guest_that_was_paused_stays_so() {
    for qemu in qemus() {
        let mut save = Save::begin(&qemu, false);
        let guardian = save.guardian(false, Then::Quit);
        save.stop_guest();
        drop(save.migrate());
        let after = save.die(guardian);
        assert!(after.is_settled && !after.has_temporary);
        let state = after.state.unwrap();
        assert!(
            matches!(state, RunState::Paused | RunState::Postmigrate),
            "{state}"
        );
    }
}

#[test]
fn a_published_guest_ends_and_is_never_let_run() {
    for qemu in qemus() {
        let mut save = Save::begin(&qemu, true);
        let mut guardian = save.guardian(true, Then::Quit);
        save.stop_guest();
        save.complete_migration();
        guardian.committing().unwrap();
        fs::rename(&save.temporary, &save.target).unwrap();
        guardian.published().unwrap();
        let id = save.guest.description().process;
        let handle = id.open().unwrap();
        let events = save.qmp.take_events();
        assert!(events.iter().all(|event| event.name != "RESUME"));
        drop(save.qmp);
        assert!(guardian.abandon().unwrap().success());
        assert!(handle.wait_gone(PATIENCE).unwrap());
        assert!(save.target.exists());
    }
}

#[test]
fn a_rename_that_was_announced_and_happened_is_seen() {
    let mut save = Save::begin(&qemus()[0], true);
    let mut guardian = save.guardian(true, Then::Quit);
    save.stop_guest();
    save.complete_migration();
    guardian.committing().unwrap();
    fs::rename(&save.temporary, &save.target).unwrap();
    let handle = save.guest.description().process.open().unwrap();
    drop(save.qmp);
    assert!(guardian.abandon().unwrap().success());
    assert!(handle.wait_gone(PATIENCE).unwrap());
    assert!(save.target.exists());
}

#[test]
fn a_rename_that_was_announced_and_did_not_happen_is_undone() {
    let mut save = Save::begin(&qemus()[0], true);
    let mut guardian = save.guardian(true, Then::Quit);
    save.stop_guest();
    save.complete_migration();
    fs::write(&save.target, "an older image").unwrap();
    guardian.committing().unwrap();
    let after = save.die(guardian);
    assert_eq!(after.state, Some(RunState::Running));
    assert!(after.is_settled && !after.has_temporary && after.has_target);
}

#[test]
fn a_rename_whose_outcome_is_unknown_leaves_the_guest_stopped() {
    let mut save = Save::begin(&qemus()[0], true);
    let mut guardian = save.guardian(true, Then::Quit);
    save.stop_guest();
    guardian.committing().unwrap();
    fs::remove_file(&save.temporary).unwrap();
    drop(save.qmp);
    assert!(!guardian.abandon().unwrap().success());
    let mut qmp = save.guest.wait_qmp(PATIENCE).unwrap();
    assert_eq!(qmp.query_status().unwrap(), RunState::Paused);
}

#[test]
fn a_published_guest_that_shall_go_on_does_so_and_one_that_shall_wait_waits() {
    for (then, expected) in [
        (Then::Resume, RunState::Running),
        (Then::Pause, RunState::Postmigrate),
    ] {
        for qemu in qemus() {
            let mut save = Save::begin(&qemu, true);
            let mut guardian = save.guardian(true, then);
            save.stop_guest();
            save.complete_migration();
            guardian.committing().unwrap();
            fs::rename(&save.temporary, &save.target).unwrap();
            guardian.published().unwrap();
            let after = save.die(guardian);
            assert_eq!(after.state.as_ref(), Some(&expected));
            assert!(after.is_settled && after.has_target);
        }
    }
}

#[test]
fn a_guardian_that_stands_down_touches_nothing() {
    let mut save = Save::begin(&qemus()[0], true);
    let guardian = save.guardian(true, Then::Quit);
    save.stop_guest();
    guardian.stand_down().unwrap();
    assert_eq!(save.qmp.query_status().unwrap(), RunState::Paused);
    assert!(save.temporary.exists());
}

#[test]
fn the_temporary_file_goes_even_if_qemu_is_gone() {
    let mut save = Save::begin(&qemus()[0], true);
    let guardian = save.guardian(true, Then::Quit);
    save.stop_guest();
    let handle = save.guest.description().process.open().unwrap();
    handle.signal(Signal::KILL).unwrap();
    assert!(handle.wait_gone(PATIENCE).unwrap());
    let after = save.die(guardian);
    assert_eq!(after.state, None);
    assert!(after.is_settled && !after.has_temporary);
}

#[test]
fn a_temporary_file_may_be_told_of_later() {
    let mut save = Save::begin(&qemus()[0], true);
    let mut guardian = save.guardian(true, Then::Quit);
    save.stop_guest();
    let later = save.host.dir.path().join("later");
    fs::write(&later, "image").unwrap();
    let identity = NodeIdentity::of(&fs::symlink_metadata(&later).unwrap());
    guardian.temporary(&later, identity).unwrap();
    let after = save.die(guardian);
    assert_eq!(after.state, Some(RunState::Running));
    assert!(!later.exists());
}

#[test]
fn a_guardian_is_out_of_reach_of_signals_terminals_and_descriptors() {
    let save = Save::begin(&qemus()[0], true);
    let guardian = save.guardian(true, Then::Quit);
    let pid = i32::try_from(guardian.pid()).unwrap();
    assert_eq!(rustix::process::getsid(Some(raw(pid))).unwrap(), raw(pid));
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap(),
        Path::new("/")
    );
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let mut fds: Vec<OsString> = fds.map(|fd| fd.unwrap().file_name()).collect();
    fds.sort();
    assert_eq!(fds, ["0", "1", "2"]);
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::PIPE] {
        kill_process(raw(pid), signal).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    guardian.stand_down().unwrap();
}

#[test]
fn a_program_that_is_no_guardian_is_noticed() {
    let save = Save::begin(&qemus()[0], true);
    let instruction = GuardianInstruction {
        qmp: save.guest.dir().qmp_socket(),
        qemu_pid: None,
        qemu_start_time: None,
        was_running: true,
        settings: save.before.clone(),
        then: Then::Quit,
        temporary: None,
        target: None,
        temporary_identity: None,
        overlays: Vec::new(),
        runs_on: false,
        stream: None,
    };
    for program in ["/bin/true", "/bin/echo"] {
        let started = Guardian::start(Path::new(program), &instruction);
        assert!(matches!(
            started,
            Err(SuperviseError::NotReady { .. } | SuperviseError::GuardianGone(_))
        ));
    }
}

#[test]
fn a_saver_that_fails_puts_its_guest_back_itself() {
    for qemu in qemus() {
        let mut save = Save::begin(&qemu, true);
        save.stop_guest();
        let reader = save.migrate();
        drop(reader);
        let state = put_back(&mut save.qmp, &save.before, true).unwrap();
        assert_eq!(state, RunState::Running);
        // And it can be saved again.
        save.stop_guest();
        save.complete_migration();
    }
}

/// Reads until these bytes have come, and then `more`.
fn read_behind(reader: &mut PipeReader, mark: &[u8], more: usize) {
    let mut bytes = Vec::new();
    let mut portion = [0_u8; 256];
    while !bytes.windows(mark.len()).any(|window| window == mark) {
        let count = reader.read(&mut portion).unwrap();
        assert!(count > 0, "the stream has no {mark:?}");
        bytes.drain(..bytes.len().saturating_sub(mark.len()));
        bytes.extend_from_slice(&portion[..count]);
    }
    reader.read_exact(&mut vec![0; more]).unwrap();
}

/// QEMU 7.2 may leave a stopped guest as `postmigrate` if its stream breaks in the device state.
#[test]
fn a_guest_is_put_back_wherever_its_stream_breaks() {
    let breaks: [(&[u8], usize); 6] = [
        (b"QEVM", 0),
        (b"\x06pc.ram", 50_000),
        (b"\x05timer", 0),
        (b"\x05timer", 4000),
        (b"\x06fw_cfg", 0),
        (b"\"vmsd_name\"", 0),
    ];
    for qemu in qemus() {
        let mut save = Save::begin(&qemu, true);
        for (mark, more) in breaks {
            save.stop_guest();
            let mut reader = save.migrate();
            read_behind(&mut reader, mark, more);
            drop(reader);
            let state = put_back(&mut save.qmp, &save.before, true).unwrap();
            assert_eq!(state, RunState::Running, "{more} bytes behind {mark:?}");
            let settings = SavedSettings::record(&mut save.qmp).unwrap();
            assert_eq!(settings, save.before);
        }
    }
}

#[test]
fn a_guest_lost_on_the_way_back_is_an_error_not_a_wait() {
    let mut save = Save::begin(&qemus()[0], true);
    save.stop_guest();
    save.qmp.execute::<Value>("quit", Value::Null).unwrap();
    assert!(put_back(&mut save.qmp, &save.before, true).is_err());
}

#[test]
fn a_guest_whose_starter_was_killed_before_it_wrote_down_is_listed_and_stopped() {
    let host = Host::new();
    let mut guest = host.launch(&qemus()[0], "-machine none");
    guest.wait_qmp(PATIENCE).unwrap();
    fs::remove_file(guest.dir().description()).unwrap();
    let listed = list(&host.runtime).unwrap().running;
    let [found] = &listed[..] else {
        panic!("{listed:?}");
    };
    assert_eq!(found.process, guest.description().process);
    let ended = stop(&host.runtime, "web", None).unwrap();
    assert_eq!(ended, Ended::Quit);
    guest.keep();
}
