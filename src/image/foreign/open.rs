//! Opens files of others as images.
//!
//! What is stored uncompressed in a file becomes the payload of an image as it lies there: it is read once, and what an
//! image has behind its payload is kept in memory. A compressed stream is stored as chunks in a nameless temporary file,
//! compressed anew. Either way the digests are those of what was found at this moment: they prove nothing of the time before.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use super::describe::{Described, Known, describe, name_of_file};
use super::error::ForeignError;
use super::libvirt::is_save_image;
use super::origin::{LibvirtSave, Origin};
use super::source::ForeignFile;
use crate::bytes::{PublishError, ReadAt, Sink};
use crate::container::layout::FRAME_MAGIC;
use crate::container::{Head, Identity, Image, ImageWriter, Layout, SectionType};
use crate::error::{Error, Result};
use crate::image::open::{ImageError, OpenedImage, open_alone, open_source};
use crate::pipeline::{self, Encoded, Encoding, FoundMapped, PipelineError};
use crate::progress::Progress;
use crate::store::{AnyFile, FileSource, Location, Surroundings, spool};

/// zstd's level for what is kept for the time being.
const TEMPORARY_LEVEL: i32 = 1;

/// Opens an image, or what QEMU or libvirt wrote as if it were one: a bare migration stream, also of the mapped-ram layout or
/// compressed; a libvirt save image of any format. `-` is standard input.
///
/// A file of others is read to its end. [`OpenedImage::origin`] tells what it was; it has no signature, and its digests are
/// those of what was read now.
///
/// # Errors
/// As [`crate::image::open()`]; [`ForeignError`]; what is wrong with the stream.
pub fn open_any(location: &Location, progress: &dyn Progress) -> Result<OpenedImage> {
    match find(location)? {
        Found::Image(opened) => opened.whole(),
        Found::Foreign(foreign) => foreign.open(location, progress),
    }
}

/// What a location holds.
pub enum Found {
    /// An image, see [`OpenedImage::whole`].
    Image(Box<OpenedImage>),
    /// A file of others.
    Foreign(Box<ForeignFile>),
}

/// Finds out what a location holds; an image may lack its parent. Of a file of others only the beginning is read, unless it comes through a pipe and is no
/// libvirt save image: then it is spooled first.
///
/// # Errors
/// As [`open_any`].
pub fn find(location: &Location) -> Result<Found> {
    let (file, image) = match location {
        Location::Path(path) => {
            let source = FileSource::open(path)?;
            let mut beginning = [0; 16];
            let len = usize::try_from(source.len().min(16)).unwrap_or(16);
            source
                .read_exact_at(&mut beginning[..len], 0)
                .map_err(ForeignError::Read)?;
            let file = source.file().try_clone().map_err(ForeignError::Read)?;
            match is_save_image(&beginning) {
                true => return found(file),
                false => (file, open_alone(location)),
            }
        }
        Location::Pipe => {
            let pipe = io::stdin().as_fd().try_clone_to_owned();
            let mut pipe = File::from(pipe.map_err(ForeignError::Read)?);
            let mut beginning = Vec::new();
            let read = Read::by_ref(&mut pipe).take(16).read_to_end(&mut beginning);
            read.map_err(ForeignError::Read)?;
            if is_save_image(&beginning) {
                let foreign = ForeignFile::of_pipe(beginning, Box::new(pipe))?;
                return match foreign.compression.is_some() || !foreign.is_sparse() {
                    true => Ok(Found::Foreign(Box::new(foreign))),
                    false => Ok(Found::Foreign(Box::new(foreign.into_spooled()?))),
                };
            }
            let mut pipe = beginning.as_slice().chain(pipe);
            if beginning.starts_with(&FRAME_MAGIC) {
                let spooled = spool(&mut pipe, &std::env::temp_dir())?;
                let opened = open_source(spooled, location)?;
                return Ok(Found::Image(Box::new(opened)));
            }
            let spooled = spool(&mut pipe, &std::env::temp_dir())?;
            let file = spooled.file().try_clone().map_err(ForeignError::Read)?;
            (file, open_source(spooled, location))
        }
        _far => return Ok(Found::Image(Box::new(open_alone(location)?))),
    };
    match image {
        Ok(opened) => Ok(Found::Image(Box::new(opened))),
        Err(error) if may_be_foreign(&error) => match ForeignFile::of_file(file)? {
            Some(foreign) => Ok(Found::Foreign(Box::new(foreign))),
            None => Err(error),
        },
        Err(error) => Err(error),
    }
}

fn found(file: File) -> Result<Found> {
    match ForeignFile::of_file(file)? {
        Some(foreign) => Ok(Found::Foreign(Box::new(foreign))),
        None => Err(ImageError::NotAnImage.into()),
    }
}

fn may_be_foreign(error: &Error) -> bool {
    let error = error.downcast_ref();
    matches!(error, Some(ImageError::BareStream | ImageError::NotAnImage))
}

