//! Makes an image of one layout from one of another, an image from what QEMU or libvirt wrote, and what they read from an
//! image.
//!
//! ```text
//! open → check sections → recode (each chunk verified) → manifest → seal → publish
//! ```
//!
//! XML, labels and all that a restore needs to know stay. Between `zstd` and `raw` the image digest stays too, and is
//! held against the first; an image of layout `mapped` has a stream of its own, and the manifest names the digest of the
//! image that it was made from. A delta is read with its parents, so what is made of it is a full image unless a delta of another
//! parent is asked for. The new image is signed if, and only if, the old one was by somebody this user trusts or the
//! user vouches for it.

pub mod elf_core;
mod error;
mod export;
mod import;

use serde::Serialize;
use uuid::Uuid;

pub use error::ConvertError;
pub use export::{ExportForm, ExportReport, ExportRequest, export};
pub use import::import;

use crate::bytes::{PublishError, Sink};
use crate::container::{
    Finished, Head, Image, ImageWriter, Layout, Manifest, SectionType, Signature, sign_payload,
};
use crate::error::Result;
use crate::host::keys::SigningKey;
use crate::image::foreign::describe::Described;
use crate::image::{OpenedImage, Origin, ParentError, Trust};
use crate::pipeline::{self, Encoded, Encoding, PipelineError};
use crate::progress::Progress;
#[cfg(feature = "s3")]
use crate::store::object::ObjectSink;
use crate::store::{AnyFile, FileSink, Location, PipeSink};
use crate::stream::StreamSummary;

