//! The guardian itself: waits, and acts when the saver is gone.
//!
//! | the saver's last word | what the guardian does |
//! |---|---|
//! | none | undoes: settings, run state, temporary file |
//! | committing | looks which name the file has: the temporary one → undoes, the final one → finishes, none → nothing |
//! | published | finishes: `quit`, or settings and run state, as was asked |
//! | stand down | nothing |
//!
//! A guest whose image is published to take its place is never let run.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use rustix::stdio::dup2_stdout;
use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGQUIT, SIGTERM};

use super::error::SuperviseError;
use super::guardian::{GuardianInstruction, NodeIdentity, READY, Then, Word};
use super::undo::{put_back, put_back_live, while_draining};
use crate::host::{HostError, ProcessId};
use crate::qmp::{QmpClient, QmpError, RunState};

/// How long the monitor may stay busy: QEMU frees it once it notices that the saver is gone.
const CONNECT_TAKES: Duration = Duration::from_secs(30);

/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(2);

/// A QEMU whose process we do not know counts as gone when nobody has listened for so long.
const GONE_AFTER: Duration = Duration::from_secs(3);

/// How often we try.
const TRY_EVERY: Duration = Duration::from_millis(50);

/// The program's life as a guardian: the instruction and the saver's words come on stdin, what was done is told on
/// stderr in one line.
///
/// Call it before anything else is opened: it closes every descriptor from 3 on.
pub fn run() -> ExitCode {
    let mut input = io::stdin().lock();
    let Some(mut instruction) = prepare(&mut input) else {
        return ExitCode::FAILURE;
    };
    let Some(stage) = listen(&mut input, &mut instruction) else {
        return ExitCode::SUCCESS;
    };
    let report = act(&instruction, stage);
    // Nobody may be left to read it.
    let _ = writeln!(
        io::stderr(),
        "vmstow: the save was cut off; {}",
        report.text
    );
    match report.is_settled {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Reads the instruction and says that it is ready.
fn prepare(input: &mut impl BufRead) -> Option<GuardianInstruction> {
    let mut line = String::new();
    input.read_line(&mut line).ok()?;
    let instruction: GuardianInstruction = serde_json::from_str(&line).ok()?;
    detach(instruction.stream).ok()?;
    // A saver that was killed by now cannot read it, and needs a guardian all the same.
    let _ = io::stdout().write_all(READY.as_bytes());
    let _ = io::stdout().flush();
    let nothing = File::options().write(true).open("/dev/null").ok()?;
    dup2_stdout(&nothing).ok()?;
    Some(instruction)
}

/// Makes this process one that outlives its parent's terminal, and closes all it inherited but `stream`.
pub(super) fn detach(stream: Option<i32>) -> io::Result<()> {
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGPIPE] {
        // Caught and never looked at; system calls that it interrupts are taken up again.
        signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))?;
    }
    std::env::set_current_dir("/")?;
    close_inherited(stream)
}

/// Closes what somebody let us inherit: a pipe's end kept open here could keep its reader waiting.
fn close_inherited(but: Option<i32>) -> io::Result<()> {
    // Collected as numbers: once the directory is closed again its own is the one that is not open.
    let entries = fs::read_dir("/proc/self/fd")?.flatten();
    let numbers: Vec<i32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    let is_open = |number: &i32| fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
    let is_strange = |number: &i32| *number > 2 && Some(*number) != but;
    for number in numbers.into_iter().filter(is_strange).filter(is_open) {
        // SAFETY: this is the beginning of the process, and it has opened nothing that it still holds: standard
        // input, output and error are the only descriptors that an object of this program owns.
        unsafe { rustix::io::close(number) };
    }
    Ok(())
}

/// How far the saver came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Saving,
    Committing,
    Published,
}

/// Follows the saver's words to the end of the pipe. `None` if the guardian may go.
fn listen(input: &mut impl BufRead, instruction: &mut GuardianInstruction) -> Option<Stage> {
    let mut stage = Stage::Saving;
    let mut line = Vec::new();
    loop {
        line.clear();
        // A pipe that cannot be read is as good as closed; a word cut off was not said.
        let is_whole = input.read_until(b'\n', &mut line).is_ok() && line.ends_with(b"\n");
        if !is_whole {
            return Some(stage);
        }
        match serde_json::from_slice(&line) {
            Ok(Word::Temporary { path, identity }) => {
                instruction.temporary = Some(path);
                instruction.temporary_identity = Some(identity);
            }
            Ok(Word::RunsOn) => instruction.runs_on = true,
            Ok(Word::Committing) => stage = Stage::Committing,
            Ok(Word::Published) => stage = Stage::Published,
            Ok(Word::StandDown) => return None,
            Err(_) => {}
        }
    }
}

/// What was done, for people, and whether that is all that had to be done.
#[derive(Debug, PartialEq, Eq)]
struct Report {
    text: String,
    is_settled: bool,
}

