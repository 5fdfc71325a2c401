//! Appends an image to a sink: chunks, then sections, then directory and footer.
//!
//! Nothing is kept but 64 bytes a chunk, in a delta 68, and the directory. The order is fixed: `HEAD` (layout `zstd`), chunks, `XML `,
//! `MANI`, in a delta `TWIN`, `CHNK`, `PMAP`, `SIGN`, `DIR `, `FOOT`. To sync and to publish is left to the sink's owner.
//!
//! Source: spec/container.md.

use crate::bytes::{Sink, WriteAt};
use crate::digest::Digest;
use crate::units::{ChunkIndex, FileOffset, StreamOffset};

use super::Identity;
use super::chunk_table::{ChunkEntry, ChunkKind, PageDigests, TableHead, page_count, root};
use super::delta::{ParentId, data_frame, text_frame, twin_number, twins_payload};
use super::directory::{DirectoryEntry, check_entries, directory_payload, live_digest};
use super::error::ContainerError;
use super::footer::{Footer, image_digest};
use super::head::{Head, head_payload};
use super::layout::{CHUNK_ENTRY_LEN, Layout, MAX_MAX_CHUNK_LEN, SectionType};
use super::section::SectionWriter;
use super::signature::statement;

/// A chunk ready to be stored.
#[derive(Debug, Clone, Copy)]
pub struct StoredChunk<'a> {
    /// What goes into the file: one zstd frame, or the raw bytes, or nothing if it is the parent's chunk.
    pub stored: &'a [u8],
    /// Bytes of the stream it holds.
    pub raw_len: u32,
    /// CRC-32C of `stored`.
    pub stored_crc: u32,
    /// SHA-256 of the raw bytes.
    pub raw_digest: Digest,
    /// Whether `stored` is a frame, and what it follows.
    pub kind: ChunkKind,
}

/// A chunk that lies in its place already: its bytes are stored as they are.
#[derive(Debug, Clone, Copy)]
pub struct PlacedChunk {
    /// Where it begins in the file.
    pub offset: FileOffset,
    /// How many bytes it has.
    pub len: u32,
    /// CRC-32C of its bytes.
    pub crc: u32,
    /// SHA-256 of its bytes.
    pub digest: Digest,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// Names the saved guest.
    pub image_digest: Digest,
    /// 1 for a fresh image.
    pub generation: u32,
    /// Bytes of the file.
    pub file_len: u64,
    /// Bytes of the stream.
    pub stream_len: u64,
    /// Bytes of payload in the file.
    pub stored_len: u64,
    /// Number of chunks.
    pub chunk_count: u64,
}

/// Writes a fresh image.
pub struct ImageWriter<'s> {
    out: SectionAppender<'s>,
    layout: Layout,
    identity: Identity,
    delta: Option<Delta>,
    max_chunk_len: u32,
    payload_offset: u64,
    payload_end: u64,
    /// As they go into the table.
    entries: Vec<[u8; CHUNK_ENTRY_LEN]>,
    pages: PageDigests,
    stream_len: u64,
    /// Whether chunks were written in their places, where the sink does not append yet.
    is_placed: bool,
    table: Option<(TableHead, Vec<Digest>)>,
}

impl std::fmt::Debug for ImageWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("ImageWriter");
        shown
            .field("layout", &self.layout)
            .field("position", &self.out.position)
            .finish_non_exhaustive()
    }
}

/// What is special about a delta that is written.
struct Delta {
    parent: ParentId,
    parent_name: Option<String>,
    /// For each chunk the number of its twin, as it goes into `TWIN`.
    twins: Vec<u32>,
}

impl<'s> ImageWriter<'s> {
    /// Begins an image at the sink's start, which must be empty. `head` is used by layout `zstd` only.
    ///
    /// # Errors
    /// [`ContainerError::WrongField`] or [`ContainerError::TooLarge`] if `max_chunk_len` or `head` is too large.
    pub fn begin(
        sink: &'s mut dyn Sink,
        layout: Layout,
        identity: Identity,
        max_chunk_len: u32,
        head: Head<'_>,
    ) -> Result<Self, ContainerError> {
        Self::begin_with(sink, layout, identity, None, max_chunk_len, head)
    }

