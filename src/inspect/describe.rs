//! What an image says of itself, read from its footer, directory and manifest alone: the time it takes does not grow
//! with the guest's memory.

use std::collections::BTreeMap;

use serde::Serialize;
use uuid::Uuid;

use super::ways::{Ways, ways};
use crate::container::Manifest;
use crate::error::Result;
use crate::image::{OpenedImage, Trust};

/// An image in short; `manifest` has the rest.
#[derive(Debug, Clone, Serialize)]
pub struct ImageDescription {
    /// The image, as it was named.
    pub image: String,
    /// The version of its format.
    pub format_version: u32,
    /// `zstd`, `raw` or `mapped`.
    pub layout: String,
    /// The image's UUID.
    pub image_uuid: Uuid,
    /// Names what was saved, whatever the layout.
    pub image_digest: String,
    /// How often it was written: 1 plus the edits.
    pub generation: u32,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Bytes of QEMU's migration stream.
    pub stream_bytes: u64,
    /// Chunks that it lies in.
    pub chunks: u64,
    /// Of a delta: whose chunks it needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent: Option<ParentDescription>,
    /// Whose it is.
    pub trust: Trust,
    /// In which ways it can be restored here.
    pub restores: Ways,
    /// Bytes behind the last whole generation, if the last edit was cut off.
    pub torn_bytes: Option<u64>,
    /// The sections in it: type, generation, bytes, whether it is live.
    pub sections: Vec<SectionDescription>,
    /// Everything a restore needs to know.
    pub manifest: Manifest,
}

/// The parent of a delta.
#[derive(Debug, Clone, Serialize)]
pub struct ParentDescription {
    /// Its UUID.
    pub image_uuid: Uuid,
    /// Its image digest.
    pub image_digest: String,
    /// The name of its file when the delta was written.
    pub name: Option<String>,
    /// Where it and its own parents lie, nearest first; none if they are not all there.
    pub found: Vec<String>,
    /// What lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

fn parent_of(opened: &OpenedImage) -> Option<ParentDescription> {
    let parent = opened.image().parent_id()?;
    let places = opened.parents().iter();
    Some(ParentDescription {
        image_uuid: parent.image_uuid,
        image_digest: parent.image_digest.to_string(),
        name: opened.image().parent_name().map(str::to_owned),
        found: places.map(ToString::to_string).collect(),
        problem: opened.lack().map(ToString::to_string),
    })
}

/// One section.
#[derive(Debug, Clone, Serialize)]
pub struct SectionDescription {
    /// Its four letters, without a space at their end.
    #[serde(rename = "type")]
    pub section_type: String,
    /// The generation that wrote it.
    pub generation: u32,
    /// Where it begins in the file.
    pub offset: u64,
    /// Its bytes.
    pub len: u64,
    /// Whether it counts: not superseded.
    pub is_live: bool,
}

/// Describes an image.
///
/// # Errors
/// A section that cannot be read or does not match its digest.
pub fn describe(opened: &OpenedImage) -> Result<ImageDescription> {
    let image = opened.image();
    let sections = image.sections().iter().map(|entry| SectionDescription {
        section_type: entry
            .section
            .code()
            .trim_ascii_end()
            .escape_ascii()
            .to_string(),
        generation: entry.generation,
        offset: entry.offset.0,
        len: entry.length,
        is_live: entry.is_live,
    });
    let manifest = image.manifest()?;
    let trust = Trust::of(image)?;
    Ok(ImageDescription {
        restores: ways(opened, &manifest, &trust)?,
        image: opened.location().to_string(),
        format_version: crate::container::layout::FORMAT_VERSION,
        layout: image.layout().to_string(),
        image_uuid: image.identity().image_uuid,
        image_digest: image.image_digest().to_string(),
        generation: image.generation(),
        file_bytes: image.len(),
        stream_bytes: image.stream_len(),
        chunks: image.chunk_count(),
        parent: parent_of(opened),
        trust,
        torn_bytes: opened.torn().map(|torn| torn.file_len - torn.valid_len),
        sections: sections.collect(),
        manifest,
    })
}

impl ImageDescription {
    /// Its labels.
    pub fn labels(&self) -> &BTreeMap<String, String> {
        &self.manifest.labels
    }
}
