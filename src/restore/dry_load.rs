//! A guest loaded on trial: by the QEMU of the restore, with all that the image holds, and ended before it runs.
//!
//! It is restored as a clone that stays paused: it writes to overlays that end with it, its networks reach nothing, its
//! sockets lie in a directory of its own. What several guests cannot have at once cannot be tried.

use std::io::Empty;
use std::time::Instant;

use serde::Serialize;

use super::plan::Plan;
use super::{Origin, RestoreError, RestoreRequest, restore};
use crate::config::compat::{CHANGED_DISK, Finding};
use crate::config::explain;
use crate::container::Manifest;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{OpenedImage, Trust};
use crate::progress::Progress;
use crate::supervise::SuperviseError;

/// A guest that was loaded on trial.
#[derive(Debug, Clone, Serialize)]
pub struct Boot {
    /// Milliseconds from QEMU's start until it had loaded all.
    pub loaded_after_ms: u64,
    /// Bytes of QEMU's migration stream.
    pub stream_bytes: u64,
}

/// Loads the guest and ends it; or tells why it did not load, or could not be tried.
///
/// # Errors
/// A damaged image; an interruption.
pub fn dry_load(
    opened: OpenedImage,
    manifest: Manifest,
    request: &RestoreRequest,
    progress: &dyn Progress,
) -> Result<std::result::Result<Boot, Finding>> {
    // What overlays are laid over may be anything: the guest never runs.
    let force = CHANGED_DISK.map(str::to_owned);
    let trial = RestoreRequest {
        name: None,
        paused: true,
        map: None,
        lazy: None,
        held_as: None,
        throwaway: true,
        clones: Some(1),
        force: force.into_iter().collect(),
        ..request.clone()
    };
    let trust = Trust::of(opened.image())?;
    let plan = match Plan::check(manifest, &trust, &trial) {
        Ok(plan) => plan,
        Err(error) => return Ok(Err(untried(&error))),
    };
    let start = Instant::now();
    match restore::<Empty>(&plan, Origin::Image(Box::new(opened)), progress) {
        Ok((report, guest)) => {
            let loaded_after = start.elapsed().as_millis();
            guest.kill()?;
            Ok(Ok(Boot {
                loaded_after_ms: u64::try_from(loaded_after).unwrap_or(u64::MAX),
                stream_bytes: report.stream_bytes,
            }))
        }
        Err(error) if matches!(error.kind(), ErrorKind::Image | ErrorKind::Interrupted) => {
            Err(error)
        }
        Err(error) => Ok(Err(failed(&error))),
    }
}

fn untried(error: &Error) -> Finding {
    let reasons: Vec<String> = std::iter::once(error.to_string())
        .chain(error.facts())
        .collect();
    let fact = format!("it was not loaded on trial: {}", reasons.join("; "));
    Finding::warning("boot.untried", fact, None)
}

fn failed(error: &Error) -> Finding {
    let words = match (error.downcast_ref(), error.downcast_ref()) {
        (Some(RestoreError::QemuGaveUp { words, .. }), _) => words.clone(),
        (_, Some(SuperviseError::EarlyExit { log, .. })) => log.clone(),
        _ => error.to_string(),
    };
    let told = explain(&words).into_iter().next();
    let (fact, fix) = match told {
        Some(told) => (
            format!(
                "QEMU did not load it on trial: {}; that is, {}",
                told.line, told.cause
            ),
            Some(told.remedy),
        ),
        None => (
            format!("QEMU did not load it on trial: {}", words.trim()),
            None,
        ),
    };
    Finding::refusal("boot.failed", fact, fix)
}
