//! What libvirt writes before the migration stream in a save image: a header, the domain XML, a cookie.
//!
//! | offset | size | field | |
//! |---|---|---|---|
//! | 0 | 16 | magic | `LibvirtQemudSave`, or `LibvirtQemudPart` while it is being written |
//! | 16 | 4 | version | 0 to 2 |
//! | 20 | 4 | data length | of XML, cookie and padding |
//! | 24 | 4 | was running | whether the guest runs after a restore |
//! | 28 | 4 | format | of the stream: [`SaveFormat`] |
//! | 32 | 4 | cookie offset | from the XML's beginning; 0: there is none |
//! | 36 | 56 | unused | |
//!
//! The integers are in the byte order of the host that wrote it; a version that makes no sense tells of the other one. The stream
//! follows the data and ends with the file. Pure: bytes in, values out.
//!
//! Source: libvirt 11.3 `src/qemu/qemu_saveimage.h`, read; images of 9.0 and 11.3.

use std::fmt;

use serde::Serialize;

use super::error::ForeignError;
use crate::container::layout::MAX_XML_LEN;

/// Bytes of the header.
pub const HEADER_LEN: usize = 92;

const COMPLETE: &[u8; 16] = b"LibvirtQemudSave";
const PARTIAL: &[u8; 16] = b"LibvirtQemudPart";

/// The version that is written, and the last that is known.
const VERSION: u32 = 2;

/// The most bytes of XML, cookie and padding.
const MAX_DATA_LEN: u64 = 3 * MAX_XML_LEN;

/// Room that libvirt leaves for a longer XML.
const PADDING_LEN: usize = 64 << 10;

/// Whether `beginning`, the first 16 bytes, is that of a save image, whole or not.
pub fn is_save_image(beginning: &[u8]) -> bool {
    beginning.starts_with(COMPLETE) || beginning.starts_with(PARTIAL)
}

/// How the stream is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveFormat {
    /// As QEMU wrote it.
    Raw,
    /// Compressed by gzip.
    Gzip,
    /// Compressed by bzip2.
    Bzip2,
    /// Compressed by xz.
    Xz,
    /// Compressed by lzop.
    Lzop,
    /// Compressed by zstd; libvirt 10.4 or later.
    Zstd,
    /// The mapped-ram layout, whose places are counted from the file's beginning; libvirt 11.2 or later.
    Sparse,
}

impl SaveFormat {
    /// All, in the order of their numbers.
    pub const ALL: [SaveFormat; 7] = [
        SaveFormat::Raw,
        SaveFormat::Gzip,
        SaveFormat::Bzip2,
        SaveFormat::Xz,
        SaveFormat::Lzop,
        SaveFormat::Zstd,
        SaveFormat::Sparse,
    ];

    /// Its number in the file.
    pub fn number(self) -> u32 {
        match self {
            SaveFormat::Raw => 0,
            SaveFormat::Gzip => 1,
            SaveFormat::Bzip2 => 2,
            SaveFormat::Xz => 3,
            SaveFormat::Lzop => 4,
            SaveFormat::Zstd => 5,
            SaveFormat::Sparse => 6,
        }
    }

    /// libvirt's word for it.
    pub fn name(self) -> &'static str {
        match self {
            SaveFormat::Raw => "raw",
            SaveFormat::Gzip => "gzip",
            SaveFormat::Bzip2 => "bzip2",
            SaveFormat::Xz => "xz",
            SaveFormat::Lzop => "lzop",
            SaveFormat::Zstd => "zstd",
            SaveFormat::Sparse => "sparse",
        }
    }
}

impl fmt::Display for SaveFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaveHeader {
    /// Whether its integers are big-endian.
    pub is_big_endian: bool,
    /// 0 to 2.
    pub version: u32,
    /// Bytes between the header and the stream.
    pub data_len: u32,
    /// Whether the guest runs after a restore.
    pub was_running: bool,
    /// How the stream is stored.
    pub format: SaveFormat,
    /// Where the cookie begins, from the XML's beginning; 0 if there is none.
    pub cookie_offset: u32,
}

