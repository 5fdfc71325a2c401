//! Appends a generation to an image: new sections, a directory of everything, a footer. Nothing is rewritten.
//!
//! Source: spec/container.md §9.

use crate::bytes::{ReadAt, Sink};
use crate::digest::Digest;
use crate::units::FileOffset;

use super::directory::{DirectoryEntry, live_digest};
use super::error::ContainerError;
use super::footer::Footer;
use super::layout::{FOOTER_LEN, SectionType};
use super::reader::Image;
use super::section::digest_section;
use super::signature::statement;
use super::writer::{Finished, SectionAppender};

/// The next generation of an image.
pub struct Edit<'s> {
    out: SectionAppender<'s>,
    footer: Footer,
    chunk_count: u64,
}

impl std::fmt::Debug for Edit<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edit")
            .field("generation", &self.footer.generation)
            .finish_non_exhaustive()
    }
}

impl<'s> Edit<'s> {
    /// Begins an edit of `image`. What `sink` appends must land at the end of the image's file.
    ///
    /// # Errors
    /// [`ContainerError::EditOfTorn`]; [`ContainerError::UnknownReadonlyCompatible`].
    pub fn begin<R: ReadAt>(
        image: &Image<R>,
        sink: &'s mut dyn Sink,
    ) -> Result<Self, ContainerError> {
        let previous = image.footer;
        if image.is_torn() {
            let (valid_len, file_len) = (image.len(), image.reader.len());
            return Err(ContainerError::EditOfTorn {
                valid_len,
                file_len,
            });
        }
        if previous.readonly_compatible != 0 {
            let (bits, at) = (previous.readonly_compatible, previous.self_offset);
            return Err(ContainerError::UnknownReadonlyCompatible { bits, at });
        }
        let generation = previous
            .generation
            .checked_add(1)
            .ok_or(ContainerError::Full)?;
        let mut directory = image.directory.clone();
        directory.push(DirectoryEntry {
            section: SectionType::Directory,
            generation: previous.generation,
            offset: previous.directory_offset,
            length: previous.directory_len,
            sha256: previous.directory_sha256,
            is_live: false,
        });
        directory.push(footer_entry(image)?);
        let out = SectionAppender {
            sink,
            position: image.len(),
            generation,
            directory,
        };
        let footer = Footer {
            generation,
            previous_footer_offset: previous.self_offset,
            ..previous
        };
        Ok(Edit {
            out,
            footer,
            chunk_count: image.chunk_count(),
        })
    }

    /// Appends a section that takes the place of all live ones of its type.
    ///
    /// # Errors
    /// [`ContainerError::SectionNotAllowed`] for `HEAD`, `CHNK`, `DIR `, `FOOT` and `DATA`.
    pub fn replace(&mut self, section: SectionType, payload: &[u8]) -> Result<(), ContainerError> {
        if matches!(section, SectionType::Xml | SectionType::Manifest) {
            self.supersede(section);
            return self.out.append(section, payload);
        }
        self.remove(section)?;
        self.add(section, payload)
    }

    /// Appends a section beside those that are there, as a signature is.
    ///
    /// # Errors
    /// [`ContainerError::SectionNotAllowed`] if there may be only one and it is there.
    pub fn add(&mut self, section: SectionType, payload: &[u8]) -> Result<(), ContainerError> {
        let is_free = match section {
            SectionType::Signature | SectionType::Other(_) => true,
            SectionType::PageMap | SectionType::WorkingSet => !self.out.has(section),
            _ => false,
        };
        match is_free {
            true => self.out.append(section, payload),
            false => Err(ContainerError::SectionNotAllowed { section }),
        }
    }

    /// Supersedes all live sections of a type that an image can be without.
    ///
    /// # Errors
    /// [`ContainerError::SectionNotAllowed`] for types it cannot be without.
    pub fn remove(&mut self, section: SectionType) -> Result<(), ContainerError> {
        if section.is_critical() {
            return Err(ContainerError::SectionNotAllowed { section });
        }
        self.supersede(section);
        Ok(())
    }

    fn supersede(&mut self, section: SectionType) {
        let same = self
            .out
            .directory
            .iter_mut()
            .filter(|entry| entry.section == section);
        same.for_each(|entry| entry.is_live = false);
    }

    /// What a signature of the edited image has to sign; asked for when all sections but `SIGN` are appended.
    pub fn statement(&self) -> String {
        let directory = live_digest(&self.out.directory);
        statement(
            self.footer.identity.image_uuid,
            self.footer.image_digest,
            directory,
        )
    }

    /// Writes directory and footer. Does not sync and does not publish.
    ///
    /// # Errors
    /// [`ContainerError::Write`]; [`ContainerError::Full`].
    pub fn finish(self) -> Result<Finished, ContainerError> {
        let footer = Footer {
            directory_sha256: Digest::default(),
            ..self.footer
        };
        self.out.seal(footer, self.chunk_count)
    }
}

/// The entry of the image's own footer.
fn footer_entry<R: ReadAt>(image: &Image<R>) -> Result<DirectoryEntry, ContainerError> {
    let offset: FileOffset = image.footer.self_offset;
    let (_, sha256) = digest_section(&image.reader, offset.0, image.len())?;
    Ok(DirectoryEntry {
        section: SectionType::Footer,
        generation: image.footer.generation,
        offset,
        length: FOOTER_LEN as u64,
        sha256,
        is_live: false,
    })
}
