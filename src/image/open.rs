//! Opens images: files, pipes, and files whose last edit was cut off.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::foreign::Origin;
use super::foreign::libvirt::is_save_image;
use super::parent::{FoundParents, ParentError, find_parents};
use crate::bytes::ReadAt;
use crate::container::layout::{FRAME_MAGIC, SECTION_MAGIC};
use crate::container::{ContainerError, Image, SectionType, TornTail};
use crate::error::{Blame, Error, ErrorKind, Result};
use crate::store::{AnyFile, FarFile, FileSource, Location, open_far, spool};
use crate::stream::{Event, Parser, StreamError, is_stream_start};

/// Bytes read at a time where a file is searched.
const PIECE: u64 = 1 << 20;

/// Why a file is no image that can be read.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file is QEMU's migration stream and nothing else.
    #[error("it holds a migration stream of QEMU and nothing behind it")]
    BareStream,
    /// The file is what libvirt writes.
    #[error("it is a libvirt save image")]
    LibvirtSave,
    /// The file begins as no image does.
    #[error("it is no image of vmstow")]
    NotAnImage,
    /// A read from the file failed.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
}

impl Blame for ImageError {
    fn kind(&self) -> ErrorKind {
        match self {
            ImageError::BareStream | ImageError::LibvirtSave | ImageError::NotAnImage => {
                ErrorKind::Image
            }
            ImageError::Read(_) => ErrorKind::Failed,
        }
    }
}

/// An image, ready to be read.
#[derive(Debug)]
pub struct OpenedImage {
    image: Image<AnyFile>,
    location: Location,
    torn: Option<TornTail>,
    origin: Origin,
    problems: Vec<String>,
    parents: FoundParents,
}

impl OpenedImage {
    /// A file of others that can be read as an image; `problems` are its configuration's.
    pub(super) fn of_foreign(
        image: Image<AnyFile>,
        location: Location,
        origin: Origin,
        problems: Vec<String>,
    ) -> Self {
        OpenedImage {
            image,
            location,
            torn: None,
            origin,
            problems,
            parents: FoundParents::default(),
        }
    }

    /// An image; if it is a delta, its parents are looked for.
    fn of_image(mut image: Image<AnyFile>, location: &Location, torn: Option<TornTail>) -> Self {
        OpenedImage {
            parents: find_parents(&mut image, location),
            image,
            location: location.clone(),
            torn,
            origin: Origin::Image,
            problems: Vec::new(),
        }
    }

    /// What kind of file it is. [`open`] opens images only.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Of a file of others: why no QEMU arguments could be made of its domain XML, and what in them is not as that says.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// What can be read of it.
    pub fn image(&self) -> &Image<AnyFile> {
        &self.image
    }

    /// Where it lies.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Where the parents of a delta lie, nearest first; none if they were not found.
    pub fn parents(&self) -> &[Location] {
        &self.parents.places
    }

    /// Why the parents of a delta are not there.
    pub fn lack(&self) -> Option<&ParentError> {
        self.parents.lack.as_ref()
    }

    /// The image, if all is there that it needs.
    ///
    /// # Errors
    /// [`ParentError`].
    pub fn whole(self) -> Result<Self> {
        match self.lack() {
            Some(lack) => Err(lack.clone().into()),
            None => Ok(self),
        }
    }

    /// What follows its last whole generation, if its last edit was cut off.
    pub fn torn(&self) -> Option<&TornTail> {
        self.torn.as_ref()
    }
}

/// Opens the image at `location`; `-` is standard input.
///
/// Where the last edit was cut off, the generation before it is opened.
///
/// # Errors
/// What is wrong with the footer or the directory, [`ImageError::BareStream`], or what the file system says;
/// [`ParentError`] for a delta without its parent.
pub fn open(location: &Location) -> Result<OpenedImage> {
    open_alone(location)?.whole()
}

/// As [`open`]; a delta may lack its parent, so that its chunks cannot be read.
///
/// # Errors
/// As [`open`], but for [`ParentError`].
pub fn open_alone(location: &Location) -> Result<OpenedImage> {
    match location {
        Location::Path(path) => open_source(FileSource::open(path)?, location),
        Location::Pipe => {
            let spooled = spool(&mut io::stdin().lock(), &std::env::temp_dir())?;
            open_source(spooled, location)
        }
        far => of_far(open_far(far)?, location),
    }
}