    /// As [`ImageWriter::begin`], a delta of `parent`, whose file is called `parent_name`.
    ///
    /// # Errors
    /// As [`ImageWriter::begin`]; [`ContainerError::OtherParent`] if it would be its own parent.
    pub fn begin_delta(
        sink: &'s mut dyn Sink,
        identity: Identity,
        parent: ParentId,
        parent_name: Option<String>,
        max_chunk_len: u32,
        head: Head<'_>,
    ) -> Result<Self, ContainerError> {
        if parent.image_uuid == identity.image_uuid || parent.image_uuid.is_nil() {
            let (expected, found) = (parent, parent);
            return Err(ContainerError::OtherParent { expected, found });
        }
        let delta = Delta {
            parent,
            parent_name,
            twins: Vec::new(),
        };
        Self::begin_with(
            sink,
            Layout::Zstd,
            identity,
            Some(delta),
            max_chunk_len,
            head,
        )
    }

    fn begin_with(
        sink: &'s mut dyn Sink,
        layout: Layout,
        identity: Identity,
        delta: Option<Delta>,
        max_chunk_len: u32,
        head: Head<'_>,
    ) -> Result<Self, ContainerError> {
        if max_chunk_len > MAX_MAX_CHUNK_LEN {
            let (section, at, found) =
                (SectionType::ChunkTable, FileOffset(0), max_chunk_len.into());
            return Err(ContainerError::WrongField {
                section,
                field: "MAX_CHUNK_LEN",
                at,
                found,
            });
        }
        let guest_uuid = identity.guest_uuid.filter(|uuid| !uuid.is_nil());
        let identity = Identity {
            guest_uuid,
            ..identity
        };
        let mut out = SectionAppender {
            sink,
            position: 0,
            generation: 1,
            directory: Vec::new(),
        };
        if layout == Layout::Zstd {
            out.append(
                SectionType::Head,
                &head_payload(identity, delta.is_some(), max_chunk_len, head)?,
            )?;
        }
        let payload_offset = out.position;
        if let Some(delta) = &delta {
            out.append_payload(&text_frame(identity.image_uuid, &delta.parent))?;
        }
        let (entries, pages, stream_len, table) = (Vec::new(), PageDigests::default(), 0, None);
        Ok(ImageWriter {
            out,
            layout,
            identity,
            delta,
            max_chunk_len,
            payload_offset,
            payload_end: payload_offset,
            entries,
            pages,
            stream_len,
            is_placed: false,
            table,
        })
    }

    /// Appends the next chunk of the stream.
    ///
    /// # Errors
    /// [`ContainerError::ChunkNotAllowed`] if its kind or a length breaks the rules, or sections were already appended.
    pub fn append_chunk(&mut self, chunk: &StoredChunk<'_>) -> Result<ChunkIndex, ContainerError> {
        let index = ChunkIndex(self.entries.len() as u64);
        let refused = ContainerError::ChunkNotAllowed {
            layout: self.layout,
            chunk: index,
        };
        let Some(stored_len) = self.allowed_stored_len(chunk) else {
            return Err(refused);
        };
        let is_framed = self.delta.is_some() && stored_len > 0;
        let frame = is_framed.then(|| data_frame(stored_len, chunk.stored_crc));
        let frame = frame.transpose()?;
        if let Some((before, _)) = &frame {
            self.out.append_payload(before)?;
        }
        let entry = ChunkEntry {
            index,
            stored_offset: FileOffset(self.out.position),
            stream_offset: StreamOffset(self.stream_len),
            stored_len,
            raw_len: chunk.raw_len,
            kind: chunk.kind,
            stored_crc: chunk.stored_crc,
            raw_digest: chunk.raw_digest,
        };
        self.out.append_payload(chunk.stored)?;
        if let Some((_, behind)) = &frame {
            self.out.append_payload(behind)?;
        }
        if let (Some(delta), Some(twin)) = (&mut self.delta, twin_number(chunk.kind)) {
            delta.twins.push(twin);
        }
        self.note(&entry);
        Ok(index)
    }

