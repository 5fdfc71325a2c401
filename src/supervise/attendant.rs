//! The programs that work for a guest beside QEMU, such as the emulator of its TPM, and the process of ours that attends to
//! them.
//!
//! They run before QEMU, which connects to them, and have to end with it whatever ends it: its own end, `vmstow stop`, a
//! start that fails, a kill of whoever started it. So the attendant, in a session of its own, starts them as its children,
//! which the kernel ends if it is killed, and says that it is ready once they listen. Then it waits for the end of its
//! standard input, which is a pipe to whoever starts QEMU. By then either `guest.json` tells which process QEMU is, and the
//! attendant waits for its end; or there is no guest and never will be. Afterwards it gives its children time to end by
//! themselves, and ends those that do not.
//!
//! It works in the guest's directory, which stays this one if another guest gets its name.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use serde::{Deserialize, Serialize};

use super::error::SuperviseError;
use super::launch::{GuestDescription, failed, tail, write_whole};
use super::side_process::{self, SideProcess, wait_ready};
use crate::host::{
    GuestDir, HostError, ProcessId, SOCKET_PATH_LIMIT, find_program, has_listener, listener_of,
    make_private_directory,
};

/// The hidden subcommand that makes the program an attendant.
const SUBCOMMAND: &str = "__attend";

/// How long a program may take until it listens.
const LISTENS: Duration = Duration::from_secs(20);

/// How long a QEMU may take to be seen that was started by somebody who was killed then.
const APPEARS: Duration = Duration::from_secs(5);

/// How long a program may take to end by itself once QEMU has ended, and then after SIGTERM.
const ENDS: Duration = Duration::from_secs(3);

/// How long the attendant may take for all that.
const ALL_END: Duration = Duration::from_secs(10);

/// How often it is looked.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A program that works for a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideProgram {
    /// What it is for, in words of file names: `tpm0`.
    pub name: String,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Where it listens for QEMU once it is ready.
    pub socket: PathBuf,
    /// The directory of what it keeps, which only one can use at a time. It is made if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<PathBuf>,
}

/// An attendant that waits for QEMU. Dropped, it looks for it, and ends everything if there is none.
#[derive(Debug)]
pub struct Attendant {
    _process: SideProcess,
    _until: OwnedFd,
}

/// Starts the programs of a guest, and waits until all of them listen.
///
/// # Errors
/// [`HostError::NoProgram`]; [`SuperviseError::Side`] with the words of a program that ended; none of them runs then.
pub fn start_attendant(
    program: &Path,
    dir: &GuestDir,
    programs: &[SideProgram],
) -> Result<Attendant, SuperviseError> {
    for one in programs {
        refuse_missing(one)?;
        if let Some(state) = &one.state {
            make_private_directory(state)?;
        }
    }
    let path = dir.side_programs();
    let text = serde_json::to_vec_pretty(programs);
    let text = text.map_err(|source| SuperviseError::BadDescription {
        path: path.clone(),
        source,
    })?;
    write_whole(&path, &text).map_err(failed("write", &path))?;
    let (theirs, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(|errno| failed("make a pipe for", dir.path())(errno.into()))?;
    let mut process = side_process::start(program, &[SUBCOMMAND], dir.path(), Some(theirs))?;
    wait_ready(&mut process)?;
    Ok(Attendant {
        _process: process,
        _until: ours,
    })
}

fn refuse_missing(one: &SideProgram) -> Result<(), HostError> {
    let name = one.argv.first().map_or("", String::as_str);
    let is_there = match name.contains('/') {
        true => Path::new(name).is_file(),
        false => find_program(name).is_some(),
    };
    if !is_there {
        return Err(HostError::NoProgram {
            program: name.to_owned(),
            what: one.name.clone(),
        });
    }
    match one.socket.as_os_str().len() <= SOCKET_PATH_LIMIT {
        true => Ok(()),
        false => Err(HostError::SocketPathTooLong {
            path: one.socket.clone(),
            limit: SOCKET_PATH_LIMIT,
        }),
    }
}

/// The programs that work for a guest beside QEMU.
///
/// # Errors
/// [`SuperviseError::BadDescription`] if what is noted is not ours.
pub fn side_programs_of(dir: &GuestDir) -> Result<Vec<SideProgram>, SuperviseError> {
    let path = dir.side_programs();
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|source| SuperviseError::BadDescription { path, source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed("read", &path)(error)),
    }
}

/// Waits until nobody works for a guest any more whose QEMU has ended; gives up quietly after some seconds.
pub(super) fn wait_for_attendant(dir: &GuestDir) {
    let attendant = fs::read(dir.attendant());
    let attendant = attendant.map(|bytes| serde_json::from_slice::<ProcessId>(&bytes));
    if let Ok(Ok(process)) = attendant
        && let Ok(handle) = process.open()
    {
        let _ = handle.wait_gone(ALL_END);
    }
}

/// The program's life as an attendant.
pub fn run_attendant(dir: &Path) -> ExitCode {
    let started = enter(dir).and_then(|entered| {
        let children = Children::start(&entered)?;
        Ok((entered, children))
    });
    match started {
        Ok((entered, mut children)) => {
            side_process::say_ready();
            side_process::fall_silent();
            // A pipe that cannot be read is as good as closed.
            let _ = io::stdin().read_to_end(&mut Vec::new());
            if let Some(qemu) = find_qemu_of(&entered, dir) {
                children.wait_for(qemu);
            }
            children.end();
            ExitCode::SUCCESS
        }
        Err(error) => {
            side_process::say_failed(&error.into());
            ExitCode::FAILURE
        }
    }
}