/// Opens an image that somebody elsewhere lets us read. A delta's parent is not offered.
///
/// # Errors
/// As [`open_alone`].
pub fn open_offered(file: Arc<dyn FarFile>) -> Result<OpenedImage> {
    of_far(file, &Location::Pipe)
}

/// As [`open_source`], but for torn edits: finding their beginning takes all of the file.
fn of_far(file: Arc<dyn FarFile>, location: &Location) -> Result<OpenedImage> {
    match Image::open(AnyFile::Far(Arc::clone(&file))) {
        Ok(image) => Ok(OpenedImage::of_image(image, location, None)),
        Err(error) => {
            let mut beginning = [0; 16];
            let len = usize::try_from(file.len().min(16)).unwrap_or(16);
            let read = file.read_exact_at(&mut beginning[..len], 0);
            read.map_err(|error| file.failure().unwrap_or(ImageError::Read(error).into()))?;
            Err(better(error, &beginning[..len]))
        }
    }
}

/// Opens an image that comes through a pipe: it is spooled into the directory for temporary files.
///
/// # Errors
/// As [`open`].
pub fn open_pipe(pipe: &mut dyn Read) -> Result<OpenedImage> {
    open_source(spool(pipe, &std::env::temp_dir())?, &Location::Pipe)?.whole()
}

