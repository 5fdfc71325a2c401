//! The guest between its stop and its end: stopped, migrated into a pipe if it has to be, put back or ended.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;

use super::describe::Description;
use super::{Finished, GuestLeft, Plan, SaveError, SaveRequest, Subject, Then};
use crate::container::ImageWriter;
use crate::error::{Error, Result};
use crate::host::ProcessLock;
use crate::pipeline::{Encoded, Encoding, PipelineError};
use crate::progress::Progress;
use crate::qmp::{MigrationStatus, QmpClient, QmpError, RunState, SavedSettings};
use crate::store::{FileSink, temporary_name};
use crate::supervise::{Guardian, GuardianInstruction, NodeIdentity, put_back};

/// The name under which QEMU knows the pipe.
const STREAM_NAME: &str = "vmstow-stream";

/// How long QEMU may take to notice that its migration is over.
const SETTLE: Duration = Duration::from_secs(30);

/// Bytes in the pipe; what an unprivileged process may ask for.
const PIPE_LEN: usize = 1 << 20;

/// A guest with a guardian; it was not touched yet.
pub struct GuardedGuest {
    pub(super) plan: Plan,
    then: Then,
    temporary: Option<PathBuf>,
    pub(super) guardian: Guardian,
    /// The pipe for the stream of a guest that runs on.
    pub(super) pipe: Option<StreamPipe>,
}

impl GuardedGuest {
    /// Starts the guardian; `target` is the file that [`GuardedGuest::create`] will make.
    ///
    /// The guardian is told the temporary name before there is such a file, so that none is ever left.
    pub fn guard(plan: Plan, request: &SaveRequest, target: Option<&Path>) -> Result<Self> {
        let process = plan.description.process();
        let temporary = target.map(temporary_name).transpose()?;
        let instruction = GuardianInstruction {
            qmp: plan.monitor.clone(),
            qemu_pid: Some(process.pid),
            qemu_start_time: Some(process.start_time),
            was_running: plan.was_running,
            settings: plan.settings.clone(),
            then: request.then,
            temporary: temporary.clone(),
            target: target.map(Path::to_owned),
            temporary_identity: None,
            overlays: plan.overlays(),
            stream: None,
            runs_on: false,
        };
        // The guardian has it too: QEMU must never write to a pipe that nobody can read.
        let pipe = request.live.map(|_| StreamPipe::new()).transpose()?;
        let copy = pipe.as_ref().map(StreamPipe::copy).transpose()?;
        let guardian = Guardian::start_with(&request.program, &instruction, copy)?;
        Ok(GuardedGuest {
            pipe,
            plan,
            then: request.then,
            temporary,
            guardian,
        })
    }

    /// Creates the image under its temporary name.
    pub fn create(mut self, target: &Path, may_replace: bool) -> Result<(Self, FileSink)> {
        match self.make_file(target, may_replace) {
            Ok(sink) => Ok((self, sink)),
            Err(error) => {
                let _ = self.guardian.stand_down();
                Err(error)
            }
        }
    }

    fn make_file(&mut self, target: &Path, may_replace: bool) -> Result<FileSink> {
        let sink = match &self.temporary {
            Some(temporary) => FileSink::create_as(temporary, target, may_replace)?,
            None => FileSink::create(target, may_replace)?,
        };
        let identity = NodeIdentity {
            dev: sink.identity().device,
            inode: sink.identity().inode,
        };
        self.guardian.temporary(sink.temporary(), identity)?;
        Ok(sink)
    }