impl SaveHeader {
    /// Parses the first bytes of a file.
    ///
    /// # Errors
    /// [`ForeignError::Incomplete`] for an image that is still written or was given up,
    /// [`ForeignError::UnknownVersion`], [`ForeignError::UnknownFormat`], [`ForeignError::Metadata`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ForeignError> {
        if bytes.starts_with(PARTIAL) {
            return Err(ForeignError::Incomplete);
        }
        let Some((header, _)) = bytes.split_first_chunk::<HEADER_LEN>() else {
            return Err(ForeignError::Metadata {
                problem: "is cut off in its header",
            });
        };
        if !header.starts_with(COMPLETE) {
            return Err(ForeignError::Metadata {
                problem: "has no header of libvirt",
            });
        }
        let word = |at: usize, is_big_endian: bool| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            match is_big_endian {
                true => u32::from_be_bytes(bytes),
                false => u32::from_le_bytes(bytes),
            }
        };
        let is_big_endian = word(16, false) > VERSION;
        let version = word(16, is_big_endian);
        if version > VERSION {
            return Err(ForeignError::UnknownVersion {
                version: word(16, false),
            });
        }
        let data_len = word(20, is_big_endian);
        if data_len == 0 || u64::from(data_len) > MAX_DATA_LEN {
            return Err(ForeignError::Metadata {
                problem: "gives a length of its XML that makes no sense",
            });
        }
        // There was no compression before version 2, whatever stands there.
        let number = match version {
            VERSION => word(28, is_big_endian),
            _ => 0,
        };
        let mut formats = SaveFormat::ALL.into_iter();
        let format = formats.find(|format| format.number() == number);
        Ok(SaveHeader {
            is_big_endian,
            version,
            data_len,
            was_running: word(24, is_big_endian) != 0,
            format: format.ok_or(ForeignError::UnknownFormat { format: number })?,
            cookie_offset: word(32, is_big_endian),
        })
    }

    /// Where the stream begins in the file.
    pub fn stream_at(&self) -> u64 {
        HEADER_LEN as u64 + u64::from(self.data_len)
    }

    fn write(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..16].copy_from_slice(COMPLETE);
        let words = [
            self.version,
            self.data_len,
            u32::from(self.was_running),
            self.format.number(),
            self.cookie_offset,
        ];
        for (word, place) in words.iter().zip(bytes[16..].chunks_exact_mut(4)) {
            place.copy_from_slice(&match self.is_big_endian {
                true => word.to_be_bytes(),
                false => word.to_le_bytes(),
            });
        }
        bytes
    }
}

/// What stands between the header and the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveMetadata {
    /// The domain XML.
    pub xml: String,
    /// The cookie, XML too: the CPU that the guest really had. Images of libvirt before 3.4 have none.
    pub cookie: Option<String>,
}

impl SaveMetadata {
    /// Parses the bytes behind the header.
    ///
    /// # Errors
    /// [`ForeignError::Metadata`] if they are not what the header says, or no text.
    pub fn parse(header: &SaveHeader, data: &[u8]) -> Result<Self, ForeignError> {
        let text = |bytes: &[u8], problem| {
            let end = bytes.iter().position(|byte| *byte == 0);
            let bytes = &bytes[..end.unwrap_or(bytes.len())];
            let text = str::from_utf8(bytes).ok().map(str::to_owned);
            let is_text = |text: &String| !text.contains("<!DOCTYPE") && !text.is_empty();
            text.filter(is_text)
                .ok_or(ForeignError::Metadata { problem })
        };
        let xml = text(data, "has no domain XML that can be read")?;
        if xml.len() as u64 > MAX_XML_LEN {
            return Err(ForeignError::Metadata {
                problem: "has a longer domain XML than 16 MiB",
            });
        }
        let start = usize::try_from(header.cookie_offset).unwrap_or(usize::MAX);
        let cookie = match start {
            0 => None,
            start if start > xml.len() && start < data.len() => {
                Some(text(&data[start..], "has no cookie where its header says")?)
            }
            _ => {
                return Err(ForeignError::Metadata {
                    problem: "has no cookie where its header says",
                });
            }
        };
        Ok(SaveMetadata { xml, cookie })
    }

