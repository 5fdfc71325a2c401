//! Whether an image is whole.

use serde::Serialize;

use crate::bytes::ReadAt;
use crate::container::{ContainerError, Image, Layout};
use crate::error::{Blame, Error, Result};
use crate::image::{OpenedImage, Trust};
use crate::pipeline::{self, PipelineError};
use crate::progress::Progress;
use crate::stream::{Event, Parser, RamBlock, StreamSummary};

/// How far it is looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Depth {
    /// Footer, directory, every section.
    Quick,
    /// Every byte.
    Full,
    /// Every byte, and the stream is parsed: complete, every page there.
    Deep,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct VerifyReport {
    /// The image, as it was named.
    pub image: String,
    /// How far it was looked.
    pub depth: Depth,
    /// Whether nothing is wrong.
    pub is_whole: bool,
    /// Whose it is.
    pub trust: Trust,
    /// What is wrong, in the file's order.
    pub problems: Vec<Problem>,
    /// Where the parents of a delta lie, nearest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<String>,
    /// Chunks that were read and found right.
    pub chunks: u64,
    /// Bytes of the stream that were found right.
    pub stream_bytes: u64,
    /// What the stream holds; only from a deep look.
    pub stream: Option<StreamFacts>,
}

/// One thing that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What.
    pub what: String,
    /// Where, if it has a place.
    pub at: Option<String>,
}

/// What a parsed stream holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StreamFacts {
    /// RAMBlocks and their bytes.
    pub ram_blocks: Vec<(String, u64)>,
    /// Pages with bytes.
    pub data_pages: u64,
    /// Zero pages.
    pub zero_pages: u64,
    /// Device sections: idstr and instance.
    pub devices: Vec<String>,
}

/// Verifies an image. Problems are reported, not returned as an error.
///
/// # Errors
/// The user's interruption, or a file that cannot be read at all.
pub fn verify(
    opened: &OpenedImage,
    depth: Depth,
    threads: usize,
    progress: &dyn Progress,
) -> Result<VerifyReport> {
    let image = opened.image();
    let mut problems: Vec<Problem> = Vec::new();
    if let Some(torn) = opened.torn() {
        let what = format!(
            "its last edit was cut off: {} bytes follow generation {}",
            torn.file_len - torn.valid_len,
            image.generation()
        );
        problems.push(Problem {
            what,
            at: Some(format!("file offset {:#x}", torn.valid_len)),
        });
    }
    if let Some(lack) = opened.lack() {
        let what = lack.to_string();
        let at = lack.facts();
        let at = (!at.is_empty()).then(|| at.join("; "));
        problems.push(Problem { what, at });
    }
    problems.extend(
        image
            .problems()
            .into_iter()
            .map(|error| Problem::of(&error.into())),
    );
    let mut chunks = Chunks {
        parser: (depth == Depth::Deep).then(StreamCheck::default),
        ..Chunks::default()
    };
    if depth != Depth::Quick {
        progress.begin("verifying", Some(image.stream_len()));
        let looked = chunks.look(image, depth, threads, progress);
        progress.end();
        match looked {
            Err(PipelineError::Container(_)) if !problems.is_empty() => {}
            other => other?,
        }
    }
    // What cannot be read any more is not damaged.
    if let Some(error) = image.reader().failure() {
        return Err(error);
    }
    let trust = Trust::of(image).unwrap_or_else(|error| {
        problems.push(Problem::of(&error));
        Trust::Unsigned
    });
    let stream = chunks.finish();
    problems.append(&mut chunks.problems);
    Ok(VerifyReport {
        image: opened.location().to_string(),
        depth,
        is_whole: problems.is_empty(),
        trust,
        problems,
        parents: opened.parents().iter().map(ToString::to_string).collect(),
        chunks: chunks.good,
        stream_bytes: chunks.good_bytes,
        stream,
    })
}

impl Problem {
    fn of(error: &Error) -> Self {
        Problem {
            what: error.to_string(),
            at: error.at(),
        }
    }

    /// A damaged chunk, with the guest memory that it holds.
    fn of_chunk<R: ReadAt>(error: ContainerError, image: &Image<R>) -> Self {
        let pages = image.damaged_pages(&error);
        let problem = Problem::of(&error.into());
        let at = problem.at.into_iter().chain(pages);
        Problem {
            at: at.reduce(|at, pages| format!("{at}, {pages}")),
            ..problem
        }
    }
}

/// What was found while the chunks went by.
#[derive(Default)]
struct Chunks {
    good: u64,
    good_bytes: u64,
    problems: Vec<Problem>,
    parser: Option<StreamCheck>,
}

