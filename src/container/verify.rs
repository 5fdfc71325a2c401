//! Holds everything but the chunks' own bytes against its digests and rules, in bounded memory.
//!
//! Source: spec/container.md §3 to §9.

use std::ops::ControlFlow;

use crate::bytes::ReadAt;

use super::chunk_table::ChunkEntry;
use super::directory::DirectoryEntry;
use super::error::ContainerError;
use super::layout::{Layout, MAX_XML_LEN, SectionType};
use super::reader::{Image, read_footer};
use super::section::{digest_section, read_at};
use super::{head, layout};
use crate::units::FileOffset;

/// What is told of each problem, and may end the search.
type Report<'a> = dyn FnMut(ContainerError) -> ControlFlow<()> + 'a;

impl<R: ReadAt> Image<R> {
    /// Checks every section of every generation, and the chunk table with all its rules; not the chunks themselves.
    ///
    /// # Errors
    /// The first problem.
    pub fn verify_sections(&self) -> Result<(), ContainerError> {
        let mut first = Ok(());
        let _ = self.verify(&mut |problem| {
            first = Err(problem);
            ControlFlow::Break(())
        });
        first
    }

    /// As [`Image::verify_sections`], but goes on and gives all problems.
    pub fn problems(&self) -> Vec<ContainerError> {
        let mut problems = Vec::new();
        let _ = self.verify(&mut |problem| {
            problems.push(problem);
            ControlFlow::Continue(())
        });
        problems
    }

    fn verify(&self, report: &mut Report<'_>) -> ControlFlow<()> {
        for entry in &self.directory {
            let checked = self.check_section(entry);
            if let Err(problem) = checked.and_then(|()| self.check_content(entry)) {
                report(problem)?;
            }
        }
        self.check_table(report)
    }

