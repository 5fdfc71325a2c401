//! `vmstow console`: the serial console of a guest that vmstow runs.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::Outcome;
use super::ui::Ui;
use crate::host::{HostError, ProcessId, RuntimeDir};
use crate::progress::Progress;
use crate::supervise::{self, SerialPort, SuperviseError};

/// Ctrl-], which ends the connection as it does in `virsh console`.
const ESCAPE: u8 = 0x1d;

/// How often signals and the guest's end are looked for.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// What the guest has not taken yet of what was typed; more is thrown away.
const MOST_PENDING: usize = 1 << 16;

/// How often in a row the guest is read.
const MOST_READS: usize = 64;

/// Connect to the serial console of a guest that vmstow runs
///
/// What is typed goes to the guest, what the guest says to the terminal; Ctrl-] ends the connection. Of a port that goes to
/// a log, the log is shown. Only one can be connected at a time.
#[derive(Debug, Args)]
pub struct ConsoleArgs {
    /// The guest, as `vmstow list` names it
    name: String,

    /// Which serial port, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    serial: usize,
}

/// Connects until the guest or the user ends it.
pub fn run(args: &ConsoleArgs, ui: &Ui) -> Outcome {
    let dir = RuntimeDir::open()?.guest(&args.name)?;
    let ended = || SuperviseError::GuestEnded {
        guest: args.name.clone(),
    };
    let guest = supervise::describe(&dir)?.ok_or_else(ended)?;
    if !guest.process.is_alive() {
        return Err(ended().into());
    }
    let port = supervise::serial_port(&dir, &guest, args.serial)?;
    let mut console = Console::open(&port, guest.process)?;
    let how = match port {
        SerialPort::Log(_) => "it goes to a log and hears nothing",
        _ => "what you type goes there",
    };
    let end = match io::stdin().is_terminal() {
        true => "; Ctrl-] ends this",
        false => "",
    };
    let (name, number) = (&args.name, args.serial);
    ui.note(&format!("serial port {number} of {name}: {how}{end}"));
    let quits = Arc::new(AtomicBool::new(false));
    // Without the handler the signal would leave the terminal as it is.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGQUIT, Arc::clone(&quits));
    let terminal = RawTerminal::enter()?;
    let done = console.talk(&|| ui.is_cancelled() || quits.load(Ordering::Relaxed));
    drop(terminal);
    match done? {
        End::Escape => Ok(ExitCode::SUCCESS),
        End::Interrupted => Ok(ExitCode::from(130)),
        End::Guest => {
            ui.note(&format!("{name} hung up"));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Why a connection ended.
enum End {
    Escape,
    Interrupted,
    Guest,
}

/// A terminal in raw mode: every key goes to the guest. Dropped, it is as it was.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    /// Sets the terminal that we read from, if it is one.
    fn enter() -> Result<Self, HostError> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(RawTerminal(None));
        }
        let before = tcgetattr(&stdin).map_err(failed("look at", Path::new("/dev/tty")))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)
            .map_err(failed("set", Path::new("/dev/tty")))?;
        Ok(RawTerminal(Some(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // A terminal that is gone needs nothing put back.
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// The other end of a serial port.
struct Console {
    port: File,
    /// Whether the port is a file, which is always ready and has an end that moves.
    is_log: bool,
    guest: ProcessId,
    /// What was typed and not taken yet.
    pending: Vec<u8>,
}

impl Console {
    fn open(port: &SerialPort, guest: ProcessId) -> Result<Self, HostError> {
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = |path: &Path, more| {
            let opened = rustix::fs::open(path, flags | more, Mode::empty());
            opened.map_err(failed("open", path))
        };
        let fd = match port {
            SerialPort::Terminal(path) => open(path, OFlags::RDWR)?,
            SerialPort::Log(path) => open(path, OFlags::RDONLY)?,
            SerialPort::Socket(path) => connect(path)?,
        };
        Ok(Console {
            port: File::from(fd),
            is_log: matches!(port, SerialPort::Log(_)),
            guest,
            pending: Vec::new(),
        })
    }

    /// Passes on what either side says, until one of them ends it or `is_interrupted`.
    fn talk(&mut self, is_interrupted: &dyn Fn() -> bool) -> Result<End, HostError> {
        let stdin = io::stdin();
        let is_terminal = stdin.is_terminal();
        let mut hears = true;
        while !is_interrupted() {
            let [typed, says] = self.wait(hears.then(|| stdin.as_fd()))?;
            if typed {
                let mut bytes = [0; 1024];
                match rustix::io::read(&stdin, &mut bytes) {
                    Ok(0) => hears = false,
                    Ok(len) => {
                        let escape = bytes[..len].iter().position(|byte| *byte == ESCAPE);
                        let end = escape.filter(|_| is_terminal);
                        self.take(&bytes[..end.unwrap_or(len)]);
                        self.pass_on();
                        if end.is_some() {
                            return Ok(End::Escape);
                        }
                    }
                    Err(Errno::INTR | Errno::AGAIN) => {}
                    Err(_) => hears = false,
                }
            }
            self.pass_on();
            if says && !self.show()? {
                return Ok(End::Guest);
            }
            if !self.guest.is_alive() {
                // Its last words are still to be read.
                for _ in 0..MOST_READS {
                    if !self.show()? || self.is_log {
                        break;
                    }
                }
                return Ok(End::Guest);
            }
        }
        Ok(End::Interrupted)
    }

    /// Waits until somebody says something: the user, the guest.
    fn wait(&self, stdin: Option<BorrowedFd<'_>>) -> Result<[bool; 2], HostError> {
        let mut wanted = PollFlags::empty();
        // A file is always ready: it is looked at with every tick.
        if !self.is_log {
            wanted |= PollFlags::IN;
        }
        if !self.pending.is_empty() {
            wanted |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::new(&self.port, wanted)];
        fds.extend(stdin.map(|stdin| PollFd::from_borrowed_fd(stdin, PollFlags::IN)));
        match poll(&mut fds, Some(&TICK)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("wait for", Path::new("the console"))(errno)),
        }
        let is_ready = |at: usize| {
            let events = fds.get(at).map(PollFd::revents);
            events.is_some_and(|it| it.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR))
        };
        Ok([is_ready(1), is_ready(0) || self.is_log])
    }

    fn take(&mut self, typed: &[u8]) {
        let room = MOST_PENDING.saturating_sub(self.pending.len());
        if !self.is_log {
            self.pending
                .extend_from_slice(&typed[..typed.len().min(room)]);
        }
    }

    /// Gives the guest what it takes.
    fn pass_on(&mut self) {
        while !self.pending.is_empty() {
            match self.port.write(&self.pending) {
                Ok(len) if len > 0 => drop(self.pending.drain(..len)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // It will take more later, or has hung up, which reading tells.
                _ => return,
            }
        }
    }

    /// Shows what the guest said; whether more may come.
    fn show(&mut self) -> Result<bool, HostError> {
        let mut bytes = [0; 1 << 14];
        // A guest that never stops talking does not keep us from hearing the user.
        for _ in 0..MOST_READS {
            let len = match self.port.read(&mut bytes) {
                Ok(0) => return Ok(self.is_log),
                Ok(len) => len,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                // A pseudo terminal whose other end was closed.
                Err(_) => return Ok(false),
            };
            let mut out = io::stdout().lock();
            let shown = out.write_all(&bytes[..len]).and_then(|()| out.flush());
            if shown.is_err() {
                // Nobody reads it any more.
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn connect(path: &Path) -> Result<OwnedFd, HostError> {
    let connected = UnixStream::connect(path).and_then(|socket| {
        socket.set_nonblocking(true)?;
        Ok(OwnedFd::from(socket))
    });
    connected.map_err(|source| HostError::File {
        act: "connect to",
        path: path.to_owned(),
        source,
    })
}

fn failed(act: &'static str, path: &Path) -> impl FnOnce(Errno) -> HostError {
    let path = path.to_owned();
    move |errno| HostError::File {
        act,
        path,
        source: errno.into(),
    }
}
