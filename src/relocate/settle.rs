//! Settles a move that was cut off behind GO: asks the other side, and ends the guest here or lets it run on.

use std::time::Duration;

use super::MoveError;
use super::departure::Departure;
use super::there::{self, Became, Host, RestoreOrder, Runs};
use crate::bytes::ReadAt;
use crate::error::{Error, Result};
use crate::host::HostError;
use crate::progress::Progress;
use crate::qmp::{QmpClient, QmpError, RunState};
use crate::store::{FileSource, SshLocation};
use crate::supervise::SuperviseError;

/// How long a monitor may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How long QEMU may take to end: it flushes its disks then.
const END_TAKES: Duration = Duration::from_secs(60);

/// How often a connection that was lost is made again while a guest gets its memory, and after how long.
const TRIES: u32 = 5;
const BETWEEN_TRIES: Duration = Duration::from_secs(2);

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
    if let Some(runs) = &departure.there {
        quit_here(departure)?;
        match (&departure.image, Host::connect(&location)) {
            (Some(_), _) => serve_again(departure, &location, progress)?,
            (None, Ok(connection)) => finish(departure, connection, progress)?,
            (None, Err(_)) => departure.forget()?,
        }
        return Ok(Settled::Moved(runs.clone()));
    }
    let asked = there::ask(&location, departure.id, progress);
    let (connection, became) = asked.map_err(|why| MoveError::Unknown {
        guest: guest.clone(),
        host: host.clone(),
        why,
    })?;
    match became {
        // Its user has decided, and let it run on here.
        Became::Lost if is_running(departure) => {
            departure.forget()?;
            Ok(Settled::TakenBack)
        }
        Became::Lost => {
            if !departure.qemu.is_alive() {
                // There is nothing left to decide.
                departure.forget()?;
            }
            Err(MoveError::Lost { guest, host }.into())
        }
        Became::Refused if !departure.qemu.is_alive() => {
            departure.forget()?;
            Err(MoveError::Nowhere { guest, host }.into())
        }
        Became::Refused => {
            take_back(departure)?;
            let nothing: &[u8] = &[];
            let _ = connection.end(departure.id, &nothing, progress);
            Ok(Settled::TakenBack)
        }
        Became::Runs(runs) => {
            if is_running(departure) {
                return Err(MoveError::RunsTwice { guest, host }.into());
            }
            let departure = departure.runs_there(&runs)?;
            quit_here(&departure)?;
            match departure.image {
                Some(_) => serve_again(&departure, &location, progress)?,
                None => finish(&departure, connection, progress)?,
            }
            Ok(Settled::Moved(runs))
        }
    }
}

/// Lets the guest run on here as it did before, and forgets the move.
///
/// # Errors
/// [`MoveError::NotPutBack`].
pub fn take_back(departure: &Departure) -> Result<()> {
    put_back(departure).map_err(|why| {
        let (guest, host) = departure.names();
        MoveError::NotPutBack { guest, host, why }.into()
    })
}

/// Ends the guest's QEMU here, and waits until it is gone.
///
/// # Errors
/// [`MoveError::NotEnded`].
pub fn quit_here(departure: &Departure) -> Result<()> {
    quit(departure).map_err(|why| {
        let (guest, host) = departure.names();
        MoveError::NotEnded { guest, host, why }.into()
    })
}

/// Gives a guest that runs there the memory that it still needs, and forgets its move on both sides.
///
/// # Errors
/// [`MoveError::Unserved`]: this can be done again. Without memory that it needs from here, only what is wrong with the record.
pub fn finish(departure: &Departure, mut host: Host, progress: &dyn Progress) -> Result<()> {
    if let Some(path) = &departure.image {
        let image = FileSource::open(path)?;
        let served = serve(departure, &image, &mut host, progress);
        served.map_err(|why| {
            let (guest, host) = departure.names();
            MoveError::Unserved { guest, host, why }
        })?;
    } else {
        // What it does not forget now, it does by and by.
        let nothing: &[u8] = &[];
        if host.end(departure.id, &nothing, progress).is_err() && host.reconnect().is_ok() {
            let _ = host.end(departure.id, &nothing, progress);
        }
    }
    departure.forget()
}

/// Offers a guest's image until the guest needs it no more.
fn serve(
    departure: &Departure,
    image: &FileSource,
    host: &mut Host,
    progress: &dyn Progress,
) -> Result<()> {
    progress.begin("giving it its memory", None);
    let mut ended = host.end(departure.id, image, progress);
    for _ in 0..TRIES {
        // Who gave it its memory there may have been waiting for the connection that was lost.
        let Err(error) = &ended else {
            break;
        };
        if progress.is_cancelled() {
            break;
        }
        progress.warn(&format!("{error}; trying again"));
        std::thread::sleep(BETWEEN_TRIES);
        ended = host.reconnect().map_err(Error::from).and_then(|()| {
            host.hold(&again_order(departure, image), image, progress)?;
            host.end(departure.id, image, progress)
        });
    }
    progress.end();
    ended
}

/// Offers the image anew to a guest that runs already, until it needs it no more.
fn serve_again(
    departure: &Departure,
    location: &SshLocation,
    progress: &dyn Progress,
) -> Result<()> {
    let path = departure.image.clone().unwrap_or_default();
    let again = || {
        let image = FileSource::open(&path)?;
        let mut host = Host::connect(location)?;
        host.hold(&again_order(departure, &image), &image, progress)?;
        serve(departure, &image, &mut host, progress)
    };
    again().map_err(|why| {
        let (guest, host) = departure.names();
        MoveError::Unserved { guest, host, why }
    })?;
    departure.forget()
}

fn again_order(departure: &Departure, image: &FileSource) -> RestoreOrder {
    RestoreOrder {
        arguments: departure.arguments.clone(),
        id: Some(departure.id),
        length: Some(image.len()),
        path: None,
        again: true,
    }
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