/// Goes into the guest's directory, and notes there who attends.
fn enter(dir: &Path) -> Result<GuestDir, SuperviseError> {
    let entered = side_process::detach().and_then(|()| std::env::set_current_dir(dir));
    entered.map_err(failed("enter", dir))?;
    let dir = GuestDir::at(dir)?.entered();
    let us = ProcessId::of(i32::try_from(std::process::id()).unwrap_or_default())?;
    let path = dir.attendant();
    let us = serde_json::to_vec(&us).map_err(|source| SuperviseError::BadDescription {
        path: path.clone(),
        source,
    })?;
    write_whole(&path, &us).map_err(failed("write", &path))?;
    Ok(dir)
}

/// The QEMU that was started for this guest; `None` if there is none and, since the guest's directory is gone or nobody
/// comes to listen, never will be.
fn find_qemu_of(entered: &GuestDir, dir: &Path) -> Option<ProcessId> {
    let since = Instant::now();
    let is_removed = || fs::metadata(".").is_ok_and(|it| it.nlink() == 0);
    while !is_removed() {
        let described = fs::read(entered.description()).ok();
        let described =
            described.and_then(|it| serde_json::from_slice::<GuestDescription>(&it).ok());
        if let Some(guest) = described {
            return Some(guest.process);
        }
        let qmp = GuestDir::at(dir).ok()?.qmp_socket();
        let listener = listener_of(&qmp).and_then(ProcessId::of);
        if listener.is_ok() || since.elapsed() > APPEARS {
            return listener.ok();
        }
        std::thread::sleep(LOOK_EVERY);
    }
    None
}

/// The programs that run. Dropped, they are killed.
struct Children(Vec<Child>);

impl Children {
    /// Starts all, one after the other, each of which has to listen.
    fn start(dir: &GuestDir) -> Result<Self, SuperviseError> {
        let programs = side_programs_of(dir)?;
        let mut children = Children(Vec::new());
        for program in &programs {
            let mut child = spawn(dir, program)?;
            let listens = wait_until_it_listens(dir, program, &mut child);
            children.0.push(child);
            listens?;
        }
        Ok(children)
    }

    /// Waits for QEMU's end, and takes note of the programs' own meanwhile.
    fn wait_for(&mut self, qemu: ProcessId) {
        let Ok(handle) = qemu.open() else { return };
        while !handle.wait_gone(Duration::from_secs(1)).unwrap_or(true) {
            self.have_ended();
        }
    }

    fn have_ended(&mut self) -> bool {
        self.0
            .retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        self.0.is_empty()
    }

    fn have_ended_within(&mut self, patience: Duration) -> bool {
        let since = Instant::now();
        while !self.have_ended() && since.elapsed() < patience {
            std::thread::sleep(LOOK_EVERY);
        }
        self.0.is_empty()
    }

    /// Waits until they have ended by themselves, and ends those that do not.
    fn end(&mut self) {
        if self.have_ended_within(ENDS) {
            return;
        }
        for child in &self.0 {
            // It was not waited for, so its id is its own.
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        self.have_ended_within(ENDS);
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(dir: &GuestDir, program: &SideProgram) -> Result<Child, SuperviseError> {
    let path = dir.side_messages(&program.name);
    let messages = File::options().append(true).create(true).open(&path);
    let messages = messages.map_err(failed("open", &path))?;
    let errors = messages.try_clone().map_err(failed("open", &path))?;
    let Some((name, arguments)) = program.argv.split_first() else {
        return Err(SuperviseError::EmptyArguments);
    };
    let mut command = Command::new(name);
    command.args(arguments).current_dir("/");
    command.stdin(Stdio::null()).stdout(messages).stderr(errors);
    let prepare = || Ok(set_parent_process_death_signal(Some(Signal::TERM))?);
    // SAFETY: between fork and exec only async-signal-safe things may be done. The closure makes one system call,
    // allocates nothing, takes no lock; an error becomes an `io::Error` from an errno, which does not allocate either.
    unsafe { command.pre_exec(prepare) };
    command.spawn().map_err(|source| SuperviseError::Spawn {
        program: name.into(),
        source,
    })
}

/// Waits until the program listens. Nobody connects to try: some of them serve one connection and end.
fn wait_until_it_listens(
    dir: &GuestDir,
    program: &SideProgram,
    child: &mut Child,
) -> Result<(), SuperviseError> {
    let since = Instant::now();
    let words = || tail(&dir.side_messages(&program.name)).unwrap_or_default();
    let name = || program.argv.first().cloned().unwrap_or_default();
    loop {
        if has_listener(&program.socket) {
            return Ok(());
        }
        if let Ok(Some(status)) = child.try_wait() {
            return Err(SuperviseError::SideProgramEnded {
                program: name(),
                status: status.to_string(),
                words: words(),
            });
        }
        if since.elapsed() > LISTENS {
            return Err(SuperviseError::SideProgramSilent {
                program: name(),
                words: words(),
            });
        }
        std::thread::sleep(LOOK_EVERY);
    }
}
