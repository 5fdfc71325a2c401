//! A guest whose RAM is a private mapping of its image: QEMU is fed what cannot be mapped, and the image is verified
//! before it runs, or while it does.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use jiff::Timestamp;

use super::RestoreError;
use super::incoming::{Feeder, Given, Way};
use crate::config::mapped_memory::BlockInFile;
use crate::container::{Image, Layout};
use crate::error::{Error, Result};
use crate::host::ProcessId;
use crate::image::OpenedImage;
use crate::pipeline::{self, MappedImage, PipelineError};
use crate::progress::Progress;
use crate::qmp::QmpClient;
use crate::store::{AnyFile, Location, StoreError};
use crate::supervise::{self, Damage, RunningGuest, Verification, WaitingVerifier};

/// Whether and when all of an image is verified from which memory is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    /// Before the guest runs.
    Full,
    /// While it runs; it is frozen if something is wrong.
    Background,
    /// Never: only what QEMU is fed.
    Quick,
}

impl Verify {
    /// As the user says it.
    pub fn word(self) -> &'static str {
        match self {
            Verify::Full => "full",
            Verify::Background => "background",
            Verify::Quick => "quick",
        }
    }
}

/// An image from which memory is to be mapped.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// When it is verified.
    pub verify: Verify,
    /// The program that has the verifier in it: this one.
    program: PathBuf,
    /// Its RAMBlocks.
    pub(super) blocks: Vec<BlockInFile>,
}

impl Mapping {
    /// Looks where memory lies in the image, and keeps others from changing it as long as it is open anywhere.
    ///
    /// # Errors
    /// [`RestoreError::NotMapped`] if it has another layout; [`StoreError`] if somebody changes
    /// it; what is wrong with it.
    pub fn of(opened: &OpenedImage, verify: Verify, program: PathBuf) -> Result<Self> {
        let image = opened.image();
        let path = match opened.location() {
            Location::Path(path) => path,
            Location::Pipe => return Err(RestoreError::MappedPipe.into()),
            far => return Err(far.refused().into()),
        };
        if image.layout() != Layout::Mapped {
            let layout = image.layout().to_string();
            return Err(RestoreError::NotMapped { layout }.into());
        }
        image.reader().lock_shared(path)?;
        let blocks = MappedImage::open(image)?.blocks.into_iter();
        let blocks = blocks.map(|block| BlockInFile {
            offset: block.pages,
            idstr: block.block.idstr,
            used_length: block.block.used_length,
        });
        Ok(Mapping {
            verify,
            program,
            blocks: blocks.collect(),
        })
    }

    /// Prepares to verify the image behind a guest that is loaded, if that was asked for.
    pub(super) fn verify_behind(
        &self,
        image: &File,
        guest: &RunningGuest,
    ) -> Result<Option<WaitingVerifier>> {
        if self.verify != Verify::Background {
            return Ok(None);
        }
        let process = guest.description().process;
        let verifier = supervise::start_verifier(&self.program, image, guest.dir(), process)?;
        Ok(Some(verifier))
    }
}

/// The image's file once more, locked against those who would change it as long as it is open anywhere.
pub fn keep_open(opened: &OpenedImage) -> Result<File> {
    if let Some(path) = opened.location().path() {
        opened.image().reader().lock_shared(path)?;
    }
    let far = || StoreError::FarAway {
        there: opened.location().to_string(),
    };
    let file = opened.image().reader().local().ok_or_else(far)?;
    let file = file.file().try_clone();
    Ok(file.map_err(|source| StoreError::File {
        act: "keep open",
        path: opened.location().to_string().into(),
        source,
    })?)
}

/// Verifies all of an image.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn verify_all(image: &Image<AnyFile>, threads: usize, progress: &dyn Progress) -> Result<()> {
    progress.begin("verifying", Some(image.stream_len()));
    image.verify_sections()?;
    let checked = pipeline::check(image, threads, progress)?;
    progress.end();
    let damaged = checked.damaged.into_iter().chain(checked.ended_by);
    match damaged.map(PipelineError::Container).next() {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

/// Feeds QEMU the stream without the pages of the RAMBlocks that it has mapped.
pub fn load(
    qmp: &mut QmpClient,
    image: &Image<AnyFile>,
    mapped_blocks: &[String],
    progress: &dyn Progress,
) -> Result<Given> {
    let mapped = MappedImage::open(image)?;
    let mut feeder = Feeder::new(qmp, progress)?;
    let mut stream_bytes = 0;
    mapped.feed_without(
        image,
        &|block| mapped_blocks.contains(&block.block.idstr),
        &mut |raw| {
            stream_bytes += raw.len() as u64;
            feeder.take(raw)
        },
    )?;
    Ok(Given {
        way: Way::Mapped,
        stream_bytes,
    })
}

/// The program's life as a verifier: reads all of the image, which fills the page cache for the guest, and freezes the guest
/// if a byte of it is wrong.
pub fn run_verifier(dir: &Path, process: ProcessId, image: i32) -> ExitCode {
    let Some(verification) = Verification::begin(dir, process, image) else {
        return ExitCode::FAILURE;
    };
    let Ok(image) = verification.image.try_clone() else {
        return ExitCode::FAILURE;
    };
    let verified = match Image::open(AnyFile::from(image)) {
        Ok(image) => verify_behind(&image, process),
        Err(error) => Err((error.into(), None)),
    };
    match verified {
        Ok(()) => ExitCode::SUCCESS,
        Err((error, _)) if is_cancelled(&error) => ExitCode::SUCCESS,
        Err((error, pages)) => {
            let damage = Damage {
                what: error.to_string(),
                at: error.at(),
                pages,
                found_at: Timestamp::now(),
            };
            // A guest that is gone needs no freezing.
            let _ = supervise::freeze(&verification.dir, process, &damage);
            ExitCode::FAILURE
        }
    }
}

fn is_cancelled(error: &Error) -> bool {
    matches!(error.downcast_ref(), Some(PipelineError::Cancelled))
}

/// Gives the first thing that is wrong, with the guest memory that it is about.
fn verify_behind(
    image: &Image<AnyFile>,
    process: ProcessId,
) -> Result<(), (Error, Option<String>)> {
    let pages = |error: &PipelineError| match error {
        PipelineError::Container(error) => image.damaged_pages(error),
        _ => None,
    };
    image
        .verify_sections()
        .map_err(|error| (error.into(), None))?;
    // The guest has the other processors.
    let threads = pipeline::default_threads().div_ceil(2);
    let looked = pipeline::examine(image, threads, &WhileAlive(process), &mut |_, raw| {
        Ok(raw.map(drop)?)
    });
    looked.map_err(|error| {
        let pages = pages(&error);
        (error.into(), pages)
    })
}

/// Goes on as long as the process lives.
struct WhileAlive(ProcessId);

impl Progress for WhileAlive {
    fn is_cancelled(&self) -> bool {
        !self.0.is_alive()
    }
}
