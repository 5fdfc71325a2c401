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

mod assess;
mod check;
mod clones;
mod describe;
mod dry_load;
mod error;
mod incoming;
mod lazy;
mod mapped;
mod placing;
mod plan;
mod rom_size;
mod side;
mod target;
mod verdict;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

pub use clones::restore_clones;
pub use describe::describe_devices;
pub use error::RestoreError;
use incoming::Given;
pub use incoming::Way;
pub use lazy::{
    Invocation, LazyOptions, LazyRequest, Resumed, SERVE_SUBCOMMAND, ServeError, resume,
    run_server, wait_for_memory,
};
pub use mapped::{Mapping, Verify, run_verifier};
pub use plan::{Plan, call_disks_by_id};
pub use rom_size::RomSize;
pub use verdict::{Boot, Verdict, check as check_image};

use crate::bytes::ReadAt;
use crate::config::{Remap, Settings};
use crate::container::{Image, PageMap};
use crate::error::{Error, Result};
use crate::image::OpenedImage;
use crate::pipeline::{PipedImage, PipelineError};
use crate::progress::Progress;
use crate::qmp::QmpClient;
use crate::store::Location;
use crate::supervise::{self, RunningGuest, Serving};

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
    /// What this user and this host always want.
    pub settings: Settings,
    /// Whether the image may name resources of this host although nobody we trust signed it.
    pub trust: bool,
    /// Whether a disk that cannot be proven unchanged is accepted even if it certainly changed.
    pub accept_changed_disks: bool,
    /// Codes of findings that the user overrides.
    pub force: Vec<String>,
    /// The room that the ROMs of devices get.
    pub rom_sizes: Vec<RomSize>,
    /// Arguments to use instead of those that the image keeps; only to look at.
    pub arguments: Option<Vec<String>>,
    /// Whether QEMU maps guest memory from the image, and which.
    pub map: Option<Mapping>,
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
    /// How it gets its memory while it runs already; `None` if it gets it before.
    pub lazy: Option<LazyRequest>,
    /// The guest is only loaded, and does not take its disks before somebody lets it run. Its QEMU's environment has this
    /// name in [`HELD_VARIABLE`], so that it can be found whoever dies.
    pub held_as: Option<String>,
}

/// Tells in a QEMU's environment for whom it holds a guest.
pub const HELD_VARIABLE: &str = "VMSTOW_HELD_AS";

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
    /// How it got its memory while it ran; only where that was waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served: Option<Serving>,
    /// When the image is verified from which memory is mapped: `full`, `background` or `quick`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<&'static str>,
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
    if let Origin::Image(image) = &origin {
        // The guest could do without it, but nothing of a damaged image is restored.
        image.image().verify_head()?;
    }
    match (&origin, plan.lazy()) {
        (Origin::Image(image), Some(request)) => {
            return restore_lazily(plan, image, request, progress);
        }
        (Origin::Pipe(_), Some(_)) => return Err(piped_and_lazy(plan)),
        (_, None) => {}
    }
    let mut xml = None;
    let page_map = match &origin {
        Origin::Image(image) => {
            // As above.
            xml = Some(image.image().xml()?);
            match plan.mapping() {
                // Reading it would take the longer the more memory the guest has.
                Some(_) => None,
                None => image.image().page_map()?,
            }
        }
        Origin::Pipe(_) => None,
    };
    let file = match &origin {
        Origin::Image(image) if plan.mapping().is_some() => Some(mapped::keep_open(image)?),
        _ => None,
    };
    if let (Origin::Image(image), Some(mapping)) = (&origin, plan.mapping())
        && mapping.verify == Verify::Full
    {
        let image = image.image();
        let verified = mapped::verify_all(image, plan.threads(), progress);
        verified.map_err(|error| with_pages(error, image))?;
    }
    let start = Instant::now();
    let mut launch = plan.launch(file.as_ref())?;
    launch.xml = xml.filter(|_| plan.keeps_xml());
    let mut guest = supervise::launch(launch)?;
    match load_and_run(plan, origin, page_map, file, &mut guest, progress) {
        Ok((state, given)) => {
            let mut report = report(&guest, start, state, given.stream_bytes, given.way);
            report.verify = plan.mapping().map(|it| it.verify.word());
            Ok((report, guest))
        }
        Err(error) => Err(incoming::explain(error, guest)),
    }
}

