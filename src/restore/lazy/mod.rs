//! Restores a guest lazily: it runs as soon as its devices are loaded, and gets its memory behind.
//!
//! ```text
//! launch, keeper, server → devices → the guest runs → pages that it asks for, all others behind → the server ends
//! ```
//!
//! QEMU takes part in a postcopy migration whose source is a process of ours, the *server*, which has the image. It outlives
//! the command; `vmstow list` shows how far it is. If it is killed the guest waits, and [`resume`] starts another
//! one. Only a guest whose devices were not loaded yet is started over: it cannot have run.
//!
//! Source: spec/qemu-stream.md §15.

mod desk;
mod error;
mod give;
mod received;
mod record;
mod recover;
mod server;
mod task;
mod worker;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

pub use error::ServeError;
pub use server::{SERVE_SUBCOMMAND, run_server};
use task::Place;
pub use task::{LazyOptions, Task};

use super::{Plan, RestoreError};
use crate::container::{Block, PageMap};
use crate::error::{Error, Result};
use crate::host::GuestDir;
use crate::image::OpenedImage;
use crate::progress::Progress;
use crate::qmp::{QmpClient, QmpError, RunState};
use crate::store::Location;
use crate::supervise::{
    self, Phase, RunningGuest, Said, Serving, SideProcess, SuperviseError, start_side_process,
};

/// The name under which QEMU knows the socket.
const SOCKET_NAME: &str = "vmstow-pages";

/// How often we look whether the guest can run.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// How often we look how far the memory is.
const LOOK_AT_MEMORY: Duration = Duration::from_millis(20);

/// What the command that restores lazily knows of itself, so that another one can start over.
#[derive(Debug, Clone)]
pub struct Invocation {
    /// This program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Where it was started.
    pub cwd: PathBuf,
}

/// A lazy restore, as it was asked for.
#[derive(Debug, Clone)]
pub struct LazyRequest {
    /// How memory is given.
    pub options: LazyOptions,
    /// The command that asks for it.
    pub invocation: Invocation,
}

/// Starts the guest of a checked plan and lets it run without its memory. Gives its run state.
///
/// # Errors
/// [`RestoreError`], or what a module below it met. QEMU is to be killed then.
pub fn load_and_run(
    plan: &Plan,
    image: &OpenedImage,
    page_map: &PageMap,
    request: &LazyRequest,
    guest: &mut RunningGuest,
    progress: &dyn Progress,
) -> Result<String> {
    let dir = guest.dir().clone();
    let program = &request.invocation.program;
    let mut task = task(plan, image, page_map, request, guest)?;
    task.write(&dir)?;
    // Both get ready while QEMU does.
    let (ours, qemus) = UnixStream::pair().map_err(ServeError::Socket)?;
    let server = start_side_process(program, &[SERVE_SUBCOMMAND], dir.path(), Some(ours.into()))?;
    let mut keeper = supervise::start_keeper(program, &dir)?;
    let mut qmp = guest.wait_qmp(plan.timeout())?;
    find_memory(&mut task, &mut qmp)?;
    task.write(&dir)?;
    if plan.is_held() {
        super::leave_disks(&mut qmp)?;
    }
    begin_migration(&mut qmp, qemus)?;
    supervise::wait_ready(&mut keeper)?;
    wait_loaded(server, guest, plan.timeout(), progress)?;
    wait_incoming(&mut qmp, plan.timeout())?;
    let_run(&mut qmp, &mut task, &dir)
}

fn task(
    plan: &Plan,
    opened: &OpenedImage,
    page_map: &PageMap,
    request: &LazyRequest,
    guest: &RunningGuest,
) -> Result<Task> {
    let image = opened.image();
    let place = |block: &Block| Place {
        idstr: block.idstr.clone(),
        used_length: block.used_length,
        address: None,
    };
    let location = match opened.location() {
        Location::Path(path) => std::path::absolute(path).map_err(ServeError::Socket)?,
        Location::Pipe => return Err(ServeError::NoTask.into()),
        far => PathBuf::from(far.to_string()),
    };
    Ok(Task {
        image: location,
        image_uuid: image.identity().image_uuid,
        image_digest: image.image_digest().to_string(),
        qemu: guest.description().process,
        blocks: page_map.blocks().iter().map(place).collect(),
        runs_on: plan.runs_on(),
        was_let_run: false,
        options: request.options.clone(),
        threads: plan.threads(),
        arguments: request.invocation.arguments.clone(),
        cwd: request.invocation.cwd.clone(),
    })
}

