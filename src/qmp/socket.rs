//! A unix socket that never blocks longer than it may, and the lines that arrive on it.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown,
    SocketAddrUnix, SocketFlags, SocketType, connect, recv, sendmsg, shutdown, socket_with,
};

use super::error::QmpError;
use super::line::LineBuffer;

/// The longest time between two looks at the cancel flag.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Until when to wait, and what ends the waiting early.
#[derive(Debug, Clone)]
pub(super) struct Patience {
    started: Instant,
    limit: Duration,
    cancel: Option<Arc<AtomicBool>>,
}

/// Why a wait ended without what was waited for.
#[derive(Debug)]
pub(super) enum WaitError {
    TimedOut { waited: Duration },
    Cancelled,
    Failed(QmpError),
}

impl From<QmpError> for WaitError {
    fn from(error: QmpError) -> Self {
        WaitError::Failed(error)
    }
}

impl Patience {
    pub(super) fn new(limit: Duration, cancel: Option<Arc<AtomicBool>>) -> Self {
        Patience {
            started: Instant::now(),
            limit,
            cancel,
        }
    }

    /// Whether waiting may go on.
    pub(super) fn check(&self) -> Result<(), WaitError> {
        self.slice().map(|_| ())
    }

    /// How long the next sleep may be.
    fn slice(&self) -> Result<Duration, WaitError> {
        let cancel = self.cancel.as_ref();
        if cancel.is_some_and(|flag| flag.load(Ordering::Relaxed)) {
            return Err(WaitError::Cancelled);
        }
        let waited = self.started.elapsed();
        match self.limit.checked_sub(waited) {
            None | Some(Duration::ZERO) => Err(WaitError::TimedOut { waited }),
            Some(left) => Ok(left.min(LOOK_EVERY)),
        }
    }
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct LineSocket {
    socket: OwnedFd,
    lines: LineBuffer,
}

impl LineSocket {
    /// Connects. A full backlog, which is how a busy monitor looks like to its third client, is waited out.
    pub(super) fn connect(path: &Path, patience: &Patience) -> Result<Self, WaitError> {
        let failed = |errno: Errno| QmpError::Connect {
            path: path.to_owned(),
            source: errno.into(),
        };
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::AGAIN) => std::thread::sleep(patience.slice()?),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(failed(errno).into()),
            }
        }
        Ok(LineSocket {
            socket,
            lines: LineBuffer::default(),
        })
    }

    /// Sends all of `bytes`, and `fd` with the first of them. After a failure the connection is of no use any more,
    /// unless nothing was sent, and is shut down.
    pub(super) fn send(
        &mut self,
        bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
        patience: &Patience,
    ) -> Result<(), WaitError> {
        patience.check()?;
        let mut rest = bytes;
        while !rest.is_empty() {
            let is_first = rest.len() == bytes.len();
            match self.send_some(rest, fd.filter(|_| is_first)) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Err(error) = self.wait(PollFlags::OUT, patience) {
                        if !is_first {
                            // A half command cannot be taken back. Shutting down cannot fail in a way that matters.
                            let _ = shutdown(&self.socket, Shutdown::Both);
                        }
                        return Err(error);
                    }
                }
                Err(errno) => return Err(closed_or_failed(errno).into()),
            }
        }
        Ok(())
    }

    fn send_some(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> Result<usize, Errno> {
        let fds = fd.map(|fd| [fd]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(fds) = &fds {
            let has_room = control.push(SendAncillaryMessage::ScmRights(fds));
            debug_assert!(has_room);
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
    }

    /// The next line, waited for.
    pub(super) fn line(&mut self, patience: &Patience) -> Result<Vec<u8>, WaitError> {
        loop {
            if let Some(line) = self.line_now()? {
                return Ok(line);
            }
            self.wait(PollFlags::IN, patience)?;
        }
    }

    /// The next line if it has arrived.
    pub(super) fn line_now(&mut self) -> Result<Option<Vec<u8>>, QmpError> {
        loop {
            if let Some(line) = self.lines.take()? {
                return Ok(Some(line));
            }
            if !self.receive()? {
                return Ok(None);
            }
        }
    }

    /// Takes in what has arrived; false if nothing has.
    fn receive(&mut self) -> Result<bool, QmpError> {
        let mut bytes = [0; 16 << 10];
        loop {
            match recv(&self.socket, &mut bytes, RecvFlags::empty()) {
                Ok((0, _)) => return Err(QmpError::Disconnected),
                Ok((count, _)) => {
                    self.lines.push(bytes.get(..count).unwrap_or_default());
                    return Ok(true);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(closed_or_failed(errno)),
            }
        }
    }

    fn wait(&self, what: PollFlags, patience: &Patience) -> Result<(), WaitError> {
        loop {
            let slice = patience.slice()?;
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(slice.subsec_nanos()),
            };
            match poll(&mut [PollFd::new(&self.socket, what)], Some(&timeout)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(QmpError::Io(errno.into()).into()),
            }
        }
    }
}

impl AsFd for LineSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn closed_or_failed(errno: Errno) -> QmpError {
    match errno {
        Errno::PIPE | Errno::CONNRESET => QmpError::Disconnected,
        errno => QmpError::Io(io::Error::from(errno)),
    }
}
