//! Images as artifacts of registries of container images: `oci://REGISTRY/NAME:TAG`.
//!
//! A [`Registry`] asks and sends, with the credentials of the container tools; a [`Manifest`] says which blobs make up a
//! file and where their bytes lie in it; a [`RegistryFile`] is such a file, to be read at any place.
//!
//! Plain blocking HTTP by `ureq`: nothing here would gain from an asynchronous client, which would bring a runtime and six times
//! as many packages.
//!
//! Source: spec/registry.md; the OCI distribution and image specifications, 1.1.

mod challenge;
mod client;
mod credentials;
mod error;
mod file;
mod manifest;
mod request;

pub use client::Registry;
pub use error::RegistryError;
pub use file::RegistryFile;
pub use manifest::{
    CONFIG_TYPE, Descriptor, Layer, LayerKind, Manifest, Place, parse_places, write_places,
};
