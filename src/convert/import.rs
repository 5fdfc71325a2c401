//! What QEMU or libvirt wrote → an image.
//!
//! ```text
//! recognise → describe → encode (decompressed, parsed, hashed) → manifest → seal → publish
//! ```
//!
//! A stream is read once, also from a pipe; one of the mapped-ram layout is read where it lies.

use super::{ConvertError, ConvertReport, ConvertRequest, convert, publish, sign, with_sink};
use crate::bytes::Sink;
use crate::config::xml::Document;
use crate::container::{Head, Identity, Image};
use crate::error::Result;
use crate::image::Origin;
use crate::image::foreign::describe::{Described, Known, describe};
use crate::image::foreign::{About, ForeignFile, append_sections};
use crate::pipeline::{self, PipelineError};
use crate::progress::Progress;
use crate::store::{AnyFile, Location};

/// Makes an image of a file of others, which lies at `location`.
///
/// # Errors
/// [`ConvertError`], [`ForeignError`](crate::image::ForeignError), or what is wrong with the stream. No image of the new
/// name exists then.
pub fn import(
    mut foreign: ForeignFile,
    location: &Location,
    request: &ConvertRequest,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    if let Some(xml) = &request.xml {
        if foreign.save.is_some() {
            return Err(ConvertError::HasXml.into());
        }
        foreign.xml = Some(readable(xml)?);
    }
    if foreign.is_mapped {
        let opened = foreign.open(location, progress)?;
        return convert(&opened, request, progress);
    }
    with_sink(request, |sink| {
        write(foreign, location, request, sink, progress)
    })
}

fn write(
    foreign: ForeignFile,
    location: &Location,
    request: &ConvertRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<ConvertReport> {
    let origin = foreign.origin();
    let about = About::of(&foreign, location);
    let mut stream = foreign.stream()?;
    let mut described = describe(&about.known(stream.machine_type.as_deref(), &stream.blocks));
    let encoding = request
        .encoding
        .fitting(described.manifest.machine.memory_bytes);
    let identity = Identity {
        image_uuid: uuid::Uuid::new_v4(),
        guest_uuid: described.manifest.guest.uuid,
    };
    let manifest = described
        .manifest
        .to_json()
        .map_err(ConvertError::Manifest)?;
    let head = Head {
        manifest_json: &manifest,
        xml: &described.xml,
    };
    let max_chunk_len = encoding.max_chunk_len();
    let mut image = encoding.begin(sink, identity, max_chunk_len, head)?;
    let memory = stream.blocks.iter().map(|(_, len)| *len);
    progress.begin("converting", Some(memory.fold(0, u64::saturating_add)));
    let encoded = match pipeline::encode(&mut stream, &mut image, &encoding, progress) {
        Err(PipelineError::Read(error)) => return Err(stream.explain(error).into()),
        Err(PipelineError::Stream(error)) => return Err(error.into()),
        other => other?,
    };
    progress.end();
    described.complete(&about.known(None, &[]), &encoded.stream);
    append_sections(&described, encoded, &mut image)?;
    let key = request.key.as_ref().filter(|_| request.is_vouched);
    sign(&mut image, key)?;
    let finished = image.finish()?;
    publish(sink, progress)?;
    Ok(ConvertReport {
        image: request.target.to_string(),
        layout: encoding.layout.to_string(),
        from_layout: kind(&origin),
        image_uuid: identity.image_uuid,
        image_digest: finished.image_digest.to_string(),
        from_digest: None,
        file_bytes: finished.file_len,
        stream_bytes: finished.stream_len,
        is_signed: key.is_some(),
        problems: described.problems,
    })
}

/// Describes the guest of an image without a configuration by the XML that the user gives it.
pub(super) fn describe_anew(image: &Image<AnyFile>, xml: &str) -> Result<Described> {
    let manifest = image.manifest()?;
    if !manifest.qemu.argv.is_empty() || manifest.guest.has_own_xml {
        return Err(ConvertError::HasXml.into());
    }
    let xml = readable(xml)?;
    let blocks = manifest.ram_blocks.iter();
    let blocks: Vec<_> = blocks
        .map(|block| (block.idstr.clone(), block.used_length))
        .collect();
    let mut described = describe(&Known {
        xml: Some(&xml),
        cookie: None,
        was_running: Some(manifest.guest.was_running),
        name: &manifest.guest.name,
        saved_at: std::time::SystemTime::UNIX_EPOCH,
        machine_type: Some(&manifest.machine.machine_type),
        blocks: &blocks,
    });
    let made = &mut described.manifest;
    made.saved_at = manifest.saved_at;
    made.guest.run_state = manifest.guest.run_state;
    made.ram_blocks = manifest.ram_blocks;
    made.sections = manifest.sections;
    made.capabilities = manifest.capabilities;
    made.labels = manifest.labels;
    made.stream = manifest.stream;
    made.other = manifest.other;
    Ok(described)
}

/// The XML, if it can be read at all.
fn readable(xml: &str) -> Result<String> {
    Document::parse(xml.as_bytes())?;
    Ok(xml.to_owned())
}

/// `libvirt zstd`, `stream`, `mapped-ram`.
pub(super) fn kind(origin: &Origin) -> String {
    match origin {
        Origin::Image => "image".to_owned(),
        Origin::Stream => "stream".to_owned(),
        Origin::MappedRam => "mapped-ram".to_owned(),
        Origin::LibvirtSave(save) => format!("libvirt {}", save.format),
    }
}
