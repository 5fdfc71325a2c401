//! Ends a guest of ours.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::attendant::wait_for_attendant;
use super::damage::damage_of;
use super::error::SuperviseError;
use super::list::describe;
use crate::host::{HostError, ProcessHandle, RuntimeDir};
use crate::qmp::{QmpClient, QmpError};

/// How long QEMU's monitor may take to answer.
const ANSWER: Duration = Duration::from_secs(3);

/// How long QEMU may take to end once it was told to: it flushes its disks then.
const FLUSH: Duration = Duration::from_secs(30);

/// How long it may take after a signal.
const AFTER_SIGNAL: Duration = Duration::from_secs(5);

/// What ended the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its QEMU was gone before.
    Already,
    /// The guest shut itself down after its power button was pressed.
    Powerdown,
    /// QEMU obeyed `quit`.
    Quit,
    /// QEMU's monitor did not answer, but SIGTERM was heard.
    Terminated,
    /// Nothing but SIGKILL helped.
    Killed,
    /// It was frozen, since its image is damaged: SIGKILL came first.
    Frozen,
}

/// Ends the guest of that name, waits until its QEMU is gone and removes its directory.
///
/// With `graceful` its power button is pressed first, and it gets that long to shut down. Then come `quit`, SIGTERM
/// and SIGKILL, each only if the one before it did not help. A guest that is frozen hears none but the last.
///
/// # Errors
/// [`HostError::NoSuchGuest`] if there is none of that name.
pub fn stop(
    runtime: &RuntimeDir,
    name: &str,
    graceful: Option<Duration>,
) -> Result<Ended, SuperviseError> {
    let dir = runtime.guest(name)?;
    let ended = match describe(&dir)? {
        None => Ended::Already,
        Some(guest) => match guest.process.open() {
            Ok(handle) if damage_of(&dir)?.is_some() => kill(&handle, guest.process.pid)?,
            Ok(handle) => end(&handle, &guest.qmp, guest.process.pid, graceful)?,
            Err(HostError::NoSuchProcess { .. }) => Ended::Already,
            Err(error) => return Err(error.into()),
        },
    };
    wait_for_attendant(&dir);
    dir.remove()?;
    Ok(ended)
}

fn kill(handle: &ProcessHandle, pid: i32) -> Result<Ended, SuperviseError> {
    handle.signal(Signal::KILL)?;
    match handle.wait_gone(AFTER_SIGNAL)? {
        true => Ok(Ended::Frozen),
        false => Err(SuperviseError::Unkillable { pid }),
    }
}

fn end(
    handle: &ProcessHandle,
    qmp: &Path,
    pid: i32,
    graceful: Option<Duration>,
) -> Result<Ended, SuperviseError> {
    if let Some(patience) = graceful
        && tell(qmp, QmpClient::system_powerdown).is_ok()
        && handle.wait_gone(patience)?
    {
        return Ok(Ended::Powerdown);
    }
    if tell(qmp, QmpClient::quit).is_ok() && handle.wait_gone(FLUSH)? {
        return Ok(Ended::Quit);
    }
    for (signal, ended) in [
        (Signal::TERM, Ended::Terminated),
        (Signal::KILL, Ended::Killed),
    ] {
        handle.signal(signal)?;
        if handle.wait_gone(AFTER_SIGNAL)? {
            return Ok(ended);
        }
    }
    Err(SuperviseError::Unkillable { pid })
}

fn tell(
    qmp: &Path,
    command: impl FnOnce(&mut QmpClient) -> Result<(), QmpError>,
) -> Result<(), QmpError> {
    let mut client = QmpClient::connect(qmp, ANSWER)?;
    client.set_timeout(ANSWER);
    command(&mut client)
}
