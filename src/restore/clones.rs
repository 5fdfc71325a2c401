//! Several guests from one image, all of them or none.
//!
//! Each clone is restored as the guest itself would be, by the same plan; only its directory is another, and with it its
//! name, its sockets and its overlays.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{Origin, Plan, RestoreError, RestoreReport, restore};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{self, OpenedImage};
use crate::pipeline;
use crate::progress::Progress;
use crate::supervise::RunningGuest;

/// Restores `count` clones from an image, as many at a time as there are cores. `first` is the image as it was when the
/// plan was made.
///
/// # Errors
/// [`RestoreError::Clone`] for the first one that failed; the others were ended.
pub fn restore_clones(
    plan: &Plan,
    first: &OpenedImage,
    count: usize,
    progress: &dyn Progress,
) -> Result<Vec<(RestoreReport, RunningGuest)>> {
    let stream_len = first.image().stream_len();
    progress.begin("restoring", Some(stream_len.saturating_mul(count as u64)));
    let shared = Shared {
        progress,
        has_failed: AtomicBool::new(false),
    };
    let clone = |_| {
        let cloned = restore_one(plan, first, &shared);
        if cloned.is_err() {
            shared.has_failed.store(true, Ordering::Relaxed);
        }
        cloned
    };
    let cloned = pipeline::side_by_side(count, pipeline::default_threads(), &clone);
    progress.end();
    let mut guests = Vec::with_capacity(count);
    let mut failures: Vec<(usize, Error)> = Vec::new();
    for (number, clone) in (1..).zip(cloned) {
        match clone {
            Some(Ok(guest)) => guests.push(guest),
            Some(Err(why)) => failures.push((number, why)),
            None => failures.push((number, pipeline::PipelineError::Worker.into())),
        }
    }
    // Those that were only called off have no reason of their own.
    let is_reason = |(_, why): &(usize, Error)| why.kind() != ErrorKind::Interrupted;
    let position = failures.iter().position(is_reason).unwrap_or(0);
    if failures.is_empty() {
        // Who began first took the first name: web-2 comes before web-10.
        guests.sort_by_key(|(report, _)| (report.name.len(), report.name.clone()));
        return Ok(guests);
    }
    let (number, why) = failures.swap_remove(position);
    drop(guests);
    Err(RestoreError::Clone {
        guest: plan.name().to_owned(),
        number,
        count,
        why,
    }
    .into())
}

fn restore_one(
    plan: &Plan,
    first: &OpenedImage,
    progress: &Shared<'_>,
) -> Result<(RestoreReport, RunningGuest)> {
    if progress.is_cancelled() {
        return Err(pipeline::PipelineError::Cancelled.into());
    }
    let image = image::open(first.location())?;
    // It covers every section that counts.
    if image.image().statement() != first.image().statement() {
        return Err(RestoreError::ImageReplaced.into());
    }
    restore::<std::io::Empty>(plan, Origin::Image(Box::new(image)), progress)
}

/// One bar for all clones; the first failure calls off the others.
struct Shared<'a> {
    progress: &'a dyn Progress,
    has_failed: AtomicBool,
}

impl Progress for Shared<'_> {
    fn advance(&self, bytes: u64) {
        self.progress.advance(bytes);
    }

    fn warn(&self, text: &str) {
        self.progress.warn(text);
    }

    fn is_cancelled(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed) || self.progress.is_cancelled()
    }
}
