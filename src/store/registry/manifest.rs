//! The manifest of an artifact: which blobs hold a file, and where their bytes lie in it.
//!
//! Everything in it comes from somebody else: places and lengths are held against each other here, before anything is fetched.
//!
//! Source: spec/registry.md §1, §2; the OCI image specification, `manifest.md`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::RegistryError;
use crate::digest::Digest;

/// Media type of the manifest itself.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// What the artifact is.
const ARTIFACT_TYPE: &str = "application/vnd.vmstow.image.v1";
/// Media type of its config: by this an image is known.
pub const CONFIG_TYPE: &str = "application/vnd.vmstow.manifest.v1+json";
/// Bytes of the file.
const LENGTH: &str = "org.vmstow.length";
/// Where a layer begins in the file.
const OFFSET: &str = "org.vmstow.offset";
/// How many bytes of the file a sparse layer covers.
const SPAN: &str = "org.vmstow.span";

/// Most places in a sparse layer.
pub const MAX_PLACES: usize = 4096;

/// A blob, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Bytes.
    pub size: u64,
    /// What else there is to know.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Of these bytes.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Descriptor {
            media_type: media_type.to_owned(),
            digest: blob_name(&Digest::of(bytes)),
            size: bytes.len() as u64,
            annotations: BTreeMap::new(),
        }
    }
}

/// What the bytes of a layer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Sections, or sections and the footer.
    Sections,
    /// Stored bytes of chunks.
    Chunks,
    /// Places, and stored bytes of chunks that lie there.
    Sparse,
}

impl LayerKind {
    const ALL: [LayerKind; 3] = [LayerKind::Sections, LayerKind::Chunks, LayerKind::Sparse];

    fn media_type(self) -> &'static str {
        match self {
            LayerKind::Sections => "application/vnd.vmstow.sections.v1",
            LayerKind::Chunks => "application/vnd.vmstow.chunks.v1",
            LayerKind::Sparse => "application/vnd.vmstow.chunks.sparse.v1",
        }
    }
}

/// A blob that holds a piece of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// What its bytes are.
    pub kind: LayerKind,
    /// Of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Where it begins in the file.
    pub offset: u64,
    /// Bytes of the file that it covers, holes included.
    pub span: u64,
}

impl Layer {
    /// Where it ends in the file. Layers that were checked do not overflow here.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.span)
    }

    fn descriptor(&self) -> Descriptor {
        let mut annotations = BTreeMap::from([(OFFSET.to_owned(), self.offset.to_string())]);
        if self.kind == LayerKind::Sparse {
            annotations.insert(SPAN.to_owned(), self.span.to_string());
        }
        Descriptor {
            media_type: self.kind.media_type().to_owned(),
            digest: blob_name(&self.digest),
            size: self.size,
            annotations,
        }
    }

    fn of(descriptor: &Descriptor) -> Result<Self, String> {
        let media_type = &descriptor.media_type;
        let kind = LayerKind::ALL
            .into_iter()
            .find(|kind| kind.media_type() == media_type)
            .ok_or_else(|| format!("a layer of media type {media_type:?}"))?;
        let digest = parse_blob_name(&descriptor.digest)
            .ok_or_else(|| format!("a layer of digest {:?}", descriptor.digest))?;
        let offset = number(&descriptor.annotations, OFFSET)?;
        let span = match kind {
            LayerKind::Sparse => number(&descriptor.annotations, SPAN)?,
            _ => descriptor.size,
        };
        if descriptor.size == 0 || span == 0 {
            return Err(format!("layer {} has no bytes", descriptor.digest));
        }
        Ok(Layer {
            kind,
            digest,
            size: descriptor.size,
            offset,
            span,
        })
    }
}

/// What an artifact is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Bytes of the file.
    pub len: u64,
    /// In order of their places, none beside or over another.
    pub layers: Vec<Layer>,
    /// The config blob.
    pub config: Descriptor,
    /// What else there is to know.
    pub annotations: BTreeMap<String, String>,
}

