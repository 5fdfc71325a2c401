//! The guardian, as the saver sees it: a second process that acts if the saver dies.
//!
//! It follows a pipe of words, one JSON value a line: first the instruction, then what the saver is about to do. If
//! the pipe closes without [`Word::StandDown`] the guardian undoes the save or finishes it; see `guard.rs`.

use std::fs::Metadata;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::SuperviseError;
use super::launch::spawn_detached;
use crate::qmp::SavedSettings;

/// The hidden subcommand that makes the program a guardian.
pub const SUBCOMMAND: &str = "__guardian";

/// What the guardian says once it guards.
pub(super) const READY: &str = "ready\n";

/// How long it may take until then.
const READY_TAKES: Duration = Duration::from_secs(20);

/// What becomes of the guest once its image is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Then {
    /// The image takes over: QEMU ends.
    Quit,
    /// It runs on if it ran before.
    Resume,
    /// It stays stopped.
    Pause,
}

/// Which file, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeIdentity {
    /// Its file system.
    pub dev: u64,
    /// Its inode there.
    pub inode: u64,
}

impl NodeIdentity {
    /// Of a file that was looked at.
    pub fn of(metadata: &Metadata) -> Self {
        NodeIdentity {
            dev: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// All that the guardian needs in order to act alone. Relative paths are made absolute when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardianInstruction {
    /// QEMU's monitor.
    pub qmp: PathBuf,
    /// QEMU's process id, if it is known.
    pub qemu_pid: Option<i32>,
    /// When that process started, in clock ticks after boot.
    pub qemu_start_time: Option<u64>,
    /// Whether the guest ran before the save.
    pub was_running: bool,
    /// The migration settings before the save.
    pub settings: SavedSettings,
    /// What the saver does once the image is published.
    pub then: Then,
    /// The image under its temporary name; `None` if it has none, as on a pipe.
    pub temporary: Option<PathBuf>,
    /// The image's final name.
    pub target: Option<PathBuf>,
    /// Which file the temporary one is; `None` until it is made, see [`Guardian::temporary`]. Without it the outcome
    /// of a rename cannot be known.
    pub temporary_identity: Option<NodeIdentity>,
    /// Overlays in which the guest's disks go on, if they were made.
    #[serde(default)]
    pub overlays: Vec<PathBuf>,
    /// Of a guest that runs while it is saved: the descriptor, inherited, from which QEMU's stream can be read. While the
    /// saver lives only it reads; afterwards the pipe must not break, see [`put_back_live`](super::put_back_live).
    #[serde(default)]
    pub stream: Option<i32>,
    /// Whether the guest runs while it is saved, so that nobody has to let it run again; see [`Guardian::runs_on`].
    #[serde(default)]
    pub runs_on: bool,
}

/// What the saver tells after the instruction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Word {
    /// The temporary file is made now.
    Temporary {
        path: PathBuf,
        identity: NodeIdentity,
    },
    /// The guest runs on from here.
    RunsOn,
    /// The rename comes next.
    Committing,
    /// The rename is done.
    Published,
    /// All is settled.
    StandDown,
}

/// The saver's hold on its guardian. Dropped, or when the saver is killed, it makes the guardian act.
#[derive(Debug)]
pub struct Guardian {
    child: Child,
    words: Option<ChildStdin>,
    /// Why a word did not arrive.
    lost: Option<io::Error>,
}

impl Guardian {
    /// Starts a guardian: `program`, which is this program, with [`SUBCOMMAND`]. It returns once the guardian is in a
    /// session of its own, in `/`, deaf to signals, and holds no descriptor of ours but its pipe and stderr.
    ///
    /// # Errors
    /// [`SuperviseError::NotReady`] if it does not become ready; nothing must be stopped then.
    pub fn start(
        program: &Path,
        instruction: &GuardianInstruction,
    ) -> Result<Self, SuperviseError> {
        Guardian::start_with(program, instruction, None)
    }

    /// As [`Guardian::start`], of a guest that runs while it is saved: with the other end of the pipe that QEMU writes to.
    ///
    /// # Errors
    /// As [`Guardian::start`].
    pub fn start_with(
        program: &Path,
        instruction: &GuardianInstruction,
        stream: Option<OwnedFd>,
    ) -> Result<Self, SuperviseError> {
        let instruction = &GuardianInstruction {
            stream: stream.as_ref().map(AsRawFd::as_raw_fd),
            ..instruction.clone()
        };
        let line = line_of(&instruction.absolute()?)?;
        let mut command = Command::new(program);
        command.arg(SUBCOMMAND);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // From its first moment on: a Ctrl-C that ends the saver must not reach it.
        let mut child = spawn_detached(&mut command, stream.into_iter().collect())?;
        let words = child.stdin.take();
        let answers = child.stdout.take();
        let mut guardian = Guardian {
            child,
            words,
            lost: None,
        };
        guardian.send(&line);
        guardian.check()?;
        let answer = answers.map(first_answer).unwrap_or_default();
        match answer == READY.as_bytes() {
            true => Ok(guardian),
            false => {
                // One that is not ready must not act later.
                let _ = guardian.child.kill();
                let _ = guardian.child.wait();
                Err(SuperviseError::NotReady {
                    answer: String::from_utf8_lossy(&answer).into_owned(),
                })
            }
        }
    }

