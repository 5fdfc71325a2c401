//! The connection: two pipes, the greeting, and the program that holds their other ends.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::Child;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::RemoteError;
use super::frame::{
    self, Frame, FrameError, FrameType, HEADER_LEN, VERSION, greeting, parse_greeting, read_frame,
};

/// How often the thread that says that we are here looks whether the connection is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long a program that we started may take to end once nobody talks to it.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// How often each side says that it is there, and how long the other waits for a word of it; spec §2.
const LIFE_EVERY: Duration = Duration::from_secs(10);
const PATIENCE: Timespec = Timespec {
    tv_sec: 40,
    tv_nsec: 0,
};

/// Bodies that are kept for the next frames.
const MAX_SPARE: usize = 8;

/// Bytes that the pipes to and from the other side hold: fewer make the two wait for each other more often.
const PIPE_LEN: usize = 1 << 20;

/// Lets a pipe hold more than usual, if it is one and the system allows it.
pub fn widen(pipe: impl AsFd) {
    // Failure costs speed only.
    let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_LEN);
}

/// The other side of a connection. Any thread may write; one at a time reads.
pub struct Peer {
    name: String,
    input: Mutex<Box<dyn Read + Send>>,
    output: Output,
    child: Mutex<Option<Child>>,
    crossed: AtomicU64,
    /// Bodies of frames that nobody needs any more.
    spare: Mutex<Vec<Vec<u8>>>,
}

/// The pipe to the other side, until it is closed.
type Output = Arc<Mutex<Option<Box<dyn Write + Send>>>>;

/// The pipe from a client, which never is silent for long.
pub struct FromClient<I>(pub I);

impl<I: Read + AsFd> Read for FromClient<I> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        wait_for_input(&self.0)?;
        self.0.read(buf)
    }
}

/// The pipe from a server, which is not silent for long once it has said something: until then ssh may be asking for a password.
pub struct FromServer<I> {
    input: I,
    has_spoken: bool,
}

impl<I> FromServer<I> {
    /// Nothing is read yet.
    pub fn new(input: I) -> Self {
        let has_spoken = false;
        FromServer { input, has_spoken }
    }
}

impl<I: Read + AsFd> Read for FromServer<I> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.has_spoken {
            wait_for_input(&self.input)?;
        }
        let len = self.input.read(buf)?;
        self.has_spoken = true;
        Ok(len)
    }
}

