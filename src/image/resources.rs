//! The resources in a manifest as `config` knows them.

use crate::config::{Resource, ResourceTable};
use crate::container::{Manifest, manifest};

/// The manifest's resources.
pub fn resource_table(manifest: &Manifest) -> ResourceTable {
    ResourceTable {
        resources: manifest.resources.iter().filter_map(resource).collect(),
    }
}

/// A resource of the manifest; both sides are the same JSON.
pub fn resource(kept: &manifest::Resource) -> Option<Resource> {
    serde_json::from_value(serde_json::to_value(kept).ok()?).ok()
}