/// Restores the guest of a checked plan so that it runs before its memory is there; a process of ours gives it that.
///
/// If that process is killed before the guest runs, all of it is done once more.
fn restore_lazily(
    plan: &Plan,
    image: &OpenedImage,
    request: &LazyRequest,
    progress: &dyn Progress,
) -> Result<(RestoreReport, RunningGuest)> {
    if *image.location() == Location::Pipe {
        return Err(piped_and_lazy(plan));
    }
    if image.location().is_far() && request.options.records {
        // What is asked for is kept in the image itself.
        return Err(image.location().refused().into());
    }
    let guest = plan.name().to_owned();
    let xml = image.image().xml()?;
    let why = "its image has no page map";
    let page_map = image.image().page_map()?;
    let page_map = page_map.ok_or(RestoreError::NotLazy { guest, why })?;
    let mut attempts = 2;
    loop {
        attempts -= 1;
        let start = Instant::now();
        let mut launch = plan.launch(None)?;
        launch.xml = plan.keeps_xml().then(|| xml.clone());
        let mut guest = supervise::launch(launch)?;
        let loaded = lazy::load_and_run(plan, image, &page_map, request, &mut guest, progress);
        match loaded {
            Ok(state) => {
                let report = report(&guest, start, state, image.image().stream_len(), Way::Lazy);
                return Ok((report, guest));
            }
            Err(error) if attempts > 0 && lazy::is_worth_another_try(&error, guest.dir()) => {
                progress
                    .warn("the process that gives the guest its memory was killed; starting over");
                guest.kill()?;
            }
            Err(error) => return Err(incoming::explain(error, guest)),
        }
    }
}

fn piped_and_lazy(plan: &Plan) -> Error {
    let guest = plan.name().to_owned();
    let why = "it comes through a pipe; copy it to a file first";
    RestoreError::NotLazy { guest, why }.into()
}

fn report(
    guest: &RunningGuest,
    start: Instant,
    state: String,
    stream_bytes: u64,
    memory: Way,
) -> RestoreReport {
    let running_after = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    RestoreReport {
        name: guest.name().to_owned(),
        pid: guest.pid(),
        qmp: guest.dir().qmp_socket(),
        log: guest.dir().log(),
        running_after_ms: (state == "running").then_some(running_after),
        state,
        stream_bytes,
        memory,
        served: None,
        verify: None,
    }
}

/// Loads the stream, waits until QEMU is done with it, and lets the guest run if it shall. Gives the run state and what
/// QEMU was given.
fn load_and_run<R: Read>(
    plan: &Plan,
    origin: Origin<R>,
    page_map: Option<PageMap>,
    mapped: Option<File>,
    guest: &mut RunningGuest,
    progress: &dyn Progress,
) -> Result<(String, Given)> {
    let mut qmp = guest.wait_qmp(plan.timeout())?;
    if plan.is_held() {
        leave_disks(&mut qmp)?;
    }
    let given = match origin {
        Origin::Image(image) => {
            let (image, process) = (image.image(), guest.description().process);
            let page_map = page_map.as_ref();
            if plan.mapping().is_some() {
                mapped::load(&mut qmp, image, plan.mapped_blocks(), progress)
            } else {
                incoming::load(&mut qmp, process, image, page_map, plan.threads(), progress)
            }
            .map_err(|error| with_pages(error, image))?
        }
        Origin::Pipe(pipe) => incoming::feed_from_pipe(&mut qmp, pipe, plan, progress)?,
    };
    incoming::confirm_completed(&mut qmp, plan.timeout())?;
    for id in plan.idle_networks()? {
        // It leads nowhere, so one that stays does no harm.
        let _: std::result::Result<Value, _> = qmp.execute("netdev_del", json!({ "id": id }));
    }
    let verifier = match (plan.mapping(), mapped) {
        (Some(mapping), Some(file)) => mapping.verify_behind(&file, guest)?,
        _ => None,
    };
    if plan.runs_on() {
        qmp.cont().map_err(|source| RestoreError::NotStarted {
            guest: guest.name().to_owned(),
            source,
        })?;
    }
    let state = qmp.query_status()?.to_string();
    drop(verifier);
    Ok((state, given))
}

/// Has QEMU take the guest's disks only when the guest is let run: until then they may be somebody else's.
fn leave_disks(qmp: &mut QmpClient) -> Result<()> {
    let capability = ("late-block-activate".to_owned(), true);
    Ok(qmp.set_capabilities(&BTreeMap::from([capability]))?)
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
