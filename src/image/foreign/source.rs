//! A file of others: what it is, and its migration stream.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::compression::{Compressed, Compression};
use super::error::ForeignError;
use super::libvirt::{HEADER_LEN, SaveFormat, SaveHeader, SaveMetadata, is_save_image};
use crate::stream::{Event, Parser, StreamError, is_stream_start};

/// Bytes of a stream in which its block list has to be.
const BEGINNING_LEN: u64 = 64 << 10;

/// How often a stream may carry each page, on the average: a running guest's pages come more than once.
const MOST_ROUNDS: u64 = 16;

/// What a stream may have besides pages.
const MOST_OTHER: u64 = 1 << 30;

/// A file with a migration stream in it that is no image of ours.
pub struct ForeignFile {
    input: Input,
    /// Where the stream begins in it.
    start: u64,
    /// What libvirt wrote before it; `None` for a bare stream.
    pub save: Option<(SaveHeader, SaveMetadata)>,
    /// Domain XML that counts instead of what the file has.
    pub xml: Option<String>,
    /// How the stream is compressed.
    pub compression: Option<Compression>,
    /// Whether it is of the mapped-ram layout.
    pub is_mapped: bool,
}

enum Input {
    File(File),
    /// Behind the header.
    Pipe(Box<dyn Read + Send>),
}

/// RAMBlocks and their bytes.
type Blocks = Vec<(String, u64)>;

/// A migration stream of others, and what its beginning tells.
pub struct ForeignStream {
    reader: Box<dyn Read + Send>,
    /// The resolved machine type, if the stream names it.
    pub machine_type: Option<String>,
    /// RAMBlocks and their bytes.
    pub blocks: Blocks,
    is_compressed: bool,
    /// Set where it was longer than it may be.
    is_too_long: Arc<AtomicBool>,
    limit: u64,
}

impl ForeignFile {
    /// Looks at a file; `None` if it is none of others that is known.
    ///
    /// # Errors
    /// [`ForeignError`]: what is wrong with the beginning of a libvirt save image.
    pub fn of_file(file: File) -> Result<Option<Self>, ForeignError> {
        let mut reader = &file;
        reader.rewind().map_err(ForeignError::Read)?;
        let mut beginning = Vec::new();
        read_up_to(&mut reader, &mut beginning, HEADER_LEN)?;
        let save = match is_save_image(&beginning) {
            true => Some(read_save(beginning.clone(), &mut reader)?),
            false => None,
        };
        let start = save.as_ref().map_or(0, |(header, _)| header.stream_at());
        let mut found = ForeignFile {
            compression: match &save {
                Some((header, _)) => Compression::of_format(header.format),
                None => Compression::of_beginning(&beginning),
            },
            input: Input::File(file),
            start,
            save,
            xml: None,
            is_mapped: false,
        };
        let is_bare = found.save.is_none();
        if is_bare && found.compression.is_none() && !is_stream_start(&beginning) {
            return Ok(None);
        }
        if is_bare && found.compression.is_some() && !found.holds_stream() {
            return Ok(None);
        }
        found.is_mapped = found.compression.is_none() && found.begins_mapped()?;
        Ok(Some(found))
    }

    /// A libvirt save image that comes through a pipe, of which `beginning` was read.
    ///
    /// # Errors
    /// As [`ForeignFile::of_file`].
    pub fn of_pipe(
        beginning: Vec<u8>,
        mut pipe: Box<dyn Read + Send>,
    ) -> Result<Self, ForeignError> {
        let save = read_save(beginning, &mut pipe)?;
        Ok(ForeignFile {
            input: Input::Pipe(pipe),
            start: save.0.stream_at(),
            compression: Compression::of_format(save.0.format),
            save: Some(save),
            xml: None,
            is_mapped: false,
        })
    }

    /// The file, where the stream begins in it, and where it ends; `None` of a pipe.
    pub fn into_file(self) -> Option<(File, std::ops::Range<u64>)> {
        match self.input {
            Input::File(file) => {
                let len = file.metadata().map_or(0, |metadata| metadata.len());
                Some((file, self.start..len))
            }
            Input::Pipe(_) => None,
        }
    }

    /// Whether its stream is said to be of the mapped-ram layout, which can be read at any place only.
    pub fn is_sparse(&self) -> bool {
        let save = self.save.as_ref();
        save.is_some_and(|(header, _)| header.format == SaveFormat::Sparse)
    }