/// What is to be made.
pub struct ConvertRequest {
    /// The new image.
    pub target: Location,
    /// Whether an image of that name may be replaced.
    pub may_replace: bool,
    /// Layout, level, chunk size, threads.
    pub encoding: Encoding,
    /// This host's key.
    pub key: Option<SigningKey>,
    /// Whether the user vouches for what is converted: then the new image is signed whoever made the old file.
    pub is_vouched: bool,
    /// Domain XML for a guest whose file has none.
    pub xml: Option<String>,
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct ConvertReport {
    /// The new image; `-` for a pipe.
    pub image: String,
    /// Its layout.
    pub layout: String,
    /// The layout of the one that it was made from, or what kind of file that was.
    pub from_layout: String,
    /// Its UUID, which is that of the one it was made from: the same save.
    pub image_uuid: Uuid,
    /// Names what was saved.
    pub image_digest: String,
    /// The digest of the image it was made from; the same between `zstd` and `raw`. A file of others had none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_digest: Option<String>,
    /// Bytes of the file, holes included.
    pub file_bytes: u64,
    /// Bytes of QEMU's migration stream in it.
    pub stream_bytes: u64,
    /// Whether it is signed: the one that it was made from was trusted, or vouched for.
    pub is_signed: bool,
    /// What a restore will lack of the configuration, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// Converts an image.
///
/// # Errors
/// [`ConvertError`], or what a module below it met. No image of the new name exists then.
pub fn convert(
    opened: &OpenedImage,
    request: &ConvertRequest,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    with_sink(request, |sink| write(opened, request, sink, progress))
}

/// Does `work` with what the new image goes to.
fn with_sink(
    request: &ConvertRequest,
    work: impl FnOnce(&mut dyn Sink) -> Result<ConvertReport>,
) -> Result<ConvertReport> {
    match &request.target {
        Location::Pipe | Location::Object(_) if request.encoding.layout == Layout::Mapped => {
            Err(PipelineError::NoPlaces.into())
        }
        Location::Pipe => work(&mut PipeSink::stdout()?),
        Location::Path(path) => work(&mut FileSink::create(path, request.may_replace)?),
        #[cfg(feature = "s3")]
        Location::Object(there) => work(&mut ObjectSink::create(there, request.may_replace)?),
        far => Err(far.refused().into()),
    }
}

fn write(
    opened: &OpenedImage,
    request: &ConvertRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let image = opened.image();
    // What others wrote has none, and QEMU leaves bytes between the pages of a mapped-ram file.
    if opened.origin().is_image() {
        image.verify_sections()?;
    }
    let key = request.key.as_ref();
    let key = key.filter(|_| request.is_vouched || is_trusted(image));
    let (described, mut problems) = match (&request.xml, opened.origin().is_image()) {
        (Some(xml), true) => {
            let described = import::describe_anew(image, xml)?;
            let problems = described.problems.clone();
            (Some(described), problems)
        }
        _ => (None, opened.problems().to_vec()),
    };
    problems.dedup();
    let is_image = opened.origin().is_image();
    let twins = request.encoding.twins.as_ref();
    if twins.is_some_and(|it| it.parent_id().image_uuid == image.identity().image_uuid) {
        return Err(ParentError::SameSave.into());
    }
    let source = Source {
        image,
        is_image,
        described,
    };
    let finished = write_image(&source, request, key, sink, progress)?;
    publish(sink, progress)?;
    Ok(ConvertReport {
        image: request.target.to_string(),
        layout: request.encoding.layout.to_string(),
        from_layout: match opened.origin() {
            Origin::Image => image.layout().to_string(),
            origin => import::kind(origin),
        },
        image_uuid: image.identity().image_uuid,
        image_digest: finished.image_digest.to_string(),
        from_digest: is_image.then(|| image.image_digest().to_string()),
        file_bytes: finished.file_len,
        stream_bytes: finished.stream_len,
        is_signed: key.is_some(),
        problems,
    })
}

/// Makes what was written durable, and gives it its name.
fn publish(sink: &mut dyn Sink, progress: &dyn Progress) -> Result<()> {
    sink.sync().map_err(ConvertError::Write)?;
    if progress.is_cancelled() {
        return Err(PipelineError::Cancelled.into());
    }
    sink.publish().map_err(|error| match error {
        PublishError::NotPublished(source) => ConvertError::Publish(source),
        PublishError::Unknown(source) => ConvertError::PublishUnknown(source),
    })?;
    Ok(())
}

/// What is converted.
struct Source<'a> {
    image: &'a Image<AnyFile>,
    /// Whether it is one, whose digest is worth to be named.
    is_image: bool,
    /// Its configuration, if the user gave it one.
    described: Option<Described>,
}

/// Whether somebody this user trusts vouches for the image; if that cannot be told, nobody does.
fn is_trusted(image: &Image<AnyFile>) -> bool {
    Trust::of(image).is_ok_and(|trust| trust.is_trusted())
}

fn write_image(
    source: &Source<'_>,
    request: &ConvertRequest,
    key: Option<&SigningKey>,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<Finished> {
    let image = source.image;
    let manifest = match &source.described {
        Some(described) => described.manifest.clone(),
        None => image.manifest()?,
    };
    let encoding = request.encoding.fitting(manifest.machine.memory_bytes);
    let keeps_stream = pipeline::keeps_stream(image.layout(), encoding.layout);
    let max_chunk_len = match keeps_stream {
        true => image.max_chunk_len(),
        false => encoding.max_chunk_len(),
    };
    let (manifest_json, xml) = match &source.described {
        Some(described) => {
            let json = described.manifest.to_json();
            let json = json.map_err(ConvertError::Manifest)?;
            (json, described.xml.clone())
        }
        None => (image.manifest_json()?, image.xml()?),
    };
    let head = Head {
        manifest_json: &manifest_json,
        xml: &xml,
    };
    let identity = image.identity();
    let mut target = encoding.begin(sink, identity, max_chunk_len, head)?;
    progress.begin("converting", Some(work_of(image, &manifest, keeps_stream)));
    let encoded = pipeline::recode(image, &mut target, &encoding, progress)?;
    progress.end();
    target.append_section(SectionType::Xml, xml.as_bytes())?;
    match encoded {
        Some(encoded) => {
            let mut manifest = manifest;
            note(&mut manifest, &encoded.stream, source);
            // Only a stream that is read from its beginning has such a place.
            if let Some(facts) = manifest
                .stream
                .as_mut()
                .filter(|_| encoding.layout == Layout::Mapped)
            {
                facts.device_state_at = None;
            }
            append_anew(&manifest, encoded, &mut target)?;
        }
        None => append_kept(image, &manifest_json, &mut target)?,
    }
    sign(&mut target, key)?;
    Ok(target.finish()?)
}

/// Signs the image, if there is a key for it.
fn sign(target: &mut ImageWriter<'_>, key: Option<&SigningKey>) -> Result<()> {
    if let Some(key) = key {
        let statement = target.statement()?;
        let armored = key.sign(&statement)?;
        let signature = sign_payload(&Signature { statement, armored })?;
        target.append_section(SectionType::Signature, &signature)?;
    }
    Ok(())
}

/// How much the progress counts up to: a stream that stays is counted, one that is cut anew by its pages.
fn work_of(image: &Image<AnyFile>, manifest: &Manifest, keeps_stream: bool) -> u64 {
    match keeps_stream {
        true => image.stream_len(),
        false => manifest
            .ram_blocks
            .iter()
            .map(|block| block.used_length)
            .sum(),
    }
}

/// The sections about a stream that is the same.
fn append_kept(
    image: &Image<AnyFile>,
    manifest_json: &[u8],
    target: &mut ImageWriter<'_>,
) -> Result<()> {
    if target.finish_chunks()? != image.image_digest() {
        return Err(ConvertError::OtherDigest.into());
    }
    target.append_section(SectionType::Manifest, manifest_json)?;
    let is_map = |section: SectionType| section == SectionType::PageMap;
    let mut sections = image.sections().iter();
    if let Some(entry) = sections.find(|entry| entry.is_live && is_map(entry.section)) {
        let page_map = image.section_payload(entry, u32::MAX.into())?;
        target.append_section(SectionType::PageMap, &page_map)?;
    }
    Ok(())
}

/// The sections about a stream that was cut anew.
fn append_anew(manifest: &Manifest, encoded: Encoded, target: &mut ImageWriter<'_>) -> Result<()> {
    let json = manifest.to_json().map_err(ConvertError::Manifest)?;
    target.append_section(SectionType::Manifest, &json)?;
    if let Some(page_map) = encoded.page_map {
        target.append_section(SectionType::PageMap, &page_map.finish())?;
    }
    Ok(())
}

/// Notes what is another now, and which image it was made from.
fn note(manifest: &mut Manifest, stream: &StreamSummary, from: &Source<'_>) {
    manifest.capabilities.clone_from(&stream.capabilities);
    if let Some(facts) = &mut manifest.stream {
        facts.len = stream.len;
        facts.data_pages = stream.data_pages;
        facts.zero_pages = stream.zero_pages;
        facts.vmdescription = stream.vmdescription.is_some();
        facts.device_state_at = Some(stream.device_state.0);
        facts.made_from = from.is_image.then(|| from.image.image_digest().to_string());
    }
}
