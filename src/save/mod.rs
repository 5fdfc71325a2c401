//! Saves a running guest to an image.
//!
//! ```text
//! check → stop → capture, or migrate → parse → encode → confirm completed → fingerprint disks → seal → publish → quit
//! ```
//!
//! A guest that shall run on is not stopped but for a moment:
//!
//! ```text
//! check → snapshot disks → migrate in the background → parse → encode → confirm completed → seal → publish
//! ```
//!
//! Everything that can be refused is refused in `check`, before the guest is touched. Until the image is published every
//! failure puts the guest back as it was, and the guardian does so if this process is killed; from then on the save is
//! finished, never undone.

mod capture;
mod describe;
mod disks;
mod error;
mod guest;
mod live;
mod places;
mod plan;
mod source;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use uuid::Uuid;

pub use capture::Capture;
pub use error::{GuestLeft, SaveError};
pub use plan::{Plan, PlanReport};
pub use source::Source;

use crate::bytes::{PublishError, Sink};
use crate::container::{
    Head, Identity, ImageWriter, Layout, Manifest, SectionType, Signature, sign_payload,
};
use crate::error::{Error, Result};
use crate::host::keys::SigningKey;
use crate::pipeline::{self, Encoded, Encoding};
use crate::progress::Progress;
#[cfg(feature = "s3")]
use crate::store::object::ObjectSink;
use crate::store::{FileSink, Location, PipeSink};
use crate::supervise::Guardian;
pub use crate::supervise::Then;
use describe::Description;
use guest::GuardedGuest;

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
    /// What becomes of the guest when its image is published; [`Then::Resume`] of one that is saved live.
    pub then: Then,
    /// Whether, and how, the guest runs on while it is saved.
    pub live: Option<Live>,
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

/// How a guest is saved that runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Live {
    /// Whether its disks go on in new overlays, so that they stay what they were at that moment.
    pub disk_snapshot: bool,
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
    /// Of a delta: the UUID of its parent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_uuid: Option<Uuid>,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of QEMU's migration stream in it.
    pub stream_bytes: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// What became of the guest: `quit`, `quitting` if its QEMU takes long to obey, `running` or `stopped`.
    pub guest: &'static str,
    /// Milliseconds the guest was stopped before its image was published, or for which it stood still in a live save.
    pub stopped_ms: u64,
    /// The same of a live save, to the microsecond; `None` where QEMU's clock did not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<f64>,
    /// Milliseconds that a live save took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    /// The overlays in which the guest's disks go on since a live save.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub overlays: Vec<PathBuf>,
}

/// What became of a guest whose image is published.
struct Finished {
    /// As [`SaveReport::guest`].
    guest: &'static str,
    downtime: Option<Duration>,
    took: Option<Duration>,
    overlays: Vec<PathBuf>,
}

impl Finished {
    /// Of a guest that was stopped for its save.
    fn as_state(guest: &'static str) -> Self {
        Finished {
            guest,
            downtime: None,
            took: None,
            overlays: Vec::new(),
        }
    }
}

/// A guest whose image is being written, with its guardian.
trait Subject: Sized {
    /// What is known of it.
    fn description(&self) -> &Description;

