//! A guest that runs on while its memory is written.
//!
//! QEMU stops it for a moment, keeps its device state, and from then on copies each page before the guest writes to it
//! (`background-snapshot`). What it writes is the guest as it was at that moment. Disks know no such thing: they are
//! read-only, or all go on in overlays from the same moment on, for which the guest is stopped a little longer.
//!
//! Source: QEMU `migration/migration.c`, `bg_migration_thread`; spec/qemu-stream.md §13. Seen with 7.2 and 10.0.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::describe::Description;
use super::guest::{GuardedGuest, StreamPipe, begin_migration, explain, settled_migration};
use super::{Finished, GuestLeft, Plan, SaveError, SaveRequest, Subject};
use crate::container::ImageWriter;
use crate::error::{Error, Result};
use crate::host::ProcessLock;
use crate::pipeline::{self, Encoded, Encoding};
use crate::progress::Progress;
use crate::qmp::{DiskSnapshot, EventTime, MigrationStatus, QmpClient, RunState, SavedSettings};
use crate::supervise::{Guardian, put_back_live, while_draining};

/// How often we look whether the guest runs on.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A guest that runs on, or was stopped only so that its disks and its memory are of the same moment.
pub struct LiveGuest {
    qmp: QmpClient,
    description: Description,
    settings: SavedSettings,
    guardian: Guardian,
    _lock: Option<ProcessLock>,
    /// Before QEMU got its end of it.
    pipe: Option<StreamPipe>,
    /// What QEMU writes: never without a reader, for only its end makes QEMU let go of the guest.
    stream: Option<File>,
    /// In which its disks go on.
    overlays: Vec<PathBuf>,
    /// Whether we stopped it and did not let it run on yet.
    is_held: bool,
    stopped_at: Option<EventTime>,
    resumed_at: Option<EventTime>,
    since: Instant,
}

impl GuardedGuest {
    /// Sets what a save of a guest that runs on needs. Its disks go on in overlays, if they shall; the guest is stopped
    /// then until QEMU keeps watch over its memory.
    pub fn go_live(self) -> Result<LiveGuest> {
        let GuardedGuest {
            plan,
            guardian,
            pipe,
            ..
        } = self;
        let Plan {
            qmp,
            description,
            settings,
            lock,
            snapshots,
            ..
        } = plan;
        let mut guest = LiveGuest {
            qmp,
            description,
            settings,
            guardian,
            _lock: lock,
            pipe,
            stream: None,
            overlays: Vec::new(),
            is_held: false,
            stopped_at: None,
            resumed_at: None,
            since: Instant::now(),
        };
        match guest.prepare(&snapshots) {
            Ok(()) => Ok(guest),
            Err(error) => Err(guest.put_back(error)),
        }
    }
}

impl LiveGuest {
    fn prepare(&mut self, snapshots: &[DiskSnapshot]) -> Result<()> {
        let set = self.settings.set_for_live(&mut self.qmp);
        set.map_err(|source| SaveError::LiveRefused { source })?;
        self.qmp.poll_events()?;
        self.qmp.take_events();
        // QEMU 7.2 lets a guest run that somebody stopped.
        match self.qmp.query_status()? {
            RunState::Running => {}
            state => return Err(SaveError::StoppedMeanwhile { state }.into()),
        }
        if snapshots.is_empty() {
            return Ok(());
        }
        self.is_held = true;
        self.qmp.stop()?;
        self.qmp.snapshot_disks(snapshots)?;
        self.overlays = snapshots
            .iter()
            .map(|it| it.overlay.clone().into())
            .collect();
        Ok(())
    }