/// As [`open_alone`], of an open file.
pub(super) fn open_source(source: FileSource, location: &Location) -> Result<OpenedImage> {
    let copy = source.file().try_clone().map_err(ImageError::Read)?;
    match Image::open(AnyFile::from(source)) {
        Ok(image) => Ok(OpenedImage::of_image(image, location, None)),
        Err(error) if may_be_torn(&error) => {
            let beginning = beginning(&copy)?;
            open_torn(copy, location).map_err(|_| better(error, &beginning))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether the file just ends at a place where no image ends; damage and newer formats are no torn edit.
fn may_be_torn(error: &ContainerError) -> bool {
    match error {
        ContainerError::NoFooter { .. } | ContainerError::TooShort { .. } => true,
        ContainerError::WrongField { section, field, .. } => {
            *section == SectionType::Footer && *field == "SELF_OFFSET"
        }
        _ => false,
    }
}

/// The generation before a torn edit.
fn open_torn(file: File, location: &Location) -> Result<OpenedImage> {
    let source = FileSource::from(file);
    let payload_end = stream_end(&source)?;
    let (image, torn) = Image::open_torn(AnyFile::from(source), payload_end)?;
    Ok(OpenedImage::of_image(image, location, Some(torn)))
}

/// Where the stream ends with which the file begins; `None` if it begins otherwise.
///
/// Device state has no lengths of its own. So a section's beginning behind the RAM is taken for the stream's end only
/// if the stream up to there parses to its last byte.
fn stream_end(source: &FileSource) -> Result<Option<u64>> {
    let mut magic = [0; 8];
    let len = usize::try_from(source.len().min(8)).unwrap_or(8);
    source
        .read_exact_at(&mut magic[..len], 0)
        .map_err(ImageError::Read)?;
    if !is_stream_start(&magic) {
        return Ok(None);
    }
    let mut layout: fn() -> Parser = Parser::new;
    let device_state = match scan(source, source.len(), layout()) {
        Err(error) if is_mapped_ram(&error) => {
            layout = Parser::mapped_ram;
            scan(source, source.len(), layout())?.0
        }
        other => other?.0,
    };
    let mut candidate = device_state;
    while let Some(at) = next_section(source, candidate)? {
        if scan(source, at, layout())?.1.finish().is_ok() {
            return Ok(Some(at));
        }
        candidate = at + 1;
    }
    Ok(None)
}

fn is_mapped_ram(error: &Error) -> bool {
    matches!(error.downcast_ref(), Some(StreamError::MappedRam { .. }))
}

/// Parses the first `len` bytes; gives where device state begins, or where parsing stopped, and the parser.
fn scan(source: &FileSource, len: u64, mut parser: Parser) -> Result<(u64, Parser)> {
    let mut device_state = None;
    let mut rest: Vec<u8> = Vec::new();
    let mut read = 0;
    while read < len {
        let piece = usize::try_from((len - read).min(PIECE)).unwrap_or(0);
        let start = rest.len();
        rest.resize(start + piece, 0);
        source
            .read_exact_at(&mut rest[start..], read)
            .map_err(ImageError::Read)?;
        read += piece as u64;
        let mut parsed = 0;
        while parsed < rest.len() {
            let position = parser.position().0;
            let Some(element) = parser.next(&rest[parsed..])? else {
                break;
            };
            if matches!(element.event, Event::DeviceState) {
                device_state.get_or_insert(position);
                if len == source.len() {
                    return Ok((position, parser));
                }
            }
            parsed += element.len;
            if matches!(element.event, Event::MappedBlock { .. }) {
                // What follows lies behind the block's pages.
                read = parser.position().0;
                parsed = rest.len();
            }
        }
        rest.drain(..parsed);
    }
    Ok((device_state.unwrap_or(parser.position().0), parser))
}

/// The next place from `start` on where a section seems to begin.
fn next_section(source: &FileSource, start: u64) -> Result<Option<u64>> {
    let magic = [FRAME_MAGIC.as_slice(), &[0; 4], SECTION_MAGIC.as_slice()].concat();
    let is_section = |window: &[u8]| window[..4] == magic[..4] && window[8..16] == magic[8..16];
    let mut at = start;
    let mut buf = Vec::new();
    loop {
        // A hole holds no section, however long it takes to read it.
        at = source.next_data(at).map_err(ImageError::Read)?.max(at);
        if at.saturating_add(16) > source.len() {
            return Ok(None);
        }
        let piece = usize::try_from((source.len() - at).min(PIECE)).unwrap_or(0);
        buf.resize(piece, 0);
        source
            .read_exact_at(&mut buf, at)
            .map_err(ImageError::Read)?;
        if let Some(found) = buf.windows(16).position(is_section) {
            return Ok(Some(at + found as u64));
        }
        at += (piece - 15) as u64;
    }
}

/// The first 16 bytes, or as many as there are.
fn beginning(file: &File) -> Result<Vec<u8>> {
    let mut bytes = [0; 16];
    let mut len = 0;
    while len < bytes.len() {
        match file.read_at(&mut bytes[len..], len as u64) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ImageError::Read(error).into()),
        }
    }
    Ok(bytes[..len].to_vec())
}

/// Says more than "no footer" where the file's beginning tells more.
fn better(error: ContainerError, beginning: &[u8]) -> Error {
    let is_without_end = matches!(
        error,
        ContainerError::NoFooter { .. } | ContainerError::TooShort { .. }
    );
    if !is_without_end {
        error.into()
    } else if is_stream_start(beginning) {
        ImageError::BareStream.into()
    } else if is_save_image(beginning) {
        ImageError::LibvirtSave.into()
    } else if begins_as_image(beginning) {
        error.into()
    } else {
        ImageError::NotAnImage.into()
    }
}

/// Whether these bytes, or what may follow so few, begin an image of the layout `zstd`.
fn begins_as_image(beginning: &[u8]) -> bool {
    let agrees = |expected: &[u8], at: usize| {
        let found = beginning.get(at..).unwrap_or_default();
        found
            .iter()
            .zip(expected)
            .all(|(found, expected)| found == expected)
    };
    agrees(&FRAME_MAGIC, 0) && agrees(&SECTION_MAGIC, 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(bytes: &[u8]) -> Error {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        open(&Location::Path(path)).unwrap_err()
    }

    #[test]
    fn only_what_begins_as_an_image_is_called_an_incomplete_one() {
        let head = [
            FRAME_MAGIC.as_slice(),
            &[9, 0, 0, 0],
            SECTION_MAGIC.as_slice(),
        ]
        .concat();
        for incomplete in [
            b"".as_slice(),
            &head[..1],
            &head[..10],
            &[head.as_slice(), &[0; 900]].concat(),
        ] {
            let error = opened(incomplete);
            assert!(error.downcast_ref::<ContainerError>().is_some(), "{error}");
        }
        for other in [
            b"x".as_slice(),
            b"\xff\xd8\xff\xe0",
            &[0; 4096],
            &[0x28, 0xb5, 0x2f, 0xfd],
        ] {
            let error = opened(other);
            assert!(
                matches!(error.downcast_ref(), Some(ImageError::NotAnImage)),
                "{error}"
            );
        }
        let error = opened(b"QEVM\0\0\0\x03");
        assert!(
            matches!(error.downcast_ref(), Some(ImageError::BareStream)),
            "{error}"
        );
    }
}
