//! An artifact as one file that is read at any place.
//!
//! The manifest that had the tag at the opening decides for good: blobs are named by their digests, so nothing that happens
//! to the tag mixes two images. Small layers and the places of sparse ones are fetched as a whole and kept, everything else is
//! fetched as it is asked for, by any number of threads at a time.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use super::manifest::{MAX_PLACES, places_count, places_len};
use super::{Layer, LayerKind, Manifest, Place, Registry, RegistryError, parse_places};
use crate::bytes::ReadAt;
use crate::digest::Digest;
use crate::error::Error;
use crate::store::{FarFile, RegistryLocation};

/// Layers of sections up to this length are fetched as a whole.
const SMALL: u64 = 1 << 20;
/// Bytes that are kept, at most.
const KEPT: u64 = 16 << 20;

/// A file whose bytes are layers of an artifact.
#[derive(Debug)]
pub struct RegistryFile {
    registry: Registry,
    manifest: Manifest,
    kept: Mutex<Kept>,
    failure: Mutex<Option<RegistryError>>,
}

/// What was fetched of layers, by their index.
#[derive(Debug, Default)]
struct Kept {
    whole: HashMap<usize, Arc<Vec<u8>>>,
    places: HashMap<usize, Arc<Vec<Place>>>,
    bytes: u64,
}

impl Kept {
    /// Forgets all if there is no room for `bytes` more.
    fn make_room(&mut self, bytes: u64) {
        if self.bytes + bytes > KEPT {
            *self = Kept::default();
        }
        self.bytes += bytes;
    }
}

impl RegistryFile {
    /// Opens what has the tag now.
    ///
    /// # Errors
    /// [`RegistryError::NotFound`]; [`RegistryError::NotAnImage`]; [`RegistryError::BadManifest`]; what the registry says.
    pub fn open(there: &RegistryLocation) -> Result<Self, RegistryError> {
        let registry = Registry::to_read(there)?;
        let json = registry.manifest()?;
        let manifest = Manifest::parse(&json, registry.there())?;
        Ok(RegistryFile {
            registry,
            manifest,
            kept: Mutex::default(),
            failure: Mutex::default(),
        })
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: RegistryError) -> io::Error {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        io::Error::other(failure.get_or_insert(error).clone())
    }

    /// The number of the first layer that ends behind `offset`.
    fn layer_behind(&self, offset: u64) -> usize {
        let layers = &self.manifest.layers;
        layers.partition_point(|layer| layer.end() <= offset)
    }

    /// Fills `buf` with what lies at `at` of a layer, counted from its place in the file, and does not leave it.
    fn read_layer(&self, index: usize, at: u64, buf: &mut [u8]) -> Result<(), RegistryError> {
        let layer = &self.manifest.layers[index];
        match layer.kind {
            LayerKind::Sections if layer.size <= SMALL => {
                let whole = self.whole(index, layer)?;
                whole.read_exact_at(buf, at).map_err(|_| self.broken(layer))
            }
            LayerKind::Sections | LayerKind::Chunks => {
                self.registry.read_blob(&layer.digest, at, buf)
            }
            LayerKind::Sparse => self.read_sparse(index, layer, at, buf),
        }
    }

