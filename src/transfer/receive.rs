//! The receiving side: an image from anywhere into a file of this host.

use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::TransferError;
use super::parent::{Parent, ParentChoice};
use crate::bytes::{ReadAt, WriteAt};
use crate::container::{ContainerError, Image};
use crate::error::Result;
use crate::image::find_parents;
use crate::pipeline::{self, Arrival, ChunkTable, Compare, Earlier, Help};
use crate::progress::Progress;
use crate::store::{FileSource, Location, PartFile};
use crate::units::{ChunkIndex, FileOffset};

/// Bytes that are copied at a time where they are no chunks.
const PIECE: u64 = 1 << 20;

/// Requests on their way where the image is far: up to a MiB each, twice what ssh has on its way at a time.
const FAR_THREADS: usize = 4;

/// What is to be received.
#[derive(Debug, Clone)]
pub struct ReceiveRequest {
    /// The name of the image here.
    pub target: PathBuf,
    /// Whether a file of that name may be replaced.
    pub may_replace: bool,
    /// Stored bytes a second, at most.
    pub bytes_per_second: Option<u64>,
    /// Whether a request for bytes takes long: then several are on their way at a time.
    pub is_far: bool,
    /// Which image of an earlier save helps.
    pub parent: ParentChoice,
}

/// What was copied.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CopyReport {
    /// Where the image came from.
    pub source: String,
    /// Where it is now.
    pub target: String,
    /// Names the save.
    pub image_uuid: uuid::Uuid,
    /// Names what was saved.
    pub image_digest: String,
    /// Bytes of the file, holes included.
    pub file_bytes: u64,
    /// Stored bytes of chunks that came over now as they are.
    pub fetched_bytes: u64,
    /// Stored bytes of chunks that were there already, from a copy that was interrupted.
    pub kept_bytes: u64,
    /// Stored bytes of chunks that were made of an image of an earlier save, wholly or mostly.
    #[serde(default)]
    pub from_parent_bytes: u64,
    /// Bytes that went over the connection, both ways.
    #[serde(default)]
    pub crossed_bytes: u64,
    /// The image of an earlier save that helped.
    #[serde(default)]
    pub parent: Option<String>,
    /// How long it took.
    pub seconds: f64,
    /// Whether it is a delta whose parent is not beside the copy: of what follows the parent's chunks only checksums were looked at.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lacks_parent: bool,
}

/// Receives the image that `source` holds. `compare` is whoever compares guesses with it, if somebody does.
///
/// # Errors
/// What is wrong with the image or one of its chunks, what the file system says, [`TransferError`]. What is right already stays in
/// `TARGET.part`.
pub fn receive<S: ReadAt>(
    source: &S,
    compare: Option<&Compare<'_>>,
    request: &ReceiveRequest,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let begin = Instant::now();
    let offered = Image::open(source)?;
    let part = PartFile::open(&request.target, request.may_replace)?;
    let threads = pipeline::default_threads();
    let target = Location::Path(request.target.clone());
    let (image, lacking) = match go_on(&offered, &part)? {
        Some(mut image) => {
            find_parents(&mut image, &target);
            let lacking = lacking(&image, threads, progress)?;
            (image, lacking)
        }
        None => {
            let mut image = begin_anew(&offered, &part)?;
            find_parents(&mut image, &target);
            let all = (0..image.chunk_count()).map(ChunkIndex).collect();
            (image, all)
        }
    };
    let table = ChunkTable::new(&image);
    let all_bytes = stored_bytes(&image)?;
    let mut missing = 0;
    for chunk in &lacking {
        missing += u64::from(table.entry(*chunk)?.stored_len);
    }
    part.check_room(missing)?;
    let parent = match lacking.is_empty() || image.footer().is_delta() {
        // What comes of a delta is little as it is.
        true => None,
        false => Parent::choose(&request.parent, &image, &request.target)?,
    };
    let earlier = match &parent {
        Some(parent) => open_earlier(parent, &request.parent)?,
        None => None,
    };
    let map = match &earlier {
        Some(_) if compare.is_some() => image.page_map()?,
        _ => None,
    };
    progress.begin("copying", Some(all_bytes));
    progress.advance(all_bytes - missing);
    let arrival = Arrival {
        source,
        threads: match request.is_far {
            true => threads.max(FAR_THREADS),
            false => threads,
        },
        bytes_per_second: request.bytes_per_second,
        help: earlier.as_ref().map(|earlier| Help {
            earlier,
            map: map.as_ref(),
            compare,
        }),
    };
    let arrived = pipeline::arrive(&arrival, &table, &lacking, &part, progress)?;
    progress.end();
    part.sync().map_err(TransferError::Sync)?;
    let report = CopyReport {
        source: String::new(),
        target: request.target.display().to_string(),
        image_uuid: image.identity().image_uuid,
        image_digest: image.image_digest().to_string(),
        file_bytes: image.len(),
        fetched_bytes: arrived.fetched_bytes,
        kept_bytes: all_bytes - missing,
        from_parent_bytes: arrived.from_parent_bytes,
        crossed_bytes: 0,
        parent: parent
            .as_ref()
            .filter(|_| earlier.is_some())
            .map(|parent| parent.path.display().to_string()),
        seconds: begin.elapsed().as_secs_f64(),
        lacks_parent: image.parent_id().is_some() && image.parent().is_none(),
    };
    part.publish().map_err(TransferError::Publish)?;
    Ok(report)
}

