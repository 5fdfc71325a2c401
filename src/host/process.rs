//! Processes of this machine, told apart even when the kernel reuses an id.
//!
//! Source: proc(5), pidfd_open(2).

use std::fs;
use std::io::{self, ErrorKind as IoKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::error::HostError;

/// A process beyond doubt: its id and when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// The kernel's id, which may be reused after the end.
    pub pid: i32,
    /// Clock ticks after boot at which it started.
    pub start_time: u64,
}

/// What the kernel tells of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessFacts {
    /// Which process.
    pub id: ProcessId,
    /// Its arguments, the program's name first.
    pub argv: Vec<String>,
    /// Its working directory.
    pub cwd: PathBuf,
    /// Its binary; ` (deleted)` stands behind it if the file was replaced since.
    pub exe: PathBuf,
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
}

/// A hold on a process: signals through it never reach another one.
#[derive(Debug)]
pub struct ProcessHandle {
    pid: i32,
    pidfd: OwnedFd,
}

impl ProcessId {
    /// The process that has this id now.
    ///
    /// # Errors
    /// [`HostError::NoSuchProcess`], also for one that ended and was not waited for.
    pub fn of(pid: i32) -> Result<Self, HostError> {
        let text = read(pid, "stat")?;
        // The name in parentheses may hold anything, so count from the last parenthesis on.
        let (_, fields) = text.rsplit_once(')').unwrap_or_default();
        let mut fields = fields.split_ascii_whitespace();
        let has_ended = matches!(fields.next(), None | Some("Z" | "X"));
        match fields.nth(18).and_then(|ticks| ticks.parse().ok()) {
            Some(start_time) if !has_ended => Ok(ProcessId { pid, start_time }),
            _ => Err(HostError::NoSuchProcess { pid }),
        }
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        ProcessId::of(self.pid).is_ok_and(|now| now == *self)
    }

    /// Takes hold of it.
    pub fn open(&self) -> Result<ProcessHandle, HostError> {
        let gone = HostError::NoSuchProcess { pid: self.pid };
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Err(gone);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Err(gone),
            Err(errno) => return Err(failed(self.pid, "pidfd_open", errno.into())),
        };
        // Looked at with the descriptor in hand: if it is the right one now, the descriptor means it for good.
        if !self.is_alive() {
            return Err(gone);
        }
        Ok(ProcessHandle {
            pid: self.pid,
            pidfd,
        })
    }
}

/// Names this boot of this machine: process ids mean nothing in another one. Empty where the kernel does not tell.
pub fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// The processes that were started with this variable in their environment, of those that we may look at. One that is just
/// being started may not be seen yet.
pub fn processes_with(variable: &str, value: &str) -> Vec<ProcessId> {
    let wanted = format!("{variable}={value}");
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let has_it = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment
            .split(|byte| *byte == 0)
            .any(|one| one == wanted.as_bytes())
    };
    pids.filter(has_it)
        .filter_map(|pid| ProcessId::of(pid).ok())
        .collect()
}

/// Whether a process has a userfaultfd: QEMU while it watches what the guest writes. `None` if we may not look.
pub fn has_userfaultfd(pid: i32) -> Option<bool> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let targets = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    Some(
        targets
            .into_iter()
            .any(|target| target.to_string_lossy().contains("[userfaultfd]")),
    )
}

/// Says to others who ask that somebody has begun something with a process; ends with this value or its process.
#[derive(Debug)]
pub struct ProcessLock {
    _directory: OwnedFd,
}

impl ProcessId {
    /// Locks the process against others who do the same; `None` if one of them was first.
    ///
    /// The lock is on `/proc/PID`: every process that sees that one meets it, whoever its user is, and the kernel takes it
    /// away from a holder that dies.
    ///
    /// # Errors
    /// [`HostError::NoSuchProcess`]; [`HostError::Process`] where the kernel knows no such lock.
    pub fn lock(&self) -> Result<Option<ProcessLock>, HostError> {
        let path = format!("/proc/{}", self.pid);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let locked = rustix::fs::open(path, flags, Mode::empty()).and_then(|directory| {
            flock(&directory, FlockOperation::NonBlockingLockExclusive).map(|()| directory)
        });
        match locked {
            Ok(directory) if self.is_alive() => Ok(Some(ProcessLock {
                _directory: directory,
            })),
            Ok(_) => Err(HostError::NoSuchProcess { pid: self.pid }),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(failed(self.pid, "flock", errno.into())),
        }
    }
}

impl AsFd for ProcessHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl ProcessHandle {
    /// Sends a signal. A process that has ended is no error.
    pub fn signal(&self, signal: Signal) -> Result<(), HostError> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(failed(self.pid, "signal", errno.into())),
        }
    }

    /// Waits until it has ended, at most `timeout`; whether it has.
    pub fn wait_gone(&self, timeout: Duration) -> Result<bool, HostError> {
        let started = Instant::now();
        loop {
            let left = timeout.saturating_sub(started.elapsed());
            let left = Timespec::try_from(left.min(Duration::from_secs(1))).unwrap_or_default();
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left)) {
                Ok(0) if started.elapsed() >= timeout => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(errno) => return Err(failed(self.pid, "wait", errno.into())),
            }
        }
    }
}

