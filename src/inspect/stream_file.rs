//! Files of others: a bare migration stream, as QEMU's `migrate` writes it, and a libvirt save image.

use std::io::Read;

use serde::Serialize;

use super::verify::{StreamCheck, StreamFacts, device_name};
use crate::error::{Error, Result};
use crate::image::foreign::ForeignFile;
use crate::image::{LibvirtSave, OpenedImage, Origin};
use crate::progress::Progress;
use crate::store::Location;

/// A file of others in short.
#[derive(Debug, Clone, Serialize)]
pub struct StreamDescription {
    /// The file, as it was named.
    pub stream: String,
    /// What libvirt says of it; absent of a bare stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub libvirt: Option<LibvirtSave>,
    /// Whether it was read to its end and nothing is missing.
    pub is_whole: bool,
    /// Whether pages lie at places of their own.
    pub is_mapped_ram: bool,
    /// The resolved machine type, if the stream names it.
    pub machine_type: Option<String>,
    /// The run state in the stream.
    pub run_state: Option<String>,
    /// Bytes that were parsed, decompressed.
    pub bytes: u64,
    /// Whether QEMU's JSON about the device sections is there.
    pub vmdescription: bool,
    /// What it holds.
    pub contents: StreamFacts,
}

/// Reads a file of others to its end and describes it. A broken one is described as far as it was read, and comes with what
/// is wrong with it.
///
/// # Errors
/// What the file system says; what is wrong with it before anything can be told of it.
pub fn describe_foreign(
    foreign: ForeignFile,
    location: &Location,
    progress: &dyn Progress,
) -> Result<(StreamDescription, Option<Error>)> {
    let mut description = StreamDescription {
        stream: location.to_string(),
        libvirt: match foreign.origin() {
            Origin::LibvirtSave(save) => Some(save),
            _ => None,
        },
        is_whole: false,
        is_mapped_ram: foreign.is_mapped,
        machine_type: None,
        run_state: None,
        bytes: 0,
        vmdescription: false,
        contents: StreamCheck::default().facts_so_far(),
    };
    if foreign.is_mapped {
        let opened = match foreign.open(location, progress) {
            Ok(opened) => opened,
            Err(broken) => return Ok((description, Some(broken))),
        };
        describe_mapped(&mut description, &opened)?;
        return Ok((description, None));
    }
    let mut stream = match foreign.stream() {
        Ok(stream) => stream,
        Err(broken) => return Ok((description, Some(broken.into()))),
    };
    progress.begin("reading", None);
    let mut check = StreamCheck::default();
    let mut buf = vec![0; 1 << 20];
    let broken = loop {
        match stream.read(&mut buf) {
            Ok(0) => break None,
            Ok(len) => {
                if let Err(broken) = check.take(&buf[..len]) {
                    break Some(broken);
                }
                progress.advance(len as u64);
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => break Some(stream.explain(error).into()),
        }
    };
    progress.end();
    description.machine_type = check.machine_type();
    description.bytes = check.position();
    description.contents = check.facts_so_far();
    if broken.is_some() {
        return Ok((description, broken));
    }
    match check.finish() {
        Ok(summary) => {
            description.is_whole = true;
            description.run_state.clone_from(&summary.run_state);
            description.vmdescription = summary.vmdescription.is_some();
            description.contents = StreamFacts::of(&summary);
            Ok((description, None))
        }
        Err(broken) => Ok((description, Some(broken))),
    }
}

/// A stream that was opened as an image knows all of it already.
fn describe_mapped(description: &mut StreamDescription, opened: &OpenedImage) -> Result<()> {
    let manifest = opened.image().manifest()?;
    description.is_whole = true;
    description.machine_type = Some(manifest.machine.machine_type);
    if description.libvirt.is_none() {
        description.run_state = Some(manifest.guest.run_state);
    }
    description.bytes = opened.image().stream_len();
    let blocks = manifest.ram_blocks.into_iter();
    let sections = manifest.sections.into_iter();
    let stream = manifest.stream.as_ref();
    description.vmdescription = stream.is_some_and(|stream| stream.vmdescription);
    description.contents = StreamFacts {
        ram_blocks: blocks.map(|it| (it.idstr, it.used_length)).collect(),
        data_pages: stream.map_or(0, |stream| stream.data_pages),
        zero_pages: stream.map_or(0, |stream| stream.zero_pages),
        devices: sections
            .map(|it| device_name(&it.idstr, it.instance_id))
            .collect(),
    };
    Ok(())
}