/// Asks QEMU where it keeps the RAMBlocks.
fn find_memory(task: &mut Task, qmp: &mut QmpClient) -> Result<()> {
    let known = qmp.ram_blocks()?.unwrap_or_default();
    for place in &mut task.blocks {
        let mut same = known
            .iter()
            .filter(|one| (&one.idstr, one.used_length) == (&place.idstr, place.used_length));
        place.address = same.next().and_then(|one| one.host_address);
    }
    Ok(())
}

/// Lets QEMU take part in a postcopy migration at its end of the connection.
fn begin_migration(qmp: &mut QmpClient, qemus: UnixStream) -> Result<()> {
    let capabilities = ["postcopy-ram", "events"].map(|name| (name.to_owned(), true));
    qmp.set_capabilities(&BTreeMap::from(capabilities))?;
    qmp.getfd(SOCKET_NAME, qemus.as_fd())?;
    Ok(qmp.migrate_incoming(&format!("fd:{SOCKET_NAME}"))?)
}

/// Waits until the devices are loaded.
fn wait_loaded(
    mut server: SideProcess,
    guest: &mut RunningGuest,
    timeout: Duration,
    progress: &dyn Progress,
) -> Result<()> {
    const STEP: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + timeout;
    loop {
        match server.listen(STEP) {
            Ok(Some(Said::Ready)) => return Ok(()),
            Ok(Some(Said::Failed(failed))) => {
                // QEMU's own words tell more, if it is the one that ended.
                guest.check_runs().map_err(|_| RestoreError::NotLoaded)?;
                return Err(SuperviseError::from(failed).into());
            }
            Ok(None) if progress.is_cancelled() => {
                server.kill();
                return Err(crate::pipeline::PipelineError::Cancelled.into());
            }
            Ok(None) if Instant::now() > deadline => {
                server.kill();
                return Err(RestoreError::TimedOut { limit: timeout }.into());
            }
            Ok(None) => guest.check_runs().map_err(|_| RestoreError::NotLoaded)?,
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until QEMU says that the guest can run.
fn wait_incoming(qmp: &mut QmpClient, timeout: Duration) -> Result<()> {
    qmp.set_timeout(timeout);
    let deadline = Instant::now() + timeout;
    while qmp.query_status()? == RunState::Inmigrate {
        if Instant::now() > deadline {
            return Err(RestoreError::TimedOut { limit: timeout }.into());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Lets the guest run if it shall; gives its run state.
fn let_run(qmp: &mut QmpClient, task: &mut Task, dir: &GuestDir) -> Result<String> {
    if task.runs_on {
        // Before it runs: afterwards it may have done what no image knows of.
        task.was_let_run = true;
        task.write(dir)?;
        qmp.cont().map_err(|source| RestoreError::NotStarted {
            guest: dir.name().to_owned(),
            source,
        })?;
    }
    Ok(qmp.query_status()?.to_string())
}

/// Whether the guest's server was killed before the guest could run: nothing was lost, and it can be started over.
pub fn is_worth_another_try(error: &Error, dir: &GuestDir) -> bool {
    let is_killed = matches!(error.downcast_ref(), Some(SuperviseError::SideEnded))
        || matches!(error.downcast_ref(), Some(RestoreError::NotLoaded))
        || error.downcast_ref().is_some_and(QmpError::is_gone);
    let serving = Serving::of(dir).ok().flatten();
    // It may have been killed before it could say anything.
    let is_cut_off = serving.is_none_or(|it| it.phase == Phase::Loading && it.is_broken_off());
    is_killed && is_cut_off
}

/// Waits until all of a guest's memory is there.
///
/// # Errors
/// [`RestoreError::Unserved`] if its server ended before; [`RestoreError::Frozen`] if the image turned out damaged.
pub fn wait_for_memory(dir: &GuestDir, progress: &dyn Progress) -> Result<Serving> {
    let guest = dir.name().to_owned();
    loop {
        let Some(serving) = Serving::of(dir)? else {
            let why = None;
            return Err(RestoreError::Unserved { guest, why }.into());
        };
        if serving.phase == Phase::Complete {
            return Ok(serving);
        }
        if let Some(damage) = supervise::damage_of(dir)? {
            return Err(RestoreError::Frozen { guest, damage }.into());
        }
        // It may have ended just now, with all done.
        let is_gone = serving.is_broken_off()
            && Serving::of(dir)?.is_none_or(|again| again.phase != Phase::Complete);
        if is_gone && supervise::damage_of(dir)?.is_none() {
            let why = Serving::of(dir)?.and_then(|serving| serving.problem);
            return Err(RestoreError::Unserved { guest, why }.into());
        }
        if progress.is_cancelled() {
            return Err(crate::pipeline::PipelineError::Cancelled.into());
        }
        std::thread::sleep(LOOK_AT_MEMORY);
    }
}

/// How a guest goes on whose server may have been killed.
#[derive(Debug)]
pub enum Resumed {
    /// Nothing had to be done: its memory is there, or is being given.
    Already(Box<Serving>),
    /// Another server gives it its memory; its run state, where it had to be let run.
    Served(Option<String>),
    /// It had not come so far that it could run: it has to be restored anew, with these arguments in that directory.
    StartOver(Vec<OsString>, PathBuf),
}

/// Takes over for a server that was killed.
///
/// # Errors
/// [`ServeError::NoTask`] if the guest was not restored lazily; [`RestoreError::Frozen`] if its image is damaged;
/// [`RestoreError::Ended`] if it ran and its QEMU is gone; what keeps QEMU from going on.
pub fn resume(dir: &GuestDir, invocation: &Invocation, timeout: Duration) -> Result<Resumed> {
    let guest = dir.name().to_owned();
    let mut task = Task::of(dir)?.ok_or(ServeError::NoTask)?;
    if let Some(damage) = supervise::damage_of(dir)? {
        return Err(RestoreError::Frozen { guest, damage }.into());
    }
    if let Some(serving) = served_by_somebody(dir, &task)? {
        return Ok(Resumed::Already(Box::new(serving)));
    }
    if !could_run(dir)? {
        // Nothing is lost. A QEMU whose devices were being loaded ends when its source does, or waits for ever for a page
        // that they need.
        end_qemu(&task)?;
        return Ok(Resumed::StartOver(task.arguments, task.cwd));
    }
    if !task.qemu.is_alive() {
        return Err(RestoreError::Ended { guest }.into());
    }
    let arguments = [SERVE_SUBCOMMAND, server::RECOVER];
    let mut server = start_side_process(&invocation.program, &arguments, dir.path(), None)?;
    supervise::wait_ready(&mut server)?;
    // Whoever was to let it run may have been killed as well. Otherwise its monitor is its user's.
    let state = match task.runs_on && !task.was_let_run {
        true => {
            let mut qmp = QmpClient::connect(&dir.qmp_socket(), timeout)?;
            wait_incoming(&mut qmp, timeout)?;
            Some(let_run(&mut qmp, &mut task, dir)?)
        }
        false => None,
    };
    Ok(Resumed::Served(state))
}

/// Whether the guest's devices were loaded: from then on somebody may have let it run, and it is more than its image.
fn could_run(dir: &GuestDir) -> Result<bool> {
    let serving = Serving::of(dir)?;
    Ok(serving.is_some_and(|it| it.phase != Phase::Loading))
}

/// How far the guest's memory is, if somebody gives it or all of it is there. One that was killed just now may take a
/// moment to be gone.
fn served_by_somebody(dir: &GuestDir, task: &Task) -> Result<Option<Serving>> {
    const MOMENT: Duration = Duration::from_millis(20);
    let mut seen = None;
    for _ in 0..10 {
        seen = Serving::of(dir)?.filter(|_| task.qemu.is_alive());
        match &seen {
            Some(serving) if serving.phase == Phase::Complete => break,
            Some(serving) if serving.process.is_alive() => std::thread::sleep(MOMENT),
            _ => return Ok(None),
        }
    }
    Ok(seen)
}

fn end_qemu(task: &Task) -> Result<()> {
    const AT_ONCE: Duration = Duration::from_secs(5);
    if let Ok(handle) = task.qemu.open() {
        handle.signal(rustix::process::Signal::KILL)?;
        handle.wait_gone(AT_ONCE)?;
    }
    Ok(())
}
