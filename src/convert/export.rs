//! An image → what QEMU or libvirt reads.
//!
//! ```text
//! open → check sections → header → decode (each chunk verified) → publish
//! ```
//!
//! What is written has no digests: of a flipped bit in it nobody would know.

use std::io::{self, Write};

use serde::Serialize;

use super::{ConvertError, publish};
use crate::bytes::Sink;
use crate::config::xml::Document;
use crate::container::{Image, Manifest};
use crate::error::Result;
use crate::image::OpenedImage;
use crate::image::foreign::compression::Encoder;
use crate::image::foreign::libvirt::{SaveFormat, SaveMetadata};
use crate::pipeline::{self, PipelineError};
use crate::progress::Progress;
#[cfg(feature = "s3")]
use crate::store::object::ObjectSink;
use crate::store::{AnyFile, FileSink, Location, PipeSink};

/// Where the stream begins in a save image of format `sparse`: a multiple of this.
const SPARSE_ALIGNMENT: usize = 4096;

/// What is to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportForm {
    /// A libvirt save image.
    Libvirt(SaveFormat),
    /// QEMU's migration stream, as `-incoming file:` takes it.
    Stream,
    /// The same with each page at a place of its own, for the capability `mapped-ram`.
    MappedRam,
}

/// What is to be made, and where.
pub struct ExportRequest {
    /// The new file.
    pub target: Location,
    /// Whether a file of that name may be replaced.
    pub may_replace: bool,
    /// What it is to be.
    pub form: ExportForm,
    /// Workers.
    pub threads: usize,
    /// Domain XML for libvirt instead of the image's.
    pub xml: Option<String>,
}

/// What was made.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// The new file; `-` for a pipe.
    pub file: String,
    /// `libvirt`, `stream` or `mapped-ram`.
    pub form: &'static str,
    /// How a libvirt save image has the stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<SaveFormat>,
    /// The digest of the image it was made from.
    pub from_digest: String,
    /// Bytes of the image's migration stream.
    pub stream_bytes: u64,
    /// What its user should know.
    pub warnings: Vec<String>,
}

/// Makes what others read of an image, every chunk of it verified.
///
/// # Errors
/// [`ConvertError`]; the first damaged chunk. No file of the new name exists then.
pub fn export(
    opened: &OpenedImage,
    request: &ExportRequest,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    match &request.target {
        Location::Pipe | Location::Object(_) if has_places(request.form) => {
            Err(ConvertError::NoPlaces.into())
        }
        Location::Pipe => write(opened, request, &mut PipeSink::stdout()?, progress),
        Location::Path(path) => {
            let mut sink = FileSink::create(path, request.may_replace)?;
            write(opened, request, &mut sink, progress)
        }
        #[cfg(feature = "s3")]
        Location::Object(there) => {
            let mut sink = ObjectSink::create(there, request.may_replace)?;
            write(opened, request, &mut sink, progress)
        }
        far => Err(far.refused().into()),
    }
}

fn has_places(form: ExportForm) -> bool {
    matches!(
        form,
        ExportForm::MappedRam | ExportForm::Libvirt(SaveFormat::Sparse)
    )
}

fn write(
    opened: &OpenedImage,
    request: &ExportRequest,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<ExportReport> {
    let image = opened.image();
    if opened.origin().is_image() {
        image.verify_sections()?;
    }
    let manifest = image.manifest()?;
    let mut warnings = Vec::new();
    let (front, format) = match request.form {
        ExportForm::Libvirt(format) => {
            let metadata = metadata(image, &manifest, request)?;
            warn(&manifest, &metadata, &mut warnings);
            let alignment = match format {
                SaveFormat::Sparse => SPARSE_ALIGNMENT,
                _ => 1,
            };
            let front = metadata.write(manifest.guest.was_running, format, alignment)?;
            (front, format)
        }
        ExportForm::Stream => (Vec::new(), SaveFormat::Raw),
        ExportForm::MappedRam => (Vec::new(), SaveFormat::Sparse),
    };
    progress.begin("converting", Some(image.stream_len()));
    match has_places(request.form) {
        true => write_places(image, &front, request.threads, sink, progress)?,
        false => write_stream(image, &front, format, request.threads, sink, progress)?,
    }
    progress.end();
    publish(sink, progress)?;
    Ok(ExportReport {
        file: request.target.to_string(),
        form: match request.form {
            ExportForm::Libvirt(_) => "libvirt",
            ExportForm::Stream => "stream",
            ExportForm::MappedRam => "mapped-ram",
        },
        format: matches!(request.form, ExportForm::Libvirt(_)).then_some(format),
        from_digest: image.image_digest().to_string(),
        stream_bytes: image.stream_len(),
        warnings,
    })
}

/// What libvirt is told of the guest.
fn metadata(
    image: &Image<AnyFile>,
    manifest: &Manifest,
    request: &ExportRequest,
) -> Result<SaveMetadata> {
    let is_configured = !manifest.qemu.argv.is_empty() || manifest.guest.has_own_xml;
    let xml = match &request.xml {
        Some(xml) => {
            Document::parse(xml.as_bytes())?;
            xml.clone()
        }
        None if is_configured => image.xml()?,
        None => return Err(ConvertError::NoXml.into()),
    };
    Ok(SaveMetadata {
        xml,
        cookie: manifest.libvirt_cookie.clone(),
    })
}

/// Says what libvirt will not find out by itself.
fn warn(manifest: &Manifest, metadata: &SaveMetadata, warnings: &mut Vec<String>) {
    let is_open = |xml: &str| {
        let document = Document::parse(xml.as_bytes()).ok()?;
        let mode = document.root.find("cpu")?.get("mode")?.to_owned();
        Some(mode == "host-model")
    };
    if metadata.cookie.is_none() && is_open(&metadata.xml).unwrap_or(false) {
        warnings.push(
            "its CPU is the host's (host-model): on a host with another one libvirt restores it with another CPU"
                .to_owned(),
        );
    }
    if manifest.guest.ran_on {
        warnings.push(
            "its disks went on after the save, and libvirt does not know: restore it onto copies of them from that moment"
                .to_owned(),
        );
    }
}

/// Writes the stream behind `front`, compressed as `format` says.
fn write_stream(
    image: &Image<AnyFile>,
    front: &[u8],
    format: SaveFormat,
    threads: usize,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<()> {
    sink.append(front).map_err(ConvertError::Write)?;
    let mut encoder = Encoder::new(format, Appending(sink))?;
    let decoded = pipeline::decode(image, threads, progress, &mut |raw| {
        encoder.write_all(raw).map_err(PipelineError::Output)
    });
    match decoded {
        Err(PipelineError::Output(error)) => return Err(ConvertError::Write(error).into()),
        other => other?,
    }
    encoder.finish().map_err(ConvertError::Write)?;
    Ok(())
}

/// Writes pages to their places behind `front`, and all else around them.
fn write_places(
    image: &Image<AnyFile>,
    front: &[u8],
    threads: usize,
    sink: &mut dyn Sink,
    progress: &dyn Progress,
) -> Result<()> {
    let places = sink.places().ok_or(ConvertError::NoPlaces)?;
    places.write_all_at(front, 0).map_err(ConvertError::Write)?;
    let end = pipeline::unpack(image, places, front.len() as u64, threads, progress)?;
    sink.append_from(end).map_err(ConvertError::Write)?;
    Ok(())
}

/// A sink to which can be written.
struct Appending<'a>(&'a mut dyn Sink);

impl Write for Appending<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.append(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