/// As it stands in JSON; members that no reader of images needs are left out.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Json {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// The JSON of it: the same for the same artifact.
    ///
    /// # Errors
    /// None that is known: every value here can be written.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut annotations = self.annotations.clone();
        annotations.insert(LENGTH.to_owned(), self.len.to_string());
        serde_json::to_vec(&Json {
            schema_version: 2,
            media_type: Some(MANIFEST_TYPE.to_owned()),
            artifact_type: Some(ARTIFACT_TYPE.to_owned()),
            config: Some(self.config.clone()),
            layers: self.layers.iter().map(Layer::descriptor).collect(),
            annotations,
        })
    }

    /// Parses the manifest of the artifact at `there`.
    ///
    /// # Errors
    /// [`RegistryError::NotAnImage`] if it is one of something else; [`RegistryError::BadManifest`].
    pub fn parse(json: &[u8], there: &str) -> Result<Self, RegistryError> {
        let other = |what: String| RegistryError::NotAnImage {
            there: there.to_owned(),
            what,
        };
        let bad = |what: String| RegistryError::BadManifest {
            there: there.to_owned(),
            what,
        };
        let json: Json = serde_json::from_slice(json)
            .map_err(|error| other(format!("no manifest that we can read ({error})")))?;
        let Some(config) = json.config.filter(|it| it.media_type == CONFIG_TYPE) else {
            let media_type = json.artifact_type.or(json.media_type);
            let media_type = media_type.unwrap_or_else(|| "an unknown type".to_owned());
            return Err(other(format!(
                "an artifact of {}",
                media_type.escape_debug()
            )));
        };
        let layers: Result<Vec<Layer>, String> = json.layers.iter().map(Layer::of).collect();
        let mut annotations = json.annotations;
        let len = number(&annotations, LENGTH).map_err(bad)?;
        annotations.remove(LENGTH);
        let manifest = Manifest {
            len,
            layers: layers.map_err(bad)?,
            config,
            annotations,
        };
        manifest.check_places().map_err(bad)?;
        Ok(manifest)
    }

    fn check_places(&self) -> Result<(), String> {
        let mut before = 0;
        for layer in &self.layers {
            let end = layer.offset.checked_add(layer.span);
            match end.filter(|end| layer.offset >= before && *end <= self.len) {
                Some(end) => before = end,
                None => return Err(format!("layer {} lies where it cannot", layer.digest)),
            }
        }
        Ok(())
    }
}

/// A blob's name: `sha256:` and 64 hexadecimal digits.
pub fn blob_name(digest: &Digest) -> String {
    format!("sha256:{digest}")
}

fn parse_blob_name(name: &str) -> Option<Digest> {
    name.strip_prefix("sha256:")?.parse().ok()
}

fn number(annotations: &BTreeMap<String, String>, name: &str) -> Result<u64, String> {
    let value = annotations.get(name).and_then(|value| value.parse().ok());
    value.ok_or_else(|| format!("no number in the annotation {name}"))
}

/// Where bytes of a sparse layer lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Where they begin, counted from where the layer begins in the file.
    pub offset: u64,
    /// How many they are.
    pub len: u64,
    /// Where they begin in the blob.
    pub in_blob: u64,
}

/// Bytes before the first place.
const PLACES_FIXED_LEN: usize = 8;
/// Bytes of a place.
const PLACE_LEN: usize = 16;

/// Bytes that `count` places take at the beginning of a blob.
pub fn places_len(count: usize) -> u64 {
    (PLACES_FIXED_LEN + PLACE_LEN * count) as u64
}