    /// The same in a nameless temporary file, its stream where it was.
    ///
    /// # Errors
    /// [`ForeignError::Temporary`] if there is no room for it.
    pub fn into_spooled(self) -> Result<Self, ForeignError> {
        let Input::Pipe(mut pipe) = self.input else {
            return Ok(self);
        };
        let mut file = tempfile::tempfile().map_err(ForeignError::Temporary)?;
        file.seek(SeekFrom::Start(self.start))
            .map_err(ForeignError::Temporary)?;
        io::copy(&mut pipe, &mut file).map_err(ForeignError::Temporary)?;
        let mut spooled = ForeignFile {
            input: Input::File(file),
            ..self
        };
        spooled.is_mapped = spooled.begins_mapped()?;
        Ok(spooled)
    }

    /// The machine type, and the RAMBlocks with their bytes, of the stream that begins at `start`.
    ///
    /// # Errors
    /// [`ForeignError::Read`].
    pub fn beginning(file: &File, start: u64) -> Result<(Option<String>, Blocks), ForeignError> {
        let (machine_type, blocks, _) = parse_beginning(&read_beginning(file, start)?);
        Ok((machine_type, blocks))
    }

    /// Whether it can be read at any place.
    pub fn is_file(&self) -> bool {
        matches!(self.input, Input::File(_))
    }

    fn file(&self) -> Option<&File> {
        match &self.input {
            Input::File(file) => Some(file),
            Input::Pipe(_) => None,
        }
    }

    /// Whether a stream begins with what is compressed.
    fn holds_stream(&self) -> bool {
        let Some(file) = self.file().and_then(|file| file.try_clone().ok()) else {
            return false;
        };
        let probe = ForeignFile {
            input: Input::File(file),
            start: 0,
            save: None,
            xml: None,
            compression: self.compression,
            is_mapped: false,
        };
        probe.stream().is_ok()
    }

    fn begins_mapped(&self) -> Result<bool, ForeignError> {
        let beginning = match self.file() {
            Some(file) => read_beginning(file, self.start)?,
            None => Vec::new(),
        };
        let parsed = parse_beginning(&beginning);
        Ok(matches!(parsed.2, Some(StreamError::MappedRam { .. })))
    }

    /// The stream, decompressed. That it is damaged is told where it is read.
    ///
    /// # Errors
    /// [`ForeignError::OtherFormat`] if it is not compressed as its header says; [`ForeignError`].
    pub fn stream(self) -> Result<ForeignStream, ForeignError> {
        let mut reader = match (self.input, self.compression) {
            (Input::File(mut file), compression) => {
                if let (Some(compression), Some((header, _))) = (compression, &self.save) {
                    let magic = compression.magic();
                    let mut found = vec![0; magic.len()];
                    let read = file.read_exact_at(&mut found, self.start);
                    if read.is_err() || found != magic {
                        let format = header.format;
                        return Err(ForeignError::OtherFormat { format });
                    }
                }
                file.seek(SeekFrom::Start(self.start))
                    .map_err(ForeignError::Read)?;
                match compression {
                    Some(compression) => compression.decoder(Compressed::File(file))?,
                    None => Box::new(file),
                }
            }
            (Input::Pipe(pipe), Some(compression)) => {
                compression.decoder(Compressed::Pipe(pipe))?
            }
            (Input::Pipe(pipe), None) => pipe,
        };
        let mut beginning = Vec::new();
        let is_compressed = self.compression.is_some();
        let mut first = Read::by_ref(&mut reader).take(BEGINNING_LEN);
        let read = first.read_to_end(&mut beginning);
        read.map_err(|error| match is_compressed {
            true => ForeignError::Decompress(error),
            false => ForeignError::Read(error),
        })?;
        if !is_stream_start(&beginning) && self.save.is_none() {
            let kind = io::ErrorKind::InvalidData;
            return Err(ForeignError::Decompress(kind.into()));
        }
        let (machine_type, blocks, _) = parse_beginning(&beginning);
        let memory: u64 = blocks
            .iter()
            .fold(0, |sum, (_, len)| sum.saturating_add(*len));
        let limit = memory
            .saturating_mul(MOST_ROUNDS)
            .saturating_add(MOST_OTHER);
        let is_too_long = Arc::new(AtomicBool::new(false));
        let limited = Limited {
            reader: io::Cursor::new(beginning).chain(reader),
            left: limit,
            is_too_long: Arc::clone(&is_too_long),
        };
        Ok(ForeignStream {
            reader: Box::new(limited),
            machine_type,
            blocks,
            is_compressed,
            is_too_long,
            limit,
        })
    }
}