/// What is asked of the parent. One that was only found, and is damaged, does not matter.
fn open_earlier<'a>(
    parent: &'a Parent,
    choice: &ParentChoice,
) -> Result<Option<Earlier<'a, FileSource>>, TransferError> {
    match (Earlier::open(&parent.image), choice) {
        (Ok(earlier), _) => Ok(Some(earlier)),
        (Err(error), ParentChoice::Named(path)) => Err(TransferError::Parent {
            path: path.clone(),
            why: error.into(),
        }),
        (Err(_), _) => Ok(None),
    }
}

/// The image in the part file, if all of it but the chunks is there already and is that of the one offered.
fn go_on<S: ReadAt>(offered: &Image<&S>, part: &PartFile) -> Result<Option<Image<FileSource>>> {
    let Ok(image) = Image::open(part.source()?) else {
        return Ok(None);
    };
    let is_same = image.footer() == offered.footer() && image.verify_sections().is_ok();
    Ok(is_same.then_some(image))
}

/// Copies all of the image but its chunks into the emptied part file, and checks it there.
fn begin_anew<S: ReadAt>(offered: &Image<&S>, part: &PartFile) -> Result<Image<FileSource>> {
    let footer = offered.footer();
    let len = offered.len();
    let payload = footer.payload_offset.0;
    let payload_end = payload.saturating_add(footer.payload_len).min(len);
    part.begin_anew(len)?;
    part.check_room(payload + (len - payload_end))?;
    copy_range(offered.reader(), part, 0..offered.chunks_offset().0)?;
    copy_range(offered.reader(), part, payload_end..len)?;
    let image = Image::open(part.source()?)?;
    image.verify_sections()?;
    match image.footer() == footer {
        true => Ok(image),
        false => Err(TransferError::Changed.into()),
    }
}

fn copy_range<S: ReadAt>(
    source: &S,
    part: &PartFile,
    range: std::ops::Range<u64>,
) -> Result<(), ContainerError> {
    let mut at = range.start;
    let mut buffer = Vec::new();
    while at < range.end {
        let len = usize::try_from((range.end - at).min(PIECE)).unwrap_or(0);
        buffer.resize(len, 0);
        let offset = FileOffset(at);
        source
            .read_exact_at(&mut buffer, at)
            .map_err(|source| ContainerError::Read { at: offset, source })?;
        part.write_all_at(&buffer, at)
            .map_err(|source| ContainerError::Write { at: offset, source })?;
        at += len as u64;
    }
    Ok(())
}

/// The chunks whose bytes are not there, or are not right.
fn lacking(
    image: &Image<FileSource>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Vec<ChunkIndex>> {
    let checked = pipeline::check(image, threads, &Quiet(progress))?;
    if let Some(error) = checked.ended_by {
        return Err(error.into());
    }
    let damaged = checked.damaged.into_iter();
    damaged
        .map(|error| error.damaged_chunk().ok_or_else(|| error.into()))
        .collect()
}

/// The stored bytes of all chunks.
fn stored_bytes(image: &Image<FileSource>) -> Result<u64, ContainerError> {
    image
        .chunks()
        .try_fold(0, |sum, entry| Ok(sum + u64::from(entry?.stored_len)))
}

/// Can be cancelled, and tells nothing.
struct Quiet<'a>(&'a dyn Progress);

impl Progress for Quiet<'_> {
    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}
