//! The side that somebody else started: reads and makes files for the program at the other end.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{
    CopyParent, CopyReport, CopyRequest, ParentChoice, ReceiveRequest, TransferError, place,
    receive,
};
use crate::bytes::ReadAt;
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::remote::{
    Asker, Comparer, Frame, FrameType, Giver, MAX_TEXT_LEN, Peer, RemoteError, RemoteFile,
    answer_compare,
};
use crate::store::{FileSource, Location, SshLocation};

/// How often the other side hears how far it is.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// What the peer is to make; spec/transfer.md §4.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    path: String,
    length: u64,
    replace: bool,
    bytes_per_second: Option<u64>,
    /// What the copy is called in a directory.
    #[serde(default)]
    name: Option<String>,
    /// An image of an earlier save.
    #[serde(default)]
    parent: Option<String>,
    /// Whether to look for one.
    #[serde(default)]
    finds_parent: bool,
}

/// The order to copy `length` bytes to `there`.
pub fn order_to_receive(
    there: &SshLocation,
    request: &CopyRequest,
    length: u64,
) -> Result<Vec<u8>> {
    let path = there
        .path
        .to_str()
        .ok_or_else(|| unclear("a path that is not UTF-8"))?;
    let name = request.source.file_name();
    let order = Order {
        name: name.and_then(|name| name.into_string().ok()),
        parent: match &request.parent {
            CopyParent::Named(parent) => Some(parent_there(parent, there)?),
            CopyParent::Found | CopyParent::None => None,
        },
        finds_parent: matches!(request.parent, CopyParent::Found),
        path: path.to_owned(),
        length,
        replace: request.may_replace,
        bytes_per_second: request.bytes_per_second,
    };
    serde_json::to_vec(&order).map_err(|error| unclear(&error.to_string()).into())
}

/// How the other side is told which image of an earlier save is meant.
fn parent_there(parent: &Location, there: &SshLocation) -> Result<String> {
    let elsewhere = || TransferError::ParentElsewhere {
        there: parent.to_string(),
    };
    let host = |it: &SshLocation| (it.user.clone(), it.host.clone(), it.port);
    let text = match parent {
        Location::Path(path) => path.to_str().map(str::to_owned),
        Location::Ssh(parent) if host(parent) == host(there) => {
            let start = if parent.path.is_absolute() { "" } else { "~/" };
            parent.path.to_str().map(|path| format!("{start}{path}"))
        }
        _ => return Err(elsewhere().into()),
    };
    text.ok_or_else(|| unclear("a path that is not UTF-8").into())
}

/// Which image of an earlier save an order means, for a copy at `target`.
fn parent_here(order: &Order, target: &Path) -> ParentChoice {
    match &order.parent {
        Some(parent) => ParentChoice::Named(match parent.strip_prefix("~/") {
            Some(in_home) => PathBuf::from(in_home),
            None => target.parent().unwrap_or(Path::new("")).join(parent),
        }),
        None if order.finds_parent => ParentChoice::Found,
        None => ParentChoice::None,
    }
}

fn unclear(what: &str) -> TransferError {
    TransferError::Order {
        what: what.to_owned(),
    }
}

/// Answers the orders that are not about files.
pub trait Orders {
    /// Answers an order, or says that it is none; what the peer offers with it is read through `asker`. Until it is done nobody else
    /// reads from the peer.
    ///
    /// # Errors
    /// Why it cannot be done, which the peer is told.
    fn answer(&self, order: &Frame, asker: &Arc<Asker>) -> Result<bool>;
}

