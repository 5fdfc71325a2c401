//! Saves a running guest to an image.
//!
//! ```text
//! check → stop → capture, or migrate → parse → encode → confirm completed → fingerprint disks → seal → publish → quit
//! ```
//!
//! Everything that can be refused is refused in `check`, before the guest is touched. Until the image is published every
//! failure puts the guest back as it was, and the guardian does so if this process is killed; from then on the save is
//! finished, never undone.

mod capture;
mod describe;
mod error;
mod guest;
mod plan;
mod source;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use uuid::Uuid;

pub use capture::Capture;
pub use error::{GuestLeft, SaveError};
pub use plan::{Plan, PlanReport};
pub use source::Source;

use crate::bytes::{PublishError, Sink};
use crate::container::{
    Head, Identity, ImageWriter, Manifest, SectionType, Signature, sign_payload,
};
use crate::error::Result;
use crate::host::keys::SigningKey;
use crate::pipeline::{self, Encoding};
use crate::progress::Progress;
use crate::store::{Location, PipeSink};
pub use crate::supervise::Then;
use guest::{GuardedGuest, StoppedGuest};

/// What is to be saved, where to, and how.
pub struct SaveRequest {
    /// The guest.
    pub source: Source,
    /// The image.
    pub target: Location,
    /// Whether an image of that name may be replaced.
    pub may_replace: bool,
    /// Where the state is taken from.
    pub capture: Capture,
    /// Layout, level, chunk size, threads.
    pub encoding: Encoding,
    /// What becomes of the guest when its image is published.
    pub then: Then,
    /// Kept in the manifest.
    pub labels: BTreeMap<String, String>,
    /// Whether a guest that rests after a completed migration may be started for a moment, so that it can be saved.
    pub from_postmigrate: bool,
    /// The longest the guest may be stopped before the save is given up and undone.
    pub timeout: Option<Duration>,
    /// Whether every disk is read to its end for a digest.
    pub digest_disks: bool,
    /// This host's key; without it the image is not signed.
    pub key: Option<SigningKey>,
    /// The program that has the guardian in it: this one.
    pub program: PathBuf,
}

/// What a save gave.
#[derive(Debug, Clone, Serialize)]
pub struct SaveReport {
    /// The guest's name.
    pub name: String,
    /// The image; `-` for a pipe.
    pub image: String,
    /// The image's UUID.
    pub image_uuid: Uuid,
    /// Names what was saved, whatever its layout.
    pub image_digest: String,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of QEMU's migration stream in it.
    pub stream_bytes: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// What became of the guest: `quit`, `quitting` if its QEMU takes long to obey, `running` or `stopped`.
    pub guest: &'static str,
    /// Milliseconds the guest was stopped before its image was published.
    pub stopped_ms: u64,
}

/// Saves a guest to an image.
///
/// # Errors
/// [`SaveError`], or what a module below it met, wrapped in [`SaveError::NotSaved`] once the guest was stopped.
pub fn save(request: &SaveRequest, progress: &dyn Progress) -> Result<SaveReport> {
    let plan = Plan::check(request)?;
    match &request.target {
        Location::Pipe => save_into(plan, request, &mut PipeSink::stdout()?, progress),
        Location::Path(path) => {
            let guest = GuardedGuest::guard(plan, request, Some(path))?;
            let (guest, mut sink) = guest.create(path, request.may_replace)?;
            save_guarded(guest, request, &mut sink, progress)
        }
    }
}

/// Saves the guest of a checked plan into `sink`, whatever [`SaveRequest::target`] says.
///
/// # Errors
/// As [`save`].
pub fn save_into(
    plan: Plan,
    request: &SaveRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<SaveReport> {
    let guest = GuardedGuest::guard(plan, request, None)?;
    save_guarded(guest, request, sink, progress)
}

fn save_guarded(
    guest: GuardedGuest,
    request: &SaveRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<SaveReport> {
    let mut guest = guest.stop()?;
    let since = Instant::now();
    let sealed = match write_image(&mut guest, request, sink, progress) {
        Ok(sealed) => sealed,
        Err(error) => return Err(guest.put_back(error)),
    };
    if let Err(error) = guest.committing() {
        return Err(guest.put_back(error));
    }
    match sink.publish() {
        Ok(()) => guest.published(),
        Err(PublishError::NotPublished(error)) => {
            return Err(guest.put_back(SaveError::Publish { source: error }.into()));
        }
        Err(PublishError::Unknown(error)) => return Err(guest.leave_stopped(error)),
    }
    let stopped_ms = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX);
    let guest = guest.finish()?;
    Ok(SaveReport {
        guest,
        stopped_ms,
        ..sealed
    })
}

/// Everything between the guest's stop and the image's name: take its state, describe, seal.
fn write_image(
    guest: &mut StoppedGuest,
    request: &SaveRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<SaveReport> {
    let encoding = &request.encoding.fitting(guest.description().memory_bytes);
    let identity = Identity {
        image_uuid: Uuid::new_v4(),
        guest_uuid: guest.description().uuid,
    };
    let image_uuid = identity.image_uuid;
    let xml = guest.description().domain_xml()?;
    let provisional = guest.description().provisional(&request.labels);
    let head_json = json_of(&provisional)?;
    let head = Head {
        manifest_json: &head_json,
        xml: &xml,
    };
    let mut image = ImageWriter::begin(
        sink,
        encoding.layout,
        identity,
        encoding.max_chunk_len(),
        head,
    )?;
    progress.begin("saving", Some(guest.description().memory_bytes));
    let (encoded, is_direct) = guest.take(
        request.capture,
        &mut image,
        encoding,
        request.timeout,
        progress,
    )?;
    progress.end();
    progress.begin("sealing", None);
    let manifest = guest.description().complete(
        provisional,
        &encoded.stream,
        is_direct,
        request.digest_disks,
        progress,
    )?;
    image.append_section(SectionType::Xml, xml.as_bytes())?;
    image.append_section(SectionType::Manifest, &json_of(&manifest)?)?;
    if let Some(page_map) = encoded.page_map {
        image.append_section(SectionType::PageMap, &page_map.finish())?;
    }
    if let Some(key) = &request.key {
        let statement = image.statement()?;
        let armored = key.sign(&statement)?;
        image.append_section(
            SectionType::Signature,
            &sign_payload(&Signature { statement, armored })?,
        )?;
    }
    let finished = image.finish()?;
    sink.sync().map_err(|source| SaveError::Write { source })?;
    progress.end();
    if progress.is_cancelled() {
        return Err(pipeline::PipelineError::Cancelled.into());
    }
    guest.confirm_stopped()?;
    Ok(SaveReport {
        name: guest.description().name.clone(),
        image: request.target.to_string(),
        image_uuid,
        image_digest: finished.image_digest.to_string(),
        file_bytes: finished.file_len,
        stream_bytes: finished.stream_len,
        memory_bytes: guest.description().memory_bytes,
        guest: "",
        stopped_ms: 0,
    })
}

fn json_of(manifest: &Manifest) -> Result<Vec<u8>, SaveError> {
    manifest
        .to_json()
        .map_err(|source| SaveError::Manifest { source })
}
