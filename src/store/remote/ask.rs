//! The asking side: requests of many threads over one connection.
//!
//! There is no thread of its own that reads: one of those who wait for an answer reads for all until it has its own, and wakes
//! the others when theirs has come, each by itself. Then it wakes one of them to go on reading.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::frame::{Frame, FrameType, MAX_BODY_LEN, MAX_REQUESTS, MAX_TEXT_LEN};
use super::peer::lock;
use super::{Peer, RemoteError};
use crate::bytes::ReadAt;
use crate::error::ErrorKind;
use crate::store::SshLocation;

/// Asks a [`Peer`]; any number of threads may.
#[derive(Debug)]
pub struct Asker {
    peer: Arc<Peer>,
    state: Mutex<State>,
    /// Rung when a request may begin.
    room: Condvar,
}

/// The number by which those who wait for orders sleep: no request has it.
const ORDERS: u64 = 0;

#[derive(Debug, Default)]
struct State {
    last: u64,
    waiting: HashSet<u64>,
    arrived: HashMap<u64, Frame>,
    /// What the peer says on its own account, if somebody waits for that.
    orders: Option<VecDeque<Frame>>,
    is_read: bool,
    /// Who sleeps until the answer of this number is there, or somebody has to read: each with a bell of its own.
    sleepers: Vec<(u64, Arc<Condvar>)>,
    failed: Option<RemoteError>,
}

impl Asker {
    /// Nobody else may read from this peer meanwhile.
    pub fn new(peer: Arc<Peer>) -> Self {
        Asker {
            peer,
            state: Mutex::default(),
            room: Condvar::new(),
        }
    }

    /// The peer.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Why the connection cannot be used any more, if so.
    pub fn failure(&self) -> Option<RemoteError> {
        lock(&self.state).failed.clone()
    }

    /// Asks, and waits for the answer, which has to be a frame of type `expected`.
    ///
    /// # Errors
    /// [`RemoteError::Refused`] if the peer says that it failed; else the connection is gone.
    pub fn ask(
        &self,
        frame_type: FrameType,
        body: &[u8],
        expected: FrameType,
    ) -> Result<Vec<u8>, RemoteError> {
        let number = self.begin()?;
        let frame = match self.peer.write(frame_type, number, body) {
            Ok(()) => self.wait(number)?,
            Err(error) => return Err(self.fail(error)),
        };
        match frame.frame_type {
            found if found == expected => Ok(frame.body),
            FrameType::Failed => Err(refusal(&self.peer, &frame.body)),
            _ => Err(self.fail(self.peer.broke("an answer of another kind"))),
        }
    }

    /// A number of its own for a request, once few enough are on their way.
    fn begin(&self) -> Result<u64, RemoteError> {
        let mut state = lock(&self.state);
        while state.waiting.len() + state.arrived.len() >= MAX_REQUESTS && state.failed.is_none() {
            state = wait(&self.room, state);
        }
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        state.last += 1;
        let number = state.last;
        state.waiting.insert(number);
        Ok(number)
    }

    fn wait(&self, number: u64) -> Result<Frame, RemoteError> {
        self.wait_for(number, |state| state.arrived.remove(&number))
    }

    /// From now on the peer may give orders, a limited number ahead; [`Asker::next_order`] gives them.
    pub fn expect_orders(&self) {
        lock(&self.state).orders.get_or_insert_default();
    }

    /// What the peer says next on its own account.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn next_order(&self) -> Result<Frame, RemoteError> {
        self.expect_orders();
        self.wait_for(ORDERS, |state| state.orders.as_mut()?.pop_front())
    }

    fn wait_for(
        &self,
        number: u64,
        mut wanted: impl FnMut(&mut State) -> Option<Frame>,
    ) -> Result<Frame, RemoteError> {
        let mut state = lock(&self.state);
        loop {
            if let Some(frame) = wanted(&mut state) {
                if !state.is_read {
                    state.wake(|_| true);
                }
                self.room.notify_one();
                return Ok(frame);
            }
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.is_read {
                let bell = Arc::new(Condvar::new());
                state.sleepers.push((number, Arc::clone(&bell)));
                state = wait(&bell, state);
                state.sleepers.retain(|(_, it)| !Arc::ptr_eq(it, &bell));
                continue;
            }
            state.is_read = true;
            drop(state);
            let outcome = self.peer.read();
            state = lock(&self.state);
            state.is_read = false;
            match outcome {
                Ok(frame) if frame.frame_type.is_order() => match &mut state.orders {
                    Some(orders) if orders.len() < MAX_REQUESTS => {
                        orders.push_back(frame);
                        state.wake(|sleeper| sleeper == ORDERS);
                    }
                    _ => {
                        let rule = "an order that does not belong here";
                        self.end(&mut state, self.peer.broke(rule));
                    }
                },
                Ok(frame) if state.waiting.remove(&frame.number) => {
                    let number = frame.number;
                    state.arrived.insert(number, frame);
                    state.wake(|sleeper| sleeper == number);
                }
                Ok(_) => {
                    let rule = "an answer that nobody asked for";
                    self.end(&mut state, self.peer.broke(rule));
                }
                Err(error) => {
                    self.end(&mut state, error);
                }
            }
        }
    }

    /// Ends it for all.
    fn fail(&self, error: RemoteError) -> RemoteError {
        self.end(&mut lock(&self.state), error)
    }

    /// Ends it for all who sleep; gives why, by the first word of it.
    fn end(&self, state: &mut State, error: RemoteError) -> RemoteError {
        let error = state.failed.get_or_insert(error).clone();
        for (_, bell) in &state.sleepers {
            bell.notify_one();
        }
        self.room.notify_all();
        error
    }
}