    /// Takes its memory and device state into `image`. Gives what was taken, and how, in the manifest's words.
    fn take(
        &mut self,
        request: &SaveRequest,
        image: &mut ImageWriter<'_>,
        encoding: &Encoding,
        progress: &dyn Progress,
    ) -> Result<(Encoded, &'static str)>;

    /// Whether what was taken is still the guest.
    fn confirm(&mut self) -> Result<()>;

    /// Puts the guest back as it was and wraps `why` into the news of how it was left.
    fn put_back(self, why: Error) -> Error;

    /// Who finishes or undoes the save if we are killed.
    fn guardian(&mut self) -> &mut Guardian;

    /// The rename comes next.
    ///
    /// # Errors
    /// The guardian is gone: then nobody would finish or undo the save if we were killed now.
    fn committing(&mut self) -> Result<()> {
        Ok(self.guardian().committing()?)
    }

    /// The image has its name: from here on there is no way back.
    fn published(&mut self) {
        // A guardian that is gone changes nothing any more.
        let _ = self.guardian().published();
    }

    /// Leaves the guest as it is, since its image may be whole.
    fn leave(self, source: io::Error) -> Error;

    /// Does with the guest what was asked for after the save; tells what became of it.
    fn finish(self) -> Result<Finished>;
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
        #[cfg(feature = "s3")]
        Location::Object(there) => {
            let mut sink = ObjectSink::create(there, request.may_replace)?;
            save_into(plan, request, &mut sink, progress)
        }
        far => Err(far.refused().into()),
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

/// A sink that hands the guest over to somebody else, and what it has to know.
pub trait HandOver: Sink {
    /// Gives it the record, not published yet. Once that has its name nobody lets the guest run any more but by the record's
    /// word, whoever is killed.
    ///
    /// # Errors
    /// What makes the hand-over impossible. The guest was not touched.
    fn keep_record(&mut self, record: FileSink) -> Result<()>;
}

/// Saves the guest of a checked plan into `sink`, whose [`Sink::publish`] hands it over: that either publishes the record, a
/// file of the name `record`, and succeeds, or leaves none of that name. The guest is stopped in the end.
///
/// # Errors
/// As [`save`]; [`SaveError::PublishUnknown`] if what became of the hand-over is not known.
pub fn hand_over(
    plan: Plan,
    request: &SaveRequest,
    record: &Path,
    sink: &mut dyn HandOver,
    progress: &dyn Progress,
) -> Result<SaveReport> {
    let guest = GuardedGuest::guard(plan, request, Some(record))?;
    let (guest, file) = guest.create(record, false)?;
    match sink.keep_record(file) {
        Ok(()) => save_guarded(guest, request, sink, progress),
        Err(error) => {
            let _ = guest.guardian.stand_down();
            Err(error)
        }
    }
}

fn save_guarded(
    guest: GuardedGuest,
    request: &SaveRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<SaveReport> {
    match request.live {
        Some(_) => save_subject(guest.go_live()?, request, sink, progress),
        None => save_subject(guest.stop()?, request, sink, progress),
    }
}

fn save_subject(
    mut guest: impl Subject,
    request: &SaveRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<SaveReport> {
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
        Err(PublishError::Unknown(error)) => return Err(guest.leave(error)),
    }
    let stopped = since.elapsed();
    let finished = guest.finish()?;
    let downtime = finished.downtime;
    Ok(SaveReport {
        guest: finished.guest,
        stopped_ms: whole_millis(match request.live {
            Some(_) => downtime.unwrap_or_default(),
            None => stopped,
        }),
        downtime_ms: downtime.map(exact_millis),
        took_ms: finished.took.map(whole_millis),
        overlays: finished.overlays,
        ..sealed
    })
}

fn whole_millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds with their microseconds, as far as they fit: more than an hour is no downtime.
fn exact_millis(duration: Duration) -> f64 {
    f64::from(u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)) / 1000.0
}

/// Everything between the guest's stop and the image's name: take its state, describe, seal.
fn write_image(
    guest: &mut impl Subject,
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
    let xml = guest.description().domain_xml();
    let provisional = guest
        .description()
        .provisional(&request.labels, request.then == Then::Resume);
    let head_json = json_of(&provisional)?;
    let head = Head {
        manifest_json: &head_json,
        xml: &xml,
    };
    let mut image = encoding.begin(sink, identity, encoding.max_chunk_len(), head)?;
    progress.begin("saving", Some(guest.description().memory_bytes));
    let (encoded, capture) = guest.take(request, &mut image, encoding, progress)?;
    progress.end();
    progress.begin("sealing", None);
    let mut manifest = guest.description().complete(
        provisional,
        &encoded.stream,
        capture,
        request.digest_disks,
        progress,
    )?;
    if let Some(facts) = manifest.stream.as_mut()
        && encoding.layout == Layout::Mapped
    {
        // Only a stream that is read from its beginning has such a place.
        facts.device_state_at = None;
    }
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
    guest.confirm()?;
    Ok(SaveReport {
        name: guest.description().name.clone(),
        image: request.target.to_string(),
        image_uuid,
        image_digest: finished.image_digest.to_string(),
        parent_uuid: encoding.twins.as_ref().map(|it| it.parent_id().image_uuid),
        file_bytes: finished.file_len,
        stream_bytes: finished.stream_len,
        memory_bytes: guest.description().memory_bytes,
        guest: "",
        stopped_ms: 0,
        downtime_ms: None,
        took_ms: None,
        overlays: Vec::new(),
    })
}

fn json_of(manifest: &Manifest) -> Result<Vec<u8>, SaveError> {
    manifest
        .to_json()
        .map_err(|source| SaveError::Manifest { source })
}