impl ForeignFile {
    /// What kind of file it is.
    pub fn origin(&self) -> Origin {
        match &self.save {
            None if self.is_mapped => Origin::MappedRam,
            None => Origin::Stream,
            Some((header, metadata)) => {
                let xml = metadata.xml.as_bytes();
                let identity = crate::config::read_identity(xml).unwrap_or_default();
                Origin::LibvirtSave(LibvirtSave {
                    version: header.version,
                    byte_order: match header.is_big_endian {
                        true => "big",
                        false => "little",
                    },
                    format: header.format,
                    was_running: header.was_running,
                    has_cookie: metadata.cookie.is_some(),
                    domain: identity.name,
                    uuid: identity.uuid,
                    stream_at: header.stream_at(),
                })
            }
        }
    }

    /// Reads it to its end, as an image.
    ///
    /// # Errors
    /// As [`open_any`].
    pub fn open(self, location: &Location, progress: &dyn Progress) -> Result<OpenedImage> {
        let origin = self.origin();
        let about = About::of(&self, location);
        let is_in_place = self.is_file() && self.compression.is_none();
        let (image, problems) = match is_in_place {
            true if self.is_mapped => adopt_mapped(self, &about, progress)?,
            true => adopt_stream(self, &about, progress)?,
            false => store(self, &about, progress)?,
        };
        Ok(OpenedImage::of_foreign(
            image,
            location.clone(),
            origin,
            problems,
        ))
    }
}

/// What is known of a guest from around its stream.
pub struct About {
    /// Its domain XML.
    pub xml: Option<String>,
    cookie: Option<String>,
    was_running: Option<bool>,
    name: String,
    saved_at: SystemTime,
}

impl About {
    /// What the file tells, and what it is called.
    pub fn of(foreign: &ForeignFile, location: &Location) -> Self {
        let save = foreign.save.as_ref();
        let modified = location.path().and_then(|path| {
            let metadata = std::fs::metadata(path).ok()?;
            metadata.modified().ok()
        });
        About {
            xml: match &foreign.xml {
                Some(xml) => Some(xml.clone()),
                None => save.map(|(_, metadata)| metadata.xml.clone()),
            },
            cookie: save.and_then(|(_, metadata)| metadata.cookie.clone()),
            was_running: save.map(|(header, _)| header.was_running),
            name: name_of_file(location.path()),
            saved_at: modified.unwrap_or_else(SystemTime::now),
        }
    }

    /// With what the stream's beginning tells.
    pub fn known<'a>(
        &'a self,
        machine_type: Option<&'a str>,
        blocks: &'a [(String, u64)],
    ) -> Known<'a> {
        Known {
            xml: self.xml.as_deref(),
            cookie: self.cookie.as_deref(),
            was_running: self.was_running,
            name: &self.name,
            saved_at: self.saved_at,
            machine_type,
            blocks,
        }
    }
}

/// An image of a file of others, and what is to be said of its configuration.
type Opened = (Image<AnyFile>, Vec<String>);

/// A stream as it lies in its file.
fn adopt_stream(foreign: ForeignFile, about: &About, progress: &dyn Progress) -> Result<Opened> {
    let Some((file, window)) = foreign.into_file() else {
        return Err(ImageError::NotAnImage.into());
    };
    let mut stream = Part {
        file: &file,
        at: window.start,
        end: window.end,
    };
    let mut beginning = ForeignFile::beginning(&file, window.start)?;
    let described = describe(&about.known(beginning.0.as_deref(), &beginning.1));
    let mut tail = TailSink::new(window.end - window.start);
    progress.begin("reading", Some(beginning.1.drain(..).map(|it| it.1).sum()));
    let problems = write(
        about,
        described,
        &mut tail,
        encoding(Layout::Raw),
        &mut |image, encoding| encoded(pipeline::encode(&mut stream, image, encoding, progress)),
    )?;
    progress.end();
    let surroundings = Surroundings {
        front: Vec::new(),
        window,
        behind: tail.kept,
    };
    let source = FileSource::with_surroundings(file, surroundings);
    Ok((Image::open(AnyFile::from(source))?, problems))
}

/// A stream of the mapped-ram layout as it lies in its file.
fn adopt_mapped(foreign: ForeignFile, about: &About, progress: &dyn Progress) -> Result<Opened> {
    let Some((file, window)) = foreign.into_file() else {
        return Err(ImageError::NotAnImage.into());
    };
    let source = FileSource::from(file.try_clone().map_err(ForeignError::Read)?);
    let found = FoundMapped::find(&source, window.start).map_err(of_stream)?;
    let mut surroundings = Surroundings {
        front: found.front.clone(),
        window: 0..window.end,
        behind: Vec::new(),
    };
    let blocks = found.stream.blocks.iter();
    let blocks: Vec<_> = blocks
        .map(|block| (block.idstr.clone(), block.used_length))
        .collect();
    let described = describe(&about.known(found.stream.machine_type.as_deref(), &blocks));
    let shown = file.try_clone().map_err(ForeignError::Read)?;
    let shown = FileSource::with_surroundings(shown, surroundings.clone());
    let mut tail = TailSink::new(window.end);
    let mut found = Some(found);
    progress.begin("reading", None);
    let problems = write(
        about,
        described,
        &mut tail,
        encoding(Layout::Mapped),
        &mut |image, encoding| {
            let found = found.take().ok_or(PipelineError::Worker)?;
            Ok(found.adopt(&shown, image, encoding, progress)?)
        },
    )?;
    progress.end();
    surroundings.behind = tail.kept;
    let source = FileSource::with_surroundings(file, surroundings);
    Ok((Image::open(AnyFile::from(source))?, problems))
}

