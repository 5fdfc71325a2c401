//! What can go wrong with processes of ours.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::side_process::Failed;
use crate::error::{Blame, ErrorKind};
use crate::host::HostError;
use crate::qmp::{MigrationStatus, QmpError, RunState};

/// A QEMU or guardian that could not be started, watched or ended.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// This machine is to blame.
    #[error(transparent)]
    Host(#[from] HostError),
    /// QEMU's monitor is to blame.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// There is nothing to start.
    #[error("the argument vector is empty")]
    EmptyArguments,
    /// A program could not be started.
    #[error("cannot start {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// QEMU ended before its monitor answered.
    #[error("QEMU ended at its start ({status}){}", quoted(log))]
    EarlyExit {
        /// How it ended, in the words of the standard library: `exit status: 1`.
        status: String,
        /// The last lines of its log: its own words, untouched.
        log: String,
    },
    /// QEMU runs, but its monitor does not answer.
    #[error("QEMU's monitor did not answer within {:.1} s{}", waited.as_secs_f64(), quoted(log))]
    NoMonitor {
        /// How long we waited.
        waited: Duration,
        /// The last lines of its log: its own words, untouched.
        log: String,
        /// Why the last attempt to connect failed.
        source: QmpError,
    },
    /// A file of a guest could not be read or written.
    #[error("cannot {act} {}", path.display())]
    File {
        /// `read`, `write`, …
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A guest's description is not what we write.
    #[error("{} does not describe a guest", path.display())]
    BadDescription {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// The instruction cannot be told: a path in it is not UTF-8.
    #[error("the guardian cannot be instructed")]
    Instruction(#[source] serde_json::Error),
    /// The guardian did not say that it is ready.
    #[error("the guardian did not become ready: {answer:?}")]
    NotReady {
        /// What it said instead.
        answer: String,
    },
    /// The guardian ended too early and guards nothing any more.
    #[error("the guardian is gone")]
    GuardianGone(#[source] io::Error),
    /// QEMU does not end a migration that was cancelled.
    #[error("QEMU's migration is still {status}, {:.0} s after it was cancelled", waited.as_secs_f64())]
    MigrationStuck {
        /// How far it is.
        status: MigrationStatus,
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU does not give up its watch over the guest's memory.
    #[error("QEMU still watches the guest's memory, {:.0} s after its migration ended", waited.as_secs_f64())]
    WatchStuck {
        /// How long we waited.
        waited: Duration,
    },
    /// `cont` was accepted, yet the guest does not run.
    #[error("the guest does not run again: it is {state}")]
    NotRunning {
        /// What it is instead.
        state: RunState,
    },
    /// A process of ours that works for a guest did not do so.
    #[error(transparent)]
    Side(#[from] Failed),
    /// A program that works for a guest beside QEMU ended at once.
    #[error("{program} ended at its start ({status})")]
    SideProgramEnded {
        /// The program.
        program: String,
        /// How it ended, in the words of the standard library: `exit status: 1`.
        status: String,
        /// Its last words.
        words: String,
    },
    /// A program that works for a guest beside QEMU runs, but does not listen for QEMU.
    #[error("{program} does not listen for QEMU")]
    SideProgramSilent {
        /// The program.
        program: String,
        /// Its last words.
        words: String,
    },
    /// It ended without a word.
    #[error("a process that works for the guest ended before its work")]
    SideEnded,
    /// The keeper of a lazily restored guest does not answer.
    #[error("the keeper of the guest is gone")]
    NoKeeper(#[source] Option<io::Error>),
    /// QEMU does not take up again what broke off.
    #[error("QEMU does not let its memory be served again")]
    NotRecovered {
        /// QEMU's words.
        words: String,
    },
    /// A guest has not so many serial ports.
    #[error("{guest} has no serial port {number}{}", counted(*count))]
    NoSerialPort {
        /// The guest.
        guest: String,
        /// The port, from 0.
        number: usize,
        /// How many it has.
        count: usize,
    },
    /// A serial port leads to something that one cannot connect to.
    #[error("nobody can connect to serial port {number} of {guest}: it is of type {backend}")]
    NotAConsole {
        /// The guest.
        guest: String,
        /// The port, from 0.
        number: usize,
        /// The type of its character device.
        backend: String,
    },
    /// Somebody else is connected to a serial port.
    #[error("somebody else is connected to serial port {number} of {guest}")]
    ConsoleInUse {
        /// The guest.
        guest: String,
        /// The port, from 0.
        number: usize,
    },
    /// A guest's process is gone.
    #[error("{guest} has ended")]
    GuestEnded {
        /// The guest.
        guest: String,
    },
    /// Even SIGKILL did not end it.
    #[error("process {pid} did not end, not even by SIGKILL")]
    Unkillable {
        /// Its id.
        pid: i32,
    },
}

fn quoted(log: &str) -> String {
    match log.trim_end() {
        "" => String::new(),
        log => format!(": {log}"),
    }
}

/// `; it has 2, counted from 0`
fn counted(count: usize) -> String {
    match count {
        0 => String::new(),
        count => format!("; it has {count}, counted from 0"),
    }
}

impl Blame for SuperviseError {
    fn kind(&self) -> ErrorKind {
        match self {
            SuperviseError::Host(error) => error.kind(),
            SuperviseError::Qmp(error) => error.kind(),
            SuperviseError::Side(failed) => failed.kind(),
            SuperviseError::EmptyArguments | SuperviseError::NoSerialPort { .. } => {
                ErrorKind::Usage
            }
            SuperviseError::Instruction(_)
            | SuperviseError::NotReady { .. }
            | SuperviseError::GuardianGone(_) => ErrorKind::Failed,
            _ => ErrorKind::Host,
        }
    }

    fn at(&self) -> Option<String> {
        match self {
            SuperviseError::Host(error) => error.at(),
            SuperviseError::Qmp(error) => error.at(),
            SuperviseError::Side(failed) => failed.at.clone(),
            _ => None,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            SuperviseError::Side(failed) => failed.facts.clone(),
            SuperviseError::NotRecovered { words } => vec![words.clone()],
            SuperviseError::SideProgramEnded { words, .. }
            | SuperviseError::SideProgramSilent { words, .. }
                if !words.is_empty() =>
            {
                vec![words.clone()]
            }
            _ => Vec::new(),
        }
    }
}
