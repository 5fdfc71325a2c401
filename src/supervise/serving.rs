//! `serving.json`: how far a process of ours is with giving a guest its memory.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use super::error::SuperviseError;
use super::launch::{failed, write_whole};
use crate::host::{GuestDir, ProcessId};

/// How far the giving is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// QEMU loads the guest's devices; without us it ends.
    Loading,
    /// The guest can run; without us it waits for ever at the first page that is missing.
    Serving,
    /// All its memory is there.
    Complete,
}

/// Who gives a guest its memory, and how far that is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Serving {
    /// The process: `pid` and `start_time`.
    #[serde(flatten)]
    pub process: ProcessId,
    /// How far it is.
    pub phase: Phase,
    /// Chunks of guest memory that are there.
    pub given_chunks: u64,
    /// Chunks of guest memory in the image, those of zero pages not counted.
    pub total_chunks: u64,
    /// How often the guest had to wait for a page.
    pub requests: u64,
    /// The longest that it waited once, in microseconds: from the arrival of the request here to the page's.
    pub worst_stall_us: u64,
    /// Whether pages are put straight into the guest's memory; QEMU puts them there otherwise.
    pub is_direct: bool,
    /// Milliseconds since the giving began.
    pub elapsed_ms: u64,
    /// What went wrong although the guest has its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl Serving {
    /// What is written in a guest's directory; `None` if nobody ever gave it memory.
    ///
    /// # Errors
    /// [`SuperviseError::File`]; [`SuperviseError::BadDescription`].
    pub fn of(dir: &GuestDir) -> Result<Option<Self>, SuperviseError> {
        let path = dir.serving();
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let parsed = serde_json::from_slice(&bytes);
        parsed
            .map(Some)
            .map_err(|source| SuperviseError::BadDescription { path, source })
    }

    /// Writes it into the guest's directory.
    ///
    /// # Errors
    /// [`SuperviseError::File`].
    pub fn write(&self, dir: &GuestDir) -> Result<(), SuperviseError> {
        let path = dir.serving();
        let text = serde_json::to_vec(self).map_err(SuperviseError::Instruction)?;
        write_whole(&path, &text).map_err(failed("write", &path))
    }

    /// Whether the guest waits for memory that nobody gives it.
    pub fn is_broken_off(&self) -> bool {
        self.phase != Phase::Complete && !self.process.is_alive()
    }

    /// The part that is there, in percent.
    pub fn percent(&self) -> u64 {
        match self.total_chunks {
            0 => 100,
            total => self.given_chunks.saturating_mul(100) / total,
        }
    }
}
