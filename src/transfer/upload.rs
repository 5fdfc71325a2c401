//! An image of this host, or of another place, into an object store.
//!
//! ```text
//! open → check sections → nothing there? → find an unfinished upload → read, verify, send what it lacks → complete
//! ```
//!
//! The object appears when the upload is completed, whole or not at all. An upload that was interrupted stays in the store; the
//! next one goes on with it if its parts are these bytes, which is told by their MD5. Nothing else there is
//! touched: an unfinished upload of other bytes may be somebody's who is still at it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::notes::UploadNotes;
use super::pace::PacedReader;
use super::{CopyReport, CopyRequest};
use crate::bytes::{PublishError, ReadAt};
use crate::container::Image;
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::{self, Departure, PipelineError};
use crate::progress::Progress;
use crate::rate::RateLimit;
use crate::store::object::{Bucket, MOST_PARTS, Part, PartDigest, Upload, may_pass_later};
use crate::store::web::WebError;
use crate::store::{AnyFile, ObjectLocation};
use crate::transfer::TransferError;
use crate::units::FileOffset;

/// The length of a part where no longer ones are needed.
const PART_LEN: u64 = 8 << 20;

/// The longest part: workers hold one each.
const MAX_PART_LEN: u64 = 88 << 20;

/// Bytes of parts that may be on their way.
const IN_FLIGHT: u64 = 32 << 20;

/// Unfinished uploads of one key that are looked at.
const MOST_UPLOADS: usize = 20;

