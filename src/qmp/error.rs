//! What can go wrong between us and QEMU's monitor.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Blame, ErrorKind};

/// A failure to talk to QEMU, or QEMU's refusal to do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens there, or we may not connect.
    #[error("cannot connect to the monitor {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The monitor did not greet: it serves one client at a time and has one, or its QEMU hangs.
    #[error("the monitor {} did not greet within {:.1} s: another client holds it, or QEMU hangs", path.display(), waited.as_secs_f64())]
    MonitorBusy {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// Something greeted, but not as QMP does; a human monitor for instance.
    #[error("{} is not a QMP monitor: it said {found:?}", path.display())]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The first line, cut after 80 bytes.
        found: String,
    },
    /// QEMU closed the connection.
    #[error("QEMU closed the monitor connection")]
    Disconnected,
    /// Reading or writing failed otherwise.
    #[error("the monitor connection failed")]
    Io(#[source] io::Error),
    /// QEMU answered with an error.
    #[error("QEMU refused {command}: {class}: {desc}")]
    Refused {
        /// The command.
        command: String,
        /// The error class, `GenericError` mostly.
        class: String,
        /// QEMU's own words, untouched.
        desc: String,
    },
    /// No answer came in time. The answer is dropped should it still come.
    #[error("QEMU did not answer {command} within {:.1} s", waited.as_secs_f64())]
    TimedOut {
        /// The command.
        command: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The event that was waited for did not come in time.
    #[error("QEMU sent no event {event} within {:.1} s", waited.as_secs_f64())]
    NoEvent {
        /// The event's name.
        event: String,
        /// How long we waited.
        waited: Duration,
    },
    /// The user asked to stop while we waited.
    #[error("interrupted while waiting for {command}")]
    Cancelled {
        /// The command or event that was waited for.
        command: String,
    },
    /// A line that is no QMP message.
    #[error("QEMU sent a line that is not a QMP message: {found:?}")]
    Garbage {
        /// Its beginning, cut after 80 bytes.
        found: String,
    },
    /// A line longer than [`LINE_LIMIT`](super::LINE_LIMIT).
    #[error("QEMU sent a line of more than {limit} bytes")]
    LineTooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// The answer does not have the shape it has in QEMU's schema.
    #[error("QEMU's answer to {command} has an unexpected shape")]
    UnexpectedReply {
        /// The command.
        command: String,
        /// Where the shapes differ.
        source: serde_json::Error,
    },
    /// The arguments of a command cannot be written as JSON.
    #[error("the arguments of {command} cannot be written as JSON")]
    Arguments {
        /// The command.
        command: String,
        /// Why.
        source: serde_json::Error,
    },
}

impl QmpError {
    /// Whether QEMU is gone or went away: nobody listens, or the connection ended.
    pub fn is_gone(&self) -> bool {
        match self {
            QmpError::Disconnected => true,
            QmpError::Connect { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ),
            _ => false,
        }
    }
}

impl Blame for QmpError {
    fn kind(&self) -> ErrorKind {
        match self {
            QmpError::Cancelled { .. } => ErrorKind::Interrupted,
            QmpError::Arguments { .. } => ErrorKind::Failed,
            _ => ErrorKind::Host,
        }
    }
}

/// The beginning of a line as text, for an error message.
pub(super) fn excerpt(line: &[u8]) -> String {
    String::from_utf8_lossy(line.get(..80).unwrap_or(line)).into_owned()
}
