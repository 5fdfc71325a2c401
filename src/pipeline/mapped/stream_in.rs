//! A migration stream → pages in their places: parsed on the caller's thread as it arrives.

use std::io::Read;

use super::places::{Placed, Places};
use crate::bytes::{ReadAt, WriteAt};
use crate::container::{Image, ImageWriter};
use crate::pipeline::{DEFAULT_CHUNK_LEN, Encoded, Encoding, PipelineError, decode};
use crate::progress::{Progress, Silent};
use crate::stream::writer::unused_section;
use crate::stream::{Element, Event, Parser};
use crate::units::PAGE_LEN;

/// Bytes read at a time.
const READ_LEN: usize = 1 << 20;

/// Reads `stream` to its end and puts it into an image of layout `mapped`; as [`encode()`](crate::pipeline::encode()).
///
/// # Errors
/// [`PipelineError::NoPlaces`] if the image goes to a pipe; the first that any thread met otherwise.
pub fn encode(
    stream: &mut dyn Read,
    image: &mut ImageWriter<'_>,
    encoding: &Encoding,
    progress: &dyn Progress,
) -> Result<Encoded, PipelineError> {
    let target = image.places().ok_or(PipelineError::NoPlaces)?;
    let mut reader = StreamIn::new(target, 0, encoding.chunk_len, progress);
    let mut bytes = Vec::new();
    loop {
        let start = bytes.len();
        bytes.resize(start + READ_LEN, 0);
        let read = read_some(stream, &mut bytes[start..])?;
        bytes.truncate(start + read);
        if read == 0 {
            break;
        }
        if progress.is_cancelled() {
            return Err(PipelineError::Cancelled);
        }
        let parsed = reader.take(&bytes)?;
        bytes.drain(..parsed);
    }
    let sealed = reader.finish(encoding)?;
    sealed.place(image)
}

/// Writes the stream of `image`, each chunk verified, to a file of the mapped-ram layout, in which it begins at `start`.
/// Gives where it ends.
///
/// # Errors
/// [`PipelineError::Container`] for the first damaged chunk, or what cannot be written; [`PipelineError::Cancelled`].
pub fn unpack<R: ReadAt>(
    image: &Image<R>,
    target: &dyn WriteAt,
    start: u64,
    threads: usize,
    progress: &dyn Progress,
) -> Result<u64, PipelineError> {
    let mut reader = StreamIn::new(target, start, DEFAULT_CHUNK_LEN, &Silent);
    let mut rest: Vec<u8> = Vec::new();
    decode(image, threads, progress, &mut |raw| {
        rest.extend_from_slice(raw);
        let parsed = reader.take(&rest)?;
        rest.drain(..parsed);
        Ok(())
    })?;
    let (placed, device_sections) = reader.placed()?;
    placed.write_framing(&device_sections)
}

fn read_some(stream: &mut dyn Read, buf: &mut [u8]) -> Result<usize, PipelineError> {
    loop {
        match stream.read(buf) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            read => return read.map_err(PipelineError::Read),
        }
    }
}

/// Pages that follow each other.
#[derive(Default)]
struct Run {
    block: usize,
    first_page: u64,
    bytes: Vec<u8>,
}

struct StreamIn<'a> {
    target: &'a dyn WriteAt,
    start: u64,
    parser: Parser,
    /// Known with the list of RAMBlocks.
    places: Option<Places<'a>>,
    run: Run,
    most_pages: usize,
    device_sections: Vec<u8>,
    progress: &'a dyn Progress,
}

impl<'a> StreamIn<'a> {
    fn new(
        target: &'a dyn WriteAt,
        start: u64,
        run_len: usize,
        progress: &'a dyn Progress,
    ) -> Self {
        StreamIn {
            target,
            start,
            parser: Parser::new(),
            places: None,
            run: Run::default(),
            most_pages: (run_len / PAGE_LEN).max(1),
            device_sections: Vec::new(),
            progress,
        }
    }

    /// Takes in what can be parsed; gives how many bytes that were.
    fn take(&mut self, bytes: &[u8]) -> Result<usize, PipelineError> {
        let mut parsed = 0;
        let mut pages = 0;
        while parsed < bytes.len() {
            let Some(element) = self.parser.next(&bytes[parsed..])? else {
                break;
            };
            let end = parsed + element.len;
            pages += u64::from(matches!(element.event, Event::Page { .. }));
            self.take_element(&element, &bytes[parsed..end])?;
            parsed = end;
        }
        self.progress.advance(pages * PAGE_LEN as u64);
        Ok(parsed)
    }

    fn take_element(&mut self, element: &Element, bytes: &[u8]) -> Result<(), PipelineError> {
        match element.event {
            Event::Framing | Event::MappedBlock { .. } => {}
            Event::DeviceState => self.device_sections.extend_from_slice(bytes),
            Event::Page {
                block,
                page,
                is_zero: true,
                ..
            } => {
                self.flush()?;
                self.places()?.clear(block, page.0)?;
            }
            Event::Page {
                block, page, body, ..
            } => {
                let next = self.run.first_page + (self.run.bytes.len() / PAGE_LEN) as u64;
                let goes_on = (self.run.block, next) == (block, page.0);
                if !goes_on || self.run.bytes.len() >= self.most_pages * PAGE_LEN {
                    self.flush()?;
                    (self.run.block, self.run.first_page) = (block, page.0);
                }
                self.run.bytes.extend_from_slice(&bytes[body..]);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), PipelineError> {
        if self.run.bytes.is_empty() {
            return Ok(());
        }
        let run = std::mem::take(&mut self.run);
        let is_touched = vec![true; run.bytes.len() / PAGE_LEN];
        self.places()?
            .put(run.block, run.first_page, &run.bytes, &is_touched)?;
        self.run.bytes = run.bytes;
        self.run.bytes.clear();
        Ok(())
    }

    fn places(&mut self) -> Result<&Places<'a>, PipelineError> {
        if self.places.is_none() {
            let blocks = self.parser.blocks().to_vec();
            let machine_type = self.parser.machine_type();
            // A guest of such an old machine type has no place for the capability.
            let machine_type = machine_type.ok_or(PipelineError::NoConfiguration)?;
            self.places = Some(Places::new(self.target, self.start, machine_type, blocks));
        }
        self.places.as_ref().ok_or(PipelineError::Worker)
    }

    fn finish(self, encoding: &Encoding) -> Result<super::seal::SealedPayload, PipelineError> {
        let progress = self.progress;
        let (placed, device_sections) = self.placed()?;
        placed.seal(&device_sections, encoding, progress)
    }

    /// All pages in their places, and the device sections.
    fn placed(mut self) -> Result<(Placed<'a>, Vec<u8>), PipelineError> {
        self.flush()?;
        self.places()?;
        self.parser.finish()?;
        let places = self.places.ok_or(PipelineError::Worker)?;
        let placed = places.finish(unused_section(&self.device_sections));
        Ok((placed, self.device_sections))
    }
}
