//! The record of a guest that moves from here: that GO was said.
//!
//! It is a file in the directory of departures, named after the guest's QEMU process. It gets that name, durably, right
//! before GO is said, and loses it when the other side's word is known and done. So whoever finds one knows whom to ask.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::failed;
use super::there::Runs;
use super::{MoveError, MoveRequest, Way};
use crate::error::Result;
use crate::host::{Lasting, ProcessId, boot_id, make_private_directory};
use crate::save::{Plan, Source};
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
    /// Its image here, from which it gets its memory when it runs there.
    pub image: Option<PathBuf>,
    /// What the other side is told beside that.
    pub arguments: Vec<String>,
    /// The guest there, once it is known to run.
    pub there: Option<Runs>,
}

impl Departure {
    /// A new move of the guest of a plan.
    ///
    /// # Errors
    /// What keeps its record from having a place.
    pub fn new(plan: &Plan, request: &MoveRequest) -> Result<Self> {
        let directory = Lasting::find()?.moves();
        let id = Uuid::new_v4();
        let departure = Departure {
            id,
            guest: plan.report().name.clone(),
            host: request.host.to_string(),
            qemu: plan.process(),
            boot_id: boot_id(),
            monitor: std::path::absolute(plan.monitor()).map_err(failed("find", plan.monitor()))?,
            was_running: plan.was_running(),
            image: match request.way {
                Way::Lazy => Some(directory.join(format!("{id}.stow"))),
                Way::Copied | Way::Streamed => None,
            },
            arguments: request.arguments.clone(),
            there: None,
        };
        make_private_directory(&directory)?;
        clean(&directory);
        Ok(departure)
    }

    /// Whether there is a record of any move from here.
    pub fn is_any() -> bool {
        let directory = Lasting::find().map(|lasting| lasting.moves());
        let entries = directory.ok().and_then(|path| fs::read_dir(path).ok());
        let mut entries = entries.into_iter().flatten().flatten();
        entries.any(|entry| entry.path().extension() == Some("json".as_ref()))
    }

    /// The move of this process that was cut off behind GO.
    ///
    /// # Errors
    /// What keeps its record from being read.
    pub fn of(process: ProcessId) -> Result<Option<Self>> {
        let Some(departure) = read(&path_of(process)?)? else {
            return Ok(None);
        };
        if departure.image.is_some()
            || (departure.boot_id == boot_id() && departure.qemu == process)
        {
            return Ok(Some(departure));
        }
        // It speaks of a process that ended with an earlier boot.
        departure.forget()?;
        Ok(None)
    }

    /// The move of a guest that has ended here, and of which something is left to do: first one that still gets its memory
    /// from here, else one of which this host has not been told yet that it is over.
    ///
    /// # Errors
    /// What keeps records from being read.
    pub fn ended_here(source: &Source) -> Result<Option<Self>> {
        let mut ended = None;
        let entries = fs::read_dir(Lasting::find()?.moves()).into_iter().flatten();
        for entry in entries.flatten() {
            let path = entry.path();
            let is_record = path.extension() == Some("json".as_ref());
            let departure = if is_record { read(&path)? } else { None };
            let Some(departure) = departure else {
                continue;
            };
            let is_it = match source {
                Source::Name(name) => departure.guest == *name,
                Source::Process(pid) => departure.qemu.pid == *pid,
                Source::Monitor(path) => {
                    std::path::absolute(path).is_ok_and(|path| path == departure.monitor)
                }
            };
            if is_it && !departure.qemu.is_alive() {
                if departure.image.is_some() {
                    return Ok(Some(departure));
                }
                ended = Some(departure);
            }
        }
        Ok(ended)
    }

    /// Writes down that the guest runs there, durably, before it ends here.
    ///
    /// # Errors
    /// What the file system says.
    pub fn runs_there(&self, runs: &Runs) -> Result<Self> {
        let departure = Departure {
            there: Some(runs.clone()),
            ..self.clone()
        };
        let path = self.record_path()?;
        let new = path.with_extension("new");
        let written = File::create(&new).and_then(|mut file| {
            file.write_all(&departure.to_json())?;
            file.sync_all()?;
            fs::rename(&new, &path)
        });
        written.map_err(failed("write", &path))?;
        sync_directory_of(&path)?;
        Ok(departure)
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

    /// The guest's name, and the host's, for people.
    pub fn names(&self) -> (String, String) {
        let host = self.location().map(|there| there.host);
        (
            self.guest.clone(),
            host.unwrap_or_else(|_| self.host.clone()),
        )
    }

    /// Whether this is where it goes.
    pub fn is_to(&self, host: &SshLocation) -> bool {
        self.location().is_ok_and(|there| {
            (&there.host, there.port, &there.user) == (&host.host, host.port, &host.user)
        })
    }

    /// Removes its image here and its record, durably.
    ///
    /// # Errors
    /// What the file system says.
    pub fn forget(&self) -> Result<()> {
        let path = self.record_path()?;
        for path in self.image.iter().chain([&path]) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", path)(error).into());
                }
                _ => {}
            }
        }
        Ok(sync_directory_of(&path)?)
    }
}

/// Removes what moves left behind that were cut off, and of which nobody needs anything any more. That it cannot be
/// removed harms nobody.
fn clean(directory: &Path) {
    /// No move before GO takes so long.
    const OLD: Duration = Duration::from_secs(7 * 24 * 3600);
    let mut kept = Vec::new();
    let mut images = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let age = entry.metadata().and_then(|it| it.modified());
        let age = age.map(|time| SystemTime::now().duration_since(time).unwrap_or_default());
        let is_old = age.is_ok_and(|age| age > OLD);
        match path.extension().and_then(|it| it.to_str()) {
            Some("json") => match read(&path) {
                Ok(Some(Departure {
                    image: Some(image), ..
                })) => kept.push(image),
                Ok(Some(ended)) if !(ended.boot_id == boot_id() && ended.qemu.is_alive()) => {
                    let _ = fs::remove_file(&path);
                }
                _ => {}
            },
            Some("stow") if is_old => images.push(path),
            _ => {}
        }
    }
    for image in images.iter().filter(|image| !kept.contains(image)) {
        let _ = fs::remove_file(image);
    }
}

fn read(path: &Path) -> Result<Option<Departure>> {
    match fs::read(path) {
        Ok(bytes) => {
            let departure = serde_json::from_slice(&bytes);
            Ok(Some(departure.map_err(|error| {
                failed("read", path)(io::Error::other(error))
            })?))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path)(error).into()),
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