/// Copies an image into an object.
///
/// # Errors
/// What is wrong with the image: then the upload is ended. [`WebError`]: then it stays, to be gone on with.
pub fn upload(
    source: &AnyFile,
    there: &ObjectLocation,
    request: &CopyRequest,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let begin = Instant::now();
    let image = Image::open(source)?;
    image.verify_sections()?;
    let part_len = part_len(image.len())?;
    let bucket = Bucket::of(there)?;
    refuse_existing(&bucket, request)?;
    let notes = UploadNotes::of(&bucket);
    let unfinished = find_unfinished(&bucket, &image, part_len, &notes)?;
    let was_resumed = unfinished.is_some();
    let begun = match unfinished {
        Some(unfinished) => unfinished,
        None => Unfinished::begin(&bucket, &notes)?,
    };
    let sender = |begun| Sender::new(&bucket, begun, &notes, request, progress);
    let mut sending = sender(begun);
    progress.begin("copying", Some(image.len()));
    let mut outcome = sending.send(&image, part_len);
    if was_resumed && outcome.as_ref().is_err_and(is_refusal) && !progress.is_cancelled() {
        // The store kept parts and takes no more of them.
        if sending.begun.is_noted {
            sending.upload().abort()?;
        }
        sending = sender(Unfinished::begin(&bucket, &notes)?);
        progress.begin("copying", Some(image.len()));
        outcome = sending.send(&image, part_len);
    }
    progress.end();
    if progress.is_cancelled() {
        return Err(PipelineError::Cancelled.into());
    }
    let published = outcome.and_then(|()| sending.publish(image.len(), request));
    if let Err(error) = published {
        if is_final(&error) || source.failure().is_some_and(|why| is_gone(&why)) {
            match sending.upload().abort() {
                Ok(()) => notes.forget(),
                Err(_) => progress.warn(&format!(
                    "the store keeps the parts of an upload that nobody goes on with, {} of {}",
                    sending.begun.id,
                    bucket.there()
                )),
            }
        }
        return Err(error);
    }
    notes.forget();
    let sent = sending.sent.into_inner();
    Ok(CopyReport {
        source: request.source.to_string(),
        target: request.target.to_string(),
        image_uuid: image.identity().image_uuid,
        image_digest: image.image_digest().to_string(),
        file_bytes: image.len(),
        fetched_bytes: sent,
        kept_bytes: sending.kept.into_inner(),
        from_parent_bytes: 0,
        crossed_bytes: sent,
        parent: None,
        lacks_parent: false,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// The same for the same file, so that parts of an earlier upload fit.
fn part_len(len: u64) -> Result<u64, WebError> {
    let needed = len.div_ceil(MOST_PARTS).next_multiple_of(1 << 20);
    match needed.max(PART_LEN) {
        part_len if part_len <= MAX_PART_LEN => Ok(part_len),
        _ => Err(WebError::TooLarge {
            len,
            limit: MAX_PART_LEN * MOST_PARTS,
        }),
    }
}

fn refuse_existing(bucket: &Bucket, request: &CopyRequest) -> Result<(), WebError> {
    match request.may_replace || bucket.object()?.is_none() {
        true => Ok(()),
        false => Err(WebError::Exists {
            there: bucket.there().to_owned(),
        }),
    }
}

/// Whether the upload can never be completed: then nobody needs its parts.
fn is_final(error: &Error) -> bool {
    let exists = matches!(error.downcast_ref(), Some(WebError::Exists { .. }));
    exists || error.kind() == ErrorKind::Image
}

/// Whether what is copied is not there any more, or not the same.
fn is_gone(why: &Error) -> bool {
    matches!(
        why.downcast_ref(),
        Some(WebError::Vanished { .. } | WebError::Changed { .. })
    )
}

/// Whether the store does not take a part.
fn is_refusal(error: &Error) -> bool {
    match error.downcast_ref() {
        Some(WebError::Status { status, words, .. }) => {
            (400..500).contains(status) && !may_pass_later(*status, words)
        }
        Some(WebError::UploadEnded { .. } | WebError::Missing { .. }) => true,
        _ => false,
    }
}

/// An upload and the parts that the store has of it.
struct Unfinished {
    id: String,
    /// Whether it was begun from here: others' may be under way.
    is_noted: bool,
    parts: HashMap<u32, Part>,
    /// MD5s that the store acknowledged, of parts that it lists without.
    noted: HashMap<u32, String>,
}

impl Unfinished {
    fn begin(bucket: &Bucket, notes: &UploadNotes) -> Result<Self, WebError> {
        let id = bucket.begin()?;
        notes.begin(&id);
        Ok(Unfinished {
            id,
            is_noted: true,
            parts: HashMap::new(),
            noted: HashMap::new(),
        })
    }

    /// What the store calls the part of this number, if it holds these bytes for certain.
    fn has(&self, number: u32, len: u64, md5: &str) -> Option<String> {
        let part = self.parts.get(&number).filter(|part| part.len == len)?;
        let noted = || self.noted.get(&number).map(String::as_str);
        let etag = part.etag.as_deref().or_else(noted);
        (etag == Some(md5)).then(|| format!("\"{md5}\""))
    }
}

/// The upload of this very file that has most parts.
fn find_unfinished<S: ReadAt>(
    bucket: &Bucket,
    image: &Image<S>,
    part_len: u64,
    notes: &UploadNotes,
) -> Result<Option<Unfinished>> {
    let (noted_id, noted) = notes.read().unzip();
    let mut ids = bucket.uploads()?.unwrap_or_default();
    ids.retain(|id| Some(id) != noted_id.as_ref());
    ids.truncate(MOST_UPLOADS);
    let ids = noted_id.clone().into_iter().chain(ids);
    let mut best: Option<Unfinished> = None;
    for id in ids {
        let parts = match Upload::new(bucket, &id).parts() {
            Ok(Some(parts)) => parts,
            Ok(None) => continue,
            // Of an upload that the store forgot it may say anything.
            Err(_) if Some(&id) == noted_id.as_ref() => continue,
            Err(error) => return Err(error.into()),
        };
        let is_ours = Some(&id) == noted_id.as_ref();
        let parts = parts.into_iter().map(|part| (part.number, part));
        let found = Unfinished {
            id,
            is_noted: is_ours,
            parts: parts.collect(),
            noted: noted.clone().filter(|_| is_ours).unwrap_or_default(),
        };
        let most = best.as_ref().map_or(0, |best| best.parts.len());
        if found.parts.len() > most && holds_this(&found, image, part_len)? {
            best = Some(found);
        }
    }
    Ok(best)
}

/// Whether its first part is what this file has there.
fn holds_this<S: ReadAt>(found: &Unfinished, image: &Image<S>, part_len: u64) -> Result<bool> {
    let Some(part) = found.parts.values().min_by_key(|part| part.number) else {
        return Ok(false);
    };
    let at = u64::from(part.number.saturating_sub(1)).saturating_mul(part_len);
    let len = image.len().saturating_sub(at).min(part_len);
    if len == 0 || part.len != len {
        return Ok(false);
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    let read = image.reader().read_exact_at(&mut bytes, at);
    read.map_err(|source| crate::container::ContainerError::Read {
        at: FileOffset(at),
        source,
    })?;
    let md5 = PartDigest::of(&bytes).hex();
    Ok(found.has(part.number, len, &md5).is_some())
}

/// Sends the parts of one upload.
struct Sender<'a> {
    bucket: &'a Bucket,
    begun: Unfinished,
    notes: &'a UploadNotes,
    progress: &'a dyn Progress,
    limit: RateLimit,
    is_over: AtomicBool,
    sent: AtomicU64,
    kept: AtomicU64,
    /// Number and ETag of each part that the store has now.
    done: Mutex<Vec<(u32, String)>>,
}

impl<'a> Sender<'a> {
    fn new(
        bucket: &'a Bucket,
        begun: Unfinished,
        notes: &'a UploadNotes,
        request: &CopyRequest,
        progress: &'a dyn Progress,
    ) -> Self {
        Sender {
            bucket,
            begun,
            notes,
            progress,
            limit: RateLimit::new(request.bytes_per_second),
            is_over: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            done: Mutex::default(),
        }
    }

    fn upload(&self) -> Upload<'_> {
        Upload::new(self.bucket, &self.begun.id)
    }

    /// Brings every part there that is not there already.
    fn send<S: ReadAt>(&self, image: &Image<S>, part_len: u64) -> Result<()> {
        let threads = usize::try_from(IN_FLIGHT / part_len).unwrap_or(1).max(1);
        // The others fail because it is over; only the first error tells why.
        let first = Mutex::new(None);
        let give = |index: u64, bytes: &[u8]| {
            let number = u32::try_from(index + 1).unwrap_or(u32::MAX);
            self.give(number, bytes).map_err(|error| {
                if !self.is_over.swap(true, Ordering::Relaxed) {
                    *first.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
                PipelineError::Cancelled.into()
            })
        };
        let departure = Departure {
            part_len,
            threads,
            give: &give,
        };
        let departed = pipeline::depart(image, &departure, self.progress);
        match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error.into()),
            None => departed,
        }
    }

    fn give(&self, number: u32, bytes: &[u8]) -> Result<(), WebError> {
        let len = bytes.len() as u64;
        let digest = PartDigest::of(bytes);
        let md5 = digest.hex();
        let etag = match self.begun.has(number, len, &md5) {
            Some(etag) => {
                self.kept.fetch_add(len, Ordering::Relaxed);
                self.progress.advance(len);
                etag
            }
            None => {
                let is_over =
                    || self.progress.is_cancelled() || self.is_over.load(Ordering::Relaxed);
                let shown = AtomicU64::new(0);
                let body = || {
                    let reader = PacedReader::new(bytes, &self.limit, &is_over);
                    Box::new(reader.shown_on(self.progress, &shown)) as Box<dyn std::io::Read>
                };
                let etag = self.upload().put(number, len, &digest, &is_over, &body)?;
                self.sent.fetch_add(len, Ordering::Relaxed);
                self.notes.add(number, &md5);
                etag
            }
        };
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        done.push((number, etag));
        Ok(())
    }

    /// Makes the object of the parts. Whether something is there already is asked once more before, and by the completion itself
    /// where the store knows how.
    fn publish(&self, len: u64, request: &CopyRequest) -> Result<()> {
        refuse_existing(self.bucket, request)?;
        let before = match request.may_replace {
            true => self.bucket.object()?,
            false => None,
        };
        let mut parts = {
            let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *done)
        };
        parts.sort_by_key(|(number, _)| *number);
        let completed = self.upload().complete(&parts, request.may_replace);
        let is_there = || {
            let now = self.bucket.object().ok().flatten();
            now != before && now.is_some_and(|object| object.len == len)
        };
        match completed {
            Ok(()) => {}
            // The answer to a completion that was done may have been lost on its way.
            Err(error @ (WebError::UploadEnded { .. } | WebError::Missing { .. })) => {
                return if is_there() {
                    Ok(())
                } else {
                    Err(error.into())
                };
            }
            Err(
                error @ (WebError::Broken { .. }
                | WebError::Unreachable { .. }
                | WebError::Status { status: 500.., .. }),
            ) => {
                let has_ended = matches!(self.upload().parts(), Ok(None));
                return match has_ended && is_there() {
                    true => Ok(()),
                    false => {
                        let unknown = PublishError::Unknown(std::io::Error::other(error));
                        Err(TransferError::Publish(unknown).into())
                    }
                };
            }
            Err(error) => return Err(error.into()),
        }
        match self.bucket.object() {
            Ok(Some(found)) if found.len != len => Err(TransferError::OtherImage {
                peer: self.bucket.server(),
            }
            .into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_grow_with_the_file_and_do_not_take_all_memory() {
        assert_eq!(part_len(1).unwrap(), PART_LEN);
        assert_eq!(part_len(PART_LEN * MOST_PARTS).unwrap(), PART_LEN);
        assert_eq!(part_len(PART_LEN * MOST_PARTS + 1).unwrap(), 9 << 20);
        assert!(matches!(part_len(1 << 40), Err(WebError::TooLarge { .. })));
    }

    #[test]
    fn a_part_is_kept_only_if_its_md5_is_known() {
        let part = |number, etag: Option<&str>| Part {
            number,
            len: 3,
            etag: etag.map(str::to_owned),
        };
        let unfinished = Unfinished {
            is_noted: true,
            id: "x".to_owned(),
            parts: [part(1, Some("aa")), part(2, None), part(3, None)]
                .map(|part| (part.number, part))
                .into(),
            noted: [(2, "bb".to_owned()), (4, "cc".to_owned())].into(),
        };
        assert_eq!(unfinished.has(1, 3, "aa").as_deref(), Some("\"aa\""));
        assert!(unfinished.has(1, 3, "ab").is_none());
        assert!(unfinished.has(1, 4, "aa").is_none());
        assert!(unfinished.has(2, 3, "bb").is_some());
        assert!(unfinished.has(3, 3, "bb").is_none());
        // What was acknowledged and is not listed is gone.
        assert!(unfinished.has(4, 3, "cc").is_none());
    }
}