impl Chunks {
    /// Looks at every chunk.
    fn look<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        depth: Depth,
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<(), PipelineError> {
        // Without its parent a delta has no stream.
        let lacks_parent = image.parent_id().is_some() && image.parent().is_none();
        if lacks_parent {
            self.parser = None;
        }
        if depth == Depth::Deep && image.layout() != Layout::Mapped && !lacks_parent {
            return pipeline::examine(image, threads, progress, &mut |_, raw| {
                self.visit(raw.map_err(|error| Problem::of_chunk(error, image)));
                Ok(())
            });
        }
        let checked = pipeline::check(image, threads, progress)?;
        (self.good, self.good_bytes) = (checked.good, checked.good_bytes);
        let damaged = checked.damaged.into_iter();
        self.problems = damaged
            .map(|error| Problem::of_chunk(error, image))
            .collect();
        checked.ended_by.map_or(Ok(()), Err)?;
        match depth {
            Depth::Deep if !lacks_parent => self.look_at_mapped(image, threads, progress),
            _ => Ok(()),
        }
    }

    /// Parses the stream that is made of pages in their places. With a damaged chunk there is none.
    fn look_at_mapped<R: ReadAt>(
        &mut self,
        image: &Image<R>,
        threads: usize,
        progress: &dyn Progress,
    ) -> Result<(), PipelineError> {
        if !self.problems.is_empty() {
            self.parser = None;
            return Ok(());
        }
        let decoded = pipeline::decode(image, threads, progress, &mut |raw| {
            self.parse(raw);
            Ok(())
        });
        match decoded {
            Err(PipelineError::Cancelled) => Err(PipelineError::Cancelled),
            Err(error) => {
                self.problems.push(Problem::of(&error.into()));
                self.parser = None;
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn parse(&mut self, raw: &[u8]) {
        if let Some(Err(error)) = self.parser.as_mut().map(|parser| parser.take(raw)) {
            self.problems.push(Problem::of(&error));
            self.parser = None;
        }
    }

    fn visit(&mut self, raw: Result<&[u8], Problem>) {
        match raw {
            Ok(raw) => {
                self.good += 1;
                self.good_bytes += raw.len() as u64;
                self.parse(raw);
            }
            Err(problem) => {
                self.problems.push(problem);
                // Behind a hole nothing can be parsed.
                self.parser = None;
            }
        }
    }

    fn finish(&mut self) -> Option<StreamFacts> {
        match self.parser.take()?.finish() {
            Ok(summary) => Some(StreamFacts::of(&summary)),
            Err(error) => {
                self.problems.push(Problem::of(&error));
                None
            }
        }
    }
}

/// Parses a stream that comes in pieces.
#[derive(Default)]
pub(super) struct StreamCheck {
    parser: Parser,
    rest: Vec<u8>,
    data_pages: u64,
    zero_pages: u64,
}

impl StreamCheck {
    /// Takes in the next piece.
    pub(super) fn take(&mut self, piece: &[u8]) -> Result<()> {
        self.rest.extend_from_slice(piece);
        let mut parsed = 0;
        while parsed < self.rest.len() {
            let Some(element) = self.parser.next(&self.rest[parsed..])? else {
                break;
            };
            match element.event {
                Event::Page { is_zero: true, .. } => self.zero_pages += 1,
                Event::Page { is_zero: false, .. } => self.data_pages += 1,
                Event::Framing | Event::MappedBlock { .. } | Event::DeviceState => {}
            }
            parsed += element.len;
        }
        self.rest.drain(..parsed);
        Ok(())
    }

    pub(super) fn machine_type(&self) -> Option<String> {
        self.parser.machine_type().map(str::to_owned)
    }

    /// Bytes that were parsed.
    pub(super) fn position(&self) -> u64 {
        self.parser.position().0
    }

    /// What was met so far; devices are known at the end only.
    pub(super) fn facts_so_far(&self) -> StreamFacts {
        StreamFacts {
            ram_blocks: named(self.parser.blocks()),
            data_pages: self.data_pages,
            zero_pages: self.zero_pages,
            devices: Vec::new(),
        }
    }

    pub(super) fn finish(self) -> Result<StreamSummary> {
        Ok(self.parser.finish()?)
    }
}

fn named(blocks: &[RamBlock]) -> Vec<(String, u64)> {
    let named = blocks
        .iter()
        .map(|block| (block.idstr.clone(), block.used_length));
    named.collect()
}

pub(super) fn device_name(idstr: &str, instance: u32) -> String {
    match instance {
        0 => idstr.to_owned(),
        instance => format!("{idstr} #{instance}"),
    }
}

impl StreamFacts {
    pub(super) fn of(summary: &StreamSummary) -> Self {
        StreamFacts {
            ram_blocks: named(&summary.blocks),
            data_pages: summary.data_pages,
            zero_pages: summary.zero_pages,
            devices: summary
                .sections
                .iter()
                .map(|section| device_name(&section.idstr, section.instance_id))
                .collect(),
        }
    }
}
