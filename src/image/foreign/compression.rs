//! The ways in which streams are compressed by others, and back.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use liblzma::read::XzDecoder;
use liblzma::stream::{CONCATENATED, Stream};
use liblzma::write::XzEncoder;

use super::error::ForeignError;
use super::libvirt::SaveFormat;
use crate::codec;

/// Bytes of compressed stream read at a time.
const READ_LEN: usize = 1 << 18;

/// The most memory that decompressing may take. `xz -9` asks for 65 MiB, the largest window of zstd for 128 MiB.
const XZ_MEMORY: u64 = 256 << 20;

/// The level that libvirt gives xz.
const XZ_LEVEL: u32 = 3;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// xz.
    Xz,
    /// lzop, of which there is no library that we may use: the program is run.
    Lzop,
    /// zstd.
    Zstd,
}

impl Compression {
    const ALL: [Compression; 5] = [
        Compression::Gzip,
        Compression::Bzip2,
        Compression::Xz,
        Compression::Lzop,
        Compression::Zstd,
    ];

    /// That of a save image; `None` where nothing is compressed.
    pub fn of_format(format: SaveFormat) -> Option<Self> {
        match format {
            SaveFormat::Raw | SaveFormat::Sparse => None,
            SaveFormat::Gzip => Some(Compression::Gzip),
            SaveFormat::Bzip2 => Some(Compression::Bzip2),
            SaveFormat::Xz => Some(Compression::Xz),
            SaveFormat::Lzop => Some(Compression::Lzop),
            SaveFormat::Zstd => Some(Compression::Zstd),
        }
    }

    /// What begins with these bytes.
    pub fn of_beginning(bytes: &[u8]) -> Option<Self> {
        let mut all = Compression::ALL.into_iter();
        all.find(|one| bytes.starts_with(one.magic()))
    }

    /// The first bytes of all that is compressed so.
    pub fn magic(self) -> &'static [u8] {
        match self {
            Compression::Gzip => &[0x1f, 0x8b],
            Compression::Bzip2 => b"BZh",
            Compression::Xz => &[0xfd, b'7', b'z', b'X', b'Z', 0],
            Compression::Lzop => &[0x89, b'L', b'Z', b'O'],
            Compression::Zstd => &[0x28, 0xb5, 0x2f, 0xfd],
        }
    }

    /// Decompresses all of `compressed`; checksums in it are checked.
    ///
    /// # Errors
    /// [`ForeignError::Decompress`]; that it is damaged is told where it is read.
    pub fn decoder(self, compressed: Compressed) -> Result<Box<dyn Read + Send>, ForeignError> {
        let failed = ForeignError::Decompress;
        let compressed = match (self, compressed) {
            (Compression::Lzop, compressed) => return lzop(compressed),
            (_, Compressed::File(file)) => Box::new(file),
            (_, Compressed::Pipe(pipe)) => pipe,
        };
        let compressed = BufReader::with_capacity(READ_LEN, compressed);
        Ok(match self {
            Compression::Gzip | Compression::Lzop => Box::new(MultiGzDecoder::new(compressed)),
            Compression::Bzip2 => Box::new(bzip2::read::MultiBzDecoder::new(compressed)),
            Compression::Xz => {
                let stream = Stream::new_stream_decoder(XZ_MEMORY, CONCATENATED);
                let stream = stream.map_err(|error| failed(error.into()))?;
                Box::new(XzDecoder::new_stream(compressed, stream))
            }
            Compression::Zstd => Box::new(zstd::Decoder::with_buffer(compressed).map_err(failed)?),
        })
    }
}

/// Where compressed bytes come from.
pub enum Compressed {
    /// A file, from where it stands to its end.
    File(File),
    /// Anything else.
    Pipe(Box<dyn Read + Send>),
}

/// Lets `lzop` decompress. What is no file goes through one.
fn lzop(compressed: Compressed) -> Result<Box<dyn Read + Send>, ForeignError> {
    let file = match compressed {
        Compressed::File(file) => file,
        Compressed::Pipe(mut pipe) => {
            let mut file = tempfile::tempfile().map_err(ForeignError::Temporary)?;
            io::copy(&mut pipe, &mut file).map_err(ForeignError::Temporary)?;
            io::Seek::rewind(&mut file).map_err(ForeignError::Temporary)?;
            file
        }
    };
    let mut child = Command::new("lzop")
        .args(["-dc", "--ignore-warn"])
        .stdin(file)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| ForeignError::NoProgram {
            program: "lzop",
            source,
        })?;
    let Some(output) = child.stdout.take() else {
        return Err(ForeignError::Decompress(io::ErrorKind::BrokenPipe.into()));
    };
    Ok(Box::new(Program { child, output }))
}