    /// Sets what a save needs, and stops the guest.
    pub fn stop(self) -> Result<StoppedGuest> {
        let Plan {
            mut qmp,
            description,
            settings,
            run_state,
            was_running,
            lock,
            ..
        } = self.plan;
        let from_postmigrate = run_state == RunState::Postmigrate;
        let stopped = settings.set_for_save(&mut qmp).and_then(|()| {
            if from_postmigrate {
                qmp.cont()?;
            }
            qmp.stop()?;
            qmp.query_status()
        });
        qmp.take_events();
        let state = match &stopped {
            Ok(state) => state.clone(),
            Err(_) => run_state.clone(),
        };
        let guest = StoppedGuest {
            qmp,
            description,
            settings,
            before: run_state,
            stopped: state,
            is_migrated: false,
            lacks_disks: false,
            lock,
            was_running,
            then: self.then,
            guardian: self.guardian,
        };
        match stopped {
            Ok(_) => Ok(guest),
            Err(error) => Err(guest.put_back(error.into())),
        }
    }
}

/// A guest that was stopped to be saved, with its guardian.
pub struct StoppedGuest {
    qmp: QmpClient,
    description: Description,
    settings: SavedSettings,
    before: RunState,
    /// What QEMU calls its state since it was stopped.
    stopped: RunState,
    /// Whether its state is taken by a migration.
    is_migrated: bool,
    /// Whether QEMU was told, without a migration, to let go of the guest's disks.
    lacks_disks: bool,
    lock: Option<ProcessLock>,
    was_running: bool,
    then: Then,
    guardian: Guardian,
}

impl StoppedGuest {
    /// Its QEMU's monitor.
    pub fn qmp(&mut self) -> &mut QmpClient {
        &mut self.qmp
    }

    /// QEMU is about to let go of the guest's disks; only `cont` takes them back.
    pub fn gives_up_disks(&mut self) {
        self.lacks_disks = true;
    }

    /// Whether no other saver can be at work: QEMU itself keeps two migrations apart, but not two who read its memory.
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }

    /// What QEMU calls the guest's state since it was stopped and before it was migrated.
    pub fn state_when_stopped(&self) -> &RunState {
        &self.stopped
    }

    /// Lets QEMU write its migration stream into a pipe; gives the pipe's other end.
    pub fn start_migration<'a>(
        &mut self,
        timeout: Option<Duration>,
        progress: &'a dyn Progress,
    ) -> Result<GuestStream<'a>> {
        self.is_migrated = true;
        begin_migration(&mut self.qmp, StreamPipe::new()?, timeout, progress)
    }

    /// Whether QEMU says that all was written, and nobody started the guest meanwhile.
    pub fn confirm_completed(&mut self) -> Result<()> {
        let info = settled_migration(&mut self.qmp)?;
        if info.0 != MigrationStatus::Completed {
            return Err(SaveError::MigrationFailed {
                status: info.0.to_string(),
                words: info.1,
            }
            .into());
        }
        self.confirm_stopped()
    }

    /// Whether nobody started or migrated the guest since it was stopped: what it did then is in no image.
    pub fn confirm_stopped(&mut self) -> Result<()> {
        self.qmp.poll_events()?;
        let resumed = self
            .qmp
            .take_events()
            .iter()
            .any(|event| event.name == "RESUME");
        if resumed {
            return Err(SaveError::Resumed.into());
        }
        match self.is_migrated {
            true => self.confirm_migrated(),
            false => self.confirm_untouched(),
        }
    }

    fn confirm_migrated(&mut self) -> Result<()> {
        let deadline = Instant::now() + SETTLE;
        loop {
            match self.qmp.query_status()? {
                RunState::Postmigrate => return Ok(()),
                RunState::FinishMigrate if Instant::now() < deadline => pause(),
                _ => return Err(SaveError::Resumed.into()),
            }
        }
    }

    fn confirm_untouched(&mut self) -> Result<()> {
        let is_migrating = self.qmp.query_migrate()?.status.is_active();
        match self.qmp.query_status()? {
            state if state == self.stopped && !is_migrating => Ok(()),
            RunState::Running => Err(SaveError::Resumed.into()),
            _ => Err(SaveError::MigratedElsewhere.into()),
        }
    }

    /// Lets a guest run on that ran before; one that did not stays stopped.
    fn resume(&mut self) -> Result<(), QmpError> {
        if self.was_running {
            self.qmp.cont()
        } else {
            Ok(())
        }
    }
}

