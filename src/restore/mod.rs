//! Restores a guest from an image, eagerly: QEMU gets the whole stream before the guest runs.
//!
//! ```text
//! open → check → launch -S -incoming defer → decode → place → feed → confirm completed → cont
//! ```
//!
//! Guest memory is written where QEMU keeps it, by all workers at once, and QEMU reads only the rest of the stream; where
//! that cannot be done (shared memory, an image that is still arriving, a QEMU that does not tell where its RAM is), it
//! reads all of it.
//!
//! Everything that can be refused is refused in `check`, all reasons at once, before QEMU is started. Every chunk is
//! verified before QEMU gets a byte of it, and all of them before the guest runs. A QEMU that does not reach `completed` is
//! killed; the image stays as it is.

mod check;
mod clones;
mod error;
mod incoming;
mod placing;
mod plan;

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

pub use clones::restore_clones;
pub use error::RestoreError;
use incoming::Given;
pub use incoming::Way;
pub use plan::Plan;

use crate::bytes::ReadAt;
use crate::config::Remap;
use crate::container::{Image, PageMap};
use crate::error::{Error, Result};
use crate::image::OpenedImage;
use crate::pipeline::{PipedImage, PipelineError};
use crate::progress::Progress;
use crate::store::Location;
use crate::supervise::{self, RunningGuest};

/// What is to be restored, and how.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    /// The image.
    pub image: Location,
    /// The QEMU to use instead of the one that the image names.
    pub qemu: Option<PathBuf>,
    /// The name to give the guest here instead of its own.
    pub name: Option<String>,
    /// Whether the guest is left paused although it ran.
    pub paused: bool,
    /// Other backends for its resources.
    pub remaps: Vec<Remap>,
    /// Whether the image may name resources of this host although nobody we trust signed it.
    pub trust: bool,
    /// Whether a disk that cannot be proven unchanged is accepted even if it certainly changed.
    pub accept_changed_disks: bool,
    /// Whether the guest writes to throwaway overlays instead of its disks.
    pub throwaway: bool,
    /// The directory for these overlays instead of the usual one.
    pub overlay_dir: Option<PathBuf>,
    /// How many clones are made of the image; `None` if the guest itself is restored.
    pub clones: Option<u32>,
    /// Workers, of each guest.
    pub threads: usize,
    /// The longest QEMU may take to load the stream once it has all of it.
    pub timeout: Duration,
}

/// What a restore gave.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    /// The guest's name here.
    pub name: String,
    /// Its QEMU process.
    pub pid: i32,
    /// The socket of its monitor.
    pub qmp: PathBuf,
    /// What its QEMU prints.
    pub log: PathBuf,
    /// `running` or `paused`.
    pub state: String,
    /// Milliseconds from QEMU's start until the guest ran; `None` if it is paused.
    pub running_after_ms: Option<u64>,
    /// Bytes of QEMU's migration stream.
    pub stream_bytes: u64,
    /// How QEMU got guest memory.
    pub memory: Way,
}

/// Where the stream of a checked plan comes from.
pub enum Origin<R: Read> {
    /// An image that can be read at any place.
    Image(Box<OpenedImage>),
    /// An image that is just arriving.
    Pipe(PipedImage<R>),
}

/// Restores the guest of a checked plan; it runs on in the background.
///
/// # Errors
/// [`RestoreError`], or what a module below it met. QEMU is gone then and the image as it was.
pub fn restore<R: Read>(
    plan: &Plan,
    origin: Origin<R>,
    progress: &dyn Progress,
) -> Result<(RestoreReport, RunningGuest)> {
    let page_map = match &origin {
        Origin::Image(image) => {
            // The guest could do without it, but nothing of a damaged image is restored.
            image.image().xml()?;
            image.image().page_map()?
        }
        Origin::Pipe(_) => None,
    };
    let start = Instant::now();
    let mut guest = supervise::launch(plan.launch()?)?;
    match load_and_run(plan, origin, page_map, &mut guest, progress) {
        Ok((state, given)) => {
            let running_after = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            let report = RestoreReport {
                name: guest.name().to_owned(),
                pid: guest.pid(),
                qmp: guest.dir().qmp_socket(),
                log: guest.dir().log(),
                running_after_ms: (state == "running").then_some(running_after),
                state,
                stream_bytes: given.stream_bytes,
                memory: given.way,
            };
            Ok((report, guest))
        }
        Err(error) => Err(incoming::explain(error, guest)),
    }
}

/// Loads the stream, waits until QEMU is done with it, and lets the guest run if it shall. Gives the run state and what
/// QEMU was given.
fn load_and_run<R: Read>(
    plan: &Plan,
    origin: Origin<R>,
    page_map: Option<PageMap>,
    guest: &mut RunningGuest,
    progress: &dyn Progress,
) -> Result<(String, Given)> {
    let mut qmp = guest.wait_qmp(plan.timeout())?;
    let given = match origin {
        Origin::Image(image) => {
            let (image, process) = (image.image(), guest.description().process);
            let page_map = page_map.as_ref();
            incoming::load(&mut qmp, process, image, page_map, plan.threads(), progress)
                .map_err(|error| with_pages(error, image))?
        }
        Origin::Pipe(pipe) => incoming::feed_from_pipe(&mut qmp, pipe, plan, progress)?,
    };
    incoming::confirm_completed(&mut qmp, plan.timeout())?;
    if plan.runs_on() {
        qmp.cont().map_err(|source| RestoreError::NotStarted {
            guest: guest.name().to_owned(),
            source,
        })?;
    }
    Ok((qmp.query_status()?.to_string(), given))
}

/// Says which guest memory is damaged, where a chunk is.
fn with_pages<R: ReadAt>(why: Error, image: &Image<R>) -> Error {
    let pages = match why.downcast_ref() {
        Some(PipelineError::Container(error)) => image.damaged_pages(error),
        _ => None,
    };
    match pages {
        Some(pages) => RestoreError::Damaged { why, pages }.into(),
        None => why,
    }
}
