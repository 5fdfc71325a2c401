//! The working set: what a guest asked for first, kept in its image for later restores.

use super::desk::Slot;
use crate::bytes::Sink;
use crate::container::{
    ChunkPages, Edit, Image, SectionType, Signature, sign_payload, working_set_payload,
};
use crate::error::Result;
use crate::host::keys::SigningKey;
use crate::image::{OpenedImage, Trust};
use crate::restore::RestoreError;
use crate::store::{FileAppender, FileSource};
use crate::units::ChunkIndex;

/// What an earlier restore recorded, as places among the chunks that hold pages. A record that cannot be read is as good
/// as none: it only says what to do first.
pub fn recorded(image: &Image<FileSource>, pages: &ChunkPages<'_>) -> Vec<Slot> {
    let chunks = image.working_set().unwrap_or_default();
    let slots = chunks
        .iter()
        .filter_map(|chunk| pages.chunks().binary_search(chunk).ok());
    slots.collect()
}

/// Writes the order into the image as a new generation, signed if the image was ours before.
///
/// # Errors
/// If somebody uses the image, or it cannot be written; the guest has its memory all the same.
pub fn write(opened: OpenedImage, chunks: &[ChunkIndex]) -> Result<()> {
    let Some(path) = opened.location().path().map(std::path::Path::to_owned) else {
        return Ok(());
    };
    let is_ours = Trust::of(opened.image())?.is_trusted();
    // Our own shared lock would keep us away.
    drop(opened);
    let mut appender = FileAppender::open(&path)?;
    let copy = appender.file().try_clone();
    let failed = |source| RestoreError::NotRecorded { source };
    let image = Image::open(FileSource::from(copy.map_err(failed)?))?;
    let mut edit = Edit::begin(&image, &mut appender)?;
    edit.replace(SectionType::WorkingSet, &working_set_payload(chunks))?;
    if is_ours {
        edit.remove(SectionType::Signature)?;
        let statement = edit.statement();
        let armored = SigningKey::load_or_create()?.sign(&statement)?;
        let signature = sign_payload(&Signature { statement, armored })?;
        edit.add(SectionType::Signature, &signature)?;
    }
    edit.finish()?;
    Ok(appender.sync().map_err(failed)?)
}