/// Waits until something can be read, or for as long as the other side may be silent.
fn wait_for_input(input: &impl AsFd) -> io::Result<()> {
    loop {
        let mut ready = [PollFd::new(input, PollFlags::IN)];
        match poll(&mut ready, Some(&PATIENCE)) {
            Err(Errno::INTR) => {}
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
}

impl Peer {
    /// Greets whoever holds the other ends of these pipes. `child` is the program that does, if we started it.
    ///
    /// # Errors
    /// [`RemoteError::NoGreeting`], [`RemoteError::NoCommonVersion`].
    pub fn greet(
        name: String,
        input: impl Read + Send + 'static,
        output: impl Write + Send + 'static,
        child: Option<Child>,
    ) -> Result<Self, RemoteError> {
        let peer = Peer {
            name,
            input: Mutex::new(Box::new(input)),
            output: Arc::new(Mutex::new(Some(Box::new(output)))),
            child: Mutex::new(child),
            crossed: AtomicU64::new(2 * 16),
            spare: Mutex::default(),
        };
        // Who ended already cannot be written to; why it did is told by what it sent.
        let _ = peer.write_bytes(&greeting());
        let mut bytes = [0; 16];
        let mut len = 0;
        while len < bytes.len() {
            match peer.input().read(&mut bytes[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        let versions = (len == bytes.len()).then(|| parse_greeting(&bytes));
        match versions.flatten() {
            None => Err(RemoteError::NoGreeting {
                peer: peer.name.clone(),
                why: peer.why_no_greeting(&bytes[..len]),
            }),
            Some((lowest, highest)) if lowest > VERSION || highest < VERSION => {
                Err(RemoteError::NoCommonVersion {
                    peer: peer.name.clone(),
                    lowest,
                    highest,
                    ours: VERSION,
                })
            }
            Some(_) => Ok(peer),
        }
    }

    /// Who it is, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that went and came so far.
    pub fn crossed_bytes(&self) -> u64 {
        self.crossed.load(Ordering::Relaxed)
    }

    /// Takes back the body of a frame that was read, for the next ones.
    pub fn give_back(&self, body: Vec<u8>) {
        let mut spare = lock(&self.spare);
        if spare.len() < MAX_SPARE {
            spare.push(body);
        }
    }

    fn count(&self, body: &[u8]) {
        let len = (HEADER_LEN + body.len()) as u64;
        self.crossed.fetch_add(len, Ordering::Relaxed);
    }

    /// Reads the next frame.
    ///
    /// # Errors
    /// [`RemoteError::Ended`]; [`RemoteError::BrokenRule`].
    pub fn read(&self) -> Result<Frame, RemoteError> {
        loop {
            let mut buffer = || lock(&self.spare).pop().unwrap_or_default();
            let outcome = read_frame(&mut *self.input(), &mut buffer);
            let frame = outcome.map_err(|error| match error {
                FrameError::Io(error) => self.ended(&error),
                FrameError::Rule(rule) => self.broke(rule),
            })?;
            self.count(&frame.body);
            if frame.frame_type != FrameType::Alive {
                return Ok(frame);
            }
        }
    }

    /// Says from time to time that we are here, as long as the connection lasts.
    ///
    /// # Errors
    /// [`RemoteError::Start`] if there is no thread for it.
    pub fn show_life(&self) -> Result<(), RemoteError> {
        let output = Arc::downgrade(&self.output);
        let (name, since) = (self.name.clone(), Instant::now());
        let show = move || {
            let mut said = 0;
            loop {
                std::thread::sleep(LOOK_EVERY);
                let Some(output) = output.upgrade() else {
                    return;
                };
                let due = since.elapsed().as_secs() / LIFE_EVERY.as_secs();
                if due == said {
                    continue;
                }
                said = due;
                let outcome = match &mut *lock(&output) {
                    Some(output) => frame::write_frame(output, FrameType::Alive, 0, &[]),
                    None => return,
                };
                if outcome.is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().spawn(show);
        thread.map(drop).map_err(|source| RemoteError::Start {
            program: name,
            source: Arc::new(source),
        })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// [`RemoteError::Ended`].
    pub fn write(
        &self,
        frame_type: FrameType,
        number: u64,
        body: &[u8],
    ) -> Result<(), RemoteError> {
        let outcome = match &mut *lock(&self.output) {
            Some(output) => frame::write_frame(output, frame_type, number, body),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        outcome.map_err(|error| self.ended(&error))?;
        self.count(body);
        Ok(())
    }

    /// Says nothing more: whoever waits for the other side hears soon that it ended.
    pub fn hang_up(&self) {
        lock(&self.output).take();
    }

    fn write_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        match &mut *lock(&self.output) {
            Some(output) => output.write_all(bytes).and_then(|()| output.flush()),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// A rule that the other side broke.
    pub fn broke(&self, rule: &'static str) -> RemoteError {
        RemoteError::BrokenRule {
            peer: self.name.clone(),
            rule,
        }
    }

    fn ended(&self, error: &io::Error) -> RemoteError {
        let mut why = Vec::new();
        let is_end = matches!(
            error.kind(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe
        );
        if !is_end {
            why.push(error.to_string());
        }
        why.extend(self.how_child_ended());
        RemoteError::Ended {
            peer: self.name.clone(),
            why,
        }
    }

    fn why_no_greeting(&self, found: &[u8]) -> Vec<String> {
        let said = (!found.is_empty()).then(|| {
            let text = String::from_utf8_lossy(found);
            format!("it begins with {text:?}")
        });
        said.into_iter().chain(self.how_child_ended()).collect()
    }

    /// How the program at the other ends ended, if it did, or does when nobody talks to it any more.
    fn how_child_ended(&self) -> Option<String> {
        lock(&self.output).take();
        let mut child = lock(&self.child);
        let child = child.as_mut()?;
        let begin = Instant::now();
        while begin.elapsed() < END_PATIENCE {
            match child.try_wait() {
                Ok(Some(status)) => return Some(format!("ssh ended: {status}")),
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(_) => return None,
            }
        }
        None
    }

    fn input(&self) -> MutexGuard<'_, Box<dyn Read + Send>> {
        lock(&self.input)
    }
}

impl Drop for Peer {
    /// The program that we started ends with its pipes; if it does not, it is ended.
    fn drop(&mut self) {
        if self.how_child_ended().is_none()
            && let Some(child) = lock(&self.child).as_mut()
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Peer").field(&self.name).finish()
    }
}

/// Whoever panicked with it left whole frames behind, or a pipe that says so itself.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
