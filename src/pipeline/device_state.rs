//! The device state of an image, without the memory before it.

use super::PipelineError;
use super::fetch::{ChunkTable, Fetcher};
use super::mapped::MappedImage;
use crate::bytes::ReadAt;
use crate::container::{ContainerError, Image, Layout};
use crate::stream::parser::MAX_DEVICE_STATE_LEN;
use crate::stream::{Event, Parser, sections_of};
use crate::units::StreamOffset;

/// The FULL sections of all devices as they stand in the stream, without the EOF byte and the vmdescription.
///
/// `begins_at` is what the manifest says of the place; without it the stream is read from its beginning. Layout `mapped`
/// needs neither.
///
/// # Errors
/// [`PipelineError::Container`] for a damaged chunk; [`PipelineError::DeviceState`] if what is found there does not end
/// as a stream does; [`PipelineError::Stream`].
pub fn device_sections<R: ReadAt>(
    image: &Image<R>,
    begins_at: Option<u64>,
) -> Result<Vec<u8>, PipelineError> {
    let (at, region) = device_region(image, begins_at)?;
    let sections = sections_of(&region).ok_or(PipelineError::DeviceState { at })?;
    Ok(sections.to_vec())
}

/// As [`device_sections`], with the EOF byte and the vmdescription behind them, and where in the stream it begins.
///
/// # Errors
/// As [`device_sections`]; how the region ends is not looked at.
pub fn device_region<R: ReadAt>(
    image: &Image<R>,
    begins_at: Option<u64>,
) -> Result<(StreamOffset, Vec<u8>), PipelineError> {
    if image.layout() == Layout::Mapped {
        let mapped = MappedImage::open(image)?;
        let begins_at = StreamOffset(mapped.device_state_at());
        return Ok((begins_at, mapped.device_sections(image)?));
    }
    let begins_at = match begins_at {
        Some(at) => StreamOffset(at),
        None => search(image)?,
    };
    let len = image.stream_len().saturating_sub(begins_at.0);
    if len > MAX_DEVICE_STATE_LEN as u64 {
        return Err(PipelineError::DeviceState { at: begins_at });
    }
    let table = ChunkTable::new(image);
    let mut fetcher = Fetcher::default();
    let mut region = Vec::new();
    let mut chunk = image.chunk_of_stream_offset(begins_at)?;
    loop {
        let skipped = begins_at.0.saturating_sub(chunk.stream_offset.0);
        let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
        for raw in fetcher.fetch(&table, &[chunk.index])? {
            region.extend_from_slice(raw.get(skipped..).unwrap_or_default());
        }
        match image.chunk_of_stream_offset(StreamOffset(chunk.stream_end())) {
            Ok(next) => chunk = next,
            Err(ContainerError::NoSuchStreamOffset { .. }) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok((begins_at, region))
}

/// Where the device state begins, by reading all that comes before it.
fn search<R: ReadAt>(image: &Image<R>) -> Result<StreamOffset, PipelineError> {
    let table = ChunkTable::new(image);
    let mut fetcher = Fetcher::default();
    let mut parser = Parser::new();
    let mut rest = Vec::new();
    for entry in image.chunks() {
        for raw in fetcher.fetch(&table, &[entry?.index])? {
            rest.extend_from_slice(raw);
        }
        let mut parsed = 0;
        while parsed < rest.len() {
            let at = parser.position();
            let Some(element) = parser.next(&rest[parsed..])? else {
                break;
            };
            if element.event == Event::DeviceState {
                return Ok(at);
            }
            parsed += element.len;
        }
        rest.drain(..parsed);
    }
    Err(PipelineError::DeviceState {
        at: parser.position(),
    })
}