    /// Tells of the temporary file, if it was not made when the guardian started; nothing is written to it before.
    pub fn temporary(&mut self, path: &Path, identity: NodeIdentity) -> Result<(), SuperviseError> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        self.tell(&Word::Temporary { path, identity })
    }

    /// The guest runs on while its memory is written: from now on whether it runs is its user's business.
    ///
    /// # Errors
    /// [`SuperviseError::GuardianGone`] if nobody listens.
    pub fn runs_on(&mut self) -> Result<(), SuperviseError> {
        self.tell(&Word::RunsOn)
    }

    /// The rename comes next. Only call it once the image is complete under its temporary name and synced. On a pipe
    /// the image's last bytes come next; whether they went out the guardian cannot know.
    ///
    /// # Errors
    /// [`SuperviseError::GuardianGone`] if nobody listens: the rename is unguarded then.
    pub fn committing(&mut self) -> Result<(), SuperviseError> {
        self.tell(&Word::Committing)
    }

    /// The rename is done: from now on the save is finished, never undone.
    ///
    /// # Errors
    /// [`SuperviseError::GuardianGone`] if nobody listens, which changes nothing for the saver.
    pub fn published(&mut self) -> Result<(), SuperviseError> {
        self.tell(&Word::Published)
    }

    /// All is settled: the guardian ends without acting, and is waited for.
    ///
    /// # Errors
    /// [`SuperviseError::GuardianGone`] if it ended before, so that it may have acted.
    pub fn stand_down(mut self) -> Result<(), SuperviseError> {
        let told = self.tell(&Word::StandDown);
        self.words = None;
        let _ = self.child.wait();
        told
    }

    /// Leaves all to the guardian and waits until it has acted. The caller must not hold the monitor.
    ///
    /// # Errors
    /// [`SuperviseError::GuardianGone`] if it cannot be waited for.
    pub fn abandon(mut self) -> Result<ExitStatus, SuperviseError> {
        self.words = None;
        self.child.wait().map_err(SuperviseError::GuardianGone)
    }

    /// Ends the guarding: it stands down if all is settled, and otherwise acts itself. Whether all is settled then. The
    /// caller must not hold the monitor.
    pub fn settle(self, is_settled: bool) -> bool {
        match is_settled {
            true => {
                // One that ended before has nothing left to do.
                let _ = self.stand_down();
                true
            }
            false => self.abandon().is_ok_and(|outcome| outcome.success()),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn tell(&mut self, word: &Word) -> Result<(), SuperviseError> {
        self.send(&line_of(word)?);
        self.check()
    }

    fn send(&mut self, line: &[u8]) {
        let sent = match &mut self.words {
            Some(words) => words.write_all(line),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        if let Err(error) = sent {
            self.lost = Some(error);
        }
    }

    fn check(&mut self) -> Result<(), SuperviseError> {
        match self.lost.take() {
            Some(error) => Err(SuperviseError::GuardianGone(error)),
            None => Ok(()),
        }
    }
}

impl GuardianInstruction {
    /// The same with absolute paths: the guardian works in `/`.
    fn absolute(&self) -> Result<Self, SuperviseError> {
        let absolute =
            |path: &Path| std::path::absolute(path).map_err(super::launch::failed("find", path));
        Ok(GuardianInstruction {
            qmp: absolute(&self.qmp)?,
            temporary: self.temporary.as_deref().map(absolute).transpose()?,
            target: self.target.as_deref().map(absolute).transpose()?,
            ..self.clone()
        })
    }
}

fn line_of(value: &impl Serialize) -> Result<Vec<u8>, SuperviseError> {
    let mut line = serde_json::to_vec(value).map_err(SuperviseError::Instruction)?;
    line.push(b'\n');
    Ok(line)
}

/// What the guardian says first: up to a line's end, its own end, or [`READY_TAKES`].
fn first_answer(mut answers: ChildStdout) -> Vec<u8> {
    let mut answer = Vec::new();
    let timeout = Timespec::try_from(READY_TAKES).ok();
    let mut bytes = [0; 256];
    while !answer.ends_with(b"\n") && answer.len() < 4096 {
        match poll(
            &mut [PollFd::new(&answers, PollFlags::IN)],
            timeout.as_ref(),
        ) {
            Err(Errno::INTR) => continue,
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        match answers.read(&mut bytes) {
            Ok(count) if count > 0 => answer.extend(bytes.iter().take(count)),
            _ => break,
        }
    }
    answer
}