    /// Follows what QEMU tells until the guest runs on, or `is_over` says that nothing is to be followed any more. A
    /// guest that we hold is let run once QEMU writes pages: from then on it keeps watch over them.
    fn follow(&mut self, has_pages: &AtomicBool, is_over: &AtomicBool) -> Result<()> {
        loop {
            let is_last_look = is_over.load(Ordering::Relaxed);
            if self.is_held && has_pages.load(Ordering::Relaxed) {
                self.qmp.cont()?;
                self.is_held = false;
            }
            self.take_times()?;
            if self.resumed_at.is_some() {
                // A guardian that is gone is noticed before the image gets its name.
                let _ = self.guardian.runs_on();
                return Ok(());
            }
            if is_last_look {
                return Ok(());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Notes when the guest was stopped, and when it ran on.
    fn take_times(&mut self) -> Result<()> {
        self.qmp.poll_events()?;
        for event in self.qmp.take_events() {
            match (event.name.as_str(), self.stopped_at, self.resumed_at) {
                ("STOP", None, _) => self.stopped_at = Some(event.timestamp),
                ("RESUME", Some(_), None) => {
                    self.resumed_at = Some(event.timestamp);
                    // QEMU 7.2 lets it run by itself.
                    self.is_held = false;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether QEMU says that all was written and the guest runs on.
    fn confirm_completed(&mut self) -> Result<()> {
        let (status, words) = settled_migration(&mut self.qmp)?;
        if status != MigrationStatus::Completed {
            let status = status.to_string();
            return Err(SaveError::MigrationFailed { status, words }.into());
        }
        if self.stopped_at.is_none() || self.resumed_at.is_none() || self.is_held {
            return Err(SaveError::NotLive.into());
        }
        Ok(())
    }

    /// For how long the guest stood still.
    fn downtime(&self) -> Option<Duration> {
        self.resumed_at?.since(self.stopped_at?)
    }
}

impl Subject for LiveGuest {
    fn description(&self) -> &Description {
        &self.description
    }

    fn take(
        &mut self,
        request: &SaveRequest,
        image: &mut ImageWriter<'_>,
        encoding: &Encoding,
        progress: &dyn Progress,
    ) -> Result<(Encoded, &'static str)> {
        let pipe = self.pipe.take().ok_or(SaveError::NotLive)?;
        self.stream = Some(File::from(pipe.copy()?));
        let mut stream = begin_migration(&mut self.qmp, pipe, request.timeout, progress)?;
        let pages = Pages {
            progress,
            were_seen: AtomicBool::new(false),
        };
        let is_over = AtomicBool::new(false);
        let (encoded, followed) = pipeline::beside(
            || {
                let encoded = pipeline::encode_live(&mut stream, image, encoding, &pages);
                is_over.store(true, Ordering::Relaxed);
                encoded
            },
            || self.follow(&pages.were_seen, &is_over),
        );
        match encoded {
            Ok(encoded) => {
                drop(stream);
                followed.unwrap_or(Err(pipeline::PipelineError::Worker.into()))?;
                self.confirm_completed()?;
                Ok((encoded, "live"))
            }
            Err(error) => Err(explain(&mut self.qmp, error, stream)),
        }
    }

    /// The image is of a moment that is past: what happened to the guest since is of no account.
    fn confirm(&mut self) -> Result<()> {
        Ok(())
    }

    fn put_back(mut self, why: Error) -> Error {
        // Whoever stopped it since it ran on did so on purpose.
        let ran_on = self.resumed_at.is_some();
        let stream = self.stream.as_ref();
        let (qmp, settings) = (&mut self.qmp, &self.settings);
        let outcome = while_draining(stream, |drained| {
            put_back_live(qmp, settings, drained, ran_on)
        });
        let LiveGuest {
            qmp,
            description,
            guardian,
            overlays,
            ..
        } = self;
        drop(qmp);
        let settled = guardian.settle(outcome.is_ok() || description.is_gone());
        let state = outcome.unwrap_or(RunState::Running);
        let left = match settled {
            true if description.is_gone() => GuestLeft::Gone,
            true if !overlays.is_empty() => GuestLeft::OnOverlays(state, overlays),
            true => GuestLeft::AsBefore(state),
            false => GuestLeft::Unknown,
        };
        let guest = description.name;
        SaveError::NotSaved { guest, left, why }.into()
    }

    fn guardian(&mut self) -> &mut Guardian {
        &mut self.guardian
    }

    fn leave(mut self, source: io::Error) -> Error {
        let _ = self.settings.put_back(&mut self.qmp);
        let _ = self.guardian.stand_down();
        let guest = self.description.name;
        SaveError::LivePublishUnknown { guest, source }.into()
    }

    fn finish(mut self) -> Result<Finished> {
        let downtime = self.downtime();
        let took = self.since.elapsed();
        let nothing = AtomicU64::new(0);
        let done = put_back_live(&mut self.qmp, &self.settings, &nothing, true);
        let LiveGuest {
            qmp,
            description,
            guardian,
            overlays,
            ..
        } = self;
        drop(qmp);
        match done {
            Ok(_) => drop(guardian.stand_down()),
            Err(_) if guardian.abandon().is_ok_and(|it| it.success()) => {}
            Err(error) => {
                let guest = description.name;
                let why = error.to_string();
                return Err(SaveError::LiveSettings { guest, why }.into());
            }
        }
        Ok(Finished {
            guest: "running",
            downtime,
            took: Some(took),
            overlays,
        })
    }
}

/// Passes on, and notes the first pages.
struct Pages<'a> {
    progress: &'a dyn Progress,
    were_seen: AtomicBool,
}

impl Progress for Pages<'_> {
    fn advance(&self, bytes: u64) {
        if bytes > 0 {
            self.were_seen.store(true, Ordering::Relaxed);
        }
        self.progress.advance(bytes);
    }

    fn is_cancelled(&self) -> bool {
        self.progress.is_cancelled()
    }
}