    /// Holds all of `HEAD`, if there is one, against its digest; of it only the fixed part is looked at when an image is opened.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn verify_head(&self) -> Result<(), ContainerError> {
        let head = self.directory.first();
        match head.filter(|first| first.section == SectionType::Head) {
            Some(entry) => self.check_section(entry),
            None => Ok(()),
        }
    }

    /// Frame, checksum and digest of one section.
    fn check_section(&self, entry: &DirectoryEntry) -> Result<(), ContainerError> {
        let (section, at, expected) = (entry.section, entry.offset, entry.sha256);
        let (header, found) =
            digest_section(&self.reader, at.0, at.0.saturating_add(entry.length))?;
        if header.section != section {
            return Err(ContainerError::WrongType {
                expected: section,
                found: header.section,
                at,
            });
        }
        if header.total_len() != entry.length {
            let (expected, found) = (entry.length, header.total_len());
            return Err(ContainerError::LengthMismatch {
                section,
                at,
                expected,
                found,
            });
        }
        match expected == found {
            true => Ok(()),
            false => Err(ContainerError::SectionDigest {
                section,
                at,
                expected,
                found,
            }),
        }
    }

    /// What one whole section means; the chunk table is checked by itself.
    fn check_content(&self, entry: &DirectoryEntry) -> Result<(), ContainerError> {
        match entry.section {
            SectionType::Footer => self.check_earlier_footer(entry),
            SectionType::Head => self.check_provisional(entry),
            SectionType::Xml if entry.is_live => self.xml().map(drop),
            SectionType::Manifest if entry.is_live => self.manifest().map(drop),
            SectionType::Signature if entry.is_live => self.signatures().map(drop),
            SectionType::PageMap if entry.is_live => self.page_map().map(drop),
            SectionType::WorkingSet if entry.is_live => self.working_set().map(drop),
            _ => Ok(()),
        }
    }

    /// The footer of an earlier generation: same save, same payload.
    fn check_earlier_footer(&self, entry: &DirectoryEntry) -> Result<(), ContainerError> {
        let (section, at) = (SectionType::Footer, entry.offset);
        let earlier = read_footer(&self.reader, at.0.saturating_add(layout::FOOTER_LEN as u64))?;
        let this = &self.footer;
        let disagrees = |field| Err(ContainerError::Disagrees { section, field, at });
        if earlier.identity != this.identity {
            return disagrees("IMAGE_UUID");
        }
        if earlier.parent != this.parent {
            return disagrees("PARENT_UUID");
        }
        if (earlier.payload_offset, earlier.payload_len) != (this.payload_offset, this.payload_len)
        {
            return disagrees("PAYLOAD_LEN");
        }
        if (earlier.layout, earlier.image_digest) != (this.layout, this.image_digest) {
            return disagrees("IMAGE_DIGEST");
        }
        match earlier.generation == entry.generation {
            true => Ok(()),
            false => disagrees("GENERATION"),
        }
    }

    /// The whole of `HEAD`.
    fn check_provisional(&self, entry: &DirectoryEntry) -> Result<(), ContainerError> {
        const LIMIT: u64 = layout::MAX_MANIFEST_LEN + MAX_XML_LEN + 64;
        let (section, at, len) = (entry.section, entry.offset, entry.length);
        if len > LIMIT {
            return Err(ContainerError::TooLarge {
                section,
                at,
                len,
                limit: LIMIT,
            });
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        read_at(&self.reader, &mut bytes, at.0)?;
        head::parse_head(&bytes).map(drop)
    }

    /// Every page of the chunk table, and that the chunks fill the payload.
    fn check_table(&self, report: &mut Report<'_>) -> ControlFlow<()> {
        if let Err(problem) = self.check_text_frame() {
            report(problem)?;
        }
        let mut raw_lens = Vec::new();
        let mut previous: Option<ChunkEntry> = None;
        for page in 0..self.table_page_count() {
            match self.table_page_behind(page, previous) {
                Ok(entries) => {
                    self.check_gaps(&entries, previous, report)?;
                    self.check_twins(&entries, report)?;
                    raw_lens.extend(entries.iter().map(|entry| entry.raw_len));
                    previous = entries.last().copied();
                }
                Err(problem) => {
                    report(problem)?;
                    return ControlFlow::Continue(());
                }
            }
        }
        if let Some(last) = previous {
            self.check_end(&last, report)?;
        }
        match self.check_page_map(&raw_lens) {
            Ok(()) => ControlFlow::Continue(()),
            Err(problem) => report(problem),
        }
    }

    /// The last chunk ends where stream and payload end; in layout `mapped` zeros may follow.
    fn check_end(&self, last: &ChunkEntry, report: &mut Report<'_>) -> ControlFlow<()> {
        let (chunk, at) = (last.index, last.stored_offset);
        if last.stream_end() != self.stream_len() {
            report(ContainerError::WrongChunk {
                chunk,
                field: "STREAM_OFFSET",
                at,
            })?;
        }
        let end = self.footer.payload_end().unwrap_or(u64::MAX);
        match self.footer.layout {
            Layout::Mapped => self.check_zeros(last.stored_end(), end, report),
            _ if self.extent(last).end == end => ControlFlow::Continue(()),
            _ => report(ContainerError::WrongChunk {
                chunk,
                field: "STORED_LEN",
                at,
            }),
        }
    }

    /// That the parent has the chunks that a delta needs, if it was found.
    fn check_twins(&self, entries: &[ChunkEntry], report: &mut Report<'_>) -> ControlFlow<()> {
        if self.parent().is_none() {
            return ControlFlow::Continue(());
        }
        for entry in entries {
            if let Err(problem) = self.twin(entry) {
                report(problem)?;
            }
        }
        ControlFlow::Continue(())
    }

    /// Bytes between chunks, which only layout `mapped` has.
    fn check_gaps(
        &self,
        entries: &[ChunkEntry],
        previous: Option<ChunkEntry>,
        report: &mut Report<'_>,
    ) -> ControlFlow<()> {
        if self.footer.layout != Layout::Mapped {
            return ControlFlow::Continue(());
        }
        let mut end = previous.map_or(0, |previous| previous.stored_end());
        for entry in entries {
            self.check_zeros(end, entry.stored_offset.0, report)?;
            end = entry.stored_end();
        }
        ControlFlow::Continue(())
    }

    fn check_zeros(&self, start: u64, end: u64, report: &mut Report<'_>) -> ControlFlow<()> {
        match self.find_nonzero(start, end) {
            Ok(None) => ControlFlow::Continue(()),
            Ok(Some(at)) => report(ContainerError::PayloadGap { at }),
            Err(problem) => report(problem),
        }
    }

    fn find_nonzero(&self, start: u64, end: u64) -> Result<Option<FileOffset>, ContainerError> {
        const PIECE_LEN: u64 = 1 << 16;
        let mut at = start;
        let mut buf = Vec::new();
        while at < end {
            let data = self.reader.next_data(at);
            let data = data.map_err(|source| ContainerError::Read {
                at: FileOffset(at),
                source,
            })?;
            // A hole is zero, however long it takes to read it.
            at = data.max(at);
            if at >= end {
                break;
            }
            buf.resize(usize::try_from((end - at).min(PIECE_LEN)).unwrap_or(0), 0);
            read_at(&self.reader, &mut buf, at)?;
            if let Some(position) = buf.iter().position(|byte| *byte != 0) {
                return Ok(Some(FileOffset(at + position as u64)));
            }
            at += buf.len() as u64;
        }
        Ok(None)
    }

    /// Holds the page map's runs against the chunks' lengths.
    fn check_page_map(&self, raw_lens: &[u32]) -> Result<(), ContainerError> {
        let at = self
            .live(SectionType::PageMap)
            .next()
            .map(|entry| entry.offset);
        let (Some(at), Ok(Some(page_map))) = (at, self.page_map()) else {
            return Ok(()); // a page map that cannot be read was already reported
        };
        page_map.check_chunks(raw_lens, at)
    }
}