    /// The stored length, if this chunk may be appended now.
    fn allowed_stored_len(&self, chunk: &StoredChunk<'_>) -> Option<u32> {
        let stored_len = u32::try_from(chunk.stored.len()).ok()?;
        let is_allowed = self.table.is_none()
            && chunk.kind.belongs_into(self.layout, self.delta.is_some())
            && twin_number(chunk.kind).is_some()
            && (1..=self.max_chunk_len).contains(&chunk.raw_len)
            && chunk.kind.allows(stored_len, chunk.raw_len);
        is_allowed.then_some(stored_len)
    }

    /// Appends `len` zero bytes to the payload that belong to no chunk; layout `mapped` only.
    ///
    /// # Errors
    /// [`ContainerError::ChunkNotAllowed`] in other layouts or behind the last chunk's end.
    pub fn append_zeros(&mut self, len: u64) -> Result<(), ContainerError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        if self.layout != Layout::Mapped || self.table.is_some() {
            let chunk = ChunkIndex(self.entries.len() as u64);
            return Err(ContainerError::ChunkNotAllowed {
                layout: self.layout,
                chunk,
            });
        }
        let mut left = len;
        while left > 0 {
            let piece = usize::try_from(left)
                .unwrap_or(ZEROS.len())
                .min(ZEROS.len());
            self.out.append_payload(&ZEROS[..piece])?;
            left -= piece as u64;
        }
        Ok(())
    }

    /// Where the payload of layout `mapped` is written before its chunks are named with [`ImageWriter::place_chunk`]; `None`
    /// where the sink has no places.
    pub fn places(&self) -> Option<&dyn WriteAt> {
        self.out.sink.places()
    }

    /// Names the next chunk, which lies in its place; layout `mapped` only. What is between the chunk before and this
    /// one must never have been written. The payload ends with the last chunk.
    ///
    /// # Errors
    /// [`ContainerError::ChunkNotAllowed`] if it does not lie behind the one before, or sections were already appended.
    pub fn place_chunk(&mut self, chunk: &PlacedChunk) -> Result<ChunkIndex, ContainerError> {
        let index = ChunkIndex(self.entries.len() as u64);
        let is_allowed = self.layout == Layout::Mapped
            && self.table.is_none()
            && (1..=self.max_chunk_len).contains(&chunk.len)
            && chunk.offset.0 >= self.out.position;
        if !is_allowed {
            let layout = self.layout;
            return Err(ContainerError::ChunkNotAllowed {
                layout,
                chunk: index,
            });
        }
        self.out.position = chunk.offset.0 + u64::from(chunk.len);
        self.is_placed = true;
        self.note(&ChunkEntry {
            index,
            stored_offset: chunk.offset,
            stream_offset: StreamOffset(self.stream_len),
            stored_len: chunk.len,
            raw_len: chunk.len,
            kind: ChunkKind::Plain,
            stored_crc: chunk.crc,
            raw_digest: chunk.digest,
        });
        Ok(index)
    }

    /// Enters a chunk into the table.
    fn note(&mut self, entry: &ChunkEntry) {
        self.stream_len += u64::from(entry.raw_len);
        self.pages.push(entry.raw_len, &entry.raw_digest);
        self.entries.push(entry.write());
    }

    /// Bytes appended so far.
    pub fn position(&self) -> u64 {
        self.out.position
    }

    /// Ends the payload; the image digest is known from here on. Sections call it by themselves.
    ///
    /// # Errors
    /// [`ContainerError::NoSuchChunk`] if there is no chunk; [`ContainerError::Full`] if there are too many.
    pub fn finish_chunks(&mut self) -> Result<Digest, ContainerError> {
        if self.table.is_none() {
            if self.entries.is_empty() {
                return Err(ContainerError::NoSuchChunk {
                    chunk: ChunkIndex(0),
                    chunk_count: 0,
                });
            }
            if self.is_placed {
                self.out.append_from_here()?;
            }
            let digests = std::mem::take(&mut self.pages).finish();
            let chunk_count = self.entries.len() as u64;
            let head = TableHead {
                chunk_count,
                table_page_count: u32::try_from(page_count(chunk_count))
                    .map_err(|_| ContainerError::Full)?,
                max_chunk_len: self.max_chunk_len,
                stream_len: self.stream_len,
                root: root(&digests),
            };
            self.table = Some((head, digests));
            self.payload_end = self.out.position;
        }
        self.image_digest().ok_or(ContainerError::Full)
    }

    /// Names the saved guest; `None` before [`ImageWriter::finish_chunks`].
    pub fn image_digest(&self) -> Option<Digest> {
        let (head, _) = self.table.as_ref()?;
        Some(image_digest(
            self.identity.guest_uuid,
            head.chunk_count,
            head.stream_len,
            head.root,
        ))
    }

    /// Appends a section: `XML ` and `MANI` once each, then at most one `PMAP`, then any number of `SIGN` or of types
    /// this format does not name. `CHNK` is written before the first of those by itself.
    ///
    /// # Errors
    /// [`ContainerError::SectionNotAllowed`] if the type is written by others or comes too early, too late or twice.
    pub fn append_section(
        &mut self,
        section: SectionType,
        payload: &[u8],
    ) -> Result<(), ContainerError> {
        self.finish_chunks()?;
        let is_once = !matches!(section, SectionType::Signature | SectionType::Other(_));
        let is_there = self.out.has(section);
        match section {
            SectionType::Xml | SectionType::Manifest if !self.out.has(SectionType::ChunkTable) => {}
            SectionType::PageMap
            | SectionType::WorkingSet
            | SectionType::Signature
            | SectionType::Other(_) => self.append_table()?,
            _ => return Err(ContainerError::SectionNotAllowed { section }),
        }
        if is_once && is_there {
            return Err(ContainerError::SectionNotAllowed { section });
        }
        self.out.append(section, payload)
    }

    /// Appends `CHNK`, if it is not there yet.
    fn append_table(&mut self) -> Result<(), ContainerError> {
        self.finish_chunks()?;
        let section = SectionType::ChunkTable;
        let Some((head, digests)) = self.table.as_ref().filter(|_| !self.out.has(section)) else {
            return Ok(());
        };
        let payload_len = head.payload_len().ok_or(ContainerError::Full)?;
        let generation = self.out.generation;
        if let Some(delta) = &self.delta {
            let (fixed, len) = twins_payload(delta.parent_name.as_deref(), &delta.twins)?;
            let (position, section) = (self.out.position, SectionType::Twins);
            let mut writer = SectionWriter::begin(&mut *self.out.sink, position, section, len)?;
            writer.write(&fixed)?;
            for twins in delta.twins.chunks(16384) {
                let bytes: Vec<u8> = twins.iter().flat_map(|it| it.to_le_bytes()).collect();
                writer.write(&bytes)?;
            }
            let entry = writer.finish(generation)?;
            self.out.took(entry);
        }
        let mut writer =
            SectionWriter::begin(&mut *self.out.sink, self.out.position, section, payload_len)?;
        writer.write(&head.write())?;
        for page in digests {
            writer.write(&page.0)?;
        }
        for entries in self.entries.chunks(1024) {
            writer.write(entries.as_flattened())?;
        }
        let entry = writer.finish(generation)?;
        self.out.took(entry);
        Ok(())
    }

    /// What a signature of this image has to sign; asked for when all sections but `SIGN` are appended.
    ///
    /// # Errors
    /// [`ContainerError::Write`]: `CHNK` is written first if it is not there yet.
    pub fn statement(&mut self) -> Result<String, ContainerError> {
        self.append_table()?;
        let image_digest = self.finish_chunks()?;
        Ok(statement(
            self.identity.image_uuid,
            image_digest,
            live_digest(&self.out.directory),
        ))
    }

    /// Writes what is missing of `CHNK`, `DIR ` and `FOOT`. Does not sync and does not publish.
    ///
    /// # Errors
    /// [`ContainerError::WrongCount`] if there is no XML or no manifest.
    pub fn finish(mut self) -> Result<Finished, ContainerError> {
        self.append_table()?;
        let image_digest = self.finish_chunks()?;
        let payload_len = self.payload_end - self.payload_offset;
        let footer = Footer {
            layout: self.layout,
            identity: self.identity,
            parent: self.delta.as_ref().map(|delta| delta.parent),
            readonly_compatible: 0,
            compatible: 0,
            generation: 1,
            payload_offset: FileOffset(self.payload_offset),
            payload_len,
            stream_len: self.stream_len,
            directory_offset: FileOffset(0),
            directory_len: 0,
            directory_sha256: Digest::default(),
            image_digest,
            self_offset: FileOffset(0),
            previous_footer_offset: FileOffset(0),
        };
        let chunk_count = self.entries.len() as u64;
        self.out.seal(footer, chunk_count)
    }
}

