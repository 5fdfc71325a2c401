//! A bare migration stream in a file, as QEMU's `migrate file:` writes it.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::verify::{StreamCheck, StreamFacts};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::StoreError;

/// A bare stream in short.
#[derive(Debug, Clone, Serialize)]
pub struct StreamDescription {
    /// The file, as it was named.
    pub stream: String,
    /// Whether it was read to its end and nothing is missing.
    pub is_whole: bool,
    /// The resolved machine type, if the stream names it.
    pub machine_type: Option<String>,
    /// The run state in the stream.
    pub run_state: Option<String>,
    /// Bytes that were parsed.
    pub bytes: u64,
    /// Whether QEMU's JSON about the device sections is there.
    pub vmdescription: bool,
    /// What it holds.
    pub contents: StreamFacts,
}

/// Reads a bare stream to its end and describes it. A broken one is described as far as it was read, and comes with what
/// is wrong with it.
///
/// # Errors
/// What the file system says.
pub fn describe_stream(
    path: &Path,
    progress: &dyn Progress,
) -> Result<(StreamDescription, Option<Error>)> {
    let error = |act| {
        move |source| StoreError::File {
            act,
            path: path.to_owned(),
            source,
        }
    };
    let mut file = File::open(path).map_err(error("open"))?;
    progress.begin(
        "reading",
        file.metadata().ok().map(|metadata| metadata.len()),
    );
    let mut check = StreamCheck::default();
    let mut buf = vec![0; 1 << 20];
    loop {
        let len = file.read(&mut buf).map_err(error("read"))?;
        if len == 0 {
            break;
        }
        if let Err(broken) = check.take(&buf[..len]) {
            progress.end();
            return Ok((so_far(path, &check), Some(broken)));
        }
        progress.advance(len as u64);
    }
    progress.end();
    let mut description = so_far(path, &check);
    match check.finish() {
        Ok(summary) => {
            description.is_whole = true;
            description.run_state = summary.run_state.clone();
            description.vmdescription = summary.vmdescription.is_some();
            description.contents = StreamFacts::of(&summary);
            Ok((description, None))
        }
        Err(broken) => Ok((description, Some(broken))),
    }
}

fn so_far(path: &Path, check: &StreamCheck) -> StreamDescription {
    StreamDescription {
        stream: path.display().to_string(),
        is_whole: false,
        machine_type: check.machine_type(),
        run_state: None,
        bytes: check.position(),
        vmdescription: false,
        contents: check.facts_so_far(),
    }
}
