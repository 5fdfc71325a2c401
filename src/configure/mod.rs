//! The configuration in an image: looked at, compared, changed.
//!
//! ```text
//! open → new XML and labels → fill in → compare → carry over → lock → append XML, manifest, signature → sync
//! ```
//!
//! A guest is restored with its kept arguments, not with arguments made from its XML. So other backends in a changed XML
//! become remaps in the manifest, which every restore applies before the user's own; a change of the name and of the
//! emulator goes there too. What the guest would see, and what no remap can say, is refused: the XML never says what a
//! restore does not do. XML that leaves things open, as people write it, is filled in first, so that an image always holds
//! XML in which nothing is left to choose. Only how the host runs the guest (tuning, actions, audio) may differ; [`Proposal::unheeded`] tells.

mod error;
mod place;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

pub use error::ConfigureError;
pub use place::{is_path, value_at, with_value_at};

use crate::config::abi::{Carried, Change, Class, Comparison, carry_over, compare};
use crate::config::expand::{HostKnowledge, expand_again};
use crate::config::remap::{self, kept_with};
use crate::config::resources::ResourceTable;
use crate::config::xml::Document;
use crate::config::{ConfigError, Remap, read_identity};
use crate::container::{Manifest, SectionType};
use crate::error::Result;
use crate::image::{self, OpenedImage};
use crate::store::open_to_change;

/// What is to be changed.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// Other XML.
    pub xml: Option<String>,
    /// Labels to set.
    pub labels: BTreeMap<String, String>,
    /// Labels to remove.
    pub removed_labels: BTreeSet<String>,
}

/// A change that can be made.
#[derive(Debug)]
pub struct Proposal {
    seen: String,
    xml: Option<String>,
    comparison: Comparison,
    manifest: Manifest,
    is_changed: bool,
}

/// What was changed.
#[derive(Debug, Clone, Serialize)]
pub struct ConfigureReport {
    /// The image.
    pub image: String,
    /// Its generation now.
    pub generation: u32,
    /// Whether anything was changed at all.
    pub is_changed: bool,
    /// Whether it is signed by this host's key now.
    pub is_signed: bool,
    /// How the XML differs from what it was.
    pub changes: Vec<Change>,
    /// What a restore applies to the kept arguments, the user's own remaps coming after.
    pub remaps: Vec<String>,
    /// The labels.
    pub labels: BTreeMap<String, String>,
}

impl Proposal {
    /// Holds the wish against the image.
    ///
    /// # Errors
    /// [`ConfigureError`] with all that stands against it; XML that cannot be read.
    pub fn check(opened: &OpenedImage, wish: Wish) -> Result<Self> {
        let image = opened.image();
        let (old, before) = (image.xml()?, image.manifest()?);
        let mut manifest = before.clone();
        manifest.labels.extend(wish.labels);
        manifest
            .labels
            .retain(|name, _| !wish.removed_labels.contains(name));
        let (mut xml, mut comparison) = (None, Comparison::default());
        if let Some(new) = wish.xml.filter(|xml| *xml != old) {
            (xml, comparison) = judge(&old, new, &manifest)?;
            change_manifest(&mut manifest, &comparison)?;
        }
        Ok(Proposal {
            seen: image.statement(),
            is_changed: xml.is_some() || manifest != before,
            xml,
            comparison,
            manifest,
        })
    }

    /// How the host shall run the guest otherwise, which the kept arguments say and a restore goes by.
    pub fn unheeded(&self) -> impl Iterator<Item = &Change> {
        self.comparison.of(Class::Host)
    }

    /// Appends a generation.
    ///
    /// # Errors
    /// If somebody uses the image, or changed it since it was opened, or it cannot be written; it is as it was.
    pub fn apply(self, opened: OpenedImage) -> Result<ConfigureReport> {
        let path = changeable(&opened)?;
        let mut report = ConfigureReport {
            image: opened.location().to_string(),
            generation: opened.image().generation(),
            is_changed: self.is_changed,
            is_signed: image::Trust::of(opened.image())?.is_trusted(),
            changes: self.comparison.changes,
            remaps: self.manifest.remaps.clone(),
            labels: self.manifest.labels.clone(),
        };
        if !self.is_changed {
            return Ok(report);
        }
        drop(opened);
        let manifest = self.manifest.to_json().map_err(ConfigureError::Manifest)?;
        let changed = image::change(&path, Some(&self.seen), |edit| {
            if let Some(xml) = &self.xml {
                edit.replace(SectionType::Xml, xml.as_bytes())?;
            }
            edit.replace(SectionType::Manifest, &manifest)?;
            Ok(())
        })?;
        (report.generation, report.is_signed) = (changed.generation, changed.is_signed);
        Ok(report)
    }
}

/// Refuses an image that cannot be changed now, before somebody spends time on how.
///
/// # Errors
/// [`ConfigureError::Pipe`], [`ConfigureError::Torn`]; a damaged section; a guest that runs on it.
pub fn check_changeable(opened: &OpenedImage) -> Result<()> {
    let path = changeable(opened)?;
    opened.image().verify_sections()?;
    drop(open_to_change(&path)?);
    Ok(())
}