/// A stream that cannot be read where it lies, in a temporary file.
fn store(foreign: ForeignFile, about: &About, progress: &dyn Progress) -> Result<Opened> {
    let mut stream = foreign.stream()?;
    let memory = stream.blocks.iter().map(|(_, len)| len);
    progress.begin(
        "reading",
        Some(memory.fold(0, |sum, len| u64::saturating_add(sum, *len))),
    );
    let described = describe(&about.known(stream.machine_type.as_deref(), &stream.blocks));
    let file = tempfile::tempfile().map_err(ForeignError::Temporary)?;
    let copy = file.try_clone().map_err(ForeignError::Temporary)?;
    let mut sink = TemporarySink(BufWriter::with_capacity(1 << 20, copy));
    let problems = write(
        about,
        described,
        &mut sink,
        encoding(Layout::Zstd),
        &mut |image, encoding| match pipeline::encode(&mut stream, image, encoding, progress) {
            Err(PipelineError::Read(error)) => Err(stream.explain(error).into()),
            other => encoded(other),
        },
    )?;
    progress.end();
    sink.0.flush().map_err(ForeignError::Temporary)?;
    Ok((Image::open(AnyFile::from(file))?, problems))
}

/// What is wrong with a stream is told as such.
fn of_stream(error: PipelineError) -> Error {
    match error {
        PipelineError::Stream(error) => error.into(),
        other => other.into(),
    }
}

fn encoded(encoded: Result<Encoded, PipelineError>) -> Result<Encoded> {
    encoded.map_err(of_stream)
}

/// Writes the payload.
type WritePayload<'a> = dyn FnMut(&mut ImageWriter<'_>, &Encoding) -> Result<Encoded> + 'a;

/// Writes an image whose payload is written by `payload`; gives what is to be said of its configuration.
fn write(
    about: &About,
    mut described: Described,
    sink: &mut dyn Sink,
    encoding: Encoding,
    payload: &mut WritePayload<'_>,
) -> Result<Vec<String>> {
    let encoding = encoding.fitting(described.manifest.machine.memory_bytes);
    let identity = Identity {
        image_uuid: uuid::Uuid::new_v4(),
        guest_uuid: described.manifest.guest.uuid,
    };
    let head = Head::default();
    let max_chunk_len = encoding.max_chunk_len();
    let mut image = ImageWriter::begin(sink, encoding.layout, identity, max_chunk_len, head)?;
    let encoded = payload(&mut image, &encoding)?;
    described.complete(&about.known(None, &[]), &encoded.stream);
    append_sections(&described, encoded, &mut image)?;
    image.finish()?;
    Ok(described.problems)
}

/// Appends what describes the payload.
///
/// # Errors
/// What cannot be written.
pub fn append_sections(
    described: &Described,
    encoded: Encoded,
    image: &mut ImageWriter<'_>,
) -> Result<()> {
    image.append_section(SectionType::Xml, described.xml.as_bytes())?;
    let manifest = described.manifest.to_json();
    let manifest = manifest.map_err(ForeignError::Manifest)?;
    image.append_section(SectionType::Manifest, &manifest)?;
    if let Some(page_map) = encoded.page_map {
        image.append_section(SectionType::PageMap, &page_map.finish())?;
    }
    Ok(())
}

fn encoding(layout: Layout) -> Encoding {
    Encoding {
        layout,
        level: TEMPORARY_LEVEL,
        chunk_len: pipeline::DEFAULT_CHUNK_LEN,
        threads: pipeline::default_threads(),
        twins: None,
    }
}

/// A part of a file, from its beginning to its end.
struct Part<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        let len = self.file.read_at(&mut buf[..len], self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// Keeps what comes behind the payload, which is there already.
struct TailSink {
    payload_len: u64,
    position: u64,
    kept: Vec<u8>,
}

impl TailSink {
    fn new(payload_len: u64) -> Self {
        TailSink {
            payload_len,
            position: 0,
            kept: Vec::new(),
        }
    }
}

impl Sink for TailSink {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let known = self.payload_len.saturating_sub(self.position);
        let known = usize::try_from(known).unwrap_or(usize::MAX);
        self.kept
            .extend_from_slice(bytes.get(known..).unwrap_or_default());
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn append_from(&mut self, offset: u64) -> io::Result<()> {
        self.position = offset;
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        Ok(())
    }
}

/// A file that nobody else sees.
struct TemporarySink(BufWriter<File>);

impl Sink for TemporarySink {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn publish(&mut self) -> Result<(), PublishError> {
        Ok(())
    }
}