    /// The bytes before the stream, header and all. The stream begins at a multiple of `alignment`.
    ///
    /// # Errors
    /// [`ForeignError::Metadata`] if the XML is longer than can be said.
    pub fn write(
        &self,
        was_running: bool,
        format: SaveFormat,
        alignment: usize,
    ) -> Result<Vec<u8>, ForeignError> {
        let mut data = self.xml.as_bytes().to_vec();
        data.push(0);
        let mut cookie_offset = 0;
        if let Some(cookie) = &self.cookie {
            cookie_offset = data.len();
            data.extend_from_slice(cookie.as_bytes());
            data.push(0);
        }
        let len = HEADER_LEN + data.len() + PADDING_LEN;
        data.resize(len.next_multiple_of(alignment.max(1)) - HEADER_LEN, 0);
        let too_long = |_| ForeignError::Metadata {
            problem: "would have a longer XML than libvirt takes",
        };
        let header = SaveHeader {
            is_big_endian: cfg!(target_endian = "big"),
            version: VERSION,
            data_len: u32::try_from(data.len()).map_err(too_long)?,
            was_running,
            format,
            cookie_offset: u32::try_from(cookie_offset).map_err(too_long)?,
        };
        Ok([header.write().as_slice(), &data].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(cookie: Option<&str>) -> SaveMetadata {
        SaveMetadata {
            xml: "<domain><name>ä</name></domain>\n".to_owned(),
            cookie: cookie.map(str::to_owned),
        }
    }

    fn parse(bytes: &[u8]) -> Result<(SaveHeader, SaveMetadata), ForeignError> {
        let header = SaveHeader::parse(bytes)?;
        let end = usize::try_from(header.stream_at()).unwrap();
        let data = SaveMetadata::parse(&header, &bytes[HEADER_LEN..end.min(bytes.len())])?;
        Ok((header, data))
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        for format in SaveFormat::ALL {
            for cookie in [None, Some("<cookie/>")] {
                let bytes = metadata(cookie).write(true, format, 4096).unwrap();
                assert!(is_save_image(&bytes) && bytes.len().is_multiple_of(4096));
                let (header, data) = parse(&bytes).unwrap();
                assert_eq!(data, metadata(cookie));
                assert_eq!((header.format, header.was_running), (format, true));
                assert_eq!(header.stream_at(), bytes.len() as u64);
                assert_eq!(header.write(), bytes[..HEADER_LEN]);
            }
        }
    }

    #[test]
    fn the_other_byte_order_is_read_too() {
        let bytes = metadata(Some("<cookie/>"))
            .write(false, SaveFormat::Xz, 1)
            .unwrap();
        let mut swapped = bytes.clone();
        swapped[16..36]
            .chunks_exact_mut(4)
            .for_each(<[u8]>::reverse);
        let (header, data) = parse(&swapped).unwrap();
        assert!(header.is_big_endian && header.version == 2);
        assert_eq!(header.write(), swapped[..HEADER_LEN]);
        assert_eq!(data, parse(&bytes).unwrap().1);
    }

    #[test]
    fn there_was_no_compression_before_version_2() {
        let mut bytes = metadata(None).write(true, SaveFormat::Gzip, 1).unwrap();
        for version in [0, 1] {
            bytes[16] = version;
            assert_eq!(parse(&bytes).unwrap().0.format, SaveFormat::Raw);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let good = metadata(Some("<cookie/>"))
            .write(true, SaveFormat::Raw, 1)
            .unwrap();
        let refused = |at: usize, new: &[u8]| {
            let mut bytes = good.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            parse(&bytes).unwrap_err().to_string()
        };
        assert!(refused(0, PARTIAL).contains("LibvirtQemudPart"));
        assert!(refused(16, &3u32.to_le_bytes()).contains("version 3"));
        assert!(refused(28, &7u32.to_le_bytes()).contains("format 7"));
        for len in [0, u32::MAX] {
            assert!(refused(20, &len.to_le_bytes()).contains("length"));
        }
        for offset in [5, u32::MAX] {
            assert!(refused(32, &offset.to_le_bytes()).contains("cookie"));
        }
        assert!(refused(HEADER_LEN, b"\0").contains("XML"));
        assert!(refused(HEADER_LEN, b"\xff").contains("XML"));
        assert!(SaveHeader::parse(&good[..50]).is_err());
    }
}