/// What a program writes, and then whether it succeeded.
struct Program {
    child: Child,
    output: ChildStdout,
}

impl Read for Program {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.output.read(buf)?;
        if len > 0 || buf.is_empty() {
            return Ok(len);
        }
        let status = self.child.wait()?;
        if status.success() {
            return Ok(0);
        }
        let mut words = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            let _ = stderr.take(4096).read_to_string(&mut words);
        }
        Err(io::Error::other(format!("{status}: {}", words.trim())))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Compresses what is written to it.
pub enum Encoder<W: Write> {
    /// Not at all.
    Plain(W),
    /// gzip.
    Gzip(GzEncoder<W>),
    /// bzip2.
    Bzip2(bzip2::write::BzEncoder<W>),
    /// xz.
    Xz(XzEncoder<W>),
    /// zstd.
    Zstd(zstd::Encoder<'static, W>),
}

impl<W: Write> Encoder<W> {
    /// Begins to compress as a save image of `format` has it, at the levels that libvirt uses.
    ///
    /// # Errors
    /// [`ForeignError::Compress`]; of `lzop` always, which libvirt itself has given up for `zstd`.
    pub fn new(format: SaveFormat, output: W) -> Result<Self, ForeignError> {
        Ok(match format {
            SaveFormat::Raw | SaveFormat::Sparse => Encoder::Plain(output),
            SaveFormat::Gzip => {
                Encoder::Gzip(GzEncoder::new(output, flate2::Compression::default()))
            }
            SaveFormat::Bzip2 => Encoder::Bzip2(bzip2::write::BzEncoder::new(
                output,
                bzip2::Compression::best(),
            )),
            SaveFormat::Xz => Encoder::Xz(XzEncoder::new(output, XZ_LEVEL)),
            SaveFormat::Zstd => {
                let encoder = zstd::Encoder::new(output, codec::DEFAULT_LEVEL);
                let mut encoder = encoder.map_err(ForeignError::Compress)?;
                encoder
                    .include_checksum(true)
                    .map_err(ForeignError::Compress)?;
                Encoder::Zstd(encoder)
            }
            SaveFormat::Lzop => {
                let kind = io::ErrorKind::Unsupported;
                return Err(ForeignError::Compress(kind.into()));
            }
        })
    }

    /// Ends the compressed stream.
    ///
    /// # Errors
    /// What the output says.
    pub fn finish(self) -> io::Result<W> {
        match self {
            Encoder::Plain(output) => Ok(output),
            Encoder::Gzip(encoder) => encoder.finish(),
            Encoder::Bzip2(encoder) => encoder.finish(),
            Encoder::Xz(encoder) => encoder.finish(),
            Encoder::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Encoder::Plain(output) => output.write(bytes),
            Encoder::Gzip(encoder) => encoder.write(bytes),
            Encoder::Bzip2(encoder) => encoder.write(bytes),
            Encoder::Xz(encoder) => encoder.write(bytes),
            Encoder::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_compressed_is_decompressed_and_damage_is_told() {
        let bytes: Vec<u8> = (0..100_000u32)
            .flat_map(|i| (i / 7).to_le_bytes())
            .collect();
        for format in SaveFormat::ALL {
            let (Some(compression), true) =
                (Compression::of_format(format), format != SaveFormat::Lzop)
            else {
                continue;
            };
            let mut encoder = Encoder::new(format, Vec::new()).unwrap();
            encoder.write_all(&bytes).unwrap();
            let compressed = encoder.finish().unwrap();
            assert_eq!(Compression::of_beginning(&compressed), Some(compression));
            let read = |compressed: Vec<u8>| {
                let pipe = Compressed::Pipe(Box::new(io::Cursor::new(compressed)));
                let mut found = Vec::new();
                let mut decoder = compression.decoder(pipe).map_err(|_| ())?;
                decoder.read_to_end(&mut found).map_err(|_| ())?;
                Ok::<_, ()>(found)
            };
            assert_eq!(read(compressed.clone()), Ok(bytes.clone()));
            let mut flipped = compressed.clone();
            flipped[compressed.len() / 2] ^= 4;
            assert!(read(flipped).is_err(), "{format}");
            for len in [compressed.len() - 1, compressed.len() / 2, 20] {
                assert!(read(compressed[..len].to_vec()).is_err(), "{format} {len}");
            }
        }
    }
}
