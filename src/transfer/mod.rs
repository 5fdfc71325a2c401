//! Copies images from one place to another, chunk by chunk, each verified when it arrives.
//!
//! ```text
//! open → copy what is not a chunk → check sections → find what is lacking → fetch, verify, write → sync → publish
//! ```
//!
//! Whoever gets the image asks for what it lacks, on whichever side of the connection it is; the other side answers. So an
//! interrupted copy goes on where it stopped, and neither side has to believe the other. `spec/transfer.md` is the protocol.

mod error;
#[cfg(feature = "s3")]
mod notes;
#[cfg(feature = "s3")]
mod pace;
mod parent;
mod place;
#[cfg(feature = "oci")]
mod push;
mod receive;
mod serve;
#[cfg(feature = "s3")]
mod upload;

pub use error::TransferError;
pub use parent::ParentChoice;
pub use receive::{CopyReport, ReceiveRequest, receive};
pub use serve::{Orders, Teller, serve};

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::bytes::ReadAt;
use crate::container::Image;
use crate::error::{Error, Result};
use crate::image;
use crate::pipeline::{PipelineError, Replier};
use crate::progress::Progress;
use crate::store::remote::{Asker, FrameType, Peer, RemoteError};
use crate::store::{AnyFile, FileSource, Location, SshLocation, open_far, spool};

/// How often a connection that was lost is made again.
const TRIES: u32 = 5;

/// What is to be copied.
#[derive(Debug, Clone)]
pub struct CopyRequest {
    /// The image.
    pub source: Location,
    /// The name of the copy.
    pub target: Location,
    /// Whether a file of that name may be replaced.
    pub may_replace: bool,
    /// Stored bytes a second, at most.
    pub bytes_per_second: Option<u64>,
    /// Which image of an earlier save helps: one on the host of the target.
    pub parent: CopyParent,
}

/// Which image of an earlier save helps with a copy.
#[derive(Debug, Clone, Default)]
pub enum CopyParent {
    /// The best that lies beside the target, if there is one.
    #[default]
    Found,
    /// This one. A path is one on the host of the target; for a target on another host a relative one starts in the target's
    /// directory.
    Named(Location),
    /// None.
    None,
}

/// Copies an image. What was copied stays in `TARGET.part` if it fails, and the next copy goes on with it; a connection
/// that is lost is made again by itself.
///
/// # Errors
/// [`TransferError`], [`RemoteError`], or what a module below met. No file of the target's name was made then.
pub fn copy(request: &CopyRequest, progress: &dyn Progress) -> Result<CopyReport> {
    again_and_again(TRIES, progress, &mut || copy_once(request, progress))
}

/// Copies an image that is open already to the target of a request, on another host. A connection that is lost is made again
/// `tries` times.
///
/// # Errors
/// As [`copy`].
pub fn send(
    image: &AnyFile,
    request: &CopyRequest,
    tries: u32,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let Location::Ssh(there) = &request.target else {
        return Err(TransferError::NoName.into());
    };
    again_and_again(tries, progress, &mut || {
        give(image, there, request, progress)
    })
}

/// Does `once` until it is done, as often as a lost connection may be made again.
fn again_and_again(
    tries: u32,
    progress: &dyn Progress,
    once: &mut dyn FnMut() -> Result<CopyReport>,
) -> Result<CopyReport> {
    let mut failures = Failures {
        count: 0,
        most: tries,
        was_connected: false,
    };
    loop {
        let error = match once() {
            Err(error) => error,
            copied => return copied,
        };
        let goes_on = failures.may_go_on(&error, progress);
        // Ctrl-C at a terminal ends ssh as well; that is no lost connection.
        if progress.is_cancelled() {
            return Err(PipelineError::Cancelled.into());
        }
        if !goes_on {
            return Err(error);
        }
    }
}

/// Connections that were lost.
struct Failures {
    count: u32,
    /// After so many it is given up.
    most: u32,
    was_connected: bool,
}

