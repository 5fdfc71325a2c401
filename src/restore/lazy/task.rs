//! `lazy.json`: what the process that gives a guest its memory has to know, kept as long as the guest runs so that another
//! one can take over.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::Result;
use crate::host::{GuestDir, ProcessId};
use crate::store::Location;
use crate::stream::RamBlock;
use crate::supervise::SuperviseError;
use crate::units::PAGE_LEN;

/// How a guest gets its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// The image's file, or its location on another host.
    pub image: PathBuf,
    /// Which image it has to be.
    pub image_uuid: Uuid,
    /// What it has to hold.
    pub image_digest: String,
    /// The guest's QEMU.
    pub qemu: ProcessId,
    /// The guest's RAMBlocks.
    pub blocks: Vec<Place>,
    /// Whether the guest shall run.
    pub runs_on: bool,
    /// Whether we have let it run.
    pub was_let_run: bool,
    /// How its memory is given.
    pub options: LazyOptions,
    /// Workers.
    pub threads: usize,
    /// The arguments with which it was restored, to start over.
    pub arguments: Vec<OsString>,
    /// The directory in which they were given.
    pub cwd: PathBuf,
}

/// How memory is given to a guest that runs already.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LazyOptions {
    /// Bytes a second at the most that are given unasked; `None`: as fast as it goes.
    pub fill_rate: Option<u64>,
    /// Whether QEMU puts every page in its place, even where we could.
    pub through_qemu: bool,
    /// Whether the order in which memory is asked for is kept in the image.
    pub records: bool,
}

/// A RAMBlock and where QEMU keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Its idstr.
    pub idstr: String,
    /// Its length in bytes.
    pub used_length: u64,
    /// The address of its first byte in QEMU's memory, if QEMU tells it.
    pub address: Option<u64>,
}

impl Task {
    /// What is written in a guest's directory; `None` if it was not restored lazily.
    ///
    /// # Errors
    /// [`SuperviseError::File`]; [`SuperviseError::BadDescription`].
    pub fn of(dir: &GuestDir) -> Result<Option<Self>> {
        let path = dir.lazy();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed("read", path, source).into()),
        };
        let parsed = serde_json::from_slice(&bytes);
        Ok(parsed
            .map(Some)
            .map_err(|source| SuperviseError::BadDescription { path, source })?)
    }

    /// Writes it into the guest's directory, whole or not at all.
    ///
    /// # Errors
    /// [`SuperviseError::File`].
    pub fn write(&self, dir: &GuestDir) -> Result<()> {
        let path = dir.lazy();
        let text = serde_json::to_vec(self).map_err(SuperviseError::Instruction)?;
        let written = tempfile::NamedTempFile::new_in(dir.path()).and_then(|mut file| {
            std::io::Write::write_all(&mut file, &text)?;
            Ok(file.persist(&path)?)
        });
        written.map_err(|source| failed("write", path, source))?;
        Ok(())
    }

    /// Where the image is.
    pub fn location(&self) -> Location {
        let far = self.image.to_str();
        let far = far.and_then(|text| text.parse::<Location>().ok());
        let far = far.filter(Location::is_far);
        far.unwrap_or_else(|| Location::Path(self.image.clone()))
    }

    /// The RAMBlocks as a stream lists them.
    pub fn ram_blocks(&self) -> Vec<RamBlock> {
        let block = |place: &Place| RamBlock {
            idstr: place.idstr.clone(),
            used_length: place.used_length,
            page_size: PAGE_LEN as u64,
        };
        self.blocks.iter().map(block).collect()
    }
}

fn failed(act: &'static str, path: impl AsRef<Path>, source: std::io::Error) -> SuperviseError {
    SuperviseError::File {
        act,
        path: path.as_ref().to_owned(),
        source,
    }
}
