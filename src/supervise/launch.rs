//! Starts a QEMU that outlives us, and watches it until its monitor answers.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::setsid;
use serde::{Deserialize, Serialize};

use super::attendant::{SideProgram, start_attendant, wait_for_attendant};
use super::error::SuperviseError;
use crate::host::{GuestDir, ProcessId};
use crate::qmp::{QmpClient, QmpError};

/// How often we look whether QEMU listens.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// How long one attempt to be greeted may take before we look whether QEMU still lives.
const ATTEMPT: Duration = Duration::from_millis(500);

/// Of the log's end this many bytes, and of these this many lines, are quoted.
const QUOTED_BYTES: u64 = 4096;
const QUOTED_LINES: usize = 12;

/// What to start and where.
#[derive(Debug)]
pub struct Launch {
    /// The binary and its arguments; a monitor on [`GuestDir::qmp_socket`] among them.
    pub argv: Vec<OsString>,
    /// QEMU's working directory.
    pub cwd: PathBuf,
    /// The guest's directory; its name is the guest's.
    pub dir: GuestDir,
    /// The image the guest comes from, if it comes from one.
    pub image: Option<PathBuf>,
    /// Descriptors that QEMU inherits under the numbers they have here.
    pub inherit: Vec<OwnedFd>,
    /// What works for the guest beside QEMU: it is started before and ends after it.
    pub side: Vec<SideProgram>,
    /// Variables that QEMU's environment has besides ours.
    pub environment: Vec<(String, String)>,
    /// The domain XML that it is started from, complete.
    pub xml: Option<String>,
}

/// `guest.json`: a guest of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestDescription {
    /// Its name.
    pub name: String,
    /// Its process: `pid` and `start_time`.
    #[serde(flatten)]
    pub process: ProcessId,
    /// The image it was restored from, if any.
    pub image: Option<PathBuf>,
    /// Its monitor.
    pub qmp: PathBuf,
    /// When it was started.
    pub started_at: Timestamp,
}

/// A QEMU just started. Dropped, it is killed and its directory removed, unless [`RunningGuest::keep`] was called.
#[derive(Debug)]
pub struct RunningGuest {
    description: GuestDescription,
    dir: GuestDir,
    child: Child,
    is_kept: bool,
}

/// Starts QEMU in a session of its own, with nothing on its standard input and its output appended to the log.
///
/// # Errors
/// [`SuperviseError::Spawn`] if it cannot be started; the guest's directory is removed then.
pub fn launch(request: Launch) -> Result<RunningGuest, SuperviseError> {
    let dir = request.dir.clone();
    let started = start(request);
    if started.is_err() {
        wait_for_attendant(&dir);
        // The error that counts is the one of the start.
        let _ = dir.remove();
    }
    started
}

fn start(request: Launch) -> Result<RunningGuest, SuperviseError> {
    let [program, arguments @ ..] = request.argv.as_slice() else {
        return Err(SuperviseError::EmptyArguments);
    };
    if let Some(xml) = &request.xml {
        let path = request.dir.domain_xml();
        write_whole(&path, xml.as_bytes()).map_err(failed("write", &path))?;
    }
    let attendant = match request.side.as_slice() {
        [] => None,
        side => Some(start_attendant(&this_program()?, &request.dir, side)?),
    };
    let log = open_log(&request.dir)?;
    let errors = log
        .try_clone()
        .map_err(failed("open", &request.dir.log()))?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&request.cwd);
    command.envs(request.environment);
    command.stdin(Stdio::null()).stdout(log).stderr(errors);
    let child = spawn_detached(&mut command, request.inherit)?;
    let mut guest = RunningGuest {
        description: GuestDescription {
            name: request.dir.name().to_owned(),
            process: ProcessId {
                pid: pid_of(&child),
                start_time: 0,
            },
            image: request.image,
            qmp: request.dir.qmp_socket(),
            started_at: Timestamp::now(),
        },
        dir: request.dir,
        child,
        is_kept: false,
    };
    guest.note()?;
    // Now it finds QEMU.
    drop(attendant);
    Ok(guest)
}

/// The program whose hidden subcommands work for a guest: this one.
fn this_program() -> Result<PathBuf, SuperviseError> {
    std::env::current_exe().map_err(failed("find", Path::new("/proc/self/exe")))
}

/// Starts a program in a session of its own, with descriptors that it inherits under the numbers they have here.
///
/// # Errors
/// [`SuperviseError::Spawn`].
pub(super) fn spawn_detached(
    command: &mut Command,
    inherit: Vec<OwnedFd>,
) -> Result<Child, SuperviseError> {
    leave_session(command, inherit);
    command.spawn().map_err(|source| SuperviseError::Spawn {
        program: command.get_program().into(),
        source,
    })
}

