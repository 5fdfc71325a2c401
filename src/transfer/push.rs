//! An image into a registry of container images, as an artifact.
//!
//! ```text
//! open → check sections → is the tag free → cut → verify, look, send what lacks → send the config → publish the manifest
//! ```
//!
//! Source: spec/registry.md.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{CopyReport, CopyRequest};
use crate::bytes::ReadAt;
use crate::container::{Image, Layout, Manifest as ImageManifest};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::pipeline::{self, ChunkTable, Group, Load, Parcel, PipelineError, Sending, Sent};
use crate::progress::Progress;
use crate::store::registry::{
    CONFIG_TYPE, Descriptor, Layer, LayerKind, Manifest, Registry, RegistryError, write_places,
};
use crate::store::{AnyFile, RegistryLocation};

/// Blobs on their way at a time.
const THREADS: usize = 4;

/// Longer sections are layers of their own.
const LARGE_SECTION: u64 = 256 << 10;

/// Copies the image in `source` into a registry. Blobs that the repository has are not sent, so an interrupted copy goes on.
///
/// # Errors
/// [`RegistryError`]; what is wrong with the image; [`PipelineError::Cancelled`]. The tag is as it was then.
pub fn push(
    source: &AnyFile,
    there: &RegistryLocation,
    request: &CopyRequest,
    progress: &dyn Progress,
) -> Result<CopyReport> {
    let begin = Instant::now();
    let image = Image::open(source)?;
    image.verify_sections()?;
    let registry = Registry::to_write(there)?;
    check_tag(&registry, request)?;
    let table = ChunkTable::new(&image);
    let cut = cut(&table)?;
    let loads: Vec<Load> = cut.iter().map(|(_, load)| load.clone()).collect();
    let sending = Sending {
        source,
        threads: THREADS,
        bytes_per_second: request.bytes_per_second,
    };
    let send = |parcel: &Parcel<'_>| send(&registry, parcel);
    progress.begin("copying", Some(loads.iter().map(Load::len).sum()));
    let outcome = pipeline::send_parcels(&sending, &table, &loads, &send, progress);
    progress.end();
    let outcome = outcome.map_err(|error| or_cancelled(error, progress))?;
    let all = loads.iter().zip(&outcome);
    let (sent, kept): (Vec<_>, Vec<_>) = all.partition(|(_, it)| it.was_sent);
    let bytes = |of: &[(&Load, &Sent)]| of.iter().map(|(load, _)| load.len()).sum();
    let (config, manifest) = manifest(&image, &cut, &outcome)?;
    put(&registry, &config)?;
    let json = manifest.to_json().map_err(not_written)?;
    // It may have been given to something else meanwhile.
    check_tag(&registry, request)?;
    registry.put_manifest(&json)?;
    Ok(CopyReport {
        source: String::new(),
        target: registry.there().to_owned(),
        image_uuid: image.identity().image_uuid,
        image_digest: image.image_digest().to_string(),
        file_bytes: image.len(),
        fetched_bytes: bytes(&sent),
        kept_bytes: bytes(&kept),
        from_parent_bytes: 0,
        crossed_bytes: bytes(&sent),
        parent: None,
        lacks_parent: false,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// Whether the tag may be given to the image.
fn check_tag(registry: &Registry, request: &CopyRequest) -> Result<(), RegistryError> {
    let there = registry.there().to_owned();
    match !request.may_replace && registry.has_tag()? {
        true => Err(RegistryError::Exists { there }),
        false => Ok(()),
    }
}

/// Whether it had to be sent.
fn send(registry: &Registry, parcel: &Parcel<'_>) -> Result<bool> {
    if registry.has_blob(&parcel.digest)? {
        return Ok(false);
    }
    registry.put_blob(&parcel.digest, parcel.len(), &|| Box::new(parcel.body()))?;
    Ok(true)
}

/// Sends a small blob, if it is not there.
fn put(registry: &Registry, blob: &[u8]) -> Result<(), RegistryError> {
    let digest = Digest::of(blob);
    match registry.has_blob(&digest)? {
        true => Ok(()),
        false => registry.put_blob(&digest, blob.len() as u64, &|| Box::new(blob)),
    }
}

fn or_cancelled(error: Error, progress: &dyn Progress) -> Error {
    match progress.is_cancelled() {
        true => PipelineError::Cancelled.into(),
        false => error,
    }
}

/// A layer without its digest.
#[derive(Debug, Clone, Copy)]
struct Piece {
    kind: LayerKind,
    offset: u64,
    span: u64,
}

/// All of the file in pieces, in order of their places, and what travels of each.
fn cut<R: ReadAt>(table: &ChunkTable<'_, R>) -> Result<Vec<(Piece, Load)>> {
    let image = table.image();
    let payload = image.footer().payload_offset.0;
    let payload_end = payload.saturating_add(image.footer().payload_len);
    let mut cuts: Vec<u64> = Vec::new();
    for section in image.sections() {
        if section.length > LARGE_SECTION {
            cuts.extend([section.offset.0, section.offset.0 + section.length]);
        }
    }
    let mut pieces = sections(0, payload, &cuts);
    for group in pipeline::groups(table)? {
        pieces.push(chunks(table, group)?);
    }
    pieces.extend(sections(payload_end, image.len(), &cuts));
    Ok(pieces)
}

/// What is not chunks from `begin` to `end`, cut at those of `cuts` that lie inside.
fn sections(begin: u64, end: u64, cuts: &[u64]) -> Vec<(Piece, Load)> {
    let mut ends: Vec<u64> = cuts
        .iter()
        .copied()
        .filter(|cut| (begin + 1..end).contains(cut))
        .collect();
    ends.push(end);
    ends.sort_unstable();
    ends.dedup();
    let mut pieces = Vec::new();
    let mut offset = begin;
    for end in ends.into_iter().filter(|end| *end > begin) {
        let piece = Piece {
            kind: LayerKind::Sections,
            offset,
            span: end - offset,
        };
        let load = Load {
            group: None,
            header: Vec::new(),
            extents: vec![(offset, end - offset)],
        };
        pieces.push((piece, load));
        offset = end;
    }
    pieces
}

/// A group of chunks, with the places of its bytes if there are gaps between them.
fn chunks<R: ReadAt>(table: &ChunkTable<'_, R>, group: Group) -> Result<(Piece, Load)> {
    let mut extents: Vec<(u64, u64)> = Vec::new();
    for chunk in group.chunks() {
        let entry = table.entry(chunk)?;
        let (at, len) = (entry.stored_offset.0, u64::from(entry.stored_len));
        match extents.last_mut() {
            Some((offset, before)) if *offset + *before == at => *before += len,
            _ => extents.push((at, len)),
        }
    }
    let offset = extents.first().map_or(0, |(offset, _)| *offset);
    let end = extents.last().map_or(0, |(offset, len)| offset + len);
    let (kind, header) = match extents.len() {
        0 | 1 => (LayerKind::Chunks, Vec::new()),
        _ => {
            let inside = extents.iter().map(|(at, len)| (at - offset, *len));
            (LayerKind::Sparse, write_places(&inside.collect::<Vec<_>>()))
        }
    };
    let span = end - offset;
    let piece = Piece { kind, offset, span };
    let group = Some(group);
    Ok((
        piece,
        Load {
            group,
            header,
            extents,
        },
    ))
}

/// The config blob and the artifact's manifest.
fn manifest<R: ReadAt>(
    image: &Image<R>,
    cut: &[(Piece, Load)],
    sent: &[Sent],
) -> Result<(Vec<u8>, Manifest)> {
    let config = image.manifest_json()?;
    let layers = cut.iter().zip(sent).map(|((piece, load), sent)| Layer {
        kind: piece.kind,
        digest: sent.digest,
        size: load.len(),
        offset: piece.offset,
        span: piece.span,
    });
    let manifest = Manifest {
        len: image.len(),
        layers: layers.collect(),
        config: Descriptor::of(CONFIG_TYPE, &config),
        annotations: annotations(image, &image.manifest()?),
    };
    Ok((config, manifest))
}

fn annotations<R: ReadAt>(image: &Image<R>, manifest: &ImageManifest) -> BTreeMap<String, String> {
    let layout: Layout = image.layout();
    let mut annotations = BTreeMap::from([
        (
            "org.vmstow.image.uuid".to_owned(),
            image.identity().image_uuid.to_string(),
        ),
        (
            "org.vmstow.image.digest".to_owned(),
            image.image_digest().to_string(),
        ),
        ("org.vmstow.layout".to_owned(), layout.to_string()),
        (
            "org.opencontainers.image.created".to_owned(),
            manifest.saved_at.clone(),
        ),
    ]);
    if !manifest.guest.name.is_empty() {
        let title = "org.opencontainers.image.title".to_owned();
        annotations.insert(title, manifest.guest.name.clone());
    }
    annotations
}

fn not_written(error: serde_json::Error) -> RegistryError {
    let why = error.to_string();
    RegistryError::Source { why }
}
