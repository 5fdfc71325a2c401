//! The working set: what a guest asked for first, kept in its image for later restores.

use super::desk::Slot;
use crate::container::{ChunkPages, Image, SectionType, working_set_payload};
use crate::error::Result;
use crate::image::{self, OpenedImage};
use crate::store::AnyFile;
use crate::units::ChunkIndex;

/// What an earlier restore recorded, as places among the chunks that hold pages. A record that cannot be read is as good
/// as none: it only says what to do first.
pub fn recorded(image: &Image<AnyFile>, pages: &ChunkPages<'_>) -> Vec<Slot> {
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
    let seen = opened.image().statement();
    // Our own shared lock would keep us away.
    drop(opened);
    image::change(&path, Some(&seen), |edit| {
        edit.replace(SectionType::WorkingSet, &working_set_payload(chunks))?;
        Ok(())
    })?;
    Ok(())
}
