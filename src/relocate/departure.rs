//! The record of a guest that moves from here: that GO was said.
//!
//! It is a file in the directory of departures, named after the guest's QEMU process. It gets that name, durably, right
//! before GO is said, and loses it when the other side's word is known and done. So whoever finds one knows whom to ask.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::MoveError;
use super::error::failed;
use crate::error::Result;
use crate::host::{Lasting, ProcessId, boot_id, make_private_directory};
use crate::save::Plan;
use crate::store::{Location, SshLocation};

/// A guest that moves from here.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Departure {
    /// Names the move.
    pub id: Uuid,
    /// The guest's name.
    pub guest: String,
    /// Where it goes, as `ssh://…`.
    pub host: String,
    /// Its QEMU process.
    pub qemu: ProcessId,
    /// The boot of this host in which that runs.
    pub boot_id: String,
    /// Its monitor.
    pub monitor: PathBuf,
    /// Whether it runs on when it is put back.
    pub was_running: bool,
}

impl Departure {
    /// A new move of the guest of a plan.
    ///
    /// # Errors
    /// What keeps its record from having a place.
    pub fn new(plan: &Plan, host: &SshLocation) -> Result<Self> {
        let departure = Departure {
            id: Uuid::new_v4(),
            guest: plan.report().name.clone(),
            host: host.to_string(),
            qemu: plan.process(),
            boot_id: boot_id(),
            monitor: std::path::absolute(plan.monitor()).map_err(failed("find", plan.monitor()))?,
            was_running: plan.was_running(),
        };
        make_private_directory(&Lasting::find()?.moves())?;
        Ok(departure)
    }

    /// The move of this process that was cut off behind GO.
    ///
    /// # Errors
    /// What keeps its record from being read.
    pub fn of(process: ProcessId) -> Result<Option<Self>> {
        let path = path_of(process)?;
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", path)(error).into()),
        };
        let departure: Departure = serde_json::from_slice(&bytes)
            .map_err(|error| failed("read", &path)(io::Error::other(error)))?;
        if departure.boot_id == boot_id() && departure.qemu == process {
            return Ok(Some(departure));
        }
        // It speaks of a process that ended with an earlier boot.
        departure.forget()?;
        Ok(None)
    }

    /// Where its record is.
    ///
    /// # Errors
    /// There is no place for records.
    pub fn record_path(&self) -> Result<PathBuf> {
        path_of(self.qemu)
    }

    /// Its record.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// The host, to be reached.
    ///
    /// # Errors
    /// The record does not say.
    pub fn location(&self) -> Result<SshLocation> {
        match self.host.parse() {
            Ok(Location::Ssh(there)) => Ok(there),
            _ => {
                let what = format!("{:?} is no host", self.host);
                Err(MoveError::Order { what }.into())
            }
        }
    }

    /// Whether this is where it goes.
    pub fn is_to(&self, host: &SshLocation) -> bool {
        self.location().is_ok_and(|there| {
            (&there.host, there.port, &there.user) == (&host.host, host.port, &host.user)
        })
    }

    /// Removes its record, durably.
    ///
    /// # Errors
    /// What the file system says.
    pub fn forget(&self) -> Result<()> {
        let path = self.record_path()?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", path)(error).into());
            }
            _ => {}
        }
        Ok(sync_directory_of(&path)?)
    }
}

fn path_of(process: ProcessId) -> Result<PathBuf> {
    let name = format!("{}-{}.json", process.pid, process.start_time);
    Ok(Lasting::find()?.moves().join(name))
}

/// Makes durable which names there are beside `path`.
pub fn sync_directory_of(path: &Path) -> Result<(), MoveError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(failed("sync", directory))
}