impl State {
    /// Wakes one of those who sleep.
    fn wake(&self, whom: impl Fn(u64) -> bool) {
        let mut sleepers = self.sleepers.iter();
        if let Some((_, bell)) = sleepers.find(|(number, _)| whom(*number)) {
            bell.notify_one();
        }
    }
}

fn wait<'a>(bell: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
    bell.wait(state).unwrap_or_else(PoisonError::into_inner)
}

/// What the peer said in a frame of type [`FrameType::Failed`].
pub(super) fn refusal(peer: &Peer, body: &[u8]) -> RemoteError {
    let (kind, text) = body.split_first().unwrap_or((&1, &[]));
    let kind = match kind {
        2 => ErrorKind::Usage,
        3 => ErrorKind::Image,
        4 => ErrorKind::Host,
        5 => ErrorKind::Remote,
        6 => ErrorKind::Trust,
        130 => ErrorKind::Interrupted,
        _ => ErrorKind::Failed,
    };
    let text = &text[..text.len().min(MAX_TEXT_LEN)];
    let text = String::from_utf8_lossy(text);
    RemoteError::Refused {
        peer: peer.name().to_owned(),
        kind,
        words: text.lines().map(str::to_owned).collect(),
    }
}

/// A file of the other side, as long as it was when it was opened.
#[derive(Debug, Clone)]
pub struct RemoteFile {
    asker: Arc<Asker>,
    len: u64,
}

impl RemoteFile {
    /// Has the peer open `path`.
    ///
    /// # Errors
    /// [`RemoteError::Refused`] with the peer's reason.
    pub fn open(asker: Arc<Asker>, path: &Path) -> Result<Self, RemoteError> {
        use std::os::unix::ffi::OsStrExt;
        let path = path.as_os_str().as_bytes();
        let body = asker.ask(FrameType::Open, path, FrameType::Opened)?;
        match <[u8; 8]>::try_from(body.as_slice()) {
            Ok(len) => Ok(RemoteFile::offered(asker, u64::from_le_bytes(len))),
            Err(_) => Err(asker.fail(asker.peer.broke("a length that is none"))),
        }
    }

    /// Opens a file of another host.
    ///
    /// # Errors
    /// As [`Peer::connect`] and [`RemoteFile::open`].
    pub fn open_at(there: &SshLocation) -> Result<Self, RemoteError> {
        let asker = Arc::new(Asker::new(Arc::new(Peer::connect(there)?)));
        RemoteFile::open(asker, &there.path)
    }

    /// The one file that the peer offers.
    pub fn offered(asker: Arc<Asker>, len: u64) -> Self {
        RemoteFile { asker, len }
    }

    /// Through which it is read.
    pub fn asker(&self) -> &Arc<Asker> {
        &self.asker
    }

    /// At most [`MAX_BODY_LEN`] bytes.
    fn read_piece(&self, len: usize, offset: u64) -> Result<Vec<u8>, RemoteError> {
        let mut body = [0; 12];
        let wanted = u32::try_from(len).unwrap_or(MAX_BODY_LEN);
        body[..8].copy_from_slice(&offset.to_le_bytes());
        body[8..].copy_from_slice(&wanted.to_le_bytes());
        let data = self.asker.ask(FrameType::Read, &body, FrameType::Data)?;
        if data.len() != len {
            let error = self.asker.peer.broke("fewer or more bytes than asked for");
            return Err(self.asker.fail(error));
        }
        Ok(data)
    }

    fn check_range(&self, len: usize, offset: u64) -> io::Result<()> {
        let end = offset.checked_add(len as u64);
        match end.is_some_and(|end| end <= self.len) {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl ReadAt for RemoteFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check_range(buf.len(), offset)?;
        let pieces = buf.chunks_mut(MAX_BODY_LEN as usize);
        for (piece, at) in pieces.zip((offset..).step_by(MAX_BODY_LEN as usize)) {
            let data = self.read_piece(piece.len(), at).map_err(io::Error::other)?;
            piece.copy_from_slice(&data);
            self.asker.peer.give_back(data);
        }
        Ok(())
    }

    fn read_to(&self, buf: &mut Vec<u8>, len: usize, offset: u64) -> io::Result<()> {
        if len == 0 || len > MAX_BODY_LEN as usize {
            buf.resize(len, 0);
            return self.read_exact_at(buf, offset);
        }
        self.check_range(len, offset)?;
        let data = self.read_piece(len, offset).map_err(io::Error::other)?;
        self.asker.peer.give_back(std::mem::replace(buf, data));
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        let body = offset.to_le_bytes();
        let answer = self
            .asker
            .ask(FrameType::NextData, &body, FrameType::Place)
            .map_err(io::Error::other)?;
        let place = <[u8; 8]>::try_from(answer.as_slice()).map(u64::from_le_bytes);
        match place {
            Ok(place) if (offset..=self.len).contains(&place) => Ok(place),
            _ => {
                let error = self.asker.peer.broke("a place outside the file");
                Err(io::Error::other(self.asker.fail(error)))
            }
        }
    }
}
