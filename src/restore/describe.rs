//! What QEMU says of the devices whose state an image holds.
//!
//! A state that was taken from QEMU's memory comes without a description, and only a QEMU that has devices in just that
//! state can write one: which fields there are, and how many, follows from what they hold. So the image is restored into
//! a paused guest of its own, cut off from everything and on throwaway overlays; that one is migrated into a pipe, at
//! whose end its description stands. Nothing else of that stream is used, and the guest is ended.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;
use serde_json::json;

use super::{Origin, Plan, RestoreError, incoming, restore};
use crate::error::Result;
use crate::image::OpenedImage;
use crate::pipeline::PipelineError;
use crate::progress::Progress;
use crate::stream::Parser;
use crate::supervise::RunningGuest;

/// The name under which QEMU knows the pipe.
const PIPE_NAME: &str = "vmstow-description";

/// Bytes read at a time, and in the pipe; what an unprivileged process may ask for.
const PIECE_LEN: usize = 1 << 20;

/// The description of the devices in an image, QEMU's JSON, by the plan of a clone that stays paused.
///
/// # Errors
/// As [`restore()`]; [`RestoreError::NotDescribed`] if QEMU wrote none. No guest is left.
pub fn describe_devices(
    plan: &Plan,
    image: OpenedImage,
    progress: &dyn Progress,
) -> Result<String> {
    let origin: Origin<io::Empty> = Origin::Image(Box::new(image));
    let (_, mut guest) = restore(plan, origin, progress)?;
    match describe(plan, &mut guest, progress) {
        Ok(description) => {
            guest.kill()?;
            Ok(description)
        }
        Err(error) => Err(incoming::explain(error, guest)),
    }
}

fn describe(plan: &Plan, guest: &mut RunningGuest, progress: &dyn Progress) -> Result<String> {
    let mut qmp = guest.wait_qmp(plan.timeout())?;
    let failed = |source: rustix::io::Errno| PipelineError::Read(source.into());
    let (ours, qemus) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
    // A larger pipe costs fewer waits; the default one works too.
    let _ = rustix::pipe::fcntl_setpipe_size(&ours, PIECE_LEN);
    rustix::io::ioctl_fionbio(&ours, true).map_err(failed)?;
    qmp.set_parameters(json!({ "max-bandwidth": 0 }))?;
    qmp.getfd(PIPE_NAME, qemus.as_fd())?;
    drop(qemus);
    qmp.migrate(&format!("fd:{PIPE_NAME}"))?;
    progress.begin("describing", None);
    let parser = parse(File::from(ours), progress);
    progress.end();
    let not_described = || RestoreError::NotDescribed {
        guest: guest.name().to_owned(),
    };
    let description = parser?.finish()?.vmdescription;
    Ok(description.ok_or_else(not_described)?.json)
}

/// Parses what comes until its writer closes the pipe.
fn parse(mut pipe: File, progress: &dyn Progress) -> Result<Parser> {
    let mut parser = Parser::new();
    let mut piece = vec![0; PIECE_LEN];
    let mut rest: Vec<u8> = Vec::new();
    loop {
        match pipe.read(&mut piece) {
            Ok(0) => return Ok(parser),
            Ok(len) => {
                rest.extend_from_slice(&piece[..len]);
                progress.advance(len as u64);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait(&pipe, progress)?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(PipelineError::Read(error).into()),
        }
        let mut parsed = 0;
        while parsed < rest.len()
            && let Some(element) = parser.next(&rest[parsed..])?
        {
            parsed += element.len;
        }
        rest.drain(..parsed);
    }
}

fn wait(pipe: &File, progress: &dyn Progress) -> Result<(), PipelineError> {
    const TICK: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 100_000_000,
    };
    if progress.is_cancelled() {
        return Err(PipelineError::Cancelled);
    }
    match poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&TICK)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(PipelineError::Read(error.into())),
    }
}
