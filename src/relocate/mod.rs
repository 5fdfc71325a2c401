//! Moves guests to other hosts, and restores images there.
//!
//! ```text
//! check there → stop → save → copy → load there → GO → it runs there → end here
//! ```
//!
//! Until GO any failure leaves the guest running here and nothing there; GO is written down on both sides before the guest may run
//! there, and from then on it stays stopped here until the other side's word. So it is never at two places, and at none only
//! until [`move_guest`] is called again, which settles it. This is spec/transfer.md §7 from the client's side; [`Reception`] is
//! the other side.

mod arrival;
mod departing;
mod departure;
mod error;
mod outgoing;
mod reception;
mod settle;
mod there;

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use uuid::Uuid;

pub use arrival::{WATCH_SUBCOMMAND, run_watch};
use departing::Departing;
use departure::Departure;
pub use error::MoveError;
pub use reception::{Reception, Request};
use settle::Settled;
pub use there::restore_on;
use there::{Host, Runs};

use crate::error::Result;
use crate::host::ProcessId;
use crate::progress::Progress;
use crate::save::{self, Plan, SaveReport, SaveRequest};
use crate::store::SshLocation;
use crate::units::human_bytes;

/// A guest that is to move, and how.
pub struct MoveRequest {
    /// How it is saved: into layout `zstd`, and left stopped ([`Then::Pause`](save::Then::Pause)), since it ends here only when it
    /// runs there.
    pub saving: SaveRequest,
    /// Where to. Its path is nobody's business.
    pub host: SshLocation,
    /// What `vmstow restore` is told there beside the image.
    pub arguments: Vec<String>,
    /// How its image goes there.
    pub way: Way,
    /// Where its image is kept there; `None` if it is not.
    pub image: Option<PathBuf>,
    /// Whether an image of that name may be replaced.
    pub may_replace: bool,
    /// The directory for the image here until it is there; `None` is the usual one.
    pub spool: Option<PathBuf>,
    /// Stored bytes a second, at most.
    pub bytes_per_second: Option<u64>,
}

/// How an image goes to the other host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// As a file, first here, then there: what arrived stays when the connection is lost for a while.
    Copied,
    /// Straight from QEMU here into QEMU there; it is kept nowhere.
    Streamed,
    /// It stays here until the guest, which runs there already, has got its memory from it.
    Lazy,
}

/// What a move gave.
#[derive(Debug, Clone, Serialize)]
pub struct MoveReport {
    /// The guest's name here.
    pub name: String,
    /// The host.
    pub host: String,
    /// Its name there.
    pub name_there: String,
    /// What it does there: `running` or `paused`.
    pub state: String,
    /// Where its image is kept there, if it is.
    pub image: Option<PathBuf>,
    /// What was sent; `None` where an earlier move was settled.
    pub sent: Option<Sent>,
    /// What may not be as it was, a sentence each.
    pub warnings: Vec<String>,
}

/// What was sent.
#[derive(Debug, Clone, Serialize)]
pub struct Sent {
    /// How.
    pub way: Way,
    /// Names the save.
    pub image_uuid: Uuid,
    /// Names what was saved.
    pub image_digest: String,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Milliseconds for which the guest ran nowhere.
    pub stopped_ms: u64,
    /// Milliseconds that the move took.
    pub took_ms: u64,
}