/// Serves the program at the other end of `peer` until it ends.
///
/// # Errors
/// [`RemoteError::BrokenRule`]; a connection that just ends is none.
pub fn serve(peer: Peer, orders: &dyn Orders) -> Result<()> {
    let peer = Arc::new(peer);
    let mut file: Option<Arc<FileSource>> = None;
    let mut comparer: Option<Box<Comparer<'_>>> = None;
    let mut giver = Giver::default();
    loop {
        let frame = match peer.read() {
            Err(RemoteError::Ended { .. }) => return Ok(()),
            other => other?,
        };
        let number = frame.number;
        let outcome = match frame.frame_type {
            FrameType::Open => open(&frame.body).and_then(|opened| {
                let len = opened.len();
                let opened = Arc::new(opened);
                comparer = Some(Box::new(super::comparer(Arc::clone(&opened))));
                file = Some(opened);
                Ok(peer.write(FrameType::Opened, number, &len.to_le_bytes())?)
            }),
            FrameType::Receive => make(&peer, &frame.body)
                .and_then(|report| Ok(peer.write(FrameType::Received, number, &report)?)),
            FrameType::Compare => {
                let mut nothing = |_: &[u8]| Err("no file is open".to_owned());
                let comparer = comparer.as_deref_mut().unwrap_or(&mut nothing);
                answer_compare(&peer, &frame, comparer)?;
                Ok(())
            }
            FrameType::Read | FrameType::NextData => {
                giver.answer(&peer, &frame, file.as_ref().map(|it| it as &dyn ReadAt))?;
                Ok(())
            }
            _ => match order(&peer, &frame, orders) {
                Ok(true) => Ok(()),
                Ok(false) => return Err(broken(&peer)),
                Err(error) => Err(error),
            },
        };
        if let Err(error) = outcome {
            match error.downcast_ref() {
                Some(RemoteError::Ended { .. }) => return Ok(()),
                Some(RemoteError::BrokenRule { .. }) => {
                    peer.refuse(number, &error)?;
                    return Err(error);
                }
                _ => peer.refuse(number, &error)?,
            }
        }
    }
}

fn broken(peer: &Peer) -> Error {
    let rule = "a frame that does not belong here";
    let peer = peer.name().to_owned();
    RemoteError::BrokenRule { peer, rule }.into()
}

fn open(path: &[u8]) -> Result<FileSource> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let file = FileSource::open(path)?;
    file.lock_shared(path)?;
    Ok(file)
}

fn order(peer: &Arc<Peer>, frame: &Frame, orders: &dyn Orders) -> Result<bool> {
    if frame.body.len() > MAX_TEXT_LEN {
        return Err(unclear("it is too long").into());
    }
    let asker = Arc::new(Asker::new(Arc::clone(peer)));
    let outcome = orders.answer(frame, &asker);
    outcome.map_err(|error| asker.failure().map_or(error, Error::from))
}

/// Makes the file that is ordered of the one that is offered.
fn make(peer: &Arc<Peer>, order: &[u8]) -> Result<Vec<u8>> {
    if order.len() > MAX_TEXT_LEN {
        return Err(unclear("it is too long").into());
    }
    let order: Order =
        serde_json::from_slice(order).map_err(|error| unclear(&error.to_string()))?;
    let asker = Arc::new(Asker::new(Arc::clone(peer)));
    let source = RemoteFile::offered(Arc::clone(&asker), order.length);
    let name = order.name.as_deref().map(Path::new);
    if name.is_some_and(|name| name.file_name() != Some(name.as_os_str())) {
        return Err(unclear("a name that is none").into());
    }
    let target = place::place(Path::new(&order.path), name.map(Path::as_os_str))?;
    let request = ReceiveRequest {
        parent: parent_here(&order, &target),
        target,
        may_replace: order.replace,
        bytes_per_second: order.bytes_per_second,
        is_far: true,
    };
    let teller = Teller::new(&asker);
    let compare = |question: &[u8]| super::compare(&asker, question);
    let outcome = receive(&source, Some(&compare), &request, &teller);
    let report: CopyReport = outcome.map_err(|error| asker.failure().map_or(error, Error::from))?;
    teller.tell();
    serde_json::to_vec(&report).map_err(|error| unclear(&error.to_string()).into())
}

/// Tells the other side how far it is.
pub struct Teller<'a> {
    asker: &'a Asker,
    done: AtomicU64,
    all: AtomicU64,
    told: Mutex<Instant>,
}

impl<'a> Teller<'a> {
    /// Nothing is told yet.
    pub fn new(asker: &'a Asker) -> Self {
        Teller {
            asker,
            done: AtomicU64::new(0),
            all: AtomicU64::new(0),
            told: Mutex::new(Instant::now()),
        }
    }

    fn tell(&self) {
        let values = [&self.done, &self.all].map(|value| value.load(Ordering::Relaxed));
        let body = values.map(u64::to_le_bytes).concat();
        // Whoever does not hear it does not answer either, and that is seen elsewhere.
        let _ = self.asker.peer().write(FrameType::Progress, 0, &body);
    }
}

impl Progress for Teller<'_> {
    fn begin(&self, _phase: &str, total: Option<u64>) {
        self.all.store(total.unwrap_or(0), Ordering::Relaxed);
    }

    fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() >= TELL_EVERY {
            *told = Instant::now();
            self.tell();
        }
    }

    fn is_cancelled(&self) -> bool {
        self.asker.failure().is_some()
    }
}
