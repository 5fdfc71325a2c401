//! Where the parent of a delta lies.
//!
//! It is looked for in the delta's own directory and in those that `VMSTOW_PARENTS` names, first by the file name that it had
//! when the delta was written, then among all images there. What decides is UUID and image digest; a name is only a hint, and
//! never leads out of these directories. A parent that is a delta is looked for together with its own.

use std::collections::HashSet;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use crate::bytes::ReadAt;
use crate::container::layout::MAX_DELTAS;
use crate::container::{ContainerError, Image, ParentId, ParentImage, ParentReader};
use crate::error::{Blame, Error, ErrorKind, Result};
use crate::pipeline::Twins;
use crate::store::{AnyFile, FileSource, Location, SshLocation, open_far};

/// Directories, with colons between, in which parents are looked for besides the delta's own.
const PARENTS: &str = "VMSTOW_PARENTS";

/// Why a delta is of no use.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ParentError {
    /// Its parent, or that of one of its parents, was not found.
    #[error("{delta} is a delta, and its parent is not there: {parent}{}", last_name(name.as_deref()))]
    Missing {
        /// The image that lacks it.
        delta: String,
        /// What it lacks.
        parent: ParentId,
        /// The name of that file when the delta was written.
        name: Option<String>,
        /// Where it was looked for, and what was found in its place.
        looked: Vec<String>,
    },
    /// Too many deltas follow each other, or in a circle.
    #[error("{delta} is the last of more than {MAX_DELTAS} deltas, each the parent of the next")]
    TooLong {
        /// The image.
        delta: String,
    },
    /// A delta is of layout zstd.
    #[error("a delta is of layout zstd, not {layout}")]
    Layout {
        /// What was asked for.
        layout: String,
    },
    /// The new image would take the place of one that it needs.
    #[error("{what} is needed by the new image, and would be replaced by it")]
    Replaced {
        /// The parent, or one of its own.
        what: String,
    },
    /// Where the delta is to go nobody would find its parent beside it.
    #[error("{there}: object stores and registries take full images only")]
    TargetThere {
        /// Where.
        there: String,
    },
    /// Of the same save the parent cannot be made a delta.
    #[error("it is the same save as its parent")]
    SameSave,
    /// The parent comes through a pipe, where no later reader finds it.
    #[error("a parent has to be a file")]
    Pipe,
}

fn last_name(name: Option<&str>) -> String {
    name.map_or(String::new(), |name| format!(", last called {name:?}"))
}

impl Blame for ParentError {
    fn kind(&self) -> ErrorKind {
        match self {
            ParentError::Missing { .. } | ParentError::TooLong { .. } => ErrorKind::Image,
            ParentError::Layout { .. }
            | ParentError::Replaced { .. }
            | ParentError::TargetThere { .. }
            | ParentError::SameSave
            | ParentError::Pipe => ErrorKind::Usage,
        }
    }

    fn facts(&self) -> Vec<String> {
        match self {
            ParentError::Missing { looked, .. } => looked.clone(),
            _ => Vec::new(),
        }
    }
}

/// What was found of an image's parents.
#[derive(Debug, Default)]
pub struct FoundParents {
    /// Where they lie, nearest first.
    pub places: Vec<Location>,
    /// Why there are not all of them; `None` if there are, and for an image that needs none.
    pub lack: Option<ParentError>,
}

/// Looks for the parents of `image`, which lies at `location`, and gives them to it.
pub fn find_parents<R: ReadAt>(image: &mut Image<R>, location: &Location) -> FoundParents {
    let mut seen = vec![image.identity().image_uuid];
    match attach(image, location, &mut seen, &mut HashSet::new()) {
        Ok(places) => FoundParents { places, lack: None },
        Err(lack) => FoundParents {
            places: Vec::new(),
            lack: Some(lack),
        },
    }
}