impl ProcessFacts {
    /// Reads what the kernel tells of a process.
    ///
    /// # Errors
    /// [`HostError::NotUtf8`] if an argument is not text, [`HostError::Process`] if we may not look.
    pub fn read(pid: i32) -> Result<Self, HostError> {
        let id = ProcessId::of(pid)?;
        let status = read(pid, "status")?;
        let facts = ProcessFacts {
            id,
            argv: argv(pid)?,
            cwd: link(pid, "cwd")?,
            exe: link(pid, "exe")?,
            uid: effective_id(&status, "Uid:").unwrap_or_default(),
            gid: effective_id(&status, "Gid:").unwrap_or_default(),
        };
        // Were it another process by now, the facts could be of two.
        match id.is_alive() {
            true => Ok(facts),
            false => Err(HostError::NoSuchProcess { pid }),
        }
    }
}

fn argv(pid: i32) -> Result<Vec<String>, HostError> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline"));
    let bytes = bytes.map_err(|source| failed(pid, "cmdline", source))?;
    let text = String::from_utf8(bytes).map_err(|_| HostError::NotUtf8 {
        pid,
        what: "command line",
    })?;
    let text = text.strip_suffix('\0').unwrap_or(&text);
    Ok(text.split('\0').map(str::to_owned).collect())
}

/// The second of the four ids in `Uid:\treal\teffective\tsaved\tfilesystem`.
fn effective_id(status: &str, key: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn read(pid: i32, what: &'static str) -> Result<String, HostError> {
    // The process's name stands in both `stat` and `status` and need not be text.
    match fs::read(format!("/proc/{pid}/{what}")) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(source) => Err(failed(pid, what, source)),
    }
}

fn link(pid: i32, what: &'static str) -> Result<PathBuf, HostError> {
    fs::read_link(format!("/proc/{pid}/{what}")).map_err(|source| failed(pid, what, source))
}

fn failed(pid: i32, what: &'static str, source: io::Error) -> HostError {
    let is_gone = source.kind() == IoKind::NotFound
        || source.raw_os_error() == Some(Errno::SRCH.raw_os_error());
    match is_gone {
        true => HostError::NoSuchProcess { pid },
        false => HostError::Process { pid, what, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    fn sleeper() -> (Child, i32) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        (child, pid)
    }

    #[test]
    fn our_own_facts_are_true() {
        let facts = ProcessFacts::read(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert_eq!(facts.cwd, std::env::current_dir().unwrap());
        assert_eq!(facts.exe, std::env::current_exe().unwrap());
        assert_eq!(facts.argv, std::env::args().collect::<Vec<_>>());
        assert_eq!(facts.uid, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn an_ended_process_is_gone_even_before_it_is_waited_for() {
        let (mut child, pid) = sleeper();
        let id = ProcessId::of(pid).unwrap();
        let handle = id.open().unwrap();
        assert!(!handle.wait_gone(Duration::from_millis(20)).unwrap());
        handle.signal(Signal::KILL).unwrap();
        assert!(handle.wait_gone(Duration::from_secs(10)).unwrap());
        assert!(!id.is_alive());
        child.wait().unwrap();
        assert!(matches!(id.open(), Err(HostError::NoSuchProcess { .. })));
        handle.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn only_one_holds_the_lock_of_a_process() {
        let (mut child, pid) = sleeper();
        let id = ProcessId::of(pid).unwrap();
        let lock = id.lock().unwrap();
        assert!(lock.is_some());
        assert!(id.lock().unwrap().is_none());
        drop(lock);
        assert!(id.lock().unwrap().is_some());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(
            id.lock(),
            Err(HostError::NoSuchProcess { .. } | HostError::Process { .. })
        ));
    }

    #[test]
    fn a_process_is_found_by_its_environment() {
        let value = std::process::id().to_string();
        assert!(processes_with("VMSTOW_TEST", &value).is_empty());
        let mut command = Command::new("sleep");
        let mut child = command
            .arg("60")
            .env("VMSTOW_TEST", &value)
            .spawn()
            .unwrap();
        let begin = Instant::now();
        let mut found = processes_with("VMSTOW_TEST", &value);
        while found.is_empty() && begin.elapsed() < Duration::from_secs(10) {
            found = processes_with("VMSTOW_TEST", &value);
        }
        let pids: Vec<i32> = found.iter().map(|one| one.pid).collect();
        assert_eq!(pids, [i32::try_from(child.id()).unwrap()]);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_reused_id_is_another_process() {
        let (mut child, pid) = sleeper();
        let mut id = ProcessId::of(pid).unwrap();
        id.start_time += 1;
        assert!(!id.is_alive());
        assert!(matches!(id.open(), Err(HostError::NoSuchProcess { .. })));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
