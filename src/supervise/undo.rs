//! The way back of a save, shared by the saver and its guardian.

use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;

use super::error::SuperviseError;
use crate::host::has_userfaultfd;
use crate::qmp::{MigrationStatus, QmpClient, QmpError, RunState, SavedSettings};

/// How long a cancelled migration may take to end.
const CANCEL_TAKES: Duration = Duration::from_secs(30);

/// How long QEMU may refuse what it will accept once the migration is cleaned up.
const CLEAN_UP_TAKES: Duration = Duration::from_secs(3);

/// How long QEMU may take to give up its watch over the guest's memory; and how long we wait where we cannot see it.
const WATCH_TAKES: Duration = Duration::from_secs(30);
const UNSEEN_WATCH_TAKES: Duration = Duration::from_secs(1);

/// How often we look.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Puts a guest back into the state it was in before the save: cancels a migration that is active and waits for its
/// end, puts the settings back and, if the guest was running, lets it run. Tells what the guest is doing then.
///
/// A guest that was stopped stays stopped, after a migration perhaps as `postmigrate`. The caller must have closed its end
/// of the stream's pipe, or QEMU stays `cancelling`. The client's cancel flag is forgotten: the way back must not be
/// interrupted.
///
/// # Errors
/// The first thing that failed. The rest is done nevertheless: that the guest runs matters most.
pub fn put_back(
    qmp: &mut QmpClient,
    settings: &SavedSettings,
    was_running: bool,
) -> Result<RunState, SuperviseError> {
    qmp.take_cancel();
    let ended = end_migration(qmp);
    let restored = persist(|| settings.put_back(qmp));
    let state = match was_running {
        true => resume(qmp),
        false => rest(qmp),
    };
    ended?;
    restored?;
    state
}

/// As [`put_back`], of a guest that runs while it is saved. If it ran on by now, whether it runs is its user's business.
///
/// The migration is not cancelled but waited for, [`while_draining`] what it writes: QEMU 7.2 never lets go of a guest whose
/// background snapshot was cancelled or failed, and at the next page that it writes to the guest waits for ever. So the
/// pipe must never have been without a reader.
///
/// # Errors
/// The first thing that failed. The rest is done nevertheless.
pub fn put_back_live(
    qmp: &mut QmpClient,
    settings: &SavedSettings,
    drained: &AtomicU64,
    ran_on: bool,
) -> Result<RunState, SuperviseError> {
    qmp.take_cancel();
    let ended = wait_for_end(qmp, drained).and_then(|()| end_watch(qmp));
    let restored = persist(|| settings.put_back(qmp));
    let state = match ran_on {
        true => settled_state(qmp),
        false => resume(qmp),
    };
    ended?;
    restored?;
    state
}

/// Does `act`, and meanwhile throws away what comes out of a pipe. `act` is told of the bytes thrown away so far.
pub fn while_draining<T>(stream: Option<&File>, act: impl FnOnce(&AtomicU64) -> T) -> T {
    let (drained, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        if let Some(stream) = stream {
            scope.spawn(|| drain(stream, &drained, &is_over));
        }
        let done = act(&drained);
        is_over.store(true, Ordering::Relaxed);
        done
    })
}

/// Waits for a migration's end as long as it writes something.
fn wait_for_end(qmp: &mut QmpClient, drained: &AtomicU64) -> Result<(), SuperviseError> {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        let status = qmp.query_migrate()?.status;
        if !status.is_active() {
            return Ok(());
        }
        let now = drained.load(Ordering::Relaxed);
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        let waited = since.elapsed();
        if waited > CANCEL_TAKES {
            return Err(SuperviseError::MigrationStuck { status, waited });
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Reads a pipe to its end, or until `is_over`.
fn drain(mut stream: &File, drained: &AtomicU64, is_over: &AtomicBool) {
    const TICK: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 20_000_000,
    };
    let mut bytes = vec![0; 1 << 18];
    loop {
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&TICK)) {
            Ok(0) | Err(Errno::INTR) if !is_over.load(Ordering::Relaxed) => continue,
            Ok(ready) if ready > 0 => {}
            _ => return,
        }
        match stream.read(&mut bytes) {
            Ok(len) if len > 0 => drained.fetch_add(len as u64, Ordering::Relaxed),
            _ => return,
        };
    }
}