fn act(instruction: &GuardianInstruction, stage: Stage) -> Report {
    match decide(instruction, stage) {
        Decision::Undo => undo(instruction),
        Decision::Finish => finish(instruction),
        Decision::LeaveAlone => Report {
            text: "whether its image got its name is unknown, so the guest was left stopped"
                .to_owned(),
            is_settled: false,
        },
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Undo,
    Finish,
    LeaveAlone,
}

fn decide(instruction: &GuardianInstruction, stage: Stage) -> Decision {
    let has_it = |path: &Option<_>| is_file(path.as_deref(), instruction.temporary_identity);
    match stage {
        Stage::Saving => Decision::Undo,
        Stage::Published => Decision::Finish,
        Stage::Committing if has_it(&instruction.target) => Decision::Finish,
        Stage::Committing if has_it(&instruction.temporary) => Decision::Undo,
        Stage::Committing => Decision::LeaveAlone,
    }
}

fn is_file(path: Option<&Path>, identity: Option<NodeIdentity>) -> bool {
    let found = path.and_then(|path| fs::symlink_metadata(path).ok());
    match (found, identity) {
        (Some(metadata), Some(identity)) => NodeIdentity::of(&metadata) == identity,
        _ => false,
    }
}

fn undo(instruction: &GuardianInstruction) -> Report {
    let outcome = match instruction.stream {
        Some(number) => undo_live(instruction, number),
        None => connect(instruction)
            .and_then(|mut qmp| put_back(&mut qmp, &instruction.settings, instruction.was_running)),
    };
    let mut report = match outcome {
        Ok(state) => Report {
            text: format!(
                "the guest was put back and is {state}{}",
                new_overlays(instruction)
            ),
            is_settled: true,
        },
        Err(error) if is_gone(instruction, &error) => Report {
            text: "QEMU is gone".to_owned(),
            is_settled: true,
        },
        Err(error) => Report {
            text: format!("the guest could not be put back: {}", with_causes(&error)),
            is_settled: false,
        },
    };
    remove_temporary(instruction, &mut report);
    report
}

/// The descriptor is the pipe that QEMU writes to, which the saver read until now; without a reader QEMU could not even
/// answer.
fn undo_live(instruction: &GuardianInstruction, number: i32) -> Result<RunState, SuperviseError> {
    let stream = File::open(format!("/proc/self/fd/{number}")).ok();
    while_draining(stream.as_ref(), |drained| {
        let mut qmp = connect(instruction)?;
        let settings = &instruction.settings;
        put_back_live(&mut qmp, settings, drained, instruction.runs_on)
    })
}

/// Says where the guest's disks go on, if the save got so far.
fn new_overlays(instruction: &GuardianInstruction) -> String {
    let made = instruction.overlays.iter().filter(|path| path.exists());
    let made: Vec<String> = made.map(|path| path.display().to_string()).collect();
    match made.is_empty() {
        true => String::new(),
        false => format!(", its disks in the new overlays {}", made.join(" and ")),
    }
}

/// Removes the unfinished image, but no other file that may have its name by now.
fn remove_temporary(instruction: &GuardianInstruction, report: &mut Report) {
    let Some(path) = &instruction.temporary else {
        return;
    };
    // Until it is told which file it is, the saver has written nothing to it.
    let is_ours = match instruction.temporary_identity {
        Some(identity) => is_file(Some(path), Some(identity)),
        None => fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == 0),
    };
    if !is_ours {
        return;
    }
    let name = path.display();
    // Writing into a `String` cannot fail.
    let _ = match fs::remove_file(path) {
        Ok(()) => write!(report.text, "; the unfinished {name} was removed"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => {
            report.is_settled = false;
            write!(report.text, "; the unfinished {name} stays: {error}")
        }
    };
}

fn finish(instruction: &GuardianInstruction) -> Report {
    let outcome = sync_name(instruction).and_then(|()| settle_guest(instruction));
    match outcome {
        Ok(text) => Report {
            text: format!("its image is complete and {text}"),
            is_settled: true,
        },
        Err(error) if is_gone(instruction, &error) => Report {
            text: "its image is complete and QEMU is gone".to_owned(),
            is_settled: true,
        },
        Err(error) => Report {
            text: format!(
                "its image is complete but the guest was left as it is: {}",
                with_causes(&error)
            ),
            is_settled: false,
        },
    }
}

/// The image's name must be on disk before the guest ends.
fn sync_name(instruction: &GuardianInstruction) -> Result<(), SuperviseError> {
    let Some(directory) = instruction.target.as_deref().and_then(Path::parent) else {
        return Ok(());
    };
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    let synced = synced.or_else(|error| match error.kind() {
        // Its file system does not offer that.
        io::ErrorKind::InvalidInput => Ok(()),
        _ => Err(error),
    });
    synced.map_err(super::launch::failed("sync", directory))
}

fn settle_guest(instruction: &GuardianInstruction) -> Result<String, SuperviseError> {
    let mut qmp = connect(instruction)?;
    if instruction.then == Then::Quit {
        qmp.quit()?;
        return Ok("QEMU was told to quit".to_owned());
    }
    if instruction.stream.is_some() {
        let state = put_back_live(&mut qmp, &instruction.settings, &AtomicU64::new(0), true)?;
        return Ok(format!("the guest is {state}"));
    }
    let shall_run = instruction.then == Then::Resume && instruction.was_running;
    let state = put_back(&mut qmp, &instruction.settings, shall_run)?;
    Ok(format!("the guest is {state}"))
}

/// Connects to QEMU, and waits while its monitor is busy.
fn connect(instruction: &GuardianInstruction) -> Result<QmpClient, SuperviseError> {
    let started = Instant::now();
    loop {
        if process_of(instruction).is_some_and(|process| !process.is_alive()) {
            return Err(QmpError::Disconnected.into());
        }
        let error = match QmpClient::connect(&instruction.qmp, ATTEMPT) {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        let patience = match error.is_gone() && process_of(instruction).is_none() {
            true => GONE_AFTER,
            false => CONNECT_TAKES,
        };
        if started.elapsed() > patience {
            return Err(error.into());
        }
        std::thread::sleep(TRY_EVERY);
    }
}

fn process_of(instruction: &GuardianInstruction) -> Option<ProcessId> {
    Some(ProcessId {
        pid: instruction.qemu_pid?,
        start_time: instruction.qemu_start_time?,
    })
}

fn is_gone(instruction: &GuardianInstruction, error: &SuperviseError) -> bool {
    let hung_up = matches!(error, SuperviseError::Qmp(error) if error.is_gone());
    match process_of(instruction).map(|process| process.open()) {
        // A QEMU that is killed hangs up before its process is gone.
        Some(Ok(handle)) => hung_up && handle.wait_gone(GONE_AFTER).unwrap_or(false),
        Some(Err(error)) => matches!(error, HostError::NoSuchProcess { .. }),
        None => hung_up,
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<String> = causes.map(ToString::to_string).collect();
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::SavedSettings;
    use std::path::PathBuf;

    fn instruction() -> GuardianInstruction {
        GuardianInstruction {
            qmp: "/nonexistent/qmp.sock".into(),
            qemu_pid: None,
            qemu_start_time: None,
            was_running: true,
            settings: SavedSettings {
                capabilities: [].into(),
                max_bandwidth: None,
            },
            then: Then::Quit,
            temporary: None,
            target: None,
            temporary_identity: None,
            overlays: Vec::new(),
            runs_on: false,
            stream: None,
        }
    }

    fn stage_after(words: &str) -> Option<Stage> {
        listen(&mut words.as_bytes(), &mut instruction())
    }

    #[test]
    fn the_last_whole_word_counts() {
        assert_eq!(stage_after(""), Some(Stage::Saving));
        assert_eq!(stage_after("\"committing\"\n"), Some(Stage::Committing));
        let cut = "\"committing\"\n\"published\"";
        assert_eq!(stage_after(cut), Some(Stage::Committing));
        let whole = "\"committing\"\n\"published\"\n";
        assert_eq!(stage_after(whole), Some(Stage::Published));
        assert_eq!(stage_after("\"stand-down\"\n"), None);
        assert_eq!(stage_after("\"stand-down\""), Some(Stage::Saving));
    }

    #[test]
    fn the_name_that_the_file_has_decides_whether_a_rename_happened() {
        let dir = tempfile::tempdir().unwrap();
        let [temporary, target]: [PathBuf; 2] = ["t", "x.stow"].map(|name| dir.path().join(name));
        fs::write(&temporary, "image").unwrap();
        fs::write(&target, "an older image").unwrap();
        let mut told = instruction();
        told.temporary = Some(temporary.clone());
        told.target = Some(target.clone());
        // Without knowing which file it is, nothing can be told.
        assert_eq!(decide(&told, Stage::Committing), Decision::LeaveAlone);
        let metadata = fs::symlink_metadata(&temporary).unwrap();
        told.temporary_identity = Some(NodeIdentity::of(&metadata));
        assert_eq!(decide(&told, Stage::Committing), Decision::Undo);
        fs::rename(&temporary, &target).unwrap();
        assert_eq!(decide(&told, Stage::Committing), Decision::Finish);
        fs::remove_file(&target).unwrap();
        assert_eq!(decide(&told, Stage::Committing), Decision::LeaveAlone);
        assert_eq!(decide(&told, Stage::Saving), Decision::Undo);
        assert_eq!(decide(&told, Stage::Published), Decision::Finish);
    }

    #[test]
    fn a_file_that_took_the_temporary_name_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        fs::write(&path, "somebody else's").unwrap();
        let mut told = instruction();
        told.temporary = Some(path.clone());
        told.temporary_identity = Some(NodeIdentity { dev: 1, inode: 1 });
        let mut report = Report {
            text: String::new(),
            is_settled: true,
        };
        remove_temporary(&told, &mut report);
        told.temporary_identity = None;
        remove_temporary(&told, &mut report);
        assert!(path.exists() && report.is_settled && report.text.is_empty());
        fs::write(&path, "").unwrap();
        remove_temporary(&told, &mut report);
        assert!(!path.exists() && report.is_settled);
    }
}