/// Makes the child the leader of its own session, out of reach of our terminal, and keeps descriptors open for it.
fn leave_session(command: &mut Command, inherit: Vec<OwnedFd>) {
    let prepare = move || {
        setsid()?;
        for fd in &inherit {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe things may be done. The closure makes two kinds of system
    // calls, allocates nothing, takes no lock and touches only descriptors that it owns; an error becomes an
    // `io::Error` from an errno, which does not allocate either.
    unsafe { command.pre_exec(prepare) };
}

fn open_log(dir: &GuestDir) -> Result<File, SuperviseError> {
    let path = dir.log();
    let opened = File::options().append(true).create(true).open(&path);
    opened.map_err(failed("open", &path))
}

fn pid_of(child: &Child) -> i32 {
    // A process id of Linux is at most 2^22.
    i32::try_from(child.id()).unwrap_or_default()
}

impl RunningGuest {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.description.process.pid
    }

    /// Its directory.
    pub fn dir(&self) -> &GuestDir {
        &self.dir
    }

    /// What `guest.json` says of it.
    pub fn description(&self) -> &GuestDescription {
        &self.description
    }

    /// How it ended, if it has: in the words of the standard library.
    ///
    /// # Errors
    /// [`SuperviseError::EarlyExit`], with its last words.
    pub fn check_runs(&mut self) -> Result<(), SuperviseError> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(SuperviseError::EarlyExit {
                status: status.to_string(),
                log: self.last_words(),
            }),
            // Not being able to ask does not mean that it ended.
            Ok(None) | Err(_) => Ok(()),
        }
    }

    /// Waits until its monitor answers.
    ///
    /// # Errors
    /// [`SuperviseError::EarlyExit`] if QEMU ends first, [`SuperviseError::NoMonitor`] if it takes too long.
    pub fn wait_qmp(&mut self, timeout: Duration) -> Result<QmpClient, SuperviseError> {
        let started = Instant::now();
        loop {
            self.check_runs()?;
            let left = timeout.saturating_sub(started.elapsed());
            match QmpClient::connect(&self.description.qmp, left.min(ATTEMPT)) {
                Ok(client) => return Ok(client),
                Err(QmpError::NotQmp { path, found }) => {
                    return Err(QmpError::NotQmp { path, found }.into());
                }
                Err(source) if started.elapsed() >= timeout => {
                    return Err(SuperviseError::NoMonitor {
                        waited: started.elapsed(),
                        log: self.last_words(),
                        source,
                    });
                }
                Err(_) => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    /// The last lines of its log.
    pub fn last_words(&self) -> String {
        // A log that cannot be read has no words in it.
        tail(&self.dir.log()).unwrap_or_default()
    }

    /// Lets it live on after us.
    pub fn keep(mut self) -> GuestDescription {
        self.is_kept = true;
        self.description.clone()
    }

    /// Ends a start that failed: SIGKILL, and its directory is removed.
    pub fn kill(mut self) -> Result<(), SuperviseError> {
        self.is_kept = true;
        self.end()
    }

    fn end(&mut self) -> Result<(), SuperviseError> {
        // It is our child and not waited for, so its id cannot have been reused, and `Child` knows if it was.
        let killed = self.child.kill().and_then(|()| self.child.wait());
        wait_for_attendant(&self.dir);
        self.dir.remove()?;
        match killed {
            Ok(_) => Ok(()),
            Err(_) => Err(SuperviseError::Unkillable { pid: self.pid() }),
        }
    }

    /// Writes `pid` and `guest.json`.
    fn note(&mut self) -> Result<(), SuperviseError> {
        match ProcessId::of(self.pid()) {
            Ok(process) => self.description.process = process,
            // It ended already: `wait_qmp` will tell, with its last words.
            Err(_) => return Ok(()),
        }
        let path = self.dir.pid_file();
        fs::write(&path, format!("{}\n", self.pid())).map_err(failed("write", &path))?;
        let path = self.dir.description();
        let text = serde_json::to_vec_pretty(&self.description);
        let text = text.map_err(|source| SuperviseError::BadDescription {
            path: path.clone(),
            source,
        })?;
        write_whole(&path, &text).map_err(failed("write", &path))
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        if !self.is_kept {
            // Whoever drops it has a better error to tell.
            let _ = self.end();
        }
    }
}

/// Nobody ever sees half of it.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.persist(path)?;
    Ok(())
}

/// The last lines of a log.
pub(super) fn tail(log: &Path) -> io::Result<String> {
    let mut file = File::open(log)?;
    let len = file.metadata()?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(QUOTED_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(QUOTED_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(QUOTED_LINES);
    Ok(lines.get(first..).unwrap_or_default().join("\n"))
}

pub(super) fn failed(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SuperviseError {
    let path = path.to_owned();
    move |source| SuperviseError::File { act, path, source }
}