/// Moves a guest to another host. A move of it that was cut off is settled first: if it is there, that is all.
///
/// # Errors
/// [`MoveError`], or what a module below it met. The guest is as it was then, unless the error says otherwise.
pub fn move_guest(request: &MoveRequest, progress: &dyn Progress) -> Result<MoveReport> {
    let (name, earlier) = earlier_move(&request.saving)?;
    if let Some(departure) = earlier {
        if !departure.is_to(&request.host) {
            let (guest, host) = (name, departure.host);
            return Err(MoveError::Unsettled { guest, host }.into());
        }
        match settle::settle(&departure, progress)? {
            Settled::Moved(runs) => return Ok(settled(departure, runs, &request.host)),
            Settled::TakenBack => {
                let host = &request.host.host;
                progress.warn(&format!(
                    "an earlier move of {name} to {host} was taken back"
                ));
            }
        }
    }
    let begin = Instant::now();
    let plan = Plan::check(&request.saving)?;
    let host = Host::connect(&request.host)?;
    let departure = Departure::new(&plan, request)?;
    let (manifest, xml) = plan.preview()?;
    let prepared = host.prepare(&departure, &manifest, &xml, &request.arguments, progress)?;
    for warning in &prepared.warnings {
        progress.warn(warning);
    }
    if let (Way::Copied, Some(free), Some(resident)) = (
        request.way,
        prepared.free_bytes,
        plan.report().resident_bytes,
    ) && free < resident
    {
        let (host, free, most) = (host.name(), human_bytes(free), human_bytes(resident));
        progress.warn(&format!(
            "{host} has room for {free}; the image may need up to {most}"
        ));
    }
    let record = departure.record_path()?;
    let mut departing = Departing::new(request, host, departure, prepared.place, progress)?;
    let saved = save::hand_over(plan, &request.saving, &record, &mut departing, progress);
    let saved = match saved {
        Ok(saved) => Some(saved),
        // It runs there, whatever QEMU here did not do any more.
        Err(_) if departing.has_arrived() => None,
        Err(error) => return Err(departing.explain(error)),
    };
    let runs = departing.finish()?;
    Ok(MoveReport {
        name,
        host: request.host.host.clone(),
        name_there: runs.name,
        state: runs.state,
        image: request.image.clone(),
        sent: saved.map(|saved| sent(request.way, &saved, begin)),
        warnings: prepared.warnings,
    })
}

/// Settles a move of a guest that was cut off, and moves it no further: `None` if it is here, as it was. With `stays_here` the
/// other side is not asked: the guest does not run there.
///
/// # Errors
/// [`MoveError::NothingToSettle`]; what keeps it from being settled.
pub fn settle_move(
    source: &SaveRequest,
    stays_here: bool,
    progress: &dyn Progress,
) -> Result<(String, Option<MoveReport>)> {
    let (name, earlier) = earlier_move(source)?;
    let Some(departure) = earlier else {
        return Err(MoveError::NothingToSettle { guest: name }.into());
    };
    if stays_here {
        settle::take_back(&departure)?;
        return Ok((name, None));
    }
    let host = departure.location()?;
    Ok(match settle::settle(&departure, progress)? {
        Settled::Moved(runs) => (name, Some(settled(departure, runs, &host))),
        Settled::TakenBack => (name, None),
    })
}

/// The host to which the guest behind `process` was to move, if that move is not settled yet.
///
/// # Errors
/// What keeps its record from being read.
pub fn unsettled(process: ProcessId) -> Result<Option<String>> {
    Ok(Departure::of(process)?.map(|departure| departure.names().1))
}

/// Refuses a guest whose move is not settled: nobody else shall save it or let it run.
///
/// # Errors
/// [`MoveError::Unsettled`]; what keeps it from being found out.
pub fn refuse_unsettled(saving: &SaveRequest) -> Result<()> {
    if !Departure::is_any() {
        return Ok(());
    }
    let seen = Plan::look(saving)?;
    match Departure::of(seen.process())? {
        Some(departure) => {
            let (guest, host) = departure.names();
            Err(MoveError::Unsettled { guest, host }.into())
        }
        None => Ok(()),
    }
}

/// The guest's name, and the move of it that was cut off.
fn earlier_move(saving: &SaveRequest) -> Result<(String, Option<Departure>)> {
    let ended = Departure::ended_here(&saving.source)?;
    let still_read = ended.as_ref().is_some_and(|it| it.image.is_some());
    let seen = Plan::look(saving);
    match ended {
        Some(departure) if still_read || seen.is_err() => {
            Ok((departure.guest.clone(), Some(departure)))
        }
        _ => {
            let seen = seen?;
            Ok((seen.report().name.clone(), Departure::of(seen.process())?))
        }
    }
}

fn settled(departure: Departure, runs: Runs, host: &SshLocation) -> MoveReport {
    MoveReport {
        name: departure.guest,
        host: host.host.clone(),
        name_there: runs.name,
        state: runs.state,
        image: None,
        sent: None,
        warnings: Vec::new(),
    }
}

fn sent(way: Way, saved: &SaveReport, begin: Instant) -> Sent {
    Sent {
        way,
        image_uuid: saved.image_uuid,
        image_digest: saved.image_digest.clone(),
        image_bytes: saved.file_bytes,
        memory_bytes: saved.memory_bytes,
        stopped_ms: saved.stopped_ms,
        took_ms: u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}