/// The beginning of a sparse layer whose bytes lie at these places, offset and length each, in order and not over each other.
pub fn write_places(places: &[(u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(places.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(PLACES_FIXED_LEN + PLACE_LEN * places.len());
    bytes.extend(u64::from(count).to_le_bytes());
    let mut before = 0;
    for (offset, len) in places {
        bytes.extend(offset.saturating_sub(before).to_le_bytes());
        bytes.extend(len.to_le_bytes());
        before = offset + len;
    }
    bytes
}

/// How many places the beginning of a sparse layer promises; `None` if it cannot be so many.
pub fn places_count(fixed: [u8; PLACES_FIXED_LEN]) -> Option<usize> {
    let count = usize::try_from(u64::from_le_bytes(fixed)).ok()?;
    (1..=MAX_PLACES).contains(&count).then_some(count)
}

/// The places at the beginning of the sparse layer of `size` bytes that covers `span` bytes. `bytes` may hold more than them.
/// `None` if they break a rule.
pub fn parse_places(bytes: &[u8], size: u64, span: u64) -> Option<Vec<Place>> {
    let (fixed, rest) = bytes.split_first_chunk::<PLACES_FIXED_LEN>()?;
    let count = places_count(*fixed)?;
    let (pairs, _) = rest.as_chunks::<PLACE_LEN>();
    let pairs = pairs.get(..count)?;
    let (mut at, mut in_blob) = (0u64, places_len(count));
    let mut places = Vec::with_capacity(count);
    for pair in pairs {
        let (skip, len) = pair.split_first_chunk::<8>()?;
        let (skip, len) = (
            u64::from_le_bytes(*skip),
            u64::from_le_bytes(len.try_into().ok()?),
        );
        let offset = at.checked_add(skip).filter(|_| len > 0)?;
        at = offset.checked_add(len)?;
        places.push(Place {
            offset,
            len,
            in_blob,
        });
        in_blob = in_blob.checked_add(len)?;
    }
    (at == span && in_blob == size).then_some(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(kind: LayerKind, offset: u64, size: u64, span: u64) -> Layer {
        Layer {
            kind,
            digest: Digest([7; 32]),
            size,
            offset,
            span,
        }
    }

    fn manifest(layers: Vec<Layer>) -> Manifest {
        Manifest {
            len: 1000,
            layers,
            config: Descriptor::of(CONFIG_TYPE, b"{}"),
            annotations: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        }
    }

    fn parsed(manifest: &Manifest) -> Result<Manifest, RegistryError> {
        Manifest::parse(&manifest.to_json().unwrap(), "oci://x/y:z")
    }

    #[test]
    fn the_spec_has_the_words_of_the_code() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/spec/registry.md");
        let spec = std::fs::read_to_string(path).unwrap();
        let kinds = LayerKind::ALL.map(LayerKind::media_type);
        let words = [
            MANIFEST_TYPE,
            ARTIFACT_TYPE,
            CONFIG_TYPE,
            LENGTH,
            OFFSET,
            SPAN,
        ];
        for word in kinds.into_iter().chain(words) {
            assert!(spec.contains(&format!("`{word}`")), "{word}");
        }
        assert!(spec.contains(&format!("1 to {MAX_PLACES}")));
    }

    #[test]
    fn a_manifest_comes_back_as_it_was() {
        let written = manifest(vec![
            layer(LayerKind::Sections, 0, 10, 10),
            layer(LayerKind::Sparse, 10, 50, 700),
            layer(LayerKind::Chunks, 900, 100, 100),
        ]);
        assert_eq!(parsed(&written).unwrap(), written);
    }

    #[test]
    fn layers_that_lie_where_they_cannot_are_refused() {
        let chunks = LayerKind::Chunks;
        for layers in [
            vec![layer(chunks, 0, 10, 10), layer(chunks, 9, 10, 10)],
            vec![layer(chunks, 10, 10, 10), layer(chunks, 0, 10, 10)],
            vec![layer(chunks, 991, 10, 10)],
            vec![layer(chunks, u64::MAX, 10, 10)],
            vec![layer(LayerKind::Sparse, 1, 10, u64::MAX)],
            vec![layer(chunks, 0, 0, 0)],
        ] {
            let error = parsed(&manifest(layers.clone())).unwrap_err();
            assert!(
                matches!(error, RegistryError::BadManifest { .. }),
                "{layers:?}"
            );
        }
    }

    #[test]
    fn what_is_no_image_is_said_to_be_something_else() {
        for json in [
            "[]",
            "{}",
            r#"{"schemaVersion": 2, "layers": []}"#,
            r#"{"schemaVersion": 2, "mediaType": "x", "config": {"mediaType": "y", "digest": "z", "size": 1}}"#,
        ] {
            let error = Manifest::parse(json.as_bytes(), "oci://x/y:z").unwrap_err();
            assert!(matches!(error, RegistryError::NotAnImage { .. }), "{json}");
        }
    }

    #[test]
    fn places_come_back_and_wrong_ones_are_refused() {
        let bytes = write_places(&[(0, 10), (20, 5)]);
        let size = bytes.len() as u64 + 15;
        let place = |offset, len, in_blob| Place {
            offset,
            len,
            in_blob,
        };
        let expected = vec![place(0, 10, 40), place(20, 5, 50)];
        assert_eq!(parse_places(&bytes, size, 25), Some(expected));
        assert_eq!(parse_places(&bytes, size + 1, 25), None);
        assert_eq!(parse_places(&bytes, size, 26), None);
        assert_eq!(parse_places(&bytes[..39], size, 25), None);
        assert_eq!(parse_places(&[], 0, 0), None);
        for at in 0..8 {
            let mut wrong = bytes.clone();
            wrong[at] ^= 0xff;
            assert_eq!(parse_places(&wrong, size, 25), None);
        }
        let huge = write_places(&[(u64::MAX, 0)]);
        assert_eq!(parse_places(&huge, 24, u64::MAX), None);
    }
}
