//! Which guests of ours run.

use std::fs;
use std::io;
use std::time::{Duration, SystemTime};

use super::attendant::wait_for_attendant;
use super::error::SuperviseError;
use super::launch::{GuestDescription, failed};
use super::serving::{Phase, Serving};
use crate::host::{GuestDir, ProcessId, RuntimeDir, listener_of};

/// A directory without a description is a start under way, until it is this old.
const START_TAKES: Duration = Duration::from_secs(600);

/// What was found in the runtime directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestList {
    /// The guests whose QEMU lives, by name.
    pub running: Vec<GuestDescription>,
    /// The names of those whose QEMU is gone; their directories were removed.
    pub cleaned: Vec<String>,
    /// The names of those whose lazy restore was cut off before they ran; it can be started over.
    pub cut_off: Vec<String>,
}

/// Lists the guests of ours and removes what is left of those that ended.
pub fn list(runtime: &RuntimeDir) -> Result<GuestList, SuperviseError> {
    let mut found = GuestList::default();
    for dir in runtime.guests()? {
        match describe(&dir)? {
            Some(guest) if guest.process.is_alive() => found.running.push(guest),
            None if is_young(&dir) => {}
            Some(_) if is_cut_off(&dir) => found.cut_off.push(dir.name().to_owned()),
            _ => {
                wait_for_attendant(&dir);
                dir.remove()?;
                found.cleaned.push(dir.name().to_owned());
            }
        }
    }
    Ok(found)
}

/// What `guest.json` says. Where it is missing, since whoever started the guest was killed in the middle, what can be
/// told of the QEMU that listens there; `None` if there is none either.
///
/// # Errors
/// [`SuperviseError::BadDescription`] if it is not ours.
pub fn describe(dir: &GuestDir) -> Result<Option<GuestDescription>, SuperviseError> {
    let path = dir.description();
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(undescribed(dir)),
        Err(error) => return Err(failed("read", &path)(error)),
    };
    let described = serde_json::from_slice(&bytes);
    described
        .map(Some)
        .map_err(|source| SuperviseError::BadDescription { path, source })
}

/// The directory of the guest of ours whose QEMU this process is; `None` if it is no guest of ours.
pub fn directory_of(process: ProcessId) -> Option<GuestDir> {
    let path = RuntimeDir::usual_path();
    let runtime = path.is_dir().then(|| RuntimeDir::at(&path).ok())??;
    let mut guests = runtime.guests().ok()?.into_iter();
    guests.find(|dir| {
        let guest = describe(dir).ok().flatten();
        guest.is_some_and(|guest| guest.process == process)
    })
}

fn undescribed(dir: &GuestDir) -> Option<GuestDescription> {
    let qmp = dir.qmp_socket();
    let process = listener_of(&qmp).and_then(ProcessId::of).ok()?;
    let started_at = fs::metadata(&qmp).and_then(|socket| socket.modified());
    Some(GuestDescription {
        name: dir.name().to_owned(),
        process,
        image: None,
        qmp,
        started_at: started_at.ok()?.try_into().ok()?,
    })
}

/// Whether who gave it its memory was killed before it could run.
fn is_cut_off(dir: &GuestDir) -> bool {
    match Serving::of(dir) {
        Ok(Some(serving)) => serving.phase == Phase::Loading && serving.is_broken_off(),
        Ok(None) => dir.lazy().exists(),
        Err(_) => false,
    }
}

fn is_young(dir: &GuestDir) -> bool {
    let modified = fs::metadata(dir.path()).and_then(|it| it.modified());
    let age = modified.map(|time| SystemTime::now().duration_since(time).unwrap_or_default());
    age.is_ok_and(|age| age < START_TAKES)
}
