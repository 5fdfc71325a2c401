//! The way back of a save, shared by the saver and its guardian.

use std::time::{Duration, Instant};

use super::error::SuperviseError;
use crate::qmp::{MigrationStatus, QmpClient, QmpError, RunState, SavedSettings};

/// How long a cancelled migration may take to end.
const CANCEL_TAKES: Duration = Duration::from_secs(30);

/// How long QEMU may refuse what it will accept once the migration is cleaned up.
const CLEAN_UP_TAKES: Duration = Duration::from_secs(3);

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
        std::thread::sleep(LOOK_EVERY);
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
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Tries again while QEMU refuses: a migration's end is told a moment before QEMU has cleaned up after it.
fn persist(mut attempt: impl FnMut() -> Result<(), QmpError>) -> Result<(), SuperviseError> {
    let started = Instant::now();
    loop {
        match attempt() {
            Err(QmpError::Refused { .. }) if started.elapsed() < CLEAN_UP_TAKES => {
                std::thread::sleep(LOOK_EVERY);
            }
            outcome => return Ok(outcome?),
        }
    }
}