impl ForeignStream {
    /// What an error says of the file that was met while this was read.
    pub fn explain(&self, error: io::Error) -> ForeignError {
        if self.is_too_long.load(Ordering::Relaxed) {
            let blocks = self.blocks.iter();
            return ForeignError::TooLong {
                limit: self.limit,
                memory: blocks.fold(0, |sum, (_, len)| sum.saturating_add(*len)),
            };
        }
        match self.is_compressed {
            true => ForeignError::Decompress(error),
            false => ForeignError::Read(error),
        }
    }
}

impl Read for ForeignStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buf)
    }
}

/// A few bytes can decompress to any number.
struct Limited<R> {
    reader: R,
    left: u64,
    is_too_long: Arc<AtomicBool>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.reader.read(buf)?;
        match self.left.checked_sub(len as u64) {
            Some(left) => {
                self.left = left;
                Ok(len)
            }
            None => {
                self.is_too_long.store(true, Ordering::Relaxed);
                Err(io::ErrorKind::FileTooLarge.into())
            }
        }
    }
}

/// The header, and what stands between it and the stream; `beginning` was read already.
fn read_save(
    mut beginning: Vec<u8>,
    reader: &mut dyn Read,
) -> Result<(SaveHeader, SaveMetadata), ForeignError> {
    read_up_to(reader, &mut beginning, HEADER_LEN)?;
    let header = SaveHeader::parse(&beginning)?;
    let end = usize::try_from(header.stream_at()).unwrap_or(usize::MAX);
    let cut_off = ForeignError::Metadata {
        problem: "is cut off in its XML",
    };
    read_up_to(reader, &mut beginning, end)?;
    let data = beginning.get(HEADER_LEN..end).ok_or(cut_off)?;
    let metadata = SaveMetadata::parse(&header, data)?;
    Ok((header, metadata))
}

/// The first bytes of the stream that begins at `start`.
fn read_beginning(mut file: &File, start: u64) -> Result<Vec<u8>, ForeignError> {
    let mut beginning = Vec::new();
    file.seek(SeekFrom::Start(start))
        .map_err(ForeignError::Read)?;
    let read = file.take(BEGINNING_LEN).read_to_end(&mut beginning);
    read.map_err(ForeignError::Read)?;
    Ok(beginning)
}

/// Reads until `bytes` has `len` of them, or there are no more.
fn read_up_to(reader: &mut dyn Read, bytes: &mut Vec<u8>, len: usize) -> Result<(), ForeignError> {
    let missing = len.saturating_sub(bytes.len()) as u64;
    let read = reader.take(missing).read_to_end(bytes);
    read.map(drop).map_err(ForeignError::Read)
}

/// Machine type, RAMBlocks with their bytes, and where it stopped.
type Beginning = (Option<String>, Blocks, Option<StreamError>);

fn parse_beginning(bytes: &[u8]) -> Beginning {
    let mut parser = Parser::new();
    let mut rest = bytes;
    let stopped = loop {
        match parser.next(rest) {
            Ok(Some(element)) if matches!(element.event, Event::Framing) => {
                rest = &rest[element.len..];
            }
            Ok(_) => break None,
            Err(error) => break Some(error),
        }
    };
    let blocks = parser.blocks().iter();
    let blocks = blocks.map(|block| (block.idstr.clone(), block.used_length));
    let machine_type = match &stopped {
        Some(StreamError::MappedRam { machine_type, .. }) => machine_type.clone(),
        _ => parser.machine_type().map(str::to_owned),
    };
    (machine_type, blocks.collect(), stopped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_without_end_ends_at_its_limit() {
        let is_too_long = Arc::new(AtomicBool::new(false));
        let mut stream = ForeignStream {
            reader: Box::new(Limited {
                reader: io::repeat(7),
                left: 100_000,
                is_too_long: Arc::clone(&is_too_long),
            }),
            machine_type: None,
            blocks: vec![("pc.ram".to_owned(), 4096)],
            is_compressed: true,
            is_too_long,
            limit: 100_000,
        };
        let mut bytes = Vec::new();
        let error = stream.read_to_end(&mut bytes).unwrap_err();
        assert!(bytes.len() <= 100_000);
        let said = stream.explain(error).to_string();
        assert!(said.contains("longer than 100000 bytes"), "{said}");
    }

    #[test]
    fn what_others_know_nothing_of_is_left_alone() {
        for bytes in [
            b"".as_slice(),
            b"MZ",
            b"BZh91AY&SY, but no stream",
            &[0x28, 0xb5, 0x2f, 0xfd, 0, 0, 0, 0],
            &zstd::encode_all(b"hello".as_slice(), 1).unwrap(),
        ] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            assert!(ForeignFile::of_file(file).unwrap().is_none());
        }
    }
}