impl Subject for StoppedGuest {
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
        let (encoded, is_direct) =
            self.take_state(request.capture, image, encoding, request.timeout, progress)?;
        Ok((encoded, if is_direct { "memory" } else { "migration" }))
    }

    fn confirm(&mut self) -> Result<()> {
        self.confirm_stopped()
    }

    /// Puts the guest back as it was and wraps `why` into the news of how it was left.
    ///
    /// What we cannot do the guardian tries again; it is waited for.
    fn put_back(mut self, why: Error) -> Error {
        let outcome = put_back(&mut self.qmp, &self.settings, self.was_running);
        let is_resting = matches!(outcome, Ok(RunState::Postmigrate));
        let lacks_disks = self.lacks_disks && !self.was_running;
        let StoppedGuest {
            qmp,
            description,
            before,
            guardian,
            ..
        } = self;
        // QEMU serves one client at a time, and the guardian may be the next.
        drop(qmp);
        let settled = guardian.settle(outcome.is_ok() || description.is_gone());
        let left = match settled {
            true if description.is_gone() => GuestLeft::Gone,
            true if is_resting && before != RunState::Postmigrate => GuestLeft::Resting,
            true if lacks_disks => GuestLeft::WithoutDisks(before),
            true => GuestLeft::AsBefore(before),
            false => GuestLeft::Unknown,
        };
        let guest = description.name;
        SaveError::NotSaved { guest, left, why }.into()
    }

    fn guardian(&mut self) -> &mut Guardian {
        &mut self.guardian
    }

    /// Leaves the guest stopped, since its image may be whole; somebody may let it run on, so it gets its settings back.
    fn leave(mut self, source: io::Error) -> Error {
        // The news is that the guest is stopped.
        let _ = self.settings.put_back(&mut self.qmp);
        let _ = self.guardian.stand_down();
        SaveError::PublishUnknown {
            guest: self.description.name,
            source,
        }
        .into()
    }

    /// Does with the guest what was asked for after the save; tells what became of it.
    fn finish(mut self) -> Result<Finished> {
        let (act, done) = match self.then {
            Then::Quit => ("quit", self.qmp.quit()),
            Then::Resume => {
                let back = self.settings.put_back(&mut self.qmp);
                ("let the guest run on", back.and_then(|()| self.resume()))
            }
            Then::Pause => (
                "take its settings back",
                self.settings.put_back(&mut self.qmp),
            ),
        };
        let StoppedGuest {
            qmp,
            description,
            guardian,
            ..
        } = self;
        drop(qmp);
        match done {
            Ok(()) => drop(guardian.stand_down()),
            // The guardian knows that the image is published, and tries again.
            Err(source) if !guardian.abandon().is_ok_and(|it| it.success()) => {
                let guest = description.name;
                return Err(SaveError::Then { guest, act, source }.into());
            }
            Err(_) => {}
        }
        if self.then == Then::Quit {
            description.wait_until_gone(SETTLE);
        }
        Ok(Finished::as_state(match self.then {
            Then::Quit if !description.is_gone() => "quitting",
            Then::Quit => "quit",
            Then::Resume if self.was_running => "running",
            Then::Resume | Then::Pause => "stopped",
        }))
    }
}

/// A pipe for QEMU's migration stream.
pub(super) struct StreamPipe {
    ours: OwnedFd,
    qemus: OwnedFd,
}

impl StreamPipe {
    fn new() -> Result<Self> {
        let error = |source: rustix::io::Errno| PipelineError::Read(source.into());
        let (ours, qemus) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(error)?;
        // A larger pipe costs QEMU fewer waits; the default one works too.
        let _ = rustix::pipe::fcntl_setpipe_size(&ours, PIPE_LEN);
        Ok(StreamPipe { ours, qemus })
    }

    /// The end to read from, once more.
    pub(super) fn copy(&self) -> Result<OwnedFd> {
        Ok(self.ours.try_clone().map_err(PipelineError::Read)?)
    }
}