/// Gives `image` its parent, if it is a delta; gives where that and its own parents lie. Images whose own parents
/// were looked for in vain are `hopeless`, each with its directory, which they were looked for in: another file there is not tried.
fn attach<R: ReadAt>(
    image: &mut Image<R>,
    location: &Location,
    seen: &mut Vec<Uuid>,
    hopeless: &mut HashSet<(Uuid, Option<PathBuf>)>,
) -> Result<Vec<Location>, ParentError> {
    let Some(parent) = image.parent_id() else {
        return Ok(Vec::new());
    };
    let delta = location.to_string();
    if seen.len() > MAX_DELTAS as usize || seen.contains(&parent.image_uuid) {
        return Err(ParentError::TooLong { delta });
    }
    seen.push(parent.image_uuid);
    let name = image.parent_name().map(str::to_owned);
    let mut search = Search {
        parent,
        looked: Vec::new(),
    };
    let mut lack = None;
    for place in places(location, name.as_deref()) {
        let Some(mut opened) = search.look_at(&place) else {
            continue;
        };
        let directory = place.path().and_then(Path::parent).map(Path::to_owned);
        let candidate = (parent.image_uuid, directory);
        if hopeless.contains(&candidate) {
            continue;
        }
        let mut seen = seen.clone();
        match attach(&mut opened, &place, &mut seen, hopeless) {
            Ok(above) => match image.set_parent(Arc::new(opened)) {
                Ok(()) => return Ok(std::iter::once(place).chain(above).collect()),
                Err(_) => {
                    lack = Some(ParentError::TooLong {
                        delta: delta.clone(),
                    })
                }
            },
            Err(error) => {
                hopeless.insert(candidate);
                lack = lack.or(Some(error));
            }
        }
    }
    Err(lack.unwrap_or(ParentError::Missing {
        delta,
        parent,
        name,
        looked: search.looked,
    }))
}

/// What is looked for, and what was found instead.
struct Search {
    parent: ParentId,
    looked: Vec<String>,
}

/// Most places of which it is told what was found there.
const MOST_LOOKED: usize = 8;

impl Search {
    /// The image there, if it is the one that is looked for.
    fn look_at(&mut self, location: &Location) -> Option<ParentImage> {
        let note = match open(location, Some(self.parent)) {
            Ok(image) => return Some(image),
            Err(error) if is_other(&error) => format!("{location} is another one"),
            Err(error) if is_not_there(&error) => format!("{location} is not there"),
            Err(error) => format!("{location} cannot be used: {error}"),
        };
        if self.looked.len() < MOST_LOOKED {
            self.looked.push(note);
        }
        None
    }
}

fn is_not_there(error: &Error) -> bool {
    let is_not_found = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    let mut causes = error.causes();
    causes.any(|cause| cause.downcast_ref().is_some_and(is_not_found))
}

fn is_other(error: &Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(ContainerError::OtherParent { .. })
    )
}

/// Opens the image there and keeps others from changing it, if it is the `expected` one or none is expected.
fn open(location: &Location, expected: Option<ParentId>) -> Result<ParentImage> {
    let file = match location {
        Location::Path(path) => {
            let file = FileSource::open(path)?;
            // Images that are not meant are looked at only, so that nobody is kept from changing them.
            let found = Image::open(&file)?.as_parent();
            match expected {
                Some(expected) if expected != found => {
                    return Err(ContainerError::OtherParent { expected, found }.into());
                }
                _ => file.lock_shared(path)?,
            }
            AnyFile::from(file)
        }
        Location::Pipe => return Err(ParentError::Pipe.into()),
        far => AnyFile::Far(open_far(far)?),
    };
    let image = Image::open(ParentReader::new(file))?;
    let found = image.as_parent();
    match expected {
        Some(expected) if expected != found => {
            Err(ContainerError::OtherParent { expected, found }.into())
        }
        _ => Ok(image),
    }
}

/// Where the parent of the delta at `location` may lie, the likely places first.
fn places(location: &Location, name: Option<&str>) -> Vec<Location> {
    let mut directories: Vec<PathBuf> = Vec::new();
    let own = location.path().and_then(Path::parent);
    directories.extend(own.map(Path::to_owned));
    if let Some(named) = env::var_os(PARENTS) {
        directories.extend(env::split_paths(&named).filter(|it| !it.as_os_str().is_empty()));
    }
    let mut found: Vec<Location> = Vec::new();
    let mut push = |place: Location| {
        if place != *location && !found.contains(&place) {
            found.push(place);
        }
    };
    if let Some(name) = name {
        if let Location::Ssh(there) = location {
            push(Location::Ssh(SshLocation {
                path: there.path.with_file_name(name),
                ..there.clone()
            }));
        }
        let named = directories.iter().map(|directory| directory.join(name));
        named.for_each(|path| push(Location::Path(path)));
    }
    let images = directories.iter().flat_map(|it| images_in(it));
    images.for_each(|path| push(Location::Path(path)));
    found
}