impl Failures {
    /// Whether to try again after this error; waits a while if so.
    fn may_go_on(&mut self, error: &Error, progress: &dyn Progress) -> bool {
        let is_lost = match error.downcast_ref() {
            Some(RemoteError::Ended { .. }) => {
                self.was_connected = true;
                true
            }
            Some(RemoteError::NoGreeting { .. }) => self.was_connected,
            _ => false,
        };
        if !is_lost || self.count == self.most {
            return false;
        }
        let wait = Duration::from_secs(1 << self.count);
        self.count += 1;
        progress.end();
        progress.warn(&format!("{error}; trying again in {} s", wait.as_secs()));
        for _ in 0..wait.as_millis() / 50 {
            if progress.is_cancelled() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        true
    }
}

fn copy_once(request: &CopyRequest, progress: &dyn Progress) -> Result<CopyReport> {
    let source = open(&request.source)?;
    if matches!(request.target, Location::Object(_) | Location::Registry(_))
        && Image::open(&source)?.footer().is_delta()
    {
        let there = request.target.to_string();
        return Err(TransferError::DeltaThere { there }.into());
    }
    let outcome = match &request.target {
        Location::Pipe => Err(TransferError::NoName.into()),
        Location::Path(path) => take(&source, path, request, progress),
        Location::Ssh(there) => give(&source, there, request, progress),
        #[cfg(feature = "s3")]
        Location::Object(there) => upload::upload(&source, there, request, progress),
        #[cfg(feature = "oci")]
        Location::Registry(there) => push::push(&source, there, request, progress),
        other => Err(other.refused().into()),
    };
    let report = outcome.map_err(|error| source.failure().unwrap_or(error))?;
    Ok(CopyReport {
        source: request.source.to_string(),
        ..report
    })
}

/// Makes a copy here.
fn take(
    source: &AnyFile,
    path: &Path,
    request: &CopyRequest,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let asker = source.asker();
    let is_far = source.local().is_none();
    let receive_request = ReceiveRequest {
        target: place::place(path, request.source.file_name().as_deref())?,
        may_replace: request.may_replace,
        bytes_per_second: request.bytes_per_second,
        is_far,
        parent: match &request.parent {
            // A file that is near is read as quickly as another one; of what nobody compares, only equal chunks would help.
            CopyParent::Found if asker.is_none() => ParentChoice::None,
            CopyParent::Found => ParentChoice::Found,
            CopyParent::Named(Location::Path(path)) => ParentChoice::Named(path.clone()),
            CopyParent::Named(elsewhere) => {
                let there = elsewhere.to_string();
                return Err(TransferError::ParentElsewhere { there }.into());
            }
            CopyParent::None => ParentChoice::None,
        },
    };
    let Some(asker) = asker else {
        return receive(source, None, &receive_request, progress);
    };
    let compare = |question: &[u8]| compare(asker, question);
    let report = receive(source, Some(&compare), &receive_request, progress)?;
    Ok(CopyReport {
        crossed_bytes: asker.peer().crossed_bytes(),
        ..report
    })
}

/// Has a guess compared by the other side; `None` if it does not do that.
fn compare(asker: &Asker, question: &[u8]) -> io::Result<Option<Vec<u8>>> {
    match asker.ask(FrameType::Compare, question, FrameType::Compared) {
        Ok(reply) => Ok(Some(reply)),
        Err(RemoteError::Refused { .. }) => Ok(None),
        Err(error) => Err(io::Error::other(error)),
    }
}

/// What compares guesses with an image for the other side; it is opened when the first one comes.
fn comparer<R: ReadAt>(source: R) -> impl FnMut(&[u8]) -> std::result::Result<Vec<u8>, String> {
    let mut source = Some(source);
    let mut replier: Option<Replier<R>> = None;
    move |question| {
        if let Some(source) = source.take() {
            replier = Replier::open(source).ok();
        }
        let replier = replier.as_mut().ok_or("it is no image")?;
        replier.reply(question).map_err(|error| error.to_string())
    }
}

/// Has the program on another host make a copy, and lets it read the image.
fn give(
    source: &AnyFile,
    there: &SshLocation,
    request: &CopyRequest,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let offered = Image::open(source)?;
    let peer = Peer::connect(there)?;
    let order = serve::order_to_receive(there, request, source.len())?;
    let mut told = None;
    let mut tell = |now: Option<(u64, u64)>| {
        if let Some((done, all)) = now {
            let before = *told.get_or_insert_with(|| {
                progress.begin("copying", Some(all));
                0
            });
            progress.advance(done.saturating_sub(before));
            told = Some(done.max(before));
        }
        !progress.is_cancelled()
    };
    let report = peer.give_compared(
        source,
        &mut comparer(source),
        FrameType::Receive,
        &order,
        &mut tell,
    );
    progress.end();
    let report = report?.ok_or(PipelineError::Cancelled)?;
    let other = || TransferError::OtherImage {
        peer: peer.name().to_owned(),
    };
    let report: CopyReport = serde_json::from_slice(&report).map_err(|_| other())?;
    if report.image_digest != offered.image_digest().to_string() {
        return Err(other().into());
    }
    Ok(CopyReport {
        target: place::told(there, request.source.file_name().as_deref(), &report.target)
            .to_string(),
        crossed_bytes: peer.crossed_bytes(),
        ..report
    })
}

/// The image that is copied. What is none is told by the words of whoever opens images.
fn open(location: &Location) -> Result<AnyFile> {
    Ok(match location {
        Location::Path(path) => {
            image::open_alone(location)?;
            let file = FileSource::open(path)?;
            file.lock_shared(path)?;
            AnyFile::File(file)
        }
        Location::Pipe => {
            let mut stdin = io::stdin().lock();
            AnyFile::File(spool(&mut stdin, &std::env::temp_dir())?)
        }
        far => {
            let file = open_far(far)?;
            image::open_offered(Arc::clone(&file))?;
            AnyFile::Far(file)
        }
    })
}
