//! Processes of this program that work for one guest in the background: started in a session of their own, they say
//! `ready` on their standard output, or what went wrong, and nobody listens to them any more.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::SuperviseError;
use super::guard;
use super::launch::spawn_detached;
use crate::error::{Error, ErrorKind};
use crate::store::far_cause;

/// How long one may take until it is ready, where nobody waits for something else.
const READY_TAKES: Duration = Duration::from_secs(30);

/// The longest line that is said.
const LINE_LIMIT: usize = 1 << 16;

/// What such a process says, one JSON value a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// It does its work.
    Ready,
    /// It ends without having done it.
    Failed(Failed),
}

/// An error of another process of this program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}")]
pub struct Failed {
    /// What failed.
    pub what: String,
    /// Where.
    pub at: Option<String>,
    /// What else there is to know, a line each.
    pub facts: Vec<String>,
    /// The exit code for it.
    pub exit_code: u8,
}

/// A process that was started and may still have something to say.
#[derive(Debug)]
pub struct SideProcess {
    child: Child,
    words: Option<ChildStdout>,
    heard: Vec<u8>,
}

/// Starts this program, `program`, with a hidden subcommand, its options, and the guest's directory or what else it is about; `stdin` becomes its standard input.
///
/// # Errors
/// [`SuperviseError::Spawn`].
pub fn start(
    program: &Path,
    subcommand: &[&str],
    dir: &Path,
    stdin: Option<OwnedFd>,
) -> Result<SideProcess, SuperviseError> {
    let mut command = Command::new(program);
    command.args(subcommand).arg(dir);
    command.stdout(Stdio::piped());
    command.stdin(stdin.map_or(Stdio::null(), Stdio::from));
    command.stderr(Stdio::null());
    let mut child = spawn_detached(&mut command, Vec::new())?;
    let words = child.stdout.take();
    Ok(SideProcess {
        child,
        words,
        heard: Vec::new(),
    })
}

/// Waits until the process says that it is ready.
///
/// # Errors
/// [`SuperviseError::Side`] with what it says instead; [`SuperviseError::SideEnded`].
pub fn wait_ready(process: &mut SideProcess) -> Result<(), SuperviseError> {
    match process.listen(READY_TAKES)? {
        Some(Said::Ready) => Ok(()),
        Some(Said::Failed(failed)) => Err(SuperviseError::Side(failed)),
        None => Err(SuperviseError::SideEnded),
    }
}

impl SideProcess {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says next, waiting for at most `timeout`; `None` if it says nothing by then.
    ///
    /// # Errors
    /// [`SuperviseError::SideEnded`] if it ended without a word.
    pub fn listen(&mut self, timeout: Duration) -> Result<Option<Said>, SuperviseError> {
        let Some(words) = &mut self.words else {
            return Err(SuperviseError::SideEnded);
        };
        let timeout = Timespec::try_from(timeout).ok();
        loop {
            if let Some(end) = self.heard.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                let said = serde_json::from_slice(&line);
                return said.map(Some).map_err(|_| SuperviseError::SideEnded);
            }
            match poll(&mut [PollFd::new(words, PollFlags::IN)], timeout.as_ref()) {
                Ok(0) => return Ok(None),
                Err(Errno::INTR) => continue,
                Ok(_) | Err(_) => {}
            }
            let mut bytes = [0; 4096];
            match words.read(&mut bytes) {
                Ok(len) if len > 0 && self.heard.len() < LINE_LIMIT => {
                    self.heard.extend_from_slice(&bytes[..len]);
                }
                _ => {
                    // It is our child: nobody else would take note of its end.
                    let _ = self.child.wait();
                    return Err(SuperviseError::SideEnded);
                }
            }
        }
    }

    /// Ends it with SIGKILL.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes this process one that outlives a terminal and keeps no directory busy; call it first.
///
/// # Errors
/// What the kernel says.
pub fn detach() -> io::Result<()> {
    guard::detach(None)
}

/// Says that the work is being done.
pub fn say_ready() {
    say(&Said::Ready);
}

/// Says why it is not.
pub fn say_failed(error: &Error) {
    // An image is not damaged because it cannot be reached.
    let root = far_cause(error);
    let error = root.as_ref().unwrap_or(error);
    let mut facts = error.facts();
    facts.extend(error.causes().map(ToString::to_string));
    say(&Said::Failed(Failed {
        what: error.to_string(),
        at: error.at(),
        facts,
        exit_code: error.kind().exit_code(),
    }));
}

fn say(said: &Said) {
    let Ok(mut line) = serde_json::to_vec(said) else {
        return;
    };
    line.push(b'\n');
    // Nobody may be left to read it.
    let _ = io::stdout().write_all(&line);
    let _ = io::stdout().flush();
}

/// Lets go of standard output, on which nobody listens any more.
pub fn fall_silent() {
    if let Ok(nothing) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&nothing);
    }
}

impl Failed {
    /// The kind of error that has this exit code.
    pub fn kind(&self) -> ErrorKind {
        use ErrorKind::{Failed, Host, Image, Interrupted, Remote, Trust, Usage};
        let kinds = [Usage, Image, Host, Remote, Trust, Interrupted];
        let found = kinds
            .into_iter()
            .find(|kind| kind.exit_code() == self.exit_code);
        found.unwrap_or(Failed)
    }
}
