//! A process that verifies the image of a guest which runs on it already, and ends by itself.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};

use super::error::SuperviseError;
use super::launch::{failed, spawn_detached, write_whole};
use crate::host::{GuestDir, ProcessId, RuntimeDir};

/// The subcommand of this program that verifies.
pub const SUBCOMMAND: &str = "__verify";

/// How much less of the processors it gets than the guest.
const NICENESS: i32 = 10;

/// What a verifier works on.
#[derive(Debug)]
pub struct Verification {
    /// The image, as it was open when the guest was started from it.
    pub image: File,
    /// The guest's directory.
    pub dir: GuestDir,
    /// The guest's QEMU.
    pub process: ProcessId,
}

/// A verifier that waits. It begins when this is dropped, or when its process ends.
#[derive(Debug)]
pub struct WaitingVerifier {
    _until: Option<ChildStdin>,
}

/// Starts a verifier, in a session of its own: it outlives us, and keeps `image` open with the locks on it. It waits until
/// the guest runs: one that is frozen earlier would not answer whoever lets it run.
///
/// # Errors
/// [`SuperviseError::Spawn`].
pub fn start_verifier(
    program: &Path,
    image: &File,
    dir: &GuestDir,
    process: ProcessId,
) -> Result<WaitingVerifier, SuperviseError> {
    let image = image.try_clone().map_err(failed("open", dir.path()))?;
    let mut command = Command::new(program);
    command.arg(SUBCOMMAND).arg(dir.path());
    command.args([process.pid.to_string(), process.start_time.to_string()]);
    command.arg(image.as_raw_fd().to_string());
    let log = File::options().append(true).open(dir.log());
    let log = log.map_err(failed("open", &dir.log()))?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log);
    command.current_dir("/");
    let mut child = spawn_detached(&mut command, vec![OwnedFd::from(image)])?;
    Ok(WaitingVerifier {
        _until: child.stdin.take(),
    })
}

impl Verification {
    /// What this process was started for, with the image under descriptor `image`, once the guest runs; `None` if it was
    /// not started as a verifier.
    pub fn begin(dir: &Path, process: ProcessId, image: i32) -> Option<Self> {
        // Opened once more; the descriptor itself stays as it is, with its locks.
        let image = File::open(format!("/proc/self/fd/{image}")).ok()?;
        io::copy(&mut io::stdin(), &mut io::sink()).ok()?;
        let runtime = RuntimeDir::at(dir.parent()?).ok()?;
        let dir = runtime.guest(dir.file_name()?.to_str()?).ok()?;
        // The guest comes first; that it cannot be asked for harms nobody.
        let _ = rustix::process::nice(NICENESS);
        let verification = Verification {
            image,
            dir,
            process,
        };
        // For those who list guests only.
        let us = ProcessId::of(i32::try_from(std::process::id()).ok()?).ok()?;
        let us = serde_json::to_vec(&us).ok()?;
        let _ = write_whole(&verification.dir.verifier(), &us);
        Some(verification)
    }
}

impl Drop for Verification {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.dir.verifier());
    }
}

/// Whether the guest's image is being verified.
pub fn is_being_verified(dir: &GuestDir) -> bool {
    let verifier = fs::read(dir.verifier());
    let verifier = verifier.map(|bytes| serde_json::from_slice::<ProcessId>(&bytes));
    matches!(verifier, Ok(Ok(process)) if process.is_alive())
}
