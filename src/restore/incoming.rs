//! Gives QEMU the stream, and learns whether it took it.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;
use serde::Serialize;

use super::{Plan, RestoreError, placing};
use crate::container::{Image, Layout, PageMap};
use crate::error::{Error, Result};
use crate::host::{HostError, ProcessId, ProcessMemory};
use crate::pipeline::{self, PipedImage, PipelineError};
use crate::progress::Progress;
use crate::qmp::{MigrationStatus, QmpClient, RunState};
use crate::store::AnyFile;
use crate::stream::is_stream_start;
use crate::supervise::RunningGuest;

/// The name under which QEMU knows the pipe.
const STREAM_NAME: &str = "vmstow-stream";

/// Bytes in the pipe; what an unprivileged process may ask for.
const PIPE_LEN: usize = 1 << 20;

/// How QEMU got guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// It was written where QEMU keeps it, all but small RAMBlocks.
    Placed,
    /// QEMU read it from the stream.
    Fed,
    /// It gets it while the guest runs.
    Lazy,
    /// It is a private mapping of the image, all but small RAMBlocks.
    Mapped,
}

/// What QEMU was given.
#[derive(Debug, Clone, Copy)]
pub struct Given {
    /// How it got guest memory.
    pub way: Way,
    /// Bytes of the stream, placed or fed.
    pub stream_bytes: u64,
}

/// Gives QEMU the whole stream of an image, each chunk verified before a byte of it is used: guest memory is written
/// where QEMU keeps it if that can be done, and fed with the rest of the stream otherwise.
pub fn load(
    qmp: &mut QmpClient,
    qemu: ProcessId,
    image: &Image<AnyFile>,
    page_map: Option<&PageMap>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<Given> {
    // Where we may not look at QEMU's memory, QEMU is fed.
    let memory = ProcessMemory::open(qemu).ok();
    let placement = match (&memory, page_map) {
        // Placing takes page records apart, of which layout mapped has none.
        (Some(memory), Some(page_map)) if image.layout() != Layout::Mapped => {
            placing::placement(qmp, memory, page_map)?
        }
        _ => None,
    };
    progress.begin("restoring", Some(image.stream_len()));
    let mut feeder = Feeder::new(qmp, progress)?;
    let output = &mut |raw: &[u8]| feeder.take(raw);
    let way = match &placement {
        Some(placement) => {
            pipeline::place(image, threads, progress, placement, output)?;
            Way::Placed
        }
        None => {
            pipeline::decode(image, threads, progress, output)?;
            Way::Fed
        }
    };
    progress.end();
    Ok(Given {
        way,
        stream_bytes: image.stream_len(),
    })
}

/// Feeds the stream of an image while it arrives, and holds the image against its digests, and the disks against the
/// image, when all of it is there.
pub fn feed_from_pipe<R: Read>(
    qmp: &mut QmpClient,
    pipe: PipedImage<R>,
    plan: &Plan,
    progress: &dyn Progress,
) -> Result<Given> {
    progress.begin("restoring", None);
    let mut feeder = Feeder::new(qmp, progress)?;
    let image = pipe.decode(progress, &mut |raw| feeder.take(raw))?;
    drop(feeder);
    progress.end();
    plan.confirm(&image.manifest()?)?;
    Ok(Given {
        way: Way::Fed,
        stream_bytes: image.stream_len(),
    })
}

/// Writes a stream into a pipe that QEMU reads.
pub struct Feeder<'a> {
    qmp: &'a mut QmpClient,
    pipe: File,
    is_begun: bool,
    is_open: bool,
    progress: &'a dyn Progress,
}

impl<'a> Feeder<'a> {
    /// A feeder that QEMU has not been told of yet.
    pub fn new(qmp: &'a mut QmpClient, progress: &'a dyn Progress) -> Result<Self> {
        let error = |source: rustix::io::Errno| PipelineError::Output(source.into());
        let (qemus, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(error)?;
        // A larger pipe costs fewer waits; the default one works too.
        let _ = rustix::pipe::fcntl_setpipe_size(&ours, PIPE_LEN);
        rustix::io::ioctl_fionbio(&ours, true).map_err(error)?;
        qmp.getfd(STREAM_NAME, qemus.as_fd())?;
        let pipe = File::from(ours);
        Ok(Feeder {
            qmp,
            pipe,
            is_begun: false,
            is_open: true,
            progress,
        })
    }

    /// Gives QEMU the next bytes of the stream.
    ///
    /// QEMU hangs on an empty stream for ever, and dies of a wrong one without a word that helps: it is told to read
    /// only when there is a stream to be read.
    pub fn take(&mut self, raw: &[u8]) -> Result<(), PipelineError> {
        if !self.is_begun {
            if !is_stream_start(raw) {
                return Err(PipelineError::Output(io::Error::other(
                    RestoreError::NotAStream,
                )));
            }
            let begun = self.qmp.migrate_incoming(&format!("fd:{STREAM_NAME}"));
            begun.map_err(|error| PipelineError::Output(io::Error::other(error)))?;
            self.is_begun = true;
        }
        self.write(raw)
    }

    /// Writes all of `raw`. When QEMU has closed its end, the rest is only verified: either QEMU has all it wants, or it
    /// gave up, which its status tells.
    fn write(&mut self, mut raw: &[u8]) -> Result<(), PipelineError> {
        while self.is_open && !raw.is_empty() {
            match self.pipe.write(raw) {
                Ok(len) => raw = &raw[len..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait()?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => self.is_open = false,
                Err(error) => return Err(PipelineError::Output(error)),
            }
        }
        Ok(())
    }

    fn wait(&self) -> Result<(), PipelineError> {
        const TICK: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        if self.progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        match poll(&mut [PollFd::new(&self.pipe, PollFlags::OUT)], Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(PipelineError::Output(error.into())),
        }
    }
}

/// Waits until QEMU has loaded the stream.
pub fn confirm_completed(qmp: &mut QmpClient, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    qmp.set_timeout(timeout);
    loop {
        let status = qmp.query_migrate()?.status;
        let run_state = qmp.query_status()?;
        match (status, run_state) {
            (MigrationStatus::Completed, state) if state != RunState::Inmigrate => return Ok(()),
            (MigrationStatus::Failed, _) => return Err(RestoreError::NotLoaded.into()),
            _ if Instant::now() > deadline => {
                return Err(RestoreError::TimedOut { limit: timeout }.into());
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Ends the QEMU of a restore that failed; QEMU's own words tell more than a connection that broke.
pub fn explain(error: Error, guest: RunningGuest) -> Error {
    let name = guest.name().to_owned();
    let words = guest.last_words();
    // A QEMU that cannot be killed is told by `list`; the error that counts is the one before.
    let _ = guest.kill();
    let is_qemus_fault = error
        .downcast_ref::<crate::qmp::QmpError>()
        .is_some_and(crate::qmp::QmpError::is_gone)
        || matches!(error.downcast_ref(), Some(RestoreError::NotLoaded));
    if is_qemus_fault || is_memory_gone(&error) {
        RestoreError::QemuGaveUp { guest: name, words }.into()
    } else {
        error
    }
}

/// Whether guest memory could not be written because its process had ended.
fn is_memory_gone(error: &Error) -> bool {
    match error.downcast_ref() {
        Some(PipelineError::Place(HostError::Process { source, .. })) => {
            source.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
        }
        _ => false,
    }
}