/// The images in a directory, by name.
fn images_in(directory: &Path) -> Vec<PathBuf> {
    let listed = match directory.as_os_str().is_empty() {
        true => Path::new("."),
        false => directory,
    };
    let entries = fs::read_dir(listed).into_iter().flatten().flatten();
    let paths = entries.map(|entry| directory.join(entry.file_name()));
    let mut images: Vec<PathBuf> = paths
        .filter(|path| path.extension() == Some(OsStr::new("stow")))
        .collect();
    images.sort();
    images
}

/// An image of which deltas are to be made.
#[derive(Debug)]
pub struct Parent {
    /// Which of its chunks a new chunk may follow.
    pub twins: Arc<Twins>,
    /// Where it and its own parents lie.
    places: Vec<Location>,
}

impl Parent {
    /// Opens the image at `location` to make a delta of it, at `target`. It is read-locked, and all of it but its chunks is
    /// checked, before anything else is done.
    ///
    /// # Errors
    /// [`ParentError`]; what is wrong with the image, or with one of its own parents.
    pub fn open(location: &Location, target: &Location) -> Result<Self> {
        if matches!(target, Location::Object(_) | Location::Registry(_)) {
            let there = target.to_string();
            return Err(ParentError::TargetThere { there }.into());
        }
        let mut image = match open(location, None) {
            Ok(image) => image,
            Err(error) => return Err(better(error, location)),
        };
        let mut places = vec![location.clone()];
        let above = find_parents(&mut image, location);
        places.extend(above.places);
        if let Some(lack) = above.lack {
            return Err(lack.into());
        }
        if image.delta_depth() >= MAX_DELTAS {
            let delta = location.to_string();
            return Err(ParentError::TooLong { delta }.into());
        }
        image.verify_sections()?;
        let name = location.file_name();
        let name = name.and_then(|name| name.into_string().ok());
        let twins = Twins::of(Arc::new(image), name)?;
        let parent = Parent {
            twins: Arc::new(twins),
            places,
        };
        parent.refuse_replacing(target)?;
        Ok(parent)
    }

    /// Refuses a new image in the place of one that it needs.
    fn refuse_replacing(&self, target: &Location) -> Result<(), ParentError> {
        let real = |path: &Path| fs::canonicalize(path).ok();
        let Some(target) = target.path().and_then(real) else {
            return Ok(());
        };
        let mut places = self.places.iter().filter_map(Location::path);
        match places.find(|path| real(path).as_ref() == Some(&target)) {
            Some(path) => Err(ParentError::Replaced {
                what: path.display().to_string(),
            }),
            None => Ok(()),
        }
    }

    /// Whether a reader of `target` finds the parent without being told where it lies.
    pub fn is_beside(&self, target: &Location) -> bool {
        let directory = |location: &Location| match location {
            Location::Path(path) => std::path::absolute(path)
                .ok()
                .and_then(|path| fs::canonicalize(path.parent()?).ok()),
            _ => None,
        };
        self.places.iter().take(1).all(|place| {
            let (place, target) = (directory(place), directory(target));
            place.is_some() && place == target
        })
    }
}

/// Says what a file is that is no image.
fn better(error: Error, location: &Location) -> Error {
    let is_footer = matches!(
        error.downcast_ref(),
        Some(ContainerError::NoFooter { .. } | ContainerError::TooShort { .. })
    );
    match location {
        Location::Path(_) if is_footer => match super::open_alone(location) {
            Err(better) => better,
            // Only its last edit was cut off.
            Ok(_) => error,
        },
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hint_comes_first_and_never_leads_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.stow", "a.stow", "x.txt", "delta.stow"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let at = |name: &str| Location::Path(dir.path().join(name));
        let found = places(&at("delta.stow"), Some("gone.stow"));
        assert_eq!(found, ["gone.stow", "a.stow", "b.stow"].map(at));
        let found = places(&at("delta.stow"), Some("b.stow"));
        assert_eq!(found, ["b.stow", "a.stow"].map(at));
    }
}