/// Lets QEMU write its migration stream into a pipe; gives the pipe's other end.
pub(super) fn begin_migration<'a>(
    qmp: &mut QmpClient,
    pipe: StreamPipe,
    timeout: Option<Duration>,
    progress: &'a dyn Progress,
) -> Result<GuestStream<'a>> {
    let StreamPipe { ours, qemus } = pipe;
    qmp.getfd(STREAM_NAME, qemus.as_fd())?;
    drop(qemus);
    qmp.migrate(&format!("fd:{STREAM_NAME}"))?;
    let deadline = timeout.map(|limit| (Instant::now() + limit, limit));
    Ok(GuestStream {
        pipe: File::from(ours),
        is_ended: false,
        deadline,
        progress,
    })
}

/// Waits until the migration is over: its status, and QEMU's words if it failed.
pub(super) fn settled_migration(
    qmp: &mut QmpClient,
) -> Result<(MigrationStatus, Option<String>), QmpError> {
    let deadline = Instant::now() + SETTLE;
    loop {
        let info = qmp.query_migrate()?;
        if !info.status.is_active() || Instant::now() > deadline {
            return Ok((info.status, info.error_desc));
        }
        pause();
    }
}

/// What QEMU says of a stream that it broke off; our own error where it has nothing to say.
pub(super) fn explain(qmp: &mut QmpClient, error: PipelineError, stream: GuestStream<'_>) -> Error {
    let is_cut_by_qemu = stream.is_ended && matches!(error, PipelineError::Stream(_));
    if stream.progress.is_cancelled() {
        return PipelineError::Cancelled.into();
    }
    let timed_out = stream.timed_out();
    drop(stream);
    if let Some(limit) = timed_out {
        return SaveError::TimedOut { limit }.into();
    }
    if !is_cut_by_qemu {
        return error.into();
    }
    match settled_migration(qmp) {
        Ok((MigrationStatus::Completed, _)) => error.into(),
        Ok((status, words)) => SaveError::MigrationFailed {
            status: status.to_string(),
            words,
        }
        .into(),
        Err(gone) if gone.is_gone() => SaveError::QemuEnded.into(),
        Err(_) => error.into(),
    }
}

fn pause() {
    std::thread::sleep(Duration::from_millis(5));
}

/// QEMU's migration stream, as it comes out of the pipe. Reading ends early when the user cancels or time is up.
pub struct GuestStream<'a> {
    pipe: File,
    /// Whether QEMU has closed its end.
    is_ended: bool,
    deadline: Option<(Instant, Duration)>,
    progress: &'a dyn Progress,
}

impl GuestStream<'_> {
    /// The limit that was passed, if it was.
    fn timed_out(&self) -> Option<Duration> {
        self.deadline
            .filter(|(at, _)| Instant::now() >= *at)
            .map(|(_, limit)| limit)
    }
}

impl Read for GuestStream<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        const TICK: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        loop {
            if self.progress.is_cancelled() {
                return Err(io::Error::other("interrupted"));
            }
            if self.timed_out().is_some() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut ready = [PollFd::new(&self.pipe, PollFlags::IN)];
            match poll(&mut ready, Some(&TICK)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {
                    let len = self.pipe.read(buf)?;
                    self.is_ended = len == 0 && !buf.is_empty();
                    return Ok(len);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The two ends of a new pipe, for tests of what reads a guest's stream.
#[cfg(test)]
fn test_pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    #[test]
    fn a_stream_that_stands_still_ends_with_its_deadline() {
        let (ours, _qemus) = test_pipe();
        let limit = Duration::from_millis(50);
        let deadline = Some((Instant::now() + limit, limit));
        let mut stream = GuestStream {
            pipe: File::from(ours),
            is_ended: false,
            deadline,
            progress: &Silent,
        };
        let error = stream.read(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(stream.timed_out(), Some(limit));
    }
}
