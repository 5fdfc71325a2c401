//! Copies images from one place to another, chunk by chunk, each verified when it arrives.
//!
//! ```text
//! open → copy what is not a chunk → check sections → find what is lacking → fetch, verify, write → sync → publish
//! ```
//!
//! Whoever gets the image asks for what it lacks, on whichever side of the connection it is; the other side answers. So an
//! interrupted copy goes on where it stopped, and neither side has to believe the other. `spec/transfer.md` is the protocol.

mod error;
mod receive;
mod serve;

pub use error::TransferError;
pub use receive::{CopyReport, ReceiveRequest, receive};
pub use serve::{Checker, serve};

use std::io;
use std::time::Duration;

use crate::bytes::ReadAt;
use crate::container::Image;
use crate::error::{Error, Result};
use crate::image;
use crate::pipeline::PipelineError;
use crate::progress::Progress;
use crate::store::remote::{FrameType, Peer, RemoteError, RemoteFile};
use crate::store::{AnyFile, FileSource, Location, SshLocation, spool};

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
}

/// Copies an image. What was copied stays in `TARGET.part` if it fails, and the next copy goes on with it; a connection
/// that is lost is made again by itself.
///
/// # Errors
/// [`TransferError`], [`RemoteError`], or what a module below met. No file of the target's name was made then.
pub fn copy(request: &CopyRequest, progress: &dyn Progress) -> Result<CopyReport> {
    let mut failures = Failures::default();
    loop {
        let error = match copy_once(request, progress) {
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
#[derive(Default)]
struct Failures {
    count: u32,
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
        if !is_lost || self.count == TRIES {
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
    let outcome = match &request.target {
        Location::Pipe => Err(TransferError::NoName.into()),
        Location::Path(path) => {
            let request = ReceiveRequest {
                target: path.clone(),
                may_replace: request.may_replace,
                bytes_per_second: request.bytes_per_second,
                is_far: matches!(source, AnyFile::Remote(_)),
            };
            receive(&source, &request, progress)
        }
        Location::Ssh(there) => give(&source, there, request, progress),
    };
    let report = outcome.map_err(|error| source.failure().map_or(error, Error::from))?;
    Ok(CopyReport {
        source: request.source.to_string(),
        target: request.target.to_string(),
        ..report
    })
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
    let order = serve::order(there, request, source.len())?;
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
    let report = peer.give(source, FrameType::Receive, &order, &mut tell);
    progress.end();
    let report = report?.ok_or(PipelineError::Cancelled)?;
    let other = || TransferError::OtherImage {
        peer: peer.name().to_owned(),
    };
    let report: CopyReport = serde_json::from_slice(&report).map_err(|_| other())?;
    match report.image_digest == offered.image_digest().to_string() {
        true => Ok(report),
        false => Err(other().into()),
    }
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
        Location::Ssh(there) => {
            let file = RemoteFile::open_at(there)?;
            image::open_offered(file.clone())?;
            AnyFile::Remote(file)
        }
    })
}