fn changeable(opened: &OpenedImage) -> Result<std::path::PathBuf> {
    let path = opened.location().path().ok_or(ConfigureError::Pipe)?;
    match opened.torn() {
        Some(_) => Err(ConfigureError::Torn {
            path: path.to_owned(),
        }
        .into()),
        None => Ok(path.to_owned()),
    }
}

/// The differences of two domain XMLs; what the new one leaves open is as in the old one, or as a start would fill it in.
///
/// # Errors
/// XML that cannot be read.
pub fn differences(old: &str, new: &str) -> Result<Vec<Change>> {
    let old = Document::parse(old.as_bytes())?;
    let new = Document::parse(new.as_bytes())?;
    Ok(Reading::nearest(&old, &new).comparison.changes)
}

/// What a new domain XML means for a guest, and how that differs from what it is.
struct Reading {
    comparison: Comparison,
    /// The XML in which nothing is left open, if the new one left something.
    filled_in: Option<String>,
}

impl Reading {
    /// Word for word if the guest sees no difference so, and if nothing was left open; else filled in.
    fn nearest(old: &Document, new: &Document) -> Self {
        let word_for_word = Reading {
            comparison: compare(old, new),
            filled_in: None,
        };
        let seen = |reading: &Reading| reading.comparison.of(Class::Abi).count();
        if seen(&word_for_word) == 0 {
            return word_for_word;
        }
        // The machine and all else that a host decides are the old ones.
        match expand_again(new, old, &HostKnowledge::default()) {
            Ok(expanded) => {
                let filled_in = Reading {
                    comparison: compare(old, &expanded.document),
                    filled_in: Some(expanded.document.write()),
                };
                match seen(&filled_in) < seen(&word_for_word) {
                    true => filled_in,
                    false => word_for_word,
                }
            }
            Err(_) => word_for_word,
        }
    }
}

/// The XML to keep, and how it differs; `None` if it says what is kept already.
fn judge(old: &str, new: String, manifest: &Manifest) -> Result<(Option<String>, Comparison)> {
    if new.trim().is_empty() {
        return Err(ConfigureError::Empty.into());
    }
    let document = Document::parse(new.as_bytes())?;
    // No reader of images takes such XML, not even with this in a comment.
    if new.starts_with('\u{feff}') || new.contains("<!DOCTYPE") {
        return Err(ConfigureError::DocType.into());
    }
    if read_identity(new.as_bytes())?.name.is_none() {
        return Err(ConfigureError::NoName.into());
    }
    let reading = Reading::nearest(&Document::parse(old.as_bytes())?, &document);
    let comparison = reading.comparison;
    let seen: Vec<Change> = comparison.of(Class::Abi).cloned().collect();
    if !seen.is_empty() {
        return Err(ConfigureError::SeenByGuest {
            guest: manifest.guest.name.clone(),
            changes: seen,
        }
        .into());
    }
    let xml = match reading.filled_in {
        // Comments alone are no reason to keep another text than the one that stands there.
        Some(_) if comparison.changes.is_empty() => None,
        Some(filled_in) => Some(filled_in),
        None => Some(new),
    };
    Ok((xml, comparison))
}

/// Puts into the manifest what a restore has to know of the changed XML.
fn change_manifest(manifest: &mut Manifest, comparison: &Comparison) -> Result<()> {
    let machine_type = manifest.machine.machine_type.clone();
    let resources = image::resource_table(manifest);
    let kept = kept_with(
        &manifest.qemu.argv,
        &machine_type,
        &resources,
        &manifest.remaps,
    )?;
    let table = ResourceTable::from_arguments(&kept, Some(&machine_type));
    let refused = |reasons| ConfigureError::NotCarried {
        guest: manifest.guest.name.clone(),
        reasons,
    };
    let Carried {
        remaps,
        name,
        emulator,
    } = carry_over(comparison, &table).map_err(refused)?;
    match remap::apply(&kept, Some(&machine_type), &remaps) {
        Err(ConfigError::Refused { reasons }) => return Err(refused(reasons).into()),
        other => drop(other?),
    }
    keep(&mut manifest.remaps, &remaps);
    if let Some(name) = name {
        manifest.guest.name = name;
    }
    if let Some(emulator) = emulator {
        manifest.qemu.binary = emulator;
        manifest.qemu.binary_sha256 = None;
    }
    Ok(())
}

/// Adds remaps; one for the same resource goes, since only the last counts.
fn keep(kept: &mut Vec<String>, new: &[Remap]) {
    let is_for = |text: &String, new: &Remap| {
        let old: std::result::Result<Remap, ConfigError> = text.parse();
        old.is_ok_and(|old| old.kind == new.kind && old.selector == new.selector)
    };
    kept.retain(|text| !new.iter().any(|new| is_for(text, new)));
    kept.extend(new.iter().map(Remap::to_string));
}