    fn read_sparse(
        &self,
        index: usize,
        layer: &Layer,
        at: u64,
        buf: &mut [u8],
    ) -> Result<(), RegistryError> {
        let places = self.places(index, layer)?;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let next = places.partition_point(|place| place.offset + place.len <= at);
            let place = places.get(next).ok_or_else(|| self.broken(layer))?;
            let hole = place.offset.saturating_sub(at);
            let left = if hole > 0 {
                hole
            } else {
                place.offset + place.len - at
            };
            let len = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
            let (piece, behind) = rest.split_at_mut(len);
            match hole {
                0 => {
                    let in_blob = place.in_blob + (at - place.offset);
                    self.registry.read_blob(&layer.digest, in_blob, piece)?;
                }
                _ => piece.fill(0),
            }
            at += len as u64;
            rest = behind;
        }
        Ok(())
    }

    /// All of a small layer, held against its digest.
    fn whole(&self, index: usize, layer: &Layer) -> Result<Arc<Vec<u8>>, RegistryError> {
        if let Some(whole) = self.kept().whole.get(&index) {
            return Ok(Arc::clone(whole));
        }
        let mut bytes = vec![0; usize::try_from(layer.size).unwrap_or(0)];
        self.registry.read_blob(&layer.digest, 0, &mut bytes)?;
        if Digest::of(&bytes) != layer.digest {
            return Err(self.broken(layer));
        }
        let bytes = Arc::new(bytes);
        let mut kept = self.kept();
        kept.make_room(layer.size);
        kept.whole.insert(index, Arc::clone(&bytes));
        Ok(bytes)
    }

    /// The places of a sparse layer.
    fn places(&self, index: usize, layer: &Layer) -> Result<Arc<Vec<Place>>, RegistryError> {
        if let Some(places) = self.kept().places.get(&index) {
            return Ok(Arc::clone(places));
        }
        let read = |len: u64| {
            let mut bytes = vec![0; usize::try_from(len.min(layer.size)).unwrap_or(0)];
            self.registry.read_blob(&layer.digest, 0, &mut bytes)?;
            Ok(bytes)
        };
        // Few have more places than this.
        let mut bytes = read(places_len(MAX_PLACES / 16))?;
        let count = bytes.first_chunk().and_then(|fixed| places_count(*fixed));
        let wanted = places_len(count.ok_or_else(|| self.broken(layer))?);
        if wanted > bytes.len() as u64 {
            bytes = read(wanted)?;
        }
        let places = parse_places(&bytes, layer.size, layer.span);
        let places = Arc::new(places.ok_or_else(|| self.broken(layer))?);
        let mut kept = self.kept();
        kept.make_room((places.len() * size_of::<Place>()) as u64);
        kept.places.insert(index, Arc::clone(&places));
        Ok(places)
    }

    fn broken(&self, layer: &Layer) -> RegistryError {
        RegistryError::OtherBytes {
            registry: self.registry.registry().to_owned(),
            what: format!(
                "what it keeps as blob sha256:{} is another or damaged",
                layer.digest
            ),
        }
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), RegistryError> {
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let index = self.layer_behind(at);
            let layer = self.manifest.layers.get(index);
            let (hole, end) =
                layer.map_or((u64::MAX, 0), |it| (it.offset.saturating_sub(at), it.end()));
            let left = if hole > 0 { hole } else { end - at };
            let len = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
            let (piece, behind) = rest.split_at_mut(len);
            match layer {
                Some(layer) if hole == 0 => self.read_layer(index, at - layer.offset, piece)?,
                _ => piece.fill(0),
            }
            at += len as u64;
            rest = behind;
        }
        Ok(())
    }

    fn find_data(&self, offset: u64) -> Result<u64, RegistryError> {
        let index = self.layer_behind(offset);
        let Some(layer) = self.manifest.layers.get(index) else {
            return Ok(self.manifest.len);
        };
        if layer.kind != LayerKind::Sparse {
            return Ok(layer.offset.max(offset));
        }
        let places = self.places(index, layer)?;
        let at = offset.saturating_sub(layer.offset);
        let next = places.partition_point(|place| place.offset + place.len <= at);
        // The last place ends where the layer does.
        let place = places.get(next).map_or(layer.span, |place| place.offset);
        Ok((layer.offset + place).max(offset))
    }
}

impl ReadAt for RegistryFile {
    fn len(&self) -> u64 {
        self.manifest.len
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.manifest.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read(buf, offset).map_err(|error| self.failed(error))
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        self.find_data(offset).map_err(|error| self.failed(error))
    }
}

impl FarFile for RegistryFile {
    fn failure(&self) -> Option<Error> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.clone().map(Error::from)
    }
}
