//! Processes, held by pidfd so that a reused pid is never hit.

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::wait::PATIENCE;

/// A process that this test did not start itself.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    argv: Vec<String>,
    handle: OwnedFd,
}

impl Process {
    /// A handle of process `pid`, or `None` if there is no such process (any more).
    pub fn open(pid: u32) -> Option<Self> {
        let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
        let handle = pidfd_open(raw, PidfdFlags::empty()).ok()?;
        let argv = argv(pid);
        (!argv.is_empty()).then_some(Process { pid, argv, handle })
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its arguments; the first is its own name for itself.
    pub fn argv(&self) -> &[String] {
        &self.argv
    }

    /// The value behind the argument `name`, as in `-m 64`.
    pub fn argument(&self, name: &str) -> Option<&str> {
        let at = self.argv.iter().position(|argument| argument == name)?;
        self.argv.get(at + 1).map(String::as_str)
    }

    /// The program that it runs.
    pub fn program(&self) -> PathBuf {
        std::fs::read_link(format!("/proc/{}/exe", self.pid)).unwrap_or_default()
    }

    pub fn is_qemu(&self) -> bool {
        self.program()
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("qemu-system-"))
    }

    /// The letter of its state in `/proc`: `T` is stopped by a signal, `Z` dead but not waited for.
    pub fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.handle, signal);
    }

    pub fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits until it ends; fails the test if it does not.
    #[track_caller]
    pub fn wait_for_exit(&self) {
        assert!(
            self.wait(PATIENCE),
            "process {} did not end: {:?}",
            self.pid,
            self.argv
        );
    }

    /// Kills it, at once.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
        self.wait(PATIENCE);
    }

    fn wait(&self, patience: Duration) -> bool {
        let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
        let patience = Timespec::try_from(patience).ok();
        matches!(poll(&mut fds, patience.as_ref()), Ok(1..))
    }
}

/// A process that this test answers for: it is ended when this is dropped.
#[derive(Debug)]
pub struct Adopted(pub Process);

impl Deref for Adopted {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.0
    }
}

impl Drop for Adopted {
    fn drop(&mut self) {
        self.0.kill();
    }
}

/// All processes that know `dir`, by an argument, by their environment or by running in it, without this one.
pub fn processes_that_know(dir: &Path) -> Vec<u32> {
    let needle = dir.as_os_str().as_encoded_bytes();
    let knows = |pid: u32, file: &str| {
        let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        bytes.windows(needle.len()).any(|window| window == needle)
    };
    std::fs::read_dir("/proc")
        .expect("/proc can be read")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| pid != std::process::id())
        .filter(|&pid| knows(pid, "cmdline") || knows(pid, "environ") || runs_in(pid, dir))
        .collect()
}

fn runs_in(pid: u32, dir: &Path) -> bool {
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(dir))
}

fn argv(pid: u32) -> Vec<String> {
    let bytes = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.split_terminator('\0').map(str::to_owned).collect()
}
