//! Starts a guest from libvirt domain XML.
//!
//! ```text
//! read → expand → translate → check → make what is missing → side programs → launch -S → cont
//! ```
//!
//! Everything that can be refused is refused in `check`, before anything is made or started. A start that fails ends what it
//! started and removes what it made.

mod error;
mod knowledge;
mod making;
mod plan;
mod source;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

pub use error::RunError;
pub use plan::Plan;

use crate::config::{Remap, Settings};
use crate::error::Result;
use crate::store::Location;
use crate::supervise::{self, RunningGuest};

/// What is to be started, and how.
#[derive(Debug, Clone)]
pub struct RunRequest {
    /// The domain XML, or an image with it.
    pub source: Location,
    /// Whether the guest is left paused.
    pub paused: bool,
    /// The QEMU to use instead of the one that the XML names.
    pub qemu: Option<PathBuf>,
    /// The name to give the guest here instead of its own.
    pub name: Option<String>,
    /// Other backends for its resources.
    pub remaps: Vec<Remap>,
    /// What this user and this host always want.
    pub settings: Settings,
    /// Whether arguments for QEMU itself are used, and resources of an image that nobody we trust signed.
    pub trust: bool,
    /// The longest QEMU may take to begin.
    pub timeout: Duration,
}

/// What a start gave.
#[derive(Debug, Clone, Serialize)]
pub struct RunReport {
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
    /// Milliseconds from the start until the guest ran; `None` if it is paused.
    pub running_after_ms: Option<u64>,
}

/// Starts the guest of a checked plan; it runs on in the background.
///
/// # Errors
/// [`RunError`], or what a module below it met: QEMU's own words if it ended. Nothing of the guest is left then.
pub fn run(plan: &Plan) -> Result<(RunReport, RunningGuest)> {
    let start = Instant::now();
    let made = plan.make_missing()?;
    let mut guest = supervise::launch(plan.launch()?)?;
    let state = let_run(plan, &mut guest)?;
    made.keep();
    let after = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let report = RunReport {
        name: guest.name().to_owned(),
        pid: guest.pid(),
        qmp: guest.dir().qmp_socket(),
        log: guest.dir().log(),
        running_after_ms: (state == "running").then_some(after),
        state,
    };
    Ok((report, guest))
}

/// Waits for the monitor, sets what no argument can say, and lets the guest run if it shall. Gives the run state.
fn let_run(plan: &Plan, guest: &mut RunningGuest) -> Result<String> {
    let mut qmp = guest.wait_qmp(plan.timeout())?;
    for command in plan.qmp_commands() {
        let _: Value = qmp.execute(command.name, command.arguments.clone())?;
    }
    if plan.is_paused() {
        return Ok("paused".to_owned());
    }
    qmp.cont().map_err(|source| RunError::NotStarted {
        guest: guest.name().to_owned(),
        source,
    })?;
    Ok(qmp.query_status()?.to_string())
}
