//! Settles a move that was cut off behind GO: asks the other side, and ends the guest here or lets it run on.

use std::time::Duration;

use super::MoveError;
use super::departure::Departure;
use super::there::{self, Became, Runs};
use crate::error::{Error, Result};
use crate::host::HostError;
use crate::progress::Progress;
use crate::qmp::{QmpClient, QmpError, RunState};
use crate::supervise::SuperviseError;

/// How long a monitor may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long QEMU may take to end: it flushes its disks then.
const END_TAKES: Duration = Duration::from_secs(60);

/// How an earlier move was settled.
pub enum Settled {
    /// The guest is there, and its QEMU here has ended.
    Moved(Runs),
    /// It is not there; it is here as it was.
    TakenBack,
}

/// Settles the move of a record.
///
/// # Errors
/// [`MoveError::Unknown`] if the other side cannot be asked; [`MoveError::Lost`]; [`MoveError::RunsTwice`]; what keeps the guest here from
/// ending or from running on.
pub fn settle(departure: &Departure, progress: &dyn Progress) -> Result<Settled> {
    let location = departure.location()?;
    let (guest, host) = (departure.guest.clone(), location.host.clone());
    let asked = there::ask(&location, departure.id, progress);
    let (connection, became) = asked.map_err(|why| MoveError::Unknown {
        guest: guest.clone(),
        host: host.clone(),
        why,
    })?;
    match became {
        Became::Lost => Err(MoveError::Lost { guest, host }.into()),
        Became::Refused => {
            put_back(departure).map_err(|why| MoveError::NotPutBack { guest, host, why })?;
            let _ = connection.end(departure.id);
            Ok(Settled::TakenBack)
        }
        Became::Runs(runs) => {
            if is_running(departure) {
                return Err(MoveError::RunsTwice { guest, host }.into());
            }
            end_here(departure)?;
            let _ = connection.end(departure.id);
            Ok(Settled::Moved(runs))
        }
    }
}

/// Ends the guest's QEMU here, waits until it is gone, and forgets its record.
///
/// # Errors
/// [`MoveError::NotEnded`].
pub fn end_here(departure: &Departure) -> Result<()> {
    let ended = quit(departure).and_then(|()| departure.forget());
    ended.map_err(|why| {
        let guest = departure.guest.clone();
        let host = departure
            .location()
            .map_or_else(|_| departure.host.clone(), |it| it.host);
        MoveError::NotEnded { guest, host, why }.into()
    })
}

fn quit(departure: &Departure) -> Result<()> {
    let pid = departure.qemu.pid;
    let handle = match departure.qemu.open() {
        Err(HostError::NoSuchProcess { .. }) => return Ok(()),
        handle => handle?,
    };
    let mut qmp = QmpClient::connect(&departure.monitor, ANSWER)?;
    qmp.quit()?;
    drop(qmp);
    match handle.wait_gone(END_TAKES)? {
        true => Ok(()),
        false => Err(SuperviseError::Unkillable { pid }.into()),
    }
}

/// Lets the guest run on here, if it ran before. The record goes last: until then this can be done again.
fn put_back(departure: &Departure) -> Result<()> {
    if departure.was_running {
        let mut qmp = QmpClient::connect(&departure.monitor, ANSWER)?;
        qmp.cont()?;
        let state = qmp.query_status()?;
        if !matches!(state, RunState::Running | RunState::Suspended) {
            return Err(Error::from(SuperviseError::NotRunning { state }));
        }
    }
    departure.forget()
}

fn is_running(departure: &Departure) -> bool {
    let state = QmpClient::connect(&departure.monitor, ANSWER).and_then(|mut qmp| {
        let state: Result<RunState, QmpError> = qmp.query_status();
        state
    });
    matches!(state, Ok(RunState::Running))
}