fn end_migration(qmp: &mut QmpClient) -> Result<(), SuperviseError> {
    let started = Instant::now();
    let mut is_cancelled = false;
    loop {
        let status = qmp.query_migrate()?.status;
        if !status.is_active() {
            return Ok(());
        }
        if !is_cancelled && status != MigrationStatus::Cancelling {
            qmp.migrate_cancel()?;
            is_cancelled = true;
        }
        let waited = started.elapsed();
        if waited > CANCEL_TAKES {
            return Err(SuperviseError::MigrationStuck { status, waited });
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Waits until QEMU watches the guest's memory no more, as it does while the guest runs on during its save.
///
/// It tells the migration's end before it gives up the watch, and gives it up only if `background-snapshot` is still on:
/// taken back too early, the guest would wait for ever when it writes to a page that is still watched. That it watches is
/// seen by its descriptor.
fn end_watch(qmp: &mut QmpClient) -> Result<(), SuperviseError> {
    if !SavedSettings::is_live(qmp)? {
        return Ok(());
    }
    let started = Instant::now();
    let pid = socket_peercred(&*qmp).map(|peer| peer.pid.as_raw_nonzero().get());
    let watches = || pid.ok().and_then(has_userfaultfd);
    loop {
        match watches() {
            Some(false) => return Ok(()),
            Some(true) if started.elapsed() < WATCH_TAKES => thread::sleep(LOOK_EVERY),
            Some(true) => {
                return Err(SuperviseError::WatchStuck {
                    waited: started.elapsed(),
                });
            }
            None => {
                // We may not look: it takes some milliseconds.
                thread::sleep(UNSEEN_WATCH_TAKES);
                return Ok(());
            }
        }
    }
}

/// Lets the guest run and looks whether it does. A guest that slept sleeps on, which counts as running.
fn resume(qmp: &mut QmpClient) -> Result<RunState, SuperviseError> {
    let started = Instant::now();
    loop {
        let state = settled_state(qmp)?;
        if matches!(state, RunState::Running | RunState::Suspended) {
            return Ok(state);
        }
        if started.elapsed() > CLEAN_UP_TAKES {
            return Err(SuperviseError::NotRunning { state });
        }
        persist(|| qmp.cont())?;
    }
}

/// Lets the guest rest. It may run: a guest that rests after a migration is let run for a moment before it is saved.
fn rest(qmp: &mut QmpClient) -> Result<RunState, SuperviseError> {
    match settled_state(qmp)? {
        RunState::Running => {
            qmp.stop()?;
            settled_state(qmp)
        }
        state => Ok(state),
    }
}

/// The run state once QEMU has left the last phase of a migration.
fn settled_state(qmp: &mut QmpClient) -> Result<RunState, SuperviseError> {
    let started = Instant::now();
    loop {
        let state = qmp.query_status()?;
        if state != RunState::FinishMigrate || started.elapsed() > CLEAN_UP_TAKES {
            return Ok(state);
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Tries again while QEMU refuses: a migration's end is told a moment before QEMU has cleaned up after it.
fn persist(mut attempt: impl FnMut() -> Result<(), QmpError>) -> Result<(), SuperviseError> {
    let started = Instant::now();
    loop {
        match attempt() {
            Err(QmpError::Refused { .. }) if started.elapsed() < CLEAN_UP_TAKES => {
                thread::sleep(LOOK_EVERY);
            }
            outcome => return Ok(outcome?),
        }
    }
}