/// Appends sections to a sink and keeps the directory.
pub(super) struct SectionAppender<'s> {
    pub(super) sink: &'s mut dyn Sink,
    /// The file offset at which the sink appends.
    pub(super) position: u64,
    pub(super) generation: u32,
    pub(super) directory: Vec<DirectoryEntry>,
}

impl SectionAppender<'_> {
    /// Appends one whole section.
    pub(super) fn append(
        &mut self,
        section: SectionType,
        payload: &[u8],
    ) -> Result<(), ContainerError> {
        let mut writer = SectionWriter::begin(
            &mut *self.sink,
            self.position,
            section,
            payload.len() as u64,
        )?;
        writer.write(payload)?;
        let entry = writer.finish(self.generation)?;
        self.took(entry);
        Ok(())
    }

    /// Appends bytes that are no section.
    fn append_payload(&mut self, bytes: &[u8]) -> Result<(), ContainerError> {
        let at = FileOffset(self.position);
        self.sink
            .append(bytes)
            .map_err(|source| ContainerError::Write { at, source })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Lets the sink append at the position, behind what was written in its place.
    fn append_from_here(&mut self) -> Result<(), ContainerError> {
        let at = FileOffset(self.position);
        let moved = self.sink.append_from(self.position);
        moved.map_err(|source| ContainerError::Write { at, source })
    }

    /// Notes a section that was just appended.
    fn took(&mut self, entry: DirectoryEntry) {
        self.position += entry.length;
        self.directory.push(entry);
    }

    /// Whether a live section of this type is there.
    pub(super) fn has(&self, section: SectionType) -> bool {
        self.directory
            .iter()
            .any(|entry| entry.is_live && entry.section == section)
    }

    /// Appends directory and footer. `footer` says everything but where they are.
    pub(super) fn seal(
        mut self,
        footer: Footer,
        chunk_count: u64,
    ) -> Result<Finished, ContainerError> {
        let listed = std::mem::take(&mut self.directory);
        let payload = directory_payload(&listed)?;
        let directory_offset = FileOffset(self.position);
        let directory_len = payload.len() as u64 + super::section::OVERHEAD;
        let self_offset = FileOffset(self.position + directory_len);
        let footer = Footer {
            directory_offset,
            directory_len,
            self_offset,
            ..footer
        };
        check_entries(&listed, &footer)?;
        self.append(SectionType::Directory, &payload)?;
        let directory_sha256 = self
            .directory
            .last()
            .map(|entry| entry.sha256)
            .unwrap_or_default();
        let footer = Footer {
            directory_sha256,
            ..footer
        };
        self.append(SectionType::Footer, &footer.payload())?;
        Ok(Finished {
            image_digest: footer.image_digest,
            generation: footer.generation,
            file_len: self.position,
            stream_len: footer.stream_len,
            stored_len: footer.payload_len,
            chunk_count,
        })
    }
}
